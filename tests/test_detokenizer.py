"""service.worker.generation.detokenizer: pieces of the decoder's text, never half a character or a stop string."""

import json
import random
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from service.errors import BundleError
from service.worker.generation.detokenizer import Detokenizer, StopStrings, bytes_of, make_stages

SPECIAL = "<|end|>"
TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  two spaces, a tab\t and\n\n lines ",
    "👩‍👩‍👧‍👦 👍🏽 🇩🇪",  # joined with U+200D, with a skin tone, a flag of two
    "e\u0301 n\u0303 a\u0308\u0323 Z͑ͫ̓ͪ",  # combining marks
    "你好,世界。日本語テキスト 한국어",
    "مرحبا שלום नमस्ते ไทย",
    "\ufffd is a character, too \ufffd\ufffd",
    "null \0 and \x7f and \u00ad and \u2028",
    "▁ is not a space, Ġ is a letter",
    "<0x41> is no byte here, <|end| is no token",
]


def byte_level() -> Tokenizer:
    """As GPT-2's and SmolLM2's."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("Ġ", "w"), ("ð", "Ł"), ("ä", "½"), ("Ċ", "Ċ")]
    tokens = [*letters, *(left + right for left, right in merges)]
    tokenizer = Tokenizer(models.BPE({token: place for place, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As Llama 2's: words with a mark for the space, bytes for what has no token."""
    tokens = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", *"abcdefghijklmnopqrstuvwxyz,.!é你", "▁t", "he", "▁▁"]
    tokenizer = Tokenizer(
        models.BPE({t: i for i, t in enumerate(tokens)}, [("▁", "t"), ("h", "e"), ("▁", "▁")], byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def unigram(prepend: str = "always", *, is_fallback: bool = True) -> Tokenizer:
    """As a SentencePiece unigram model's."""
    words = [
        "<unk>",
        "▁",
        "▁the",
        "▁th",
        "e",
        *"abcdefghijklmnopqrstuvwxyz,.!é你",
        *(f"<0x{b:02X}>" for b in range(256)),
    ]
    tokenizer = Tokenizer(models.Unigram([(word, -1.0) for word in words], unk_id=0, byte_fallback=is_fallback))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
    mark = decoders.Metaspace(prepend_scheme=prepend)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), mark]) if is_fallback else mark
    return tokenizer


def stripped() -> Tokenizer:
    """Byte-level with one space put before every text, and taken away again."""
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    return tokenizer


def words() -> Tokenizer:
    """No decoder: words with spaces between them."""
    tokenizer = Tokenizer(models.WordLevel({f"w{index}": index for index in range(20)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def loaded(name: str) -> Tokenizer:
    makers = {
        "byte-level": byte_level,
        "byte-fallback": byte_fallback,
        "unigram": unigram,
        "unigram-never": lambda: unigram("never"),
        "unigram-first": lambda: unigram("first", is_fallback=False),
        "stripped": stripped,
        "words": words,
    }
    tokenizer: Tokenizer = makers[name]()
    tokenizer.add_special_tokens([AddedToken(SPECIAL, normalized=False)])
    tokenizer.add_tokens([AddedToken("<tool call>", normalized=False)])  # added, and shown
    return tokenizer


NAMES = ["byte-level", "byte-fallback", "unigram", "unigram-never", "unigram-first", "stripped", "words"]


@pytest.fixture(scope="module", params=NAMES)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return loaded(request.param)


def detokenizer(tokenizer: Tokenizer) -> Detokenizer:
    special = tokenizer.token_to_id(SPECIAL)
    decoder = json.loads(tokenizer.to_str())["decoder"]
    return Detokenizer(decoder, lambda token: None if token == special else tokenizer.id_to_token(token))


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    one = detokenizer(tokenizer)
    return [*(one.add(token) for token in ids), one.flush()]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_of_a_text_make_up_what_the_decoder_says(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


def test_pieces_of_random_tokens_make_up_what_the_decoder_says(tokenizer: Tokenizer) -> None:
    """Most are no text at all: lone bytes, halves of characters, special tokens in between."""
    draw = random.Random(0)
    size = tokenizer.get_vocab_size()
    for _ in range(400):
        few = [draw.randrange(size) for _ in range(draw.randrange(1, 12))]
        ids = [draw.choice(few) for _ in range(draw.randrange(0, 40))]
        assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids), ids


def test_pieces_of_random_bytes_make_up_what_the_decoder_says() -> None:
    draw = random.Random(1)
    for tokenizer in (loaded("byte-level"), loaded("byte-fallback")):
        bytewise = [index for index in range(256) if tokenizer.id_to_token(index) is not None]
        for _ in range(100):
            some = "".join(draw.choice("aé你🇩\u0301") for _ in range(4)).encode()
            ids = [draw.choice(bytewise) for _ in range(draw.randrange(3))] + bytes_to_ids(tokenizer, some)
            del ids[draw.randrange(len(ids)) :][:1]
            assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids), ids


def bytes_to_ids(tokenizer: Tokenizer, text: bytes) -> list[int]:
    """One token a byte."""
    names = {bytes_of(tokenizer.id_to_token(index)): index for index in range(256)}
    if len(names) == 256 and all(len(name) == 1 for name in names):
        return [names[bytes([byte])] for byte in text]
    return list(text)  # of byte_fallback: token i is byte i


@pytest.mark.parametrize("name", ["byte-level", "byte-fallback", "unigram"])
def test_no_piece_ends_within_a_character(name: str) -> None:
    tokenizer = loaded(name)
    text = "a你👩‍👧é!"
    found = pieces(tokenizer, tokenizer.encode(text).ids)
    assert "".join(found) == text
    assert "\ufffd" not in "".join(found)


def test_a_character_is_shown_with_its_last_byte() -> None:
    tokenizer = loaded("byte-level")
    ids = bytes_to_ids(tokenizer, "é👍a".encode())
    assert pieces(tokenizer, ids) == ["", "é", "", "", "", "👍", "a", ""]


@pytest.mark.parametrize("name", ["byte-level", "byte-fallback", "unigram"])
def test_bytes_that_never_become_a_character_are_marked_at_the_end(name: str) -> None:
    tokenizer = loaded(name)
    names = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "👍".encode()[:3]]
    ids = bytes_to_ids(tokenizer, "👍".encode()[:3]) if name == "byte-level" else names
    found = pieces(tokenizer, ids)
    assert found[:-1] == ["", "", ""]
    assert found[-1] == ("\ufffd" if name == "byte-level" else "\ufffd" * 3)


def test_special_tokens_are_not_shown_and_others_that_were_added_are() -> None:
    tokenizer = loaded("byte-level")
    ids = [tokenizer.token_to_id(token) for token in ("h", SPECIAL, "<tool call>", SPECIAL, "e")]
    assert pieces(tokenizer, ids) == ["h", "", "<tool call>", "", "e", ""]


def test_a_token_that_the_tokenizer_does_not_have_is_not_shown() -> None:
    assert pieces(loaded("byte-level"), [10**6]) == ["", ""]


def test_a_token_costs_the_same_however_long_the_text_is() -> None:
    """Nothing that grows: the stages hold no text but what is still open."""
    tokenizer = loaded("byte-level")
    one = detokenizer(tokenizer)
    for _ in range(10_000):
        one.add(tokenizer.token_to_id("h"))
    held = [value for stage in one._stages for value in vars(stage).values()]
    assert all(not isinstance(value, (str, list, bytearray)) or len(value) == 0 for value in held)


@pytest.mark.parametrize(
    "decoder",
    [
        {"type": "CTC"},
        {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"Regex": "a+"}, "content": "b"}]},
        {"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "ByteFallback"}]},
        {"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 0, "stop": 1}]},
    ],
    ids=lambda decoder: str(decoder)[:50],
)
def test_a_decoder_that_is_not_known_is_refused(decoder: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match="is not supported"):
        make_stages(decoder)


def test_strip_of_each_piece() -> None:
    tokenizer = loaded("words")
    tokenizer.decoder = decoders.Strip("w", 1, 0)
    ids = [3, 0, 12]
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


# --- stop strings


def shown(stops: list[str], texts: list[str]) -> tuple[str, str | None]:
    """All that is shown of `texts`, and what ended it."""
    one, found = StopStrings(stops), ""
    for text in texts:
        safe, stop = one.feed(text)
        found += safe
        if stop is not None:
            return found, stop
    return found + one.flush(), None


@pytest.mark.parametrize(
    ("stops", "texts", "expected"),
    [
        ([], ["any", "thing"], ("anything", None)),
        (["END"], ["abc END def"], ("abc ", "END")),
        (["END"], ["abc E", "N", "D"], ("abc ", "END")),
        (["END"], ["abc E", "N", "X"], ("abc ENX", None)),
        (["END"], ["abc EN"], ("abc EN", None)),
        (["END"], ["EENEND"], ("EEN", "END")),
        (["aab"], ["a", "a", "a", "b"], ("a", "aab")),
        (["abab", "bc"], ["aba", "bc"], ("", "abab")),
        (["abcd", "bc"], ["xabcd"], ("xa", "bc")),  # complete first
        (["c", "abc", "bc"], ["xab", "c"], ("x", "abc")),  # complete at once: the longest
        (["\n\n", "\n#"], ["a\n", "b\n", "\n"], ("a\nb", "\n\n")),
        (["👍"], ["ok 👍🏽"], ("ok ", "👍")),
    ],
)
def test_stop_strings(stops: list[str], texts: list[str], expected: tuple[str, str | None]) -> None:
    assert shown(stops, texts) == expected


def test_what_may_begin_a_stop_is_held_back_and_no_more() -> None:
    one = StopStrings(["<end>", "stop"])
    assert one.feed("a <") == ("a ", None)
    assert one.feed("en") == ("", None)
    assert one.feed("s") == ("<en", None)
    assert one.feed("to") == ("", None)
    assert one.feed("o") == ("stoo", None)
    assert one.flush() == ""
    assert one.feed("st") == ("", None)
    assert one.flush() == "st"


def test_the_result_does_not_depend_on_how_the_text_was_cut() -> None:
    """Against the definition, on texts and stops of two letters, where everything overlaps."""
    draw = random.Random(2)
    for _ in range(2000):
        stops = ["".join(draw.choices("ab", k=draw.randrange(1, 6))) for _ in range(draw.randrange(1, 4))]
        text = "".join(draw.choices("abc", weights=(5, 5, 1), k=draw.randrange(0, 14)))
        cuts = sorted(draw.choices(range(len(text) + 1), k=3))
        texts = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert shown(stops, texts) == defined(stops, text), (stops, texts)


def defined(stops: list[str], text: str) -> tuple[str, str | None]:
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    return text, None


def test_nothing_that_is_shown_belongs_to_a_stop_that_comes_later() -> None:
    draw = random.Random(3)
    for _ in range(500):
        stop = "".join(draw.choices("ab", k=draw.randrange(1, 6)))
        text = "".join(draw.choices("ab", k=10)) + stop
        one, found = StopStrings([stop]), ""
        for character in text:
            safe, matched = one.feed(character)
            found += safe
            if matched:
                break
        assert text.startswith(found + stop)
        assert stop not in found
