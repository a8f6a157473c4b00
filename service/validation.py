"""A failed pydantic validation, said as one `InvalidRequest` that names the field, the reason and the value."""

import re
from typing import Any

from pydantic import ValidationError

from service.errors import InvalidRequest

_SAYS_ALL = ("missing", "unexpected_keyword_argument", "extra_forbidden")  # kinds of failure that are not of a value
_TUPLE = re.compile(r"\btuple\b", re.IGNORECASE)  # what becomes of a caller's list
_SHOWN = 60  # characters of a value or a field's name that an error repeats


def _shown(value: Any) -> str:
    return _cut(repr(list(value) if isinstance(value, tuple) else value))


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def _path(location: tuple[int | str, ...]) -> str:
    return _cut(".".join(str(part) for part in location if part != "[key]"))


def invalid(error: ValidationError) -> InvalidRequest:
    """The first failure of `error` in words; how many more there are is said too."""
    first, *others = error.errors(include_url=False, include_context=False)
    if first["type"] == "json_invalid":
        return InvalidRequest(
            f"the body is not valid JSON: {first['msg'].removeprefix('Invalid JSON: ')}", code="invalid_json"
        )
    path = _path(first["loc"])
    where = path or "the body"
    is_empty = first["type"] == "too_short"  # no list has another least length than one
    reason = "at least one is needed, got none" if is_empty else _TUPLE.sub("list", first["msg"])
    reason = reason.removeprefix("Value error, ").replace(" after validation", "")
    # A list whose only item failed is also "too short": one problem, not two.
    others = [other for other in others if other["loc"] != first["loc"][: len(other["loc"])]]
    more = f" ({len(others)} more problem{'s' if len(others) > 1 else ''})" if others else ""
    got = "" if is_empty or first["type"] in _SAYS_ALL or not path else f", got {_shown(first['input'])}"
    return InvalidRequest(f"{where}: {reason[0].lower()}{reason[1:]}{got}{more}", param=path or None)
