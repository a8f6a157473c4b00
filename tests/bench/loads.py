"""Runs a load generator as a process of its own and reads back one sample.

wrk for REST, `generator` for gRPC and Poisson arrivals, `stream_generator` for generation. Knows how each is called;
nothing of servers or of what is compared with what.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .figures import Latency, Sample, sample_from
from .generator import Load
from .stream_generator import StreamLoad
from .streams import StreamSample, stream_sample_from


class LoadFailed(Exception):
    """The generator could not be run, or printed no result."""


def module_command(name: str) -> tuple[list[str], Path]:
    """How to run a sibling module as a process: its command, and the directory to run it in."""
    package = __package__ or ""
    top = Path(__file__).resolve().parents[len(package.split("."))]
    return [sys.executable, "-m", f"{package}.{name}"], top


def run_module(name: str, described: Any) -> Any:
    """Run a sibling module as a process on `described` as JSON; what its last line says. Raises LoadFailed."""
    command, directory = module_command(name)
    finished = subprocess.run(
        command, cwd=directory, input=json.dumps(described), capture_output=True, text=True, check=False
    )
    if finished.returncode != 0:
        raise LoadFailed(f"{name} failed: {finished.stderr.strip()[-500:]}")
    return json.loads(finished.stdout.splitlines()[-1])


def run_generator(load: Load) -> Sample:
    return sample_from(run_module("generator", asdict(load)))


def run_streams(load: StreamLoad) -> StreamSample:
    return stream_sample_from(run_module("stream_generator", asdict(load)))


def has_wrk() -> bool:
    return shutil.which("wrk") is not None


def run_wrk(url: str, bodies: Path, *, concurrency: int, seconds: float, start: int = 0) -> Sample:
    """A closed loop with wrk on one thread. `bodies` holds one JSON body a line; wrk takes whole seconds only."""
    script = Path(__file__).with_name("wrk.lua")
    command = ["wrk", "-t1", f"-c{concurrency}", f"-d{max(1, round(seconds))}s", "--timeout", "20s"]
    command += ["-s", str(script), url, "--", str(bodies), str(start)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        printed, complaints = process.stdout.read(), process.stderr.read()
        # wait4 gives this one child's CPU time, which subprocess does not.
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    found = [line for line in printed.splitlines() if line.startswith('{"requests"')]
    if process.returncode != 0 or not found:
        raise LoadFailed(f"wrk failed: {(complaints or printed).strip()[-500:]}")
    return _wrk_sample(json.loads(found[0]), used.ru_utime + used.ru_stime)


def _wrk_sample(found: dict[str, Any], cpu_seconds: float) -> Sample:
    elapsed = found["microseconds"] / 1e6
    faults = {fault: num for fault, num in found["faults"].items() if num}
    answered = found["requests"] - sum(faults.values())
    latency = Latency(**{name: found[name] / 1e6 for name in ("mean", "p50", "p90", "p99", "worst")})
    return Sample(
        rate=answered / elapsed,
        latency=latency,
        requests=answered,
        faults=faults,
        client_cpu=cpu_seconds / elapsed,
    )
