"""service.worker.beginnings: what is read of a text has the tokens of the whole, whatever it is made of."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from test_detokenizer import NAMES, byte_level, loaded
from tokenizers import AddedToken, Tokenizer, pre_tokenizers

from service.domain import TextInput
from service.errors import TooLarge
from service.worker import beginnings, tokenizer
from service.worker.beginnings import Beginnings, longest_of, seam_of
from service.worker.tokenizer import Tokenizer as Cutting
from service.worker.tokenizer import load_tokenizer

BERT = Path(__file__).parents[1] / "model" / "zoo" / "sentiment" / "tokenizer.json"
# Separators of all kinds, special tokens and halves of them, marks that join what is before them, what is left out.
ATOMS = [
    *(
        "a",
        "film",
        "unbelievable",
        "x" * 120,
        "\u30ab" * 40,
        "'s",
        "12",
        "[UNK]",
        "[MASK]",
        "[",
        "]",
        "<|end|>",
        "<|",
        "|>",
    ),
    *(" ", "  ", "\n", "\r\n", "\t", "\x1c", "\u00a0", "\u2003", "\u3000", "\u200b", "\0"),
    *(
        ".",
        ",",
        "-",
        "$",
        "`",
        "=",
        "\u3002",
        "\u3001",
        "\u2014",
        "\u4e2d",
        "\u6587",
        "\uf900",
        "\ud55c",
        "\u30ab",
        "👍",
    ),
    *("\u0301", "e\u0301", "\u0327\u0301", "\u0130", "\u03a3", "\u00df", "\ufffd"),
]


def some_text(draw: random.Random, most: int) -> str:
    """Of few kinds of atoms, so that there are texts without white space, without letters and so on."""
    kinds = draw.choices(ATOMS, k=draw.randint(1, 8))
    return "".join(draw.choices(kinds, k=draw.randint(0, most)))


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short texts are read as long ones are, and from too few characters on."""
    monkeypatch.setattr(tokenizer, "LONG_TEXT", 20)
    monkeypatch.setattr(beginnings, "CHARACTERS_A_TOKEN", 1)
    monkeypatch.setattr(beginnings, "GROWTH", 2)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("max_tokens", [5, 8, 9, 16])
def test_a_text_that_is_cut_first_has_the_tokens_of_one_that_is_cut_last(max_tokens: int) -> None:
    """Pairs, too, whose longer text loses its tokens first; with one token left over when both lose some."""
    draw = random.Random(max_tokens)
    ours, plain, num_shortened = Cutting(BERT, max_tokens), load_tokenizer(BERT), 0
    plain.enable_truncation(max_tokens)
    for _ in range(400):
        text, pair = some_text(draw, 60), draw.choice(["", some_text(draw, 60), some_text(draw, 8)]) or None
        (found,) = ours.encode([TextInput(text, pair)], truncate=True)
        expected = plain.encode(text, pair)
        assert found.ids == expected.ids
        assert found.offsets == expected.offsets
        assert found.type_ids == (None if pair is None else expected.type_ids)
        assert found.encoding.sequence_ids == expected.sequence_ids
        assert found.is_truncated == bool(expected.overflowing)
        read = ours._beginning(TextInput(text, pair))
        num_shortened += read != (text if pair is None else (text, pair))
    assert num_shortened > 120


def digits() -> Tokenizer:
    """As SmolLM2's."""
    made = byte_level()
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])
    made.add_special_tokens([AddedToken("<|end|>", normalized=False)])
    return made


def stripped() -> Tokenizer:
    """As our translator's."""
    made = loaded("stripped")
    spec = json.loads(made.to_str())
    spec["added_tokens"] = [one for one in spec["added_tokens"] if " " not in one["content"]]
    return Tokenizer.from_str(json.dumps(spec))


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("make", [digits, stripped], ids=["digits", "stripped"])
def test_the_tokens_of_a_beginning_are_the_first_of_the_whole(make: Any, tmp_path: Path) -> None:
    whole, draw, num_shortened = make(), random.Random(0), 0
    whole.save(str(tmp_path / "tokenizer.json"))
    ours = Beginnings(tmp_path / "tokenizer.json")
    for _ in range(1000):
        spaced = "".join(draw.choices(["\n", "\n", " ", "a"], k=60))  # two line breaks are one token
        text, enough = draw.choice([some_text(draw, 60), spaced]), draw.randint(1, 20)
        beginning = ours.of(text, enough, lambda some: len(whole.encode(some).ids))
        if beginning != text:
            num_shortened += 1
            ids = whole.encode(beginning).ids
            assert len(ids) > enough
            assert whole.encode(text).ids[: len(ids)] == ids
    assert num_shortened > 250


def bert(**changes: Any) -> dict[str, Any]:
    return json.loads(BERT.read_text()) | changes


def test_texts_are_cut_for_tokenizers_of_known_kinds_only() -> None:
    for name in NAMES:
        assert seam_of(json.loads(loaded(name).to_str())) is None  # not even byte-level: a token has a space in it
    assert seam_of(json.loads(byte_level().to_str())) is not None
    assert seam_of(json.loads(digits().to_str())) is not None
    assert seam_of(bert()) is not None
    assert seam_of(bert(pre_tokenizer=None)) is None
    assert seam_of(bert(normalizer=bert()["normalizer"] | {"handle_chinese_chars": False})) is None
    assert seam_of(json.loads(byte_level().to_str()) | {"normalizer": {"type": "NFKC"}}) is None
    for option in ("single_word", "lstrip", "rstrip", "normalized"):
        assert seam_of(bert(added_tokens=[bert()["added_tokens"][0] | {option: True}])) is None
    assert seam_of(bert(added_tokens=[bert()["added_tokens"][0] | {"content": "a.b"}])) is None


def test_a_text_of_more_bytes_than_tokens_can_have_has_more_tokens(tmp_path: Path) -> None:
    whole = digits()
    whole.save(str(tmp_path / "tokenizer.json"))
    ours, asked = Beginnings(tmp_path / "tokenizer.json"), []

    def count(text: str) -> int:
        asked.append(len(text))
        return len(whole.encode(text).ids)

    assert longest_of(json.loads(whole.to_str())) == len("<|end|>")
    huge = "<|end|>" * 10_000
    assert count(ours.showing_more(huge, 100, count)) > 100
    assert max(asked) == 100 * len("<|end|>") + 1
    assert ours.showing_more("<|end|>" * 100, 100, count) == "<|end|>" * 100
    # Where the bound does not hold after all, nothing is lost.
    assert ours.showing_more("x" * 10_000, 100, lambda text: len(text) // 100) == "x" * 10_000


def without(vocab: dict[str, int], *tokens: str) -> dict[str, int]:
    return {token: id for token, id in vocab.items() if token not in tokens}


def test_characters_that_are_dropped_do_not_count(tmp_path: Path) -> None:
    """As SmolLM2 drops some of control."""
    spec = json.loads(byte_level().to_str())
    spec["model"]["vocab"] = without(spec["model"]["vocab"], "\u0104", "\u00f1")  # 0x04; first of rare characters
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    whole, ours = Tokenizer.from_str(json.dumps(spec)), Beginnings(tmp_path / "tokenizer.json")

    def count(text: str) -> int:
        return len(whole.encode(text).ids)

    rare = "\U00050000" * 500
    assert len(ours.showing_more(rare, 100, count)) == 201
    assert count(rare) > 100
    dropped = "a" + "\x04" * 5000
    assert count(dropped) == 1
    assert ours.showing_more(dropped, 100, count) == dropped
    assert ours.showing_more("a" * 150 + dropped, 100, count) == "a" * 150 + dropped


def test_a_token_may_stand_for_any_number_of_bytes() -> None:
    spec = json.loads(byte_level().to_str())
    assert longest_of(spec) == 2
    model = spec["model"]
    assert longest_of(spec | {"model": model | {"unk_token": "a"}}) is None
    assert longest_of(spec | {"model": model | {"vocab": without(model["vocab"], "Ģ")}}) is None  # 0x80
    assert longest_of(json.loads(loaded("unigram").to_str())) is None
    assert longest_of(bert()) is None


class Watched:
    """A tokenizer that remembers the longest text it was given."""

    def __init__(self, watched: Any) -> None:
        self._watched, self.longest = watched, 0

    def encode_batch(self, batch: list[Any]) -> Any:
        for one in batch:
            self.longest = max([self.longest, *map(len, [one] if isinstance(one, str) else one)])
        return self._watched.encode_batch(batch)

    encode_batch_fast = encode_batch


@pytest.mark.parametrize("word", ["film ", "film.", "\u4e2d\u6587", "a\n"])
def test_of_a_huge_text_little_more_is_read_than_is_kept(word: str) -> None:
    ours, huge = Cutting(BERT, 512), word * 200_000
    cut, whole = Watched(ours._cut), Watched(ours._whole)
    ours._cut, ours._whole = cut, whole  # type: ignore[assignment]
    (single, pair) = ours.encode([TextInput(huge), TextInput("a film", huge)], truncate=True)
    assert len(single.ids) == len(pair.ids) == 512
    assert single.is_truncated
    assert pair.is_truncated
    assert max(cut.longest, whole.longest) < 20 * 512


def test_a_refusal_counts_all_tokens_but_those_of_huge_texts() -> None:
    ours = Cutting(BERT, 512)
    with pytest.raises(TooLarge, match=r"^input\.0 has 10002 tokens, the limit is 512;"):
        ours.encode([TextInput("film " * 10_000)], truncate=False)
    with pytest.raises(TooLarge, match=r"^input\.1 has more than 512 tokens, the limit is 512;") as caught:
        ours.encode([TextInput("film"), TextInput("film " * 100_000)], truncate=False)
    assert caught.value.param == "input.1"
    with pytest.raises(TooLarge, match=r"^input\.0 has 10003 tokens, the limit is 512;"):
        ours.encode([TextInput("film " * 5_000, "film " * 5_000)], truncate=False)
