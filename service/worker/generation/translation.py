"""Texts to translate as sentences, each a source of its own, and their translations as texts again.

Sentences are written side by side, but told in order: what a later one says waits until those before it have ended.
White space and all else without a letter, before, between and behind them, stays as it is. Per sentence are the model's
limit, `max_tokens`, `min_tokens` and `n` (the j-th output of a text consists of each sentence's j-th). An output's
finish_reason is "length" if any sentence's is. A stop string or id ends the output, a string also where it is of more
than one sentence (of one that is to have `min_tokens`, only behind these); what was written meanwhile of later
sentences is in the usage and nowhere else, and when all outputs have been stopped no more is. Token ids are a source as
they are. In the timing, the first token is that of whichever sentence has one first, even if it is told later.
Knows no engine: it makes another request for a generator, and other events of what comes back.
"""

import asyncio
import re
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from itertools import islice
from typing import Protocol

from service.domain import MAX_OUTPUTS, Call, Event, GenerateRequest
from service.errors import InvalidRequest, TooLarge, Unsupported
from service.worker.generation.prompts import num_characters
from service.worker.generation.rejoined import Rejoined, Source, Text
from service.worker.generation.sentences import as_read, sentence_spans

LONG_TO_SPLIT = 65_536  # characters from which on splitting would hold up the event loop (some 10 ms)


class Generates(Protocol):
    """What Generator does."""

    def generate(self, request: GenerateRequest, call: Call) -> AsyncGenerator[Event, None]: ...


def translate(generator: Generates, request: GenerateRequest, call: Call) -> AsyncGenerator[Event, None]:
    """The events of `request`, from a generator that gets its sentences as prompts.

    Raises an AttndError, by this call itself or later; one about a sentence says which it is.
    """
    if request.echo:
        raise Unsupported("echo: the tokens of a source have no log-probabilities", param="echo", code="no_echo")
    texts = None if num_characters(request) > LONG_TO_SPLIT else texts_of(request)
    if texts is not None and sources_of(texts) == request.prompt:
        return generator.generate(request, call)  # each is one sentence, and there is nothing to rejoin
    return _translate_sentences(generator, request, call, texts)


async def _translate_sentences(
    generator: Generates, request: GenerateRequest, call: Call, texts: Sequence[Text] | None
) -> AsyncGenerator[Event, None]:
    """`texts` None: it takes long to find them."""
    if texts is None:
        texts = await asyncio.to_thread(texts_of, request)
    rejoined = Rejoined(texts, request)
    call.progress.is_told_late = True
    sentences = replace(request, prompt=sources_of(texts))
    try:
        async with aclosing(generator.generate(sentences, call)) as events:
            async for event in events:
                for told in rejoined.take(event):
                    yield told
                if rejoined.is_stopped:
                    break
        if rejoined.is_stopped:
            yield rejoined.end(call.progress)
    except (InvalidRequest, TooLarge) as error:
        raise _named(error, texts) from None


def texts_of(request: GenerateRequest) -> list[Text]:
    """Raises InvalidRequest for a prompt without any sentence, TooLarge for more than a request may have outputs."""
    texts: list[Text] = []
    most = left = MAX_OUTPUTS // request.n
    for index, prompt in enumerate(request.prompt or ()):
        text, param = _text(prompt, left + 1), f"prompt.{index}"
        if not text.sources:
            raise InvalidRequest(f"{param} has nothing to translate", param=param)
        left -= len(text.sources)
        if left < 0:
            times = f" with n {request.n}" if request.n > 1 else ""
            message = f"{param} brings more than {most} sentences, the limit of a request{times}"
            raise TooLarge(message, param=param, code="too_many_sentences")
        texts.append(text)
    return texts


def sources_of(texts: Sequence[Text]) -> tuple[Source, ...]:
    return tuple([source for text in texts for source in text.sources])


def _text(prompt: Source, most: int) -> Text:
    """Its first `most` sentences."""
    if not isinstance(prompt, str):
        return Text((prompt,), ("", ""))
    spans = list(islice(sentence_spans(prompt), most))
    ends = [0, *(end for _, end in spans)]
    starts = [*(start for start, _ in spans), len(prompt)]
    spaces = tuple([prompt[end:start] for end, start in zip(ends, starts, strict=True)])
    return Text(tuple([as_read(prompt[start:end]) for start, end in spans]), spaces)


def _named(error: InvalidRequest | TooLarge, texts: Sequence[Text]) -> InvalidRequest | TooLarge:
    """The error of a sentence, which was a prompt to whoever raised it, in terms of the caller's prompts."""
    found = re.fullmatch(r"prompt\.(\d+)", error.param or "")
    if found is None:
        return error
    places = [(index, place) for index, text in enumerate(texts) for place in range(len(text.sources))]
    index, place = places[int(found[1])]
    message = error.message.replace(found[0], f"sentence {place + 1} of prompt.{index}", 1)
    return type(error)(message, param=f"prompt.{index}", code=error.code)
