"""How much memory this process may still take: the machine's, cut to what the container leaves."""

from collections.abc import Iterator
from pathlib import Path


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
        mount = root / "sys/fs/cgroup"
        group = mount / path.lstrip("/")
        for one in (group, *(parent for parent in group.parents if parent.is_relative_to(mount))):
            limit, used = _read(one / "memory.max").strip(), _read(one / "memory.current").strip()
            if limit.isdigit() and used.isdigit():
                yield max(0, int(limit) - int(used))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
