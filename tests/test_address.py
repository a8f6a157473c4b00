"""How addresses are written, and what is said when one cannot be listened on."""

import errno
import os
import socket

import pytest

from service.address import address_text, addresses_of, listening
from service.errors import ConfigError


@pytest.mark.parametrize(
    ("host", "text"),
    [("127.0.0.1", "127.0.0.1:1"), ("a.b", "a.b:1"), ("::1", "[::1]:1"), ("fe80::1%eth0", "[fe80::1%eth0]:1")],
)
def test_only_ipv6_has_brackets(host: str, text: str) -> None:
    assert address_text(host, 1) == text


async def test_an_address_stands_for_itself() -> None:
    assert await addresses_of("127.0.0.1") == ["127.0.0.1"]
    assert await addresses_of("::1") == ["::1"]
    assert {"127.0.0.1", "::1"} & set(await addresses_of("localhost"))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.EADDRINUSE, "('::1', 7) is in use"), os.strerror(errno.EADDRINUSE)),
        (socket.gaierror(socket.EAI_NONAME, "no such name"), "no such name"),
        (OSError("no address was bound"), "no address was bound"),
        (UnicodeError("the label is too long"), "the label is too long"),
    ],
)
def test_what_cannot_be_listened_on_is_named(error: Exception, reason: str) -> None:
    with pytest.raises(ConfigError) as caught, listening("HTTP", "::1", 7):
        raise error
    assert caught.value.message == f"cannot listen for HTTP on [::1]:7: {reason}"
