"""What the three verifiers share: a check, the report of all, and how far what is served lies from the reference.

Knows no bundle and no engine.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Found = tuple[bool, str]  # whether a check passed, and what it found
Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Check:
    name: str
    passed: bool
    found: str


@dataclass(frozen=True)
class Report:
    checks: tuple[Check, ...]
    quality: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def text(self) -> str:
        return "\n".join(f"{'ok  ' if one.passed else 'FAIL'} {one.name}: {one.found}" for one in self.checks)

    def facts(self) -> dict[str, Any]:
        """For the manifest."""
        return {"passed": self.passed, "checks": {check.name: check.found for check in self.checks}}


def checked(name: str, check: Callable[..., Found], *arguments: Any) -> Check:
    """Runs one check; what it raises is a failure like any other, and no reason to skip the rest."""
    try:
        return Check(name, *check(*arguments))
    except Exception as error:
        return Check(name, False, f"{type(error).__name__}: {error}")


def difference(ours: Logits, theirs: Logits | float) -> float:
    """The largest."""
    return float(np.abs(ours - theirs).max())


def largest(gaps: Iterable[float]) -> float:
    """A NaN if there is one. max() may lose it, as nothing is more than a NaN and no NaN more than anything."""
    return float(np.max(list(gaps)))


def error(ours: Logits, theirs: Logits) -> float:
    """Of logits (rows, V): the root mean square of what separates them, beside that of how theirs vary from row to row.

    As sqrt(1 - c * c) for a correlation of c, but another scale counts too, and an offset of every row.
    """
    return float(np.sqrt(np.square(ours - theirs).sum() / np.square(theirs - theirs.mean(0)).sum()))
