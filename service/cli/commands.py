"""The commands that ask a model: from flags to a request, and from what comes back to lines in a terminal.

Planning reads the input and checks the request, so that what is wrong with it is said before a model is opened.
"""

import re
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import orjson
from pydantic import ValidationError

from service.cli.client import Answers
from service.cli.lines import Line, about, in_order, patiently
from service.cli.maps import Picture, picture_of, table_of
from service.domain import (
    AttentionRequest,
    Call,
    Classification,
    ClassifyRequest,
    Finish,
    GenerateRequest,
    Message,
    TextInput,
    Token,
    attention_tasks,
    choose_model,
    generation_tasks,
)
from service.errors import AttndError, ConfigError, InvalidRequest, TooLarge
from service.validation import invalid

CHUNK = 64  # texts to label in one request; more wait for their turn
PLACES = 64  # outputs and beams to translate that are under way at once; a server's queue has 256 for all its callers
_STDIN = "-"
_SENTENCE_ENDS = re.compile(r"[.!?]\s|\n")

Options = Mapping[str, Any]
Request = TypeVar("Request", ClassifyRequest, GenerateRequest, AttentionRequest)


@dataclass(frozen=True)
class Plan:
    """`tasks` of models that can do it, the likeliest first; `run` asks one, so many seconds a request, and prints."""

    tasks: tuple[str, ...]
    run: Callable[[Answers, float], Awaitable[None]]


def plan(command: str, options: Options) -> Plan:
    """Raises InvalidRequest, which names the field, and ConfigError."""
    plans = {"classify": _classify, "generate": _generate, "translate": _translate, "attention": _attention}
    return plans[command](options)


def _classify(options: Options) -> Plan:
    """A server may take fewer texts at once than it is sent: then it is asked about either half of them."""
    lines = _lines(options)
    requests = [
        _request(ClassifyRequest, options, input=[TextInput(line.text) for line in chunk]) for chunk in _chunks(lines)
    ]

    async def run(backend: Answers, timeout_s: float) -> None:
        waiting, num_told = deque(requests), 0
        while waiting:
            request = waiting.popleft()
            try:
                result = await patiently(partial(backend.classify, request), _call(timeout_s))
            except TooLarge as error:
                if len(request.input) == 1:
                    raise about(lines[num_told], error) from None
                waiting.extendleft(reversed(_halves(request)))
                continue
            num_told += len(request.input)
            _print_labels(request, result, as_json=options["json"])

    return Plan(("classification",), run)


def _halves(request: ClassifyRequest) -> tuple[ClassifyRequest, ClassifyRequest]:
    middle = len(request.input) // 2
    return replace(request, input=request.input[:middle]), replace(request, input=request.input[middle:])


def _print_labels(request: ClassifyRequest, result: Classification, *, as_json: bool) -> None:
    if as_json:
        _print(orjson.dumps(result).decode())
        return
    for text, scores in zip(request.input, result.results, strict=True):
        best = "  ".join(f"{one.label} {one.score:.4f}" for one in scores[: request.top_k or 1])
        _print(f"{best}  {text.text}")


def _generate(options: Options) -> Plan:
    text = _text(options)
    if options["chat"] or options["system"] is not None:
        system = [] if options["system"] is None else [Message("system", options["system"])]
        request = _request(GenerateRequest, options, messages=(*system, Message("user", text)))
    else:
        request = _request(GenerateRequest, options, prompt=text)

    async def run(backend: Answers, timeout_s: float) -> None:
        async with aclosing(backend.generate(request, _call(timeout_s))) as events:
            async for event in events:
                if isinstance(event, (Token, Finish)):
                    _print(event.text, end="")
        _print("")

    return Plan(generation_tasks(request), run)


def _translate(options: Options) -> Plan:
    """A line without a letter has nothing to translate, and stays as it is."""
    lines, tasks = _lines(options), ("translation",)
    options = {"max_tokens": None, **options}  # as many as a translation takes
    request = _request(GenerateRequest, options, prompt="")  # in whose place each line is put

    async def run(backend: Answers, timeout_s: float) -> None:
        model = choose_model(await backend.models(), tasks, request.model).id

        async def translation(line: Line) -> str:
            ask = partial(_whole, backend, replace(request, prompt=(line.text,), model=model))
            try:
                return await patiently(ask, replace(_call(timeout_s), wants_tokens=False))
            except AttndError as error:
                raise about(line, error) from None

        def num_places(line: Line) -> int:
            return request.num_beams * _num_sentences(line.text)

        with_words = [line for line in lines if _has_letter(line.text)]
        async with aclosing(in_order(with_words, translation, size=num_places, most=PLACES)) as translations:
            for line in lines:
                _print(await anext(translations) if _has_letter(line.text) else line.text)

    return Plan(tasks, run)


def _has_letter(text: str) -> bool:
    return any(map(str.isalpha, text))


def _num_sentences(text: str) -> int:
    """About as many as `text` has; a server looks more closely."""
    return 1 + len(_SENTENCE_ENDS.findall(text))


async def _whole(backend: Answers, request: GenerateRequest, call: Call) -> str:
    """The only output of `request`."""
    async with aclosing(backend.generate(request, call)) as events:
        return "".join([event.text async for event in events if isinstance(event, (Token, Finish))])


def _attention(options: Options) -> Plan:
    reduce = options.get("reduce", "none" if "heads" in options else "mean")
    request = _request(AttentionRequest, options, text=_text(options), reduce=reduce)
    save = _to_file(Path(options["png"])) if options["png"] is not None else None

    async def run(backend: Answers, timeout_s: float) -> None:
        picture = picture_of(request, await backend.attention(request, _call(timeout_s)))
        if save is not None:
            save(picture)
        else:
            _print("\n".join(table_of(picture)))

    return Plan(attention_tasks(request), run)


def _to_file(path: Path) -> Callable[[Picture], None]:
    """What draws into the file at `path`. Raises ConfigError at once when it will not be able to."""
    try:
        from service.cli.heatmap import save_png
    except ImportError:
        raise ConfigError("--png needs matplotlib: pip install matplotlib; without --png a table is printed") from None
    return partial(save_png, path=path)


def _request(kind: type[Request], options: Options, **own: Any) -> Request:
    """Of `kind`, with its `own` fields over those of its flags that were given. Raises InvalidRequest."""
    given = {one.name: options[one.name] for one in fields(kind) if one.name in options}
    try:
        return kind(**{**given, **own})
    except ValidationError as error:
        raise invalid(error) from None


def _call(timeout_s: float) -> Call:
    """One for each request: a file may take longer than a line."""
    return Call(uuid4().hex, "command line", time.monotonic() + timeout_s)


def _lines(options: Options) -> list[Line]:
    """The texts given, or each line of standard input. Raises InvalidRequest."""
    texts: list[str] = options["texts"]
    is_read = texts in ([], [_STDIN])
    given = [line.rstrip("\n") for line in _standard_input()] if is_read else texts
    kind = "line" if is_read else "text"
    return [Line(place := f"{kind} {number}", _utf8(text, place)) for number, text in enumerate(given, 1)]


def _text(options: Options) -> str:
    """The one given, or all of standard input but its last line's end. Raises InvalidRequest."""
    text: str | None = options["text"]
    if text in (None, _STDIN):
        return _utf8("".join(_standard_input()).removesuffix("\n"), "standard input")
    return _utf8(text, "the text")


def _standard_input() -> list[str]:
    try:
        return list(sys.stdin)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"standard input is not {error.encoding.upper()}: {error.reason}") from None


def _utf8(text: str, place: str) -> str:
    """`text`. Raises InvalidRequest, which names the `place`, where bytes were no UTF-8: no request can carry them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(f"{place} is not UTF-8") from None
    return text


def _chunks(lines: Sequence[Line]) -> Iterator[Sequence[Line]]:
    yield from (lines[at : at + CHUNK] for at in range(0, len(lines), CHUNK))


def _print(text: str, end: str = "\n") -> None:
    print(text, end=end, flush=True)
