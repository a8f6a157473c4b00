"""Which subwords a translator ever writes; a model and its tokenizer with these numbered first.

The vocabulary is of both languages, and more than a quarter of it is in no translation of the training data: the model
never learnt to write that. Numbered last, it is left out of the matrix that makes logits, the largest one of a step.
Sources may hold all of it. Knows no graph.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from model.config import ModelConfig
from model.pairs import Pair
from model.subwords import END_ID, PAD_ID, START_ID, subwords_of
from model.train import checkpoint_sha256, load_checkpoint
from model.transformer import EncoderDecoder
from service.worker.bundle import TOKENIZER
from service.worker.weights.checkpoint import Text


@dataclass(frozen=True)
class Translator:
    """A checkpoint, its tokens numbered as in its bundle."""

    config: ModelConfig
    model: EncoderDecoder
    text: Text
    num_written: int  # the first tokens, which have logits
    sha256: str | None = None  # of the file of weights

    @property
    def subwords(self) -> Tokenizer:
        return subwords_of(self.text.tokenizer)


def load_translator(checkpoint: Path, pairs: Sequence[Pair]) -> Translator:
    """`pairs`: what it was trained on."""
    config, model = load_checkpoint(checkpoint, EncoderDecoder)
    tokenizer, num_written = number_written_first(model, (checkpoint / TOKENIZER).read_text("utf-8"), pairs)
    return Translator(config, model, text_of(tokenizer), num_written, checkpoint_sha256(checkpoint))


def text_of(tokenizer: str) -> Text:
    """`tokenizer`: tokenizer.json."""
    return Text(tokenizer=tokenizer, bos_id=START_ID, end_ids=(END_ID,), chat_template=None)


def number_written_first(model: EncoderDecoder, tokenizer: str, pairs: Sequence[Pair]) -> tuple[str, int]:
    """Renumbers the model's tokens, in place. `tokenizer`: tokenizer.json; `pairs`: what the model was trained on.

    The new tokenizer.json, and how many of its first tokens are ever written: all if there are no pairs.
    """
    subwords = Tokenizer.from_str(tokenizer)
    vocab_size = subwords.get_vocab_size()
    if not pairs:
        return tokenizer, vocab_size
    written = written_ids(subwords, pairs)
    order = written + sorted(set(range(vocab_size)).difference(written))
    renumber(model, order)
    return renumbered(tokenizer, order), len(written)


def written_ids(subwords: Tokenizer, pairs: Sequence[Pair]) -> list[int]:
    """What the pairs' targets hold, in ascending order; and all bytes, of which any text can be made."""
    targets = subwords.encode_batch_fast([pair.target for pair in pairs])
    single_bytes = (token for name, token in subwords.get_vocab().items() if len(name) == 1)
    return sorted({PAD_ID, START_ID, END_ID, *single_bytes}.union(*(target.ids for target in targets)))


@torch.no_grad()
def renumber(model: EncoderDecoder, order: Sequence[int]) -> None:
    """Token i becomes what order[i] was, in the one matrix that both embeddings and the head share."""
    model.head.weight.copy_(model.head.weight[list(order)])


def renumbered(tokenizer: str, order: Sequence[int]) -> str:
    """The same in a tokenizer.json. Special tokens must stay where they are."""
    content = json.loads(tokenizer)
    new = {old: token for token, old in enumerate(order)}
    content["model"]["vocab"] = {name: new[old] for name, old in content["model"]["vocab"].items()}
    return str(Tokenizer.from_str(json.dumps(content)).to_str(pretty=True))
