"""What this process may use of the machine: threads and memory, cut to what its container allows, and instructions."""

import os
from collections.abc import Iterator, Set
from pathlib import Path

VNNI = frozenset({"avx512_vnni", "avx_vnni"})  # as Linux calls them


def available_threads(root: Path = Path("/")) -> int:
    """How many threads can run at once: the processors this process may use, cut to the container's CPU quota.

    ONNX Runtime counts the host's processors instead and would start too many. `root` is where /proc and /sys are.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for quota in _quotas(root) if quota is not None]
    return max(1, min([affinity, *(int(quota) for quota in quotas)]))


def cores_for(num_threads: int) -> list[Set[int]]:
    """On which processors each of `num_threads` should compute. Linux only.

    Where this process may use as many as there are threads, each has one of its own: moved about, they at times share
    one while another is idle. The first is not the same one for all processes, for it has the most to do.
    """
    cores = sorted(os.sched_getaffinity(0))
    if num_threads != len(cores):
        return [set(cores)] * num_threads
    first = os.getpid() % len(cores)
    return [{core} for core in cores[first:] + cores[:first]]


def _quotas(root: Path) -> Iterator[float | None]:
    """CPU quotas, in processors, of this process's cgroup and of those above it; None where there is no limit."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield from (_quota_v2(group) for group in _upwards(root / "sys/fs/cgroup", path))
        elif "cpu" in controllers.split(","):
            yield from (_quota_v1(group) for group in _upwards(root / "sys/fs/cgroup/cpu", path))


def _upwards(mount: Path, path: str) -> list[Path]:
    """The directories of a cgroup and its parents. Inside a container only the mount itself may be visible."""
    group = mount / path.lstrip("/")
    return [group, *(parent for parent in group.parents if parent.is_relative_to(mount))]


def _quota_v2(group: Path) -> float | None:
    fields = _read(group / "cpu.max").split()  # "150000 100000" or "max 100000", microseconds
    return int(fields[0]) / int(fields[1]) if len(fields) == 2 and fields[0] != "max" else None


def _quota_v1(group: Path) -> float | None:
    quota, period = _read(group / "cpu.cfs_quota_us").strip(), _read(group / "cpu.cfs_period_us").strip()
    return int(quota) / int(period) if quota and period and int(quota) > 0 else None


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes; None where the system does not say. `root` is where /proc and /sys are."""
    found = [*_machine(root), *_container(root)]
    return min(found, default=None)


def _machine(root: Path) -> Iterator[int]:
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024  # "MemAvailable:   18000000 kB"


def _container(root: Path) -> Iterator[int]:
    """What the limits of this process's control groups (version 2) and of those above it leave."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers:
            continue
        for group in _upwards(root / "sys/fs/cgroup", path):
            limit, used = _read(group / "memory.max").strip(), _read(group / "memory.current").strip()
            if limit.isdigit() and used.isdigit():
                yield max(0, int(limit) - int(used))


def has_vnni(root: Path = Path("/")) -> bool:
    """Whether an x86 processor has instructions that sum products of bytes in 32 bits; False where nothing says so."""
    lines = _read(root / "proc/cpuinfo").splitlines()
    return any(line.startswith("flags") and not VNNI.isdisjoint(line.split()) for line in lines)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
