"""The state of one output on its way through the engine, and of the request it belongs to."""

from collections.abc import Sequence as Ids
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from service.domain import Progress
from service.worker.generation.prefix_cache import CHUNK, Block, Tokens, whole_chunks

if TYPE_CHECKING:
    from service.worker.generation.output import Output


@dataclass(slots=True, eq=False)
class Job:
    """One request's outputs.

    `is_closed` is set once nobody waits for the job any more (answered, failed, cancelled, expired): what is left of it
    leaves before the next step. `closed_at` is then a `time.monotonic()` instant, if its end should be timed.
    """

    num_outputs: int
    progress: Progress
    num_unfinished: int = field(init=False)
    num_waiting: int = 0  # outputs admitted that have no slot yet
    is_closed: bool = False
    closed_at: float | None = None

    def __post_init__(self) -> None:
        self.num_unfinished = self.num_outputs


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """The tokens that one or several outputs continue; `index` is its place in the request."""

    index: int
    ids: Ids[int]
    chunks: tuple[Tokens, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "chunks", whole_chunks(self.ids))


@dataclass(slots=True, eq=False)
class Sequence:
    """One output: its prompt, and how much of prompt and output the engine has in the K/V of its slot.

    It is waiting without a slot, then prefilling until all of the prompt is computed, then decoding: `last_id` is the
    token that the next step reads. Of an echoed prompt every logit is wanted, so that nothing of it may come from the
    prefix cache. `output` makes text of the logits, which is no concern of the policy.
    """

    job: Job
    index: int  # of the output in the request
    prompt: Prompt
    output: "Output"
    is_echoed: bool = False
    rank: tuple[int, int] = (0, 0)  # the lower, the sooner; unique
    slot: int = -1
    num_computed: int = 0
    num_known: int = 0  # chunks that the prefix cache had when it was last asked
    num_cached: int = 0  # tokens that came from there
    block: Block | None = None  # where in the prefix cache the computed chunks end; None: they are not all there
    last_id: int = -1
    is_finished: bool = False

    @property
    def reusable(self) -> tuple[Tokens, ...]:
        """The chunks that may come from the prefix cache: never the whole prompt, its last logits are needed."""
        return () if self.is_echoed else self.prompt.chunks[: (len(self.prompt.ids) - 1) // CHUNK]

    @property
    def next_chunk(self) -> tuple[int, int]:
        """What to compute next of the prompt, up to the end of a chunk, as (start, end)."""
        start = max(self.num_computed, self.num_known * CHUNK)
        return start, min((start // CHUNK + 1) * CHUNK, len(self.prompt.ids))

    @property
    def num_missing(self) -> int:
        """Tokens of the prompt that are still to be computed."""
        return len(self.prompt.ids) - self.next_chunk[0]

    @property
    def is_prefilled(self) -> bool:
        return self.num_computed >= len(self.prompt.ids)

    @property
    def has_left(self) -> bool:
        return self.is_finished or self.job.is_closed
