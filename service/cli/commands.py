"""The commands that ask a model: from flags to a request, and from what comes back to lines in a terminal.

Planning reads the input and checks the request, so that what is wrong with it is said before a model is opened.
"""

import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import orjson
from pydantic import ValidationError

from service.cli.client import Answers
from service.cli.maps import Picture, picture_of, table_of
from service.domain import (
    AttentionRequest,
    Call,
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
from service.errors import ConfigError
from service.validation import invalid

CHUNK = 64  # texts in one request; more wait for their turn
_STDIN = "-"

Options = Mapping[str, Any]
Request = TypeVar("Request", ClassifyRequest, GenerateRequest, AttentionRequest)


@dataclass(frozen=True)
class Plan:
    """`tasks` of models that can do it, the likeliest first; `run` asks one and prints."""

    tasks: tuple[str, ...]
    run: Callable[[Answers, Call], Awaitable[None]]


def plan(command: str, options: Options) -> Plan:
    """Raises InvalidRequest, which names the field, and ConfigError."""
    plans = {"classify": _classify, "generate": _generate, "translate": _translate, "attention": _attention}
    return plans[command](options)


def _classify(options: Options) -> Plan:
    requests = [
        _request(ClassifyRequest, options, input=[TextInput(text) for text in chunk])
        for chunk in _chunks(_texts(options))
    ]

    async def run(backend: Answers, call: Call) -> None:
        for request in requests:
            result = await backend.classify(request, call)
            if options["json"]:
                _print(orjson.dumps(result).decode())
                continue
            for text, scores in zip(request.input, result.results, strict=True):
                best = "  ".join(f"{one.label} {one.score:.4f}" for one in scores[: request.top_k or 1])
                _print(f"{best}  {text.text}")

    return Plan(("classification",), run)


def _generate(options: Options) -> Plan:
    text = _text(options)
    if options["chat"] or options["system"] is not None:
        system = [] if options["system"] is None else [Message("system", options["system"])]
        request = _request(GenerateRequest, options, messages=(*system, Message("user", text)))
    else:
        request = _request(GenerateRequest, options, prompt=text)

    async def run(backend: Answers, call: Call) -> None:
        async with aclosing(backend.generate(request, call)) as events:
            async for event in events:
                if isinstance(event, (Token, Finish)):
                    _print(event.text, end="")
        _print("")

    return Plan(generation_tasks(request), run)


def _translate(options: Options) -> Plan:
    """A line without words has no tokens to translate, and stays as it is."""
    texts, tasks = _texts(options), ("translation",)
    with_words = [text for text in texts if text.strip()]
    options = {"max_tokens": None, **options}  # as many as a translation takes
    requests = [_request(GenerateRequest, options, prompt=chunk) for chunk in _chunks(with_words)]

    async def run(backend: Answers, call: Call) -> None:
        model = choose_model(await backend.models(), tasks, options.get("model")).id
        translations = (
            text for request in requests for text in await _whole(backend, replace(request, model=model), call)
        )
        for text in texts:
            _print(await anext(translations) if text.strip() else text)

    return Plan(tasks, run)


async def _whole(backend: Answers, request: GenerateRequest, call: Call) -> list[str]:
    """All outputs of `request`."""
    outputs = [""] * request.num_outputs
    async with aclosing(backend.generate(request, call)) as events:
        async for event in events:
            if isinstance(event, (Token, Finish)):
                outputs[event.index] += event.text
    return outputs


def _attention(options: Options) -> Plan:
    reduce = options.get("reduce", "none" if "heads" in options else "mean")
    request = _request(AttentionRequest, options, text=_text(options), reduce=reduce)
    save = _to_file(Path(options["png"])) if options["png"] is not None else None

    async def run(backend: Answers, call: Call) -> None:
        picture = picture_of(request, await backend.attention(request, call))
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
        raise ConfigError(
            "--png needs matplotlib: pip install 'attnd[plot]'; without --png a table is printed"
        ) from None
    return partial(save_png, path=path)


def _request(kind: type[Request], options: Options, **own: Any) -> Request:
    """Of `kind`, with its `own` fields over those of its flags that were given. Raises InvalidRequest."""
    given = {one.name: options[one.name] for one in fields(kind) if one.name in options}
    try:
        return kind(**{**given, **own})
    except ValidationError as error:
        raise invalid(error) from None


def _texts(options: Options) -> Sequence[str]:
    """Those given, or each line of standard input."""
    texts: list[str] = options["texts"]
    return [line.rstrip("\n") for line in sys.stdin] if texts in ([], [_STDIN]) else texts


def _text(options: Options) -> str:
    """The one given, or all of standard input but its last line's end."""
    text: str | None = options["text"]
    return sys.stdin.read().removesuffix("\n") if text in (None, _STDIN) else text


def _chunks(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    yield from (texts[at : at + CHUNK] for at in range(0, len(texts), CHUNK))


def _print(text: str, end: str = "\n") -> None:
    print(text, end=end, flush=True)
