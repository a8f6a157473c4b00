"""One output: what it shows, what it holds back, and what ends it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from service.domain import Event, Finish, GenerateRequest, Token
from service.errors import EngineFailed
from service.worker.generation.detokenizer import Detokenizer
from service.worker.generation.output import Output
from service.worker.generation.sampling import Sampler

WORDS = ["<end>", "a", "b", "c", "Ã", "©", " "]  # 4 and 5 are the two bytes of one character, byte-level
END = 0


class ByteTokenizer:
    """A byte-level tokenizer of WORDS."""

    def token_text(self, token: int) -> str:
        return WORDS[token]

    def token_bytes(self, token: int) -> bytes:
        return WORDS[token].encode()

    def detokenizer(self) -> Detokenizer:
        return Detokenizer({"type": "ByteLevel"}, lambda token: None if token == END else WORDS[token])

    def decode(self, tokens: Sequence[int]) -> str:
        detokenizer = self.detokenizer()
        return detokenizer.add(*tokens) + detokenizer.flush()


def make_output(
    *, max_tokens: int = 100, end_ids: tuple[int, ...] = (END,), wants_tokens: bool = True, **fields: Any
) -> Output:
    request = GenerateRequest(prompt="x", **fields)
    sampler = Sampler(request, temperature=0.0, seed=0, prompt_ids=(1,), end_ids=end_ids, vocab_size=len(WORDS))
    return Output(
        3,
        request,
        sampler=sampler,
        tokenizer=ByteTokenizer(),
        end_ids=end_ids,
        max_tokens=max_tokens,
        wants_tokens=wants_tokens,
    )


def logits(token: int) -> np.ndarray:
    row = np.zeros(len(WORDS), np.float32)
    row[token] = 5
    return row


def write(output: Output, *tokens: int) -> list[Event]:
    return [event for token in tokens for event in output.write([logits(token)])]


def texts(events: list[Event]) -> list[str]:
    return [event.text for event in events if isinstance(event, Token | Finish)]


def test_a_token_at_a_time_until_the_end_token_which_is_counted_and_not_shown() -> None:
    output = make_output()
    assert write(output, 1, 2, END) == [Token(3, 1, "a"), Token(3, 2, "b"), Finish(3, "stop")]
    assert (output.is_finished, output.num_tokens) == (True, 3)


def test_the_last_token_allowed_ends_it() -> None:
    output = make_output(max_tokens=2)
    assert write(output, 1, 2) == [Token(3, 1, "a"), Token(3, 2, "b"), Finish(3, "length")]


def test_half_a_character_waits_for_the_other_half() -> None:
    assert texts(write(make_output(), 4, 5, 1)) == ["", "é", "a"]


def test_half_a_character_at_the_end_is_told_as_such() -> None:
    assert texts(write(make_output(max_tokens=2), 1, 4)) == ["a", "", "\ufffd"]


@pytest.mark.parametrize(
    ("stop", "tokens", "shown"),
    [
        ("bc", (1, 2, 3), ["a", "", "", ""]),  # across tokens, and not a character of it shown
        ("bc", (2, 1, 2, END), ["", "ba", "", "b"]),  # what only began like it comes with the end
        ("é", (1, 4, 5), ["a", "", "", ""]),  # across the bytes of a character
        ("\ufffd", (1, 4, END), ["a", "", ""]),  # completed by what the end brings
    ],
)
def test_stop_strings(stop: str, tokens: tuple[int, ...], shown: list[str]) -> None:
    output = make_output(stop=stop)
    events = write(output, *tokens)
    assert texts(events) == shown
    assert output.is_finished
    last = events[-1]
    assert isinstance(last, Finish)
    assert (last.finish_reason, last.stop) == ("stop", None if END in tokens and stop == "bc" else stop)


def test_stop_strings_count_from_min_tokens_on() -> None:
    output = make_output(stop="a", min_tokens=2)
    assert texts(write(output, 1, 2, 1)) == ["a", "b", "", ""]


def test_log_probabilities_are_those_of_the_model_itself() -> None:
    output = make_output(logprobs=2, logit_bias={2: 100.0})
    (token,) = write(output, 1)
    assert isinstance(token, Token)
    assert token.logprob is not None
    total = np.log(np.exp(logits(1)).sum())
    assert (token.id, token.logprob.logprob) == (2, pytest.approx(-total))
    assert [(one.text, one.logprob) for one in token.logprob.top] == [
        ("a", pytest.approx(5 - total)),
        ("<end>", pytest.approx(-total)),
    ]


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({}, (1, 4, 5, 2, END)),
        ({"stop_token_ids": (3,)}, (1, 6, 4, 3)),  # half a character at the end
        ({"min_tokens": 3}, (2, 2, 2, END)),
        ({"max_tokens": 3}, (1, 4, 5)),
        ({}, (END,)),
    ],
)
def test_where_no_token_is_wanted_the_end_tells_the_same_text(fields: dict[str, Any], tokens: tuple[int, ...]) -> None:
    told, whole = make_output(**fields), make_output(**fields, wants_tokens=False)
    *_, end = events = write(told, *tokens)
    (finish,) = write(whole, *tokens)
    assert isinstance(end, Finish)
    ids = tuple(event.id for event in events if isinstance(event, Token))
    assert finish == Finish(3, end.finish_reason, "".join(texts(events)), end.stop, ids)
    assert not whole.is_told
    assert whole.num_shown == told.num_shown == len(events) - 1
    assert (whole.num_tokens, whole.is_finished) == (told.num_tokens, True)


@pytest.mark.parametrize("fields", [{"stop": "bc"}, {"logprobs": 0}])
def test_tokens_whose_text_or_log_probability_is_asked_for_are_told_all_the_same(fields: dict[str, Any]) -> None:
    told, whole = make_output(**fields), make_output(**fields, wants_tokens=False)
    assert write(whole, 1, 2, 3) == write(told, 1, 2, 3)
    assert whole.is_told


def test_an_echo_is_read_in_pieces() -> None:
    whole, pieces = make_output(echo=True), make_output(echo=True)
    ids, rows = [1, 2, 3, 1], np.stack([logits(2), logits(1), logits(1), logits(2)])
    whole.read(ids, 0, rows)
    pieces.read(ids, 0, rows[:2])
    pieces.read(ids, 2, rows[2:])
    told = whole.echoed(0)
    assert told == pieces.echoed(0)
    assert [token.id for token in told.tokens] == ids
    likely, unlikely = told.tokens[1].logprob, told.tokens[2].logprob
    assert (told.tokens[0].logprob, told.tokens[3].logprob) == (0.0, pytest.approx(likely))
    assert unlikely == pytest.approx(likely - 5)


def test_what_is_not_finite_fails() -> None:
    with pytest.raises(EngineFailed):
        list(make_output().write([np.full(len(WORDS), np.nan, np.float32)]))
