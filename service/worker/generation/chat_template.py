"""The turns of a chat -> one text, as the model's own Jinja template says. The only file that imports jinja2.

A template comes with a bundle and is data: it runs in Jinja's sandbox, which refuses attributes that lead to Python's
insides, and it may not write more than its turns warrant. What a hostile one could still waste is time and memory on
the way: nothing counts its loops, and not every function that makes long texts is kept from it.
"""

import json
import operator
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateSyntaxError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from service.domain import Message
from service.errors import BundleError, EngineFailed, InvalidRequest, TooLarge

MOST_CHARACTERS = 65_536  # that a template may write of its own, and
MOST_OF_A_TURN = 1_024  # for each turn, besides
MOST_COPIES = 4  # of what the turns say
MOST_OF_A_REASON = 200  # characters; a status of gRPC has little room
WASTEFUL = ("center", "format", "indent", "wordwrap")  # filters that make much of nothing


class Refused(Exception):
    """The template called raise_exception."""


def raise_exception(message: str) -> NoReturn:
    raise Refused(message)


def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Not Jinja's own, which escapes what HTML would not take."""
    if indent is not None and not 0 <= indent <= 16:
        raise ValueError(f"tojson: indent is {indent}, it must be 0 to 16")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


def times(left: Any, right: Any) -> Any:
    """left * right, which must not make a long text of a short one."""
    for text, count in ((left, right), (right, left)):
        if isinstance(text, (str, list, tuple)) and isinstance(count, int) and len(text) * count > MOST_CHARACTERS:
            raise ValueError(f"a product of {len(text)} characters and {count} is over {MOST_CHARACTERS}")
    return operator.mul(left, right)


def power(left: Any, right: Any) -> Any:
    """left ** right of numbers that stay small."""
    if abs(left) > 2**16 or abs(right) > 64:
        raise ValueError(f"{left} ** {right} is too large")
    return operator.pow(left, right)


def sandbox() -> ImmutableSandboxedEnvironment:
    """White space as chat templates expect it, and the functions that they may call."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    environment.globals.pop("lipsum")
    for name in WASTEFUL:
        environment.filters.pop(name)
    environment.intercepted_binops = frozenset({"*", "**"})
    environment.binop_table |= {"*": times, "**": power}
    return environment


class ChatTemplate:
    """Thread-safe. `bos_token` and `eos_token` are the texts that the template may write for them."""

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "") -> None:
        """Raises BundleError if `source` is no template."""
        try:
            self._template = sandbox().from_string(source)
        except TemplateSyntaxError as error:
            raise BundleError(f"the chat template, line {error.lineno}: {error.message}") from error
        self._constants = {"bos_token": bos_token, "eos_token": eos_token, "tools": None, "documents": None}

    def render(self, messages: Sequence[Message], *, quote: Callable[[str], str] = str) -> str:
        """The prompt, up to where the model is to speak; `quote` is applied to what the turns say.

        Raises InvalidRequest if the template refuses these turns, TooLarge if it writes too much, EngineFailed if it
        does not work.
        """
        turns = [{"role": message.role, "content": quote(message.content)} for message in messages]
        limit = MOST_CHARACTERS + sum(MOST_OF_A_TURN + MOST_COPIES * len(turn["content"]) for turn in turns)
        pieces = self._template.generate(messages=turns, add_generation_prompt=True, **self._constants)
        try:
            return "".join(limited(pieces, limit))
        except Refused as error:
            raise InvalidRequest(f"the model's chat template refuses this: {_told(error)}", param="messages") from error
        except TooLarge:
            raise
        except Exception as error:  # whatever Python raises for a template's mistake
            name = type(error).__name__
            raise EngineFailed(f"the model's chat template failed: {name}: {_told(error)}") from error


def _told(error: Exception) -> str:
    """What a template says of why, which may repeat turns: without halves of surrogate pairs, which nothing can carry.

    What the turns say may be quoted with such halves; see prompt_tokenizer.py.
    """
    reason = str(error).encode(errors="ignore").decode()
    return reason if len(reason) <= MOST_OF_A_REASON else reason[:MOST_OF_A_REASON] + "..."


def limited(pieces: Iterator[str], limit: int) -> Iterator[str]:
    """Raises TooLarge once there are more than `limit` characters."""
    num_characters = 0
    for piece in pieces:
        num_characters += len(piece)
        if num_characters > limit:
            raise TooLarge(f"the model's chat template wrote over {limit} characters", param="messages")
        yield piece
