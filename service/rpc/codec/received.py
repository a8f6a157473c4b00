"""Bytes that a caller sent -> the message that they should be."""

from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from service.errors import InvalidRequest

AnyMessage = TypeVar("AnyMessage", bound=Message)


def received(kind: type[AnyMessage], data: bytes) -> AnyMessage:
    """Raises InvalidRequest when `data` is no such message."""
    try:
        return kind.FromString(data)
    except DecodeError:
        raise InvalidRequest(
            f"the message is not a valid {kind.DESCRIPTOR.full_name}", code="invalid_protobuf"
        ) from None
