"""Where the sentences of an English text begin and end: a translator was trained on sentences, one at a time.

A line break ends a sentence. So do `!`, `?`, `…` and full stops, with the quotes and brackets that close behind them,
when white space follows, and other scripts' full stops even when none does. Not before a small letter, nor behind the
number of a list's item, a single letter, a dotted or a known abbreviation, unless a word that mostly begins a sentence
follows.
What has no letter is no sentence: a number, a row of dashes, an emoji need no translation.
Knows no grammar: in doubt two sentences stay together, which costs a translation less than one that is cut in two.
Sentences that a line's end cuts, as in mail wrapped by hand, are cut; those inside of brackets and quotes are separate.
The time is linear in the text, whatever it is made of.
"""

import re
from collections.abc import Iterator
from itertools import chain

# White space, control characters, and the marks of Unicode that have no width.
_BLANK = r"[\s\x00-\x1f\x7f-\x9f\u200b\u2060\ufeff]"
BLANKS = re.compile(rf"{_BLANK}++")
CHARACTER = re.compile(rf"{_BLANK}++|.", re.DOTALL)  # that is read as one
UNPADDED = re.compile(rf"(?!{_BLANK}).(?:.*(?!{_BLANK}).)?", re.DOTALL)  # from the first to the last that is not blank
LINE = re.compile(r"[^\n\r\v\f\x1c-\x1e\x85\u2028\u2029]+")
# Quotes and brackets, and the marks of emphasis: straight, curly and angular.
_CLOSING = r"[\"'\u201d\u2019\xbb\u203a)\]}*_]*+"
_OPENING = r"[\"'\u201c\u2018\u201e\xab\u2039(\[{*_]*+"
# Chinese and Japanese (also as half a width), Devanagari, Arabic, Ethiopic, Armenian, Burmese, Khmer.
_FOREIGN = r"[\u3002\uff61\uff0e\uff01\uff1f\u0964\u0965\u061f\u06d4\u1362\u0589\u104b\u17d4]++"
END = re.compile(rf"(?<![.!?…])(?P<marks>[.!?…]++){_CLOSING}(?=\s)|{_FOREIGN}{_CLOSING}")
FOLLOWING = re.compile(rf"\s++{_OPENING}(?P<word>\w{{0,20}})")
WORD = re.compile(r"[^\W_]+(\.[^\W_]+)*$")
LONGEST = 16  # characters of a word before a full stop that are looked at


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


ABBREVIATIONS = _words(
    """
    mr mrs ms messrs dr prof rev hon st mt ft gen col maj capt cmdr lt sgt cpl adm sen rep gov pres supt jr sr esq
    inc ltd co corp bros dept univ assn est dist govt approx ca cf vs viz etc al ibid incl excl resp
    jan feb mar apr jun jul aug sep sept oct nov dec tue tues thu thurs fri
    ave blvd rd sq apt tel ext
    """
)
NUMBERED = _words("no nos p pp fig figs vol vols ch sec art eq para")  # before a number
# Words that begin a sentence far more often than a name.
STARTERS = _words(
    """
    The This That These Those There Then It Its He She We They You His Her Our Their My Your
    But And So Or Yet If When While After Before Because Although Though Since Until As At In On For From With
    What Who Why How Where However Meanwhile Later Now Today Yes No Not Nobody Everyone Some Many Most All Both
    """
)


def sentence_spans(text: str) -> Iterator[tuple[int, int]]:
    """(start, end) of each sentence, in order; what lies before, between and behind them has no letter."""
    for line in LINE.finditer(text):
        start = line.start()
        for end in chain(_ends(text, *line.span()), (line.end(),)):
            sentence = UNPADDED.search(text, start, end)
            if sentence is not None and any(map(str.isalpha, sentence[0])):
                yield sentence.span()
            start = end


def as_read(sentence: str) -> str:
    """With a space for whatever else is blank: a translator has seen nothing but single spaces."""
    return BLANKS.sub(" ", sentence)


def places_as_read(text: str, start: int, end: int) -> list[int]:
    """Where in `text` each character stands that is read of its sentence from `start` to `end`; and `end`."""
    return [*(found.start() for found in CHARACTER.finditer(text, start, end)), end]


def _ends(text: str, start: int, stop: int) -> Iterator[int]:
    """Where sentences end that do not end the line from `start` to `stop`."""
    for mark in END.finditer(text, start, stop):
        if mark["marks"] is None or _is_end(text, start, stop, mark):
            yield mark.end()
            start = mark.end()


def _is_end(text: str, start: int, stop: int, mark: re.Match[str]) -> bool:
    """Whether a Latin full stop or the like ends the sentence that begins at `start`."""
    following = FOLLOWING.match(text, mark.end(), stop)
    after = following["word"] if following else ""
    if after[:1].islower():
        return False
    if mark["marks"] != ".":
        return True
    before = text[max(start, mark.start() - LONGEST) : mark.start()]
    if before.strip(" \t([").isdecimal() and len(before) < LONGEST:
        return False
    return not _is_abbreviation(before, after) or after in STARTERS


def _is_abbreviation(before: str, after: str) -> bool:
    """Whether the full stop between `before` and `after` belongs to the word before it."""
    word = WORD.search(before)
    if word is None:
        return False
    name = word[0].lower()
    if name in NUMBERED and after[:1].isdecimal():
        return True
    is_dotted = "." in name and not name[0].isdecimal()
    return name in ABBREVIATIONS or is_dotted or (len(name) == 1 and name.isalpha())
