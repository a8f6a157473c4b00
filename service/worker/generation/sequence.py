"""The state of one output, or of a beam of it, on its way through the engine, and of the request it belongs to."""

from collections.abc import Sequence as Ids
from dataclasses import InitVar, dataclass, field
from typing import TYPE_CHECKING

from service.domain import Progress
from service.worker.generation.prefix_cache import CHUNK, Block, Tokens, whole_chunks

if TYPE_CHECKING:
    from service.worker.generation.beam_search import BeamOutput
    from service.worker.generation.output import Output


@dataclass(slots=True, eq=False)
class Job:
    """One request's outputs. `num_places`: the rows that they take, one each or one a beam. `wants_tokens`: see Call.

    `is_closed` is set once nobody waits for the job any more (answered, failed, cancelled, expired): what is left of it
    leaves before the next step. `closed_at` is then a `time.monotonic()` instant, if its end should be timed. The lanes
    that its outputs are in only read it, but for marks of its progress.
    """

    num_places: int
    progress: Progress
    wants_tokens: bool = True
    is_closed: bool = False
    closed_at: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """The tokens that one or several outputs continue; `index` is its place in the request.

    One that `is_whole` is read in one piece and never cached: an encoder sees all of its source at once. What follows
    its last token begins a text of its own.
    """

    index: int
    ids: Ids[int]
    is_whole: bool = False
    chunks: tuple[Tokens, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "chunks", () if self.is_whole else whole_chunks(self.ids))


@dataclass(slots=True, eq=False)
class Sequence:
    """One row: its prompt, and how much of prompt and output the engine has in the K/V of its slot.

    It is waiting without a slot, then prefilling until all of the prompt is computed, then decoding: `last_id` is the
    token that the next step reads. Of an echoed prompt every logit is wanted, so that nothing of it may come from the
    prefix cache. `output` makes text of the logits, which is no concern of the policy.

    The rows of a search with `num_beams` are one that leads and its `followers`: they get their slots together, the
    first reads the prompt for all, and they end together. `parent` is the row that one goes on from, if not itself.
    """

    job: Job
    index: int  # of the output in the request
    prompt: Prompt
    output: "Output | BeamOutput"
    is_echoed: bool = False
    num_beams: InitVar[int] = 1
    followers: "tuple[Sequence, ...]" = field(init=False, default=())
    is_follower: bool = False
    rank: tuple[int, int] = (0, 0)  # the lower, the sooner; unique
    started: float = 0.0  # when it got its slot, a `time.monotonic()` instant
    written: float = 0.0  # when it got its latest token, another such instant
    slot: int = -1
    num_computed: int = 0
    num_known: int = 0  # chunks that the prefix cache had when it was last asked
    num_cached: int = 0  # tokens that came from there
    block: Block | None = None  # where in the prefix cache the computed chunks end; None: they are not all there
    last_id: int = -1
    parent: "Sequence | None" = None
    is_finished: bool = False

    def __post_init__(self, num_beams: int) -> None:
        self.followers = tuple(
            Sequence(self.job, self.index, self.prompt, self.output, is_follower=True) for _ in range(num_beams - 1)
        )

    @property
    def rows(self) -> "tuple[Sequence, ...]":
        return (self, *self.followers)

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
    def is_reading(self) -> bool:
        return not (self.is_prefilled or self.is_follower)

    @property
    def has_left(self) -> bool:
        return self.is_finished or self.job.is_closed
