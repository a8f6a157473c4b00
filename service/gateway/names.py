"""What the callers of a dialect call a request's fields, for errors that are found after their body was read.

A body names a wrong field as it was sent (bodies.py). What the request itself or the model finds is told in the
request's own names, which the caller may never have seen: what they call prompt.0 may have been sent as `inputs`.
"""

import re
from collections.abc import Mapping

from service.errors import InvalidRequest, TooLarge, Unsupported

Names = Mapping[str, str]  # a field as the request calls it, or what its messages say of it -> what its sender does

FieldError = InvalidRequest | TooLarge | Unsupported

SAME: Names = {}
FIELD_ERRORS = (InvalidRequest, TooLarge, Unsupported)  # which tell of a field, if any do


def names_of_items(field: str, number: int, sent: str | None = None) -> dict[str, str]:
    """Of a `field` that counts its items, and the caller's name of it, if another.

    Of one item only, which may have been sent by itself, the number is not told.
    """
    name = field if sent is None else sent
    return {field: name, f"{field}.0": name} if number == 1 else {field: name}


def told_as(names: Names, error: FieldError) -> FieldError:
    """`error` with the caller's names in its param and its message."""
    if not names:
        return error
    param = error.param and _renamed(error.param, names)
    return type(error)(_renamed(error.message, names), param=param, code=error.code)


def _renamed(text: str, names: Names) -> str:
    """`text` with the names that stand there as words of their own replaced; in quotes are values, which stay."""
    longest_first = sorted(names, key=len, reverse=True)
    found = rf"(?<![\w.'\"])({'|'.join(map(re.escape, longest_first))})(?![\w'\"])"
    return re.sub(found, lambda name: names[name[1]], text)
