"""The state of one input on its way through the engine, and of the request it belongs to."""

from collections.abc import Sequence as Ids
from dataclasses import dataclass, field

from service.domain import AttentionMap, Progress
from service.worker.attention.views import View


@dataclass(slots=True, eq=False)
class Job:
    """One request's inputs in the engine: how many are missing, and the rows that are there.

    `is_closed` is set once nobody waits for the job any more (answered, failed, cancelled, expired): what is left of it
    is then skipped. A job with a `view` has one input, and its `maps` are there when its row is.
    """

    num_inputs: int
    progress: Progress
    view: View | None = None
    maps: tuple[AttentionMap, ...] = ()
    rows: list[Ids[float]] = field(default_factory=list)
    num_missing: int = 0
    num_waiting: int = 0  # inputs admitted and not yet in a batch
    is_closed: bool = False

    def __post_init__(self) -> None:
        self.rows = [()] * self.num_inputs
        self.num_missing = self.num_waiting = self.num_inputs

    def widen(self, num_more: int) -> None:
        """Make room for more inputs, before any of them runs."""
        self.rows += [()] * num_more
        self.num_inputs += num_more
        self.num_missing += num_more
        self.num_waiting += num_more


@dataclass(frozen=True, slots=True, eq=False)
class Sequence:
    """One input of a job: its place in the job, its tokens, and the length at which it runs."""

    job: Job
    index: int
    ids: Ids[int]
    type_ids: Ids[int] | None
    padded_length: int
