"""service.worker.generation.translation: texts as sentences and back, on a generator that is told what to say."""

import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import pytest
from generations import Collected

from service.domain import (
    Call,
    End,
    Event,
    Finish,
    GenerateRequest,
    GenerateTiming,
    GenerateUsage,
    Start,
    Token,
    TokenLogprob,
)
from service.errors import AttndError, EngineFailed, InvalidRequest, Overloaded, TooLarge, Unsupported
from service.worker.generation.translation import LONG_TO_SPLIT, texts_of, translate

START = Start("de", 9)
END = End(GenerateUsage(9, 8, 0), GenerateTiming(0, 0, 0, 0, 0, 0))


class Script:
    """A generator that says `events` between Start and End, or fails, and remembers what it was asked."""

    def __init__(self, events: Sequence[Event] = (), error: Exception | None = None) -> None:
        self._events, self._error = events, error
        self.asked: GenerateRequest | None = None
        self.is_closed = False

    async def generate(self, request: GenerateRequest, call: Call) -> AsyncGenerator[Event, None]:
        self.asked = request
        try:
            yield START
            for event in self._events:
                yield event
            if self._error is not None:
                raise self._error
            yield END
        finally:
            self.is_closed = True


async def said(script: Script, **fields: Any) -> list[Event]:
    call = Call("id", "/v1/generate", time.monotonic() + 10)
    return [event async for event in translate(script, GenerateRequest(**fields), call)]


async def test_sentences_become_prompts_and_their_translations_one_text() -> None:
    script = Script([Token(0, 1, "Er ging."), Finish(0, "stop"), Token(1, 2, "Sie"), Finish(1, "stop", " blieb.")])
    events = await said(script, prompt=" He left. \n She stayed.\t", max_tokens=7, seed=3)
    assert script.asked == GenerateRequest(prompt=("He left.", "She stayed."), max_tokens=7, seed=3)
    assert events == [
        START,
        Token(0, 1, " Er ging."),
        Token(0, 2, " \n Sie"),
        Finish(0, "stop", " blieb.\t"),
        END,
    ]


async def test_a_later_sentence_waits_for_those_before_it() -> None:
    script = Script(
        [
            Token(2, 7, "c"),
            Finish(2, "stop", "C"),
            Token(0, 5, "a"),
            Token(1, 6, "b"),
            Finish(1, "stop", "B"),
            Token(0, 5, "A"),
            Finish(0, "stop"),
        ]
    )
    events = await said(script, prompt="One. Two. Three.")
    assert events[1:-1] == [
        Token(0, 5, "a"),
        Token(0, 5, "A"),
        Token(0, 6, " b"),
        Token(0, 7, "B c"),
        Finish(0, "stop", "C"),
    ]


async def test_outputs_of_several_texts_are_kept_apart() -> None:
    texts = {0: "a1", 1: "a2", 2: "b1", 3: "b2", 4: "c1", 5: "c2"}  # two outputs each of A., B. and of C.
    said_by = [event for at, text in texts.items() for event in (Token(at, at, text), Finish(at, "stop"))]
    collected = Collected(await said(Script(said_by), prompt=["A word. B word.", "C word."], n=2))
    assert [collected.text(index) for index in range(4)] == ["a1 b1", "a2 b2", "c1", "c2"]
    assert [collected.ids(index) for index in range(4)] == [[0, 2], [1, 3], [4], [5]]


async def test_a_log_probability_goes_with_its_token() -> None:
    logprob = TokenLogprob(4, "zwei", b"zwei", -0.5)
    script = Script([Finish(0, "stop", "eins"), Token(1, 4, "zwei", logprob), Finish(1, "stop")])
    events = await said(script, prompt="One. Two.", logprobs=0)
    assert events[1] == Token(0, 4, "eins zwei", logprob)


async def test_the_whole_ends_by_length_if_one_sentence_does() -> None:
    script = Script([Finish(0, "length", "a"), Finish(1, "stop", "b")])
    assert (await said(script, prompt="One. Two."))[1] == Finish(0, "length", "a b")


@pytest.mark.parametrize("stop", ["x", 7])
async def test_a_stop_ends_the_whole(stop: str | int) -> None:
    script = Script([Finish(0, "length", "a"), Token(2, 3, "c"), Finish(1, "stop", "b", stop), Finish(2, "stop", "C")])
    asked: dict[str, Any] = {"stop": stop} if isinstance(stop, str) else {"stop_token_ids": [stop]}
    events = await said(script, prompt="One. Two. Three. ", **asked)
    assert events[1:-1] == [Finish(0, "stop", "a b", stop)]


SPLIT = [Token(0, 1, "a"), Token(0, 2, "."), Finish(0, "stop"), Token(1, 3, "B"), Token(1, 4, "c"), Finish(1, "stop")]


@pytest.mark.parametrize(
    ("stop", "text"),
    [(". ", "a"), (". B", "a"), (" B", "a."), (["Bc", ".  "], "a. "), (" ", "a."), (["c", " Bc"], "a."), ("B c", None)],
)
async def test_a_stop_string_may_be_of_several_sentences(stop: str | list[str], text: str | None) -> None:
    collected = Collected(await said(Script(SPLIT), prompt="One. Two.", stop=stop))
    assert collected.text(0) == ("a. Bc" if text is None else text)
    assert (collected.finish(0).stop is None) == (text is None)


async def test_a_stop_that_a_sentence_found_loses_to_one_that_was_complete_before() -> None:
    found = Script([Finish(0, "stop", "a."), Finish(1, "stop", "", "Bc")])
    (finish,) = (await said(found, prompt="One. Two.", stop=["Bc", ". B"]))[1:-1]
    assert finish == Finish(0, "stop", "a", ". B")
    alone = Script([Finish(0, "stop", "a."), Finish(1, "stop", "", "Bc")])
    assert (await said(alone, prompt="One. Two.", stop=["Bc", ". C"]))[1:-1] == [Finish(0, "stop", "a. ", "Bc")]


async def test_a_stop_string_is_not_sought_before_the_least_tokens() -> None:
    events = await said(Script(SPLIT), prompt="One. Two.", stop=["a", " B"], min_tokens=2)
    assert Collected(events).text(0) == "a. Bc"  # B is the second sentence's first token


async def test_text_that_may_begin_a_stop_is_held_back_and_told_at_the_end() -> None:
    events = await said(Script(SPLIT), prompt="One. Two. ", stop="c .")
    assert events[1:-1] == [
        Token(0, 1, "a"),
        Token(0, 2, "."),
        Token(0, 3, " B"),
        Token(0, 4, ""),
        Finish(0, "stop", "c "),
    ]


async def test_once_all_outputs_are_stopped_nothing_more_is_waited_for() -> None:
    script = Script([Token(0, 1, "a"), Token(2, 2, "b"), Token(0, 3, ""), Finish(0, "stop", "", "x"), Token(1, 4, "c")])
    call = Call("id", "/", time.monotonic() + 10)
    events = [event async for event in translate(script, GenerateRequest(prompt="One. Two. Three.", stop="x"), call)]
    *_, finish, end = events
    assert finish == Finish(0, "stop", "", "x")
    assert isinstance(end, End)
    assert end.usage == GenerateUsage(START.prompt_tokens, 3, 0)
    assert script.is_closed
    assert call.progress.finished is not None


async def test_the_end_tokens_of_sentences_before_a_stop_are_in_the_usage() -> None:
    told = [Token(0, 1, "a"), Finish(0, "stop"), Finish(2, "stop", "c", ids=(4, 5)), Token(1, 2, "b")]
    script = Script([*told, Finish(1, "stop", "", "x"), Token(3, 3, "d")])
    *_, end = await said(script, prompt="One. Two. Three. Four.", stop="x")
    assert isinstance(end, End)
    assert end.usage == GenerateUsage(START.prompt_tokens, 2 + 3 + 1, 0)


async def test_an_output_that_is_stopped_does_not_end_another() -> None:
    script = Script([Finish(0, "stop", "", "x"), Finish(2, "stop", "d"), Finish(3, "stop", "e"), Finish(1, "stop")])
    events = await said(script, prompt=["One. Two.", "Three. Four."], stop="x")
    assert events[1:3] == [Finish(0, "stop", "", "x"), Finish(1, "stop", "d e")]


async def test_tokens_that_were_not_told_come_with_the_end_of_all() -> None:
    script = Script([Finish(1, "stop", "b", ids=(3,)), Finish(0, "length", "a", ids=(1, 2))])
    assert (await said(script, prompt="One. Two."))[1] == Finish(0, "length", "a b", ids=(1, 2, 3))
    script = Script([Finish(0, "stop", "a", ids=(1, 2)), Finish(1, "stop", "b", 7, ids=(3,))])
    assert (await said(script, prompt="One. Two. Three."))[1] == Finish(0, "stop", "a b", 7, ids=(1, 2, 3))


async def test_the_score_is_the_sum_of_the_sentences() -> None:
    script = Script([Finish(1, "stop", "b", score=-0.25), Finish(0, "stop", "a", score=-0.5)])
    assert (await said(script, prompt="One. Two."))[1] == Finish(0, "stop", "a b", score=-0.75)


async def test_token_ids_are_a_source_as_they_are() -> None:
    script = Script([Finish(0, "stop", "a"), Finish(1, "stop", "b")])
    events = await said(script, prompt=[[3, 4], "Hi. "])
    assert script.asked is not None
    assert script.asked.prompt == ((3, 4), "Hi.")
    assert events[1:-1] == [Finish(0, "stop", "a"), Finish(1, "stop", "b ")]


async def test_an_error_names_the_sentence_and_the_prompt_of_the_caller() -> None:
    error = TooLarge("prompt.2 has 300 tokens, the limit is 256", param="prompt.2", code="context_length_exceeded")
    with pytest.raises(TooLarge) as caught:
        await said(Script(error=error), prompt=["A word.", "B word. C word."])
    assert caught.value.message == "sentence 2 of prompt.1 has 300 tokens, the limit is 256"
    assert (caught.value.param, caught.value.code) == ("prompt.1", "context_length_exceeded")


@pytest.mark.parametrize(
    "error", [Overloaded("full", retry_after_s=7), EngineFailed("it broke"), TooLarge("too much", param="min_tokens")]
)
async def test_other_errors_pass_as_they_are(error: AttndError) -> None:
    with pytest.raises(type(error)) as caught:
        await said(Script(error=error), prompt="A word.")
    assert caught.value is error


@pytest.mark.parametrize("prompt", ["", " \n", ["A word.", "\t"], "...", "1) \u200b\n* * *"])
async def test_a_text_without_words_is_refused(prompt: Any) -> None:
    script = Script()
    with pytest.raises(InvalidRequest, match=r"^prompt\.[01] has nothing to translate$"):
        await said(script, prompt=prompt)
    assert script.asked is None


async def test_echo_is_refused() -> None:
    with pytest.raises(Unsupported, match="echo: the tokens of a source have no log-probabilities"):
        await said(Script(), prompt="A word.", echo=True)


def test_more_sentences_than_a_request_may_have_outputs_are_refused() -> None:
    assert len(texts_of(GenerateRequest(prompt=("Hi. " * 32,), n=4))[0].sources) == 32
    for prompt, param in ((("Hi. " * 33,), "prompt.0"), (("Hi. " * 20, "Ho. " * 13), "prompt.1")):
        with pytest.raises(TooLarge, match=f"{param} brings more than 32 sentences, .* with n 4") as caught:
            texts_of(GenerateRequest(prompt=prompt, n=4))
        assert caught.value.param == param


async def test_a_long_text_is_split_like_a_short_one() -> None:
    word = "x" * LONG_TO_SPLIT
    script = Script([Finish(0, "stop", "a"), Finish(1, "stop", "b")])
    assert (await said(script, prompt=f"{word}. Y."))[1] == Finish(0, "stop", "a b")
    with pytest.raises(InvalidRequest, match=r"prompt\.0 has nothing"):
        await said(script, prompt=" " * (LONG_TO_SPLIT + 1))


async def test_prompts_that_are_sentences_are_asked_for_as_they_are() -> None:
    request = GenerateRequest(prompt=["A word.", [3, 4], "B word."], n=2)
    script = Script([Token(5, 1, "x"), Finish(5, "length", " y")])
    events = [event async for event in translate(script, request, Call("id", "/", time.monotonic() + 10))]
    assert script.asked is request
    assert events == [START, Token(5, 1, "x"), Finish(5, "length", " y"), END]


@pytest.mark.parametrize("prompt", ["Hi.", "Hi. Ho."])
async def test_leaving_closes_the_generator(prompt: str) -> None:
    script = Script([Token(0, 1, "a"), Finish(0, "stop")])
    events = translate(script, GenerateRequest(prompt=prompt), Call("id", "/", time.monotonic() + 10))
    assert await anext(events) == START
    await events.aclose()
    assert script.is_closed
