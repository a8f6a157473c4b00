"""Why requests failed: counted by kind, put together over rounds, said in lines.

A fault is a line of text; what is before its first colon is its kind. Knows no wire and no server.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Protocol

Faults = Mapping[str, int]

LONGEST_TEXT = 200  # characters that are kept of a reply that was no success


class Sampled(Protocol):
    """What a sample of any load has."""

    @property
    def faults(self) -> Faults: ...


def status_fault(status: int, body: bytes) -> str:
    """Of a reply that was no success: its status, and how its body begins."""
    return f"status {status}: {body[:LONGEST_TEXT].decode(errors='replace')}"


def lost_fault(error: Exception | None) -> str:
    """Of a request whose connection was lost before the whole reply had come."""
    return f"the connection was lost: {error or 'closed by the server'}"


def counted(faults: Iterable[str]) -> dict[str, int]:
    """How many of each kind, the most frequent first; a kind is told as it first came."""
    first: dict[str, str] = {}
    kinds = Counter(first.setdefault(fault.partition(":")[0], fault) for fault in faults)
    return dict(kinds.most_common())


def by_point(samples: Mapping[str, Iterable[Sampled]]) -> dict[str, dict[str, int]]:
    """What went wrong over all rounds, of the points at which anything did."""
    merged = {
        point: counted(chain.from_iterable(Counter(sample.faults).elements() for sample in found))
        for point, found in samples.items()
    }
    return {point: faults for point, faults in merged.items() if faults}


def fault_lines(found: Mapping[str, Faults]) -> list[str]:
    """What `by_point` gives, a line each."""
    return [f"{point}: {num} x {fault}" for point, faults in found.items() for fault, num in faults.items()]


def outcry(sample: Sampled) -> str:
    """What follows a sample's figures while the run goes on: nothing, if nothing went wrong."""
    return "".join(f"  {num} ERRORS: {fault}" for fault, num in sample.faults.items())
