"""Real `python -m service` processes, to be tested from outside."""

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import IO

import httpx
import pytest

ROOT = Path(__file__).parents[1]
READY_TIMEOUT_S = 120  # a limit for what never comes, not an expectation
EXIT_TIMEOUT_S = 60


def _has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


needs_ipv6 = pytest.mark.skipif(not _has_ipv6(), reason="needs IPv6")


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without settings of ours that happen to be set, and with `extra`."""
    return {key: value for key, value in os.environ.items() if not key.startswith("ATTND_")} | dict(extra or {})


def attnd(*arguments: str, extra: Mapping[str, str] | None = None, given: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command to its end; `given` is its standard input."""
    command = [sys.executable, "-m", "service", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment(extra), input=given, capture_output=True, text=True, timeout=EXIT_TIMEOUT_S
    )


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on just now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


async def _until_ready(process: asyncio.subprocess.Process, port: int) -> None:
    async with asyncio.timeout(READY_TIMEOUT_S), httpx.AsyncClient() as client:
        while True:
            if process.returncode is not None:
                raise RuntimeError(f"the process ended with {process.returncode} before it was ready")
            with contextlib.suppress(httpx.TransportError):
                if (await client.get(f"http://127.0.0.1:{port}/readyz")).status_code == 200:
                    return
            await asyncio.sleep(0.05)


async def until_draining(client: httpx.AsyncClient) -> None:
    """Return once /readyz says that the process cannot serve; fails when it does not answer."""
    async with asyncio.timeout(EXIT_TIMEOUT_S):
        while (await client.get("/readyz")).status_code != 503:  # noqa: ASYNC110 - a probe is all that there is
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def running(
    *arguments: str, ready_port: int, stderr: IO[bytes] | None = None
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process that answers on /readyz of `ready_port`; killed at the end if it still runs."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "service", *arguments, cwd=ROOT, env=environment(), stderr=stderr
    )
    try:
        await _until_ready(process, ready_port)
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@contextlib.asynccontextmanager
async def serving(*arguments: str) -> AsyncIterator[tuple[int, int]]:
    """`serve` as a process; gives its HTTP and its gRPC port."""
    http_port, grpc_port = free_ports(2)
    flags = (f"--http-port={http_port}", f"--grpc-port={grpc_port}", *arguments)
    async with running("serve", *flags, ready_port=http_port):
        yield http_port, grpc_port
