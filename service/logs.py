"""Log lines as JSON objects on stderr, one a line: `time level logger message`, and the request line's own fields."""

import logging
import os
import sys
import time
from typing import Any

import orjson

STDERR = 2


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
        return orjson.dumps(line, default=str).decode()


def configure_logging(level: str) -> None:
    """Send everything from `level` up to stderr; other libraries only from warning up."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("attnd").setLevel(level.upper())


def write_request_line(fields: dict[str, object]) -> None:
    """One line for one request. Past the logging module, which would cost as much as the rest of the HTTP edge."""
    line = {"time": round(time.time(), 6), "level": "info", "logger": "attnd.requests", "message": "request"}
    os.write(STDERR, orjson.dumps(line | fields, option=orjson.OPT_APPEND_NEWLINE))
