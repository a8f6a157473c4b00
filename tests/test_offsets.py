"""Where the tokens of a text stand in it, told from what each of them shows."""

import codecs
import random
from collections.abc import Iterator, Sequence

import pytest

from service.domain import Event, Finish, GenerateRequest, Token, TokenLogprob
from service.gateway.openai.offsets import Offsets, prompt_offsets
from service.worker.generation.detokenizer import StopStrings
from service.worker.generation.rejoined import Rejoined, Text


def logprob(token: bytes) -> TokenLogprob:
    return TokenLogprob(0, token.decode(errors="replace"), token, -1.0)


def placed(told: Sequence[tuple[str | bytes, str]], *, start: int = 0, is_held: bool = False) -> list[int]:
    offsets = Offsets(start, is_held=is_held)
    return [offsets.place(logprob(token if isinstance(token, bytes) else token.encode()), text) for token, text in told]


@pytest.mark.parametrize(
    ("told", "offsets"),
    [
        ([("A", "A"), (" dog", " dog"), (".", ".")], [0, 1, 5]),
        ([(" Ein", "Ein"), (" Hund", " Hund"), (".", "."), (" Ja", "\n\n\nJa"), ("!", "!")], [0, 3, 8, 12, 14]),
        ([(" Ein", "\tEin"), (" Ja", " Ja")], [1, 4]),  # the second may be a sentence's first, behind a space
        ([(b" \xe6", " "), (b"\x97", ""), (b"\xa5", "日"), ("!", "!")], [0, 1, 1, 2]),
        ([(b"\xc3", ""), (b"\xa9t\xc3", "ét"), (b"\xa9", "é")], [0, 0, 2]),
        ([(".", "."), (b" \xc3", "\n\n"), (b"\xa9", "é"), ("x", "x")], [0, 3, 3, 4]),
        ([("<s>", ""), (" Ein", "Ein"), ("</s>", ""), ("</s>", ""), ("<s>", "\n"), (" Ja", "Ja")], [0, 0, 3, 3, 4, 4]),
        ([("\n", "\n"), ("\n", "\n"), (" ", " "), ("x", "x")], [0, 1, 2, 3]),
        ([(".", "."), (b"\xc3", ""), (" Ja", "\ufffd\n\nJa"), ("!", "!")], [0, 1, 4, 6]),  # half a character stays one
    ],
)
def test_a_token_stands_where_it_is_shown(told: list[tuple[str | bytes, str]], offsets: list[int]) -> None:
    assert placed(told) == offsets
    assert placed(told, start=7) == [7 + offset for offset in offsets]


@pytest.mark.parametrize(
    ("told", "offsets"),
    [
        ([("a", ""), ("b", ""), ("c", "abc"), ("d", "d")], [0, 1, 2, 3]),
        ([("a", ""), ("a", "a"), ("c", "ac")], [0, 1, 2]),
        ([("ab x", "ab "), ("y", "xy")], [0, 4]),
        ([(" Ein", ""), (" Hund", "Ein Hund"), (".", ".")], [0, 3, 8]),
        ([(".", ""), (" Ja", ".\n\n"), (" wohl", "Ja wohl")], [0, 3, 5]),
        ([("</s>", ""), ("a", "a"), ("b", "b")], [0, 0, 1]),
    ],
)
def test_a_token_that_is_held_back_stands_where_it_will_be_shown(
    told: list[tuple[str | bytes, str]], offsets: list[int]
) -> None:
    assert placed(told, is_held=True) == offsets


def test_the_parts_of_a_prompts_character_stand_where_it_does() -> None:
    pieces = (b"a", b" \xe6", b"\x97", b"\xa5", b"\xf0\x9f", b"\x98\x80!", b"b")
    assert prompt_offsets(map(logprob, pieces)) == [0, 1, 2, 2, 3, 3, 5]
    assert prompt_offsets(()) == []


def split(text: bytes, rng: random.Random) -> list[bytes]:
    ends = sorted({rng.randrange(1, len(text)) for _ in range(rng.randrange(len(text)))} | {len(text)})
    return [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def events_of(index: int, tokens: Sequence[bytes], stops: Sequence[str]) -> Iterator[Event]:
    """As an output tells them whose tokenizer puts a space before every text."""
    decode, held = codecs.getincrementaldecoder("utf-8")().decode, StopStrings(stops)
    is_begun = False
    for token in tokens:
        text = decode(token)
        if text and not is_begun:
            text, is_begun = text[1:], True
        shown, stop = held.feed(text)
        assert stop is None
        yield Token(index, 0, shown, logprob(token))
    yield Finish(index, "stop", held.flush())


@pytest.mark.parametrize("seed", range(200))
def test_tokens_of_a_translation_stand_where_they_do_in_the_whole_text(seed: int) -> None:
    rng = random.Random(seed)
    sentences = [
        "".join(rng.choice(["a", "b", " a", "é", "日", "😀"]) for _ in range(rng.randrange(1, 12))) for _ in "123"
    ]
    sentences = [sentence.strip() for sentence in sentences]
    stops = rng.choice([[], ["abZ", "é日Z", "aaaZ"]])  # some begin, none is there
    texts = [Text(("",) * 3, ("\n", "\n\t", "\n\n", ""))]
    request = GenerateRequest(prompt=("",), stop=tuple(stops))
    rejoined, offsets = Rejoined(texts, request), Offsets(0, is_held=bool(stops))
    found, truth, whole = [], [], ""
    for index, sentence in enumerate(sentences):
        start = sum(map(len, sentences[:index])) + sum(map(len, texts[0].spaces[: index + 1]))
        decode = codecs.getincrementaldecoder("utf-8")().decode
        num_before = 0
        for event in events_of(index, tokens := split(f" {sentence}".encode(), rng), stops):
            for told in rejoined.take(event):
                assert isinstance(told, Token | Finish)
                whole += told.text
                if isinstance(told, Token) and told.logprob is not None:
                    found.append(offsets.place(told.logprob, told.text))
        for token in tokens:
            truth.append(start + max(0, num_before - 1))
            num_before += len(decode(token))
    assert whole == "\n{}\n\t{}\n\n{}".format(*sentences)
    assert found == truth
