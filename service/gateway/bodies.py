"""JSON bodies whose fields are those of a request, declared there and nowhere else, and a dialect's own.

So every dialect takes the same types and bounds, names a wrong field by the name that it was sent under, and describes
them in OpenAPI.
"""

from collections.abc import Collection
from dataclasses import MISSING, fields
from typing import Any, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from service.domain import GenerateRequest
from service.gateway.names import FIELD_ERRORS, SAME, Names, told_as
from service.validation import invalid

_STRICT = ConfigDict(extra="forbid", strict=True)

Body = TypeVar("Body", bound=BaseModel)


def body_model(
    name: str, about: str, taken: Collection[str], *, nullable: bool, of: Any = GenerateRequest, **own: Any
) -> type[BaseModel]:
    """A strict model with the fields `taken` from the request class `of`, and its `own`: name=(type, default).

    `nullable`: null means that a field is not given, whatever its type.
    """
    types = get_type_hints(of, include_extras=True)
    defaults = {one.name: _default(one) for one in fields(of)}
    shared: dict[str, Any] = {
        field: (types[field] | None, None) if nullable else (types[field], defaults[field]) for field in taken
    }
    return create_model(name, __config__=_STRICT, __doc__=about, **shared, **own)


def _default(field: Any) -> Any:
    """A dataclass field's default as pydantic wants it: ... where it must be given."""
    if field.default_factory is not MISSING:
        return Field(default_factory=field.default_factory)
    return ... if field.default is MISSING else field.default


def read(model: type[Body], body: bytes) -> Body:
    """Raises InvalidRequest, which names the field."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise invalid(error) from None


def generate_request(values: dict[str, Any], names: Names = SAME) -> GenerateRequest:
    """Raises InvalidRequest when fields that are right by themselves do not go together, under the caller's `names`."""
    try:
        return GenerateRequest(**values)
    except ValidationError as error:
        raise told_as(names, invalid(error)) from None
    except FIELD_ERRORS as error:
        raise told_as(names, error) from None


def given(body: BaseModel, names: Collection[str]) -> dict[str, Any]:
    """Those of the named fields that were sent and are not null."""
    return {name: value for name in names if (value := getattr(body, name)) is not None}
