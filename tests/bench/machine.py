"""What a run says: its progress, and the machine that its figures depend on."""

import os
import platform
import sys
from pathlib import Path
from typing import Any


def say(line: str) -> None:
    """Progress goes to stderr: stdout is the result."""
    print(line, file=sys.stderr, flush=True)


def machine() -> dict[str, Any]:
    cpu = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")]
    return {"cpu": names[0] if names else platform.processor(), "cores": len(os.sched_getaffinity(0))}
