"""Log lines as JSON objects on stderr, one a line: `time level logger message`, and the request line's own fields."""

import asyncio
import json
import logging
import os
import select
import sys
import time
from typing import Any

import orjson

STDERR = 2


def _encoded(line: dict[str, Any]) -> bytes:
    """In JSON, whatever is in it."""
    try:
        return orjson.dumps(line, default=str)
    except TypeError:  # half a surrogate pair, a number of over 64 bits: these it leaves to the library
        return json.dumps(line, default=str).encode()


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": round(record.created, 6),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return _encoded(line).decode()


def configure_logging(level: str) -> None:
    """Send everything from `level` up to stderr; other libraries only from warning up."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("attnd").setLevel(level.upper())


class RequestLog:
    """One line a request. Past the logging module, which would cost as much as the rest of the HTTP edge.

    What one turn of the event loop brings leaves together, since in each system call the engine's threads may take the
    interpreter; but never so much that a pipe would let another process's lines in between.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[float, dict[str, object]]] = []

    def write(self, fields: dict[str, object]) -> None:
        """Called on the event loop."""
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._flush)
        self._waiting.append((time.time(), fields))

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        data = b""
        for now, fields in waiting:
            about = {"time": round(now, 6), "level": "info", "logger": "attnd.requests", "message": "request"}
            line = _encoded(about | fields) + b"\n"
            if data and len(data) + len(line) > select.PIPE_BUF:
                os.write(STDERR, data)
                data = b""
            data += line
        os.write(STDERR, data)
