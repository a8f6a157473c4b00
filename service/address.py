"""Addresses to listen on: how they are written, what a name stands for, and what to say where listening fails."""

import asyncio
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from service.errors import ConfigError


def address_text(host: str, port: int) -> str:
    """HOST:PORT, an IPv6 address in brackets, without which its end would be taken for the port."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def addresses_of(host: str) -> list[str]:
    """The IP addresses that a name stands for, or the address that it is. Raises OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


@contextmanager
def listening(protocol: str, host: str, port: int) -> Iterator[None]:
    """Around what listens: its failure as a ConfigError that names the address, which the system's errors do not."""
    try:
        yield
    except (OSError, UnicodeError) as error:  # the latter: a name that cannot even be looked up
        message = f"cannot listen for {protocol} on {address_text(host, port)}: {_reason(error)}"
        raise ConfigError(message) from None


def _reason(error: OSError | UnicodeError) -> str:
    """The system's own words; those of an event loop repeat the address."""
    if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)
    return getattr(error, "strerror", None) or str(error)
