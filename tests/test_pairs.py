"""Sentence pairs: token-sized batches, what a decoder is given, reading, splits that do not leak."""

import random
from pathlib import Path

import pytest
import torch

from model.pairs import (
    EncodedPairs,
    Pair,
    Ragged,
    Variants,
    read_pairs,
    read_parallel,
    split_by_source,
    token_batches,
)


def corpus(count: int = 400, *, seed: int = 1) -> EncodedPairs:
    """Targets about as long as their sources."""
    draw = random.Random(seed)
    sources = [[draw.randrange(3, 50) for _ in range(draw.randrange(1, 30))] for _ in range(count)]
    targets = [[draw.randrange(3, 50) for _ in range(max(1, len(ids) + draw.randrange(-3, 4)))] for ids in sources]
    return EncodedPairs(Ragged.of(sources), Ragged.of(targets))


def padded_tokens(pairs: EncodedPairs, batch: list[int]) -> int:
    return len(batch) * max(max(len(pairs.sources[index]), len(pairs.targets[index])) for index in batch)


def test_token_batches_cover_each_pair_once_within_the_limit() -> None:
    pairs = corpus()
    batches = token_batches(pairs, 300, seed=1)
    assert sorted(index for batch in batches for index in batch) == list(range(400))
    assert max(padded_tokens(pairs, batch) for batch in batches) <= 300


def test_token_batches_are_full_and_pad_little() -> None:
    pairs = corpus(4000)
    batches = token_batches(pairs, 500, seed=1)
    real = sum(map(len, pairs.sources)) + sum(map(len, pairs.targets))
    assert real > 0.85 * 2 * sum(padded_tokens(pairs, batch) for batch in batches)
    assert sum(padded_tokens(pairs, batch) < 400 for batch in batches) < 0.1 * len(batches)


def test_token_batches_follow_from_the_seed() -> None:
    pairs = corpus()
    assert token_batches(pairs, 300, seed=1) == token_batches(pairs, 300, seed=1)
    one, other = ({frozenset(batch) for batch in token_batches(pairs, 300, seed=seed)} for seed in (1, 2))
    assert len(one & other) < len(one) / 2  # others share a batch, not only another order


def test_a_pair_beyond_the_limit_is_refused() -> None:
    pairs = EncodedPairs(Ragged.of([[5], [5] * 9]), Ragged.of([[5], [5]]))
    with pytest.raises(ValueError, match="pair 1 has 9 tokens, a batch holds 8"):
        token_batches(pairs, 8, seed=0)


def test_the_decoder_sees_the_target_moved_by_one() -> None:
    pairs = EncodedPairs(Ragged.of([[5, 6, 2], [7, 2]]), Ragged.of([[8, 2], [9, 10, 11, 2]]))
    batch = pairs.batch([0, 1], start_id=1, pad_id=0)
    assert batch.source.tolist() == [[5, 6, 2], [7, 2, 0]]
    assert batch.source_mask is not None
    assert batch.source_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.inputs.tolist() == [[1, 8, 2, 0], [1, 9, 10, 11]]
    assert batch.targets.tolist() == [[8, 2, 0, 0], [9, 10, 11, 2]]
    assert pairs.batch([1], start_id=1, pad_id=0).source_mask is None


def test_epochs_take_the_segmentations_in_turn() -> None:
    corpora = [corpus(seed=seed) for seed in (1, 2)]
    variants = Variants(corpora, start_id=1)
    for number, expected in ((0, corpora[0]), (1, corpora[1]), (2, corpora[0])):
        batches = variants.epoch(number, batch_size=300, seed=number, pad_id=0)
        assert batches.order == token_batches(expected, 300, seed=number)
        batch = expected.batch(batches.order[3], start_id=1, pad_id=0)
        assert torch.equal(batches[3].targets, batch.targets)


def test_parallel_files_are_read_line_by_line(tmp_path: Path) -> None:
    (tmp_path / "a.en").write_text("one \ntwo\u2028lines\n")
    (tmp_path / "a.de").write_text("eins\nzwei Zeilen\n")
    assert read_parallel(tmp_path / "a.en", tmp_path / "a.de") == [
        Pair("one", "eins"),
        Pair("two\u2028lines", "zwei Zeilen"),
    ]
    (tmp_path / "a.de").write_text("eins\n")
    with pytest.raises(ValueError, match=r"a\.en has 2 lines, .*a\.de has 1"):
        read_parallel(tmp_path / "a.en", tmp_path / "a.de")


def test_empty_files_are_no_pair(tmp_path: Path) -> None:
    for name in ("a.en", "a.de"):
        (tmp_path / name).write_text("\n" if name == "a.en" else "")
    with pytest.raises(ValueError, match=r"a\.en and .*a\.de are empty"):
        read_parallel(tmp_path / "a.en", tmp_path / "a.de")
    with pytest.raises(ValueError, match=r"a\.en:1: expected a sentence, a tab"):
        read_pairs(tmp_path / "a.en")


def test_a_line_without_a_tab_is_named(tmp_path: Path) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_text("one\teins\ntwo zwei\n")
    with pytest.raises(ValueError, match=r"pairs\.tsv:2: expected a sentence, a tab and its translation"):
        read_pairs(path)
    path.write_text("one\teins\ntwo\tzwei\n")
    assert read_pairs(path) == [Pair("one", "eins"), Pair("two", "zwei")]


def test_no_translation_of_a_held_out_source_is_trained_on() -> None:
    pairs = [Pair(f"Sentence {index // 2}{'.' if index % 2 else '!'}", f"Satz {index}") for index in range(40)]
    training, held = split_by_source(pairs, 5, seed=1)
    assert sorted(training + held) == sorted(pairs)
    assert len(held) == 10  # two translations of each of five
    assert not {pair.source[:-1] for pair in training} & {pair.source[:-1] for pair in held}
    with pytest.raises(ValueError, match="20 different sources are too few to hold out 21"):
        split_by_source(pairs, 21, seed=1)
