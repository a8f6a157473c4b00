"""The request lines on stderr, through a pair of sockets that keeps the bounds of what was written."""

import asyncio
import json
import logging
import select
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from service import logs
from service.logs import RequestLog


@pytest.fixture
def stderr(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Where the lines arrive; each write is one message."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    here.setblocking(False)
    with here, there:
        monkeypatch.setattr(logs, "STDERR", there.fileno())
        yield here


def arrived(stderr: socket.socket) -> list[bytes]:
    """What was written since, a piece a write."""
    written = []
    while select.select([stderr], [], [], 0)[0]:
        written.append(stderr.recv(1_000_000))
    return written


def lines(written: list[bytes]) -> list[dict[str, Any]]:
    assert all(data.endswith(b"\n") for data in written)
    return [json.loads(line) for data in written for line in data.splitlines()]


async def test_a_line_has_the_fields_after_when_and_what(stderr: socket.socket) -> None:
    RequestLog().write({"request_id": "r1", "total_seconds": 0.25})
    await asyncio.sleep(0)
    (line,) = lines(arrived(stderr))
    assert list(line) == ["time", "level", "logger", "message", "request_id", "total_seconds"]
    assert (line["level"], line["logger"], line["request_id"]) == ("info", "attnd.requests", "r1")


async def test_the_lines_of_one_turn_are_written_together_and_in_order(stderr: socket.socket) -> None:
    log = RequestLog()
    for turn in range(2):
        for number in range(3):
            log.write({"number": 3 * turn + number})
        await asyncio.sleep(0)
    written = arrived(stderr)
    assert len(written) == 2
    assert [line["number"] for line in lines(written)] == list(range(6))


async def test_no_write_is_more_than_a_pipe_takes_at_once(stderr: socket.socket) -> None:
    log = RequestLog()
    for number in range(20):
        log.write({"number": number, "text": "x" * 500})
    await asyncio.sleep(0)
    written = arrived(stderr)
    assert 2 < len(written) < 20
    assert all(len(data) <= select.PIPE_BUF for data in written)
    assert [line["number"] for line in lines(written)] == list(range(20))


async def test_a_line_that_is_longer_by_itself_is_written_alone(stderr: socket.socket) -> None:
    log = RequestLog()
    for size in (5000, 1, 5000):
        log.write({"text": "x" * size})
    await asyncio.sleep(0)
    assert [len(line["text"]) for line in lines(arrived(stderr))] == [5000, 1, 5000]


async def test_a_line_that_is_hard_to_write_costs_no_other(stderr: socket.socket) -> None:
    log, values = RequestLog(), ["a", "half a pair: \udfff", 2**80, "b"]
    for value in values:
        log.write({"value": value})
    await asyncio.sleep(0)
    assert [line["value"] for line in lines(arrived(stderr))] == values


def test_a_message_that_is_hard_to_write_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    handlers, level = logging.root.handlers, logging.getLogger("attnd").level
    try:
        logs.configure_logging("info")
        logging.getLogger("attnd").info("half a pair: \udfff")
    finally:
        logging.root.handlers = handlers
        logging.getLogger("attnd").setLevel(level)
    assert json.loads(capsys.readouterr().err)["message"] == "half a pair: \udfff"


async def test_a_write_that_fails_loses_its_own_lines_only(
    stderr: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, about: told.append(about))
    log, good = RequestLog(), logs.STDERR
    monkeypatch.setattr(logs, "STDERR", -1)
    log.write({"number": 1})
    await asyncio.sleep(0)
    monkeypatch.setattr(logs, "STDERR", good)
    log.write({"number": 2})
    await asyncio.sleep(0)
    assert [line["number"] for line in lines(arrived(stderr))] == [2]
    assert isinstance(told[0]["exception"], OSError)
