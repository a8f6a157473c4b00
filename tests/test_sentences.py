"""service.worker.generation.sentences: where English sentences end, where they do not, and that nothing is lost."""

import random

import pytest

from service.worker.generation.sentences import as_read, sentence_spans


def sentences(text: str) -> list[str]:
    return [text[start:end] for start, end in sentence_spans(text)]


@pytest.mark.parametrize(
    "expected",
    [
        ["He left.", "She stayed!", "Why?", "Nobody knows…", "The end"],
        ["Wait...", "What?!", "Really!!!", "Yes."],
        ['"Go."', "'Now.'", "(He left.)", "[It rained.]", "\u201cFine.\u201d", "Then *this.*", "_That._"],
        ["1. Take an egg.", "2. Break it.", "(3) Eat."],
        ["It starts at 5 p.m.", "The end is open."],
        ["He lives in the U.S.", "However, she does not."],
        ["I said no.", "Five came."],
        ["I need vitamin C.", "This is why."],
        ["He was born in 1999.", "7 years later he left."],
    ],
)
def test_a_sentence_ends_where_white_space_and_a_new_one_follow(expected: list[str]) -> None:
    assert sentences(" ".join(expected)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "Mr. Smith met Dr. J. R. R. Tolkien, Prof. King Jr. and Mrs. Jones in St. Ives.",
        "Fruit, e.g. apples, i.e. what grows (cf. Fig. 3, pp. 12 and No. 5), etc. and so on.",
        "It costs 3.50 euros, or $4.99 at www.example.com/a.b?c=d!e today.",
        "The U.S. Army left at 5 a.m. Monday, Jan. 5, for Acme Inc. Chicago.",
        "Well... maybe he is right, he said.",
        '"Stop!" he cried, and "Why?" she asked.',
        "Yahoo! is a name and so is v. 2.0 of it.",
        "A text without an end",
    ],
)
def test_other_full_stops_end_nothing(text: str) -> None:
    assert sentences(text) == [text]


def test_line_breaks_end_sentences() -> None:
    assert sentences("A title\nThe text. More\r\n\r\n  - an item\u2028Mr.\nX") == [
        "A title",
        "The text.",
        "More",
        "- an item",
        "Mr.",
        "X",
    ]


@pytest.mark.parametrize("mark", "\u3002\uff61\uff0e\uff01\uff1f\u0964\u0965\u061f\u06d4\u1362\u0589\u104b\u17d4")
def test_full_stops_of_other_scripts_need_no_white_space(mark: str) -> None:
    assert sentences(f"abc{mark}def{mark}\u201d ghi") == [f"abc{mark}", f"def{mark}\u201d", "ghi"]


@pytest.mark.parametrize(
    "text", ["", " ", "\n\n\t \u3000\x85\x1c", "...", "-", "* * *", "\U0001f642", "1)", "\u200b\x00"]
)
def test_what_has_no_letter_holds_no_sentence(text: str) -> None:
    assert sentences(text) == []
    assert sentences(f"A dog runs.\n{text}\nA cat.") == ["A dog runs.", "A cat."]


def test_marks_without_width_and_control_characters_are_blank() -> None:
    assert sentences("\ufeffA dog runs. \u200b\x00A cat.\x7f") == ["A dog runs.", "A cat."]
    assert as_read("A\tdog\x00 \u2060 runs\xa0far") == "A dog runs far"


def test_whatever_the_text_no_letter_lies_outside() -> None:
    draw = random.Random(0)
    for _ in range(2000):
        text = "".join(draw.choices(' \t\n\r\x1c\ufeff.!?…"\u201d(。1aA', k=draw.randint(0, 30)))
        end = 0
        for start, stop in sentence_spans(text):
            assert not any(map(str.isalpha, text[end:start]))
            assert any(map(str.isalpha, text[start:stop]))
            assert text[start:stop].strip(" \t\n\r\x1c\ufeff") == text[start:stop]
            end = stop
        assert not any(map(str.isalpha, text[end:]))


@pytest.mark.parametrize("piece", [".", "a. ", "!)", '."', " ", "1. ", "a.a", "(.", ".\n"])
def test_a_long_text_is_split_in_linear_time(piece: str) -> None:
    """Quadratic time would take minutes here."""
    text = piece * 200_000 + " " * 200_000 + "x"
    for start, end in sentence_spans(text):
        as_read(text[start:end])
