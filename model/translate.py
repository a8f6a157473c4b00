"""Texts through a translation model: encodes, searches batch by batch, decodes; owns no model and no scores."""

from collections.abc import Callable, Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor

from model.data import pad
from model.subwords import END_ID, PAD_ID, START_ID
from model.transformer import EncoderDecoder, generate

Search = Callable[[EncoderDecoder, Tensor, Tensor | None], list[list[int]]]  # source ids, mask -> ids of each target


def greedy(model: EncoderDecoder, source: Tensor, mask: Tensor | None) -> list[list[int]]:
    """The most probable token at each step."""
    start = torch.full((len(source), 1), START_ID)
    limits = longest(source, mask, most=model.max_length - 1)
    ids = generate(model, start, max_new=max(limits), end_id=END_ID, source=source, source_mask=mask)
    return [until_end(row[:limit]) for row, limit in zip(ids[:, 1:].tolist(), limits, strict=True)]


def longest(source: Tensor, mask: Tensor | None, *, most: int) -> list[int]:
    """How many tokens each translation may have, the end included: twice those of its source and ten, up to `most`."""
    lengths = torch.full((len(source),), source.size(1)) if mask is None else mask.bool().sum(1)
    return (2 * lengths + 10).clamp(max=most).tolist()


def until_end(ids: list[int]) -> list[int]:
    return ids[: ids.index(END_ID)] if END_ID in ids else ids


def translate(
    model: EncoderDecoder, tokenizer: Tokenizer, texts: Sequence[str], *, search: Search = greedy, batch_size: int = 64
) -> list[str]:
    """The translations, in the order of the texts; sentences of like lengths are searched together.

    Raises ValueError for a text of more tokens than the model reads.
    """
    sources = [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts))]
    if (most := max(map(len, sources), default=0)) > model.max_length:
        raise ValueError(f"a text has {most} tokens, the model reads {model.max_length}")
    was_training = model.training
    model.eval()
    order = sorted(range(len(sources)), key=lambda index: len(sources[index]))
    found = [""] * len(sources)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        targets = search(model, *pad([sources[index] for index in chosen], PAD_ID))
        for index, text in zip(chosen, tokenizer.decode_batch(targets), strict=True):
            found[index] = text
    model.train(was_training)
    return found
