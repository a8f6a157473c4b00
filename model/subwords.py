"""The joint vocabulary of subwords: byte-level BPE over both languages; owns its training and its random segmentations.

Text comes back as it went in, character for character: bytes are the alphabet, and the one space that is put before
the text, so that a first word is the same subword as any other, is taken away again.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from model.pairs import EncodedPairs, Pair, Ragged

PAD, START, END = "<pad>", "<s>", "</s>"
PAD_ID, START_ID, END_ID = 0, 1, 2


def train_subwords(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-pair encoding (Sennrich et al. 2016) on bytes; encoding appends the end token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True) for token in (PAD, START, END)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, END_ID)])
    return tokenizer


def load_subwords(path: Path) -> Tokenizer:
    """Reads tokenizer.json; the names of special tokens in a text are text."""
    return subwords_of(path.read_text(encoding="utf-8"))


def subwords_of(content: str) -> Tokenizer:
    """As load_subwords, of the file's content."""
    tokenizer = Tokenizer.from_str(content)
    tokenizer.encode_special_tokens = True
    return tokenizer


def encode_pairs(tokenizer: Tokenizer, pairs: Sequence[Pair], *, dropout: float = 0.0) -> EncodedPairs:
    """With `dropout`, each merge is skipped with that probability (Provilkov et al. 2020): another result each time."""
    tokenizer.model.dropout = dropout or None
    sides = [tokenizer.encode_batch_fast(list(side)) for side in zip(*pairs, strict=True)]
    tokenizer.model.dropout = None
    return EncodedPairs(*(Ragged.of(encoding.ids for encoding in side) for side in sides))


def save_encoded(corpus: EncodedPairs, path: Path) -> None:
    """Random segmentations cannot be drawn again from a seed: a run that is to resume exactly reads them from files."""
    sides = {"source": corpus.sources, "target": corpus.targets}
    tensors = {f"{name}_ids": side.flat for name, side in sides.items()}
    new = path.with_suffix(".new")
    save_file(tensors | {f"{name}_lengths": side.lengths for name, side in sides.items()}, new)
    new.replace(path)


def load_encoded(path: Path) -> EncodedPairs:
    tensors = load_file(path)
    return EncodedPairs(*(Ragged(tensors[f"{name}_ids"], tensors[f"{name}_lengths"]) for name in ("source", "target")))
