"""What the three verifiers share: a check, the report of all, what is said of a model, how far logits are apart.

Knows no engine.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.config import ModelConfig
from service.worker.bundle import Manifest

Found = tuple[bool, str]  # whether a check passed, and what it found
Logits = NDArray[np.float32]
Facts = Mapping[str, tuple[Any, Any]]  # by name: what the manifest says, what the checkpoint does


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


def agree(facts: Facts) -> Found:
    wrong = [f"{name} is {ours!r:.80}, not {theirs!r:.80}" for name, (ours, theirs) in facts.items() if ours != theirs]
    return not wrong, "; ".join(wrong) or "equal to the checkpoint's"


def common_facts(
    manifest: Manifest, config: ModelConfig, *, task: str, graphs: Iterable[str], checkpoint_sha256: str | None
) -> dict[str, tuple[Any, Any]]:
    """What is to `agree` whatever the task."""
    ours, theirs = manifest.architecture, {name: one for name, one in asdict(config).items() if name != "labels"}
    return {
        "task": (manifest.task, task),
        **{f"architecture.{name}": (ours.get(name), theirs.get(name)) for name in sorted({*ours, *theirs})},
        "graphs": (sorted(manifest.graphs), sorted(graphs)),
        "provenance.checkpoint_sha256": (manifest.provenance.get("checkpoint_sha256"), checkpoint_sha256),
    }


def stated(said: Mapping[str, Any], measured: Mapping[str, Any], *, within: float) -> list[Check]:
    """Is the quality that a manifest states the one that was measured? No check where it states none, when it is made.

    `within`: how far figures may be from each other, as another processor rounds elsewhere.
    """
    ours, theirs = leaves(said), leaves(measured)
    wrong = [
        f"{name} is {ours.get(name)}, measured {theirs.get(name)}"
        for name in sorted({*ours, *theirs})
        if not is_near(ours.get(name), theirs.get(name), within)
    ]
    return [Check("stated quality", not wrong, "; ".join(wrong) or "as measured")] if said else []


def leaves(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Nested figures by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in facts.items():
        inner = {f".{key}": one for key, one in leaves(value).items()} if isinstance(value, Mapping) else {"": value}
        found |= {f"{name}{key}": one for key, one in inner.items()}
    return found


def is_near(a: Any, b: Any, within: float) -> bool:
    return a == b or (isinstance(a, float) and isinstance(b, float) and abs(a - b) <= within)


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
