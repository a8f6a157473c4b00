"""One step as a plan: what the scheduler decides and the loop executes. Plain data."""

from dataclasses import dataclass, field

from service.worker.generation.sequence import Job, Sequence


@dataclass(frozen=True, slots=True)
class Move:
    """Copy the K/V of tokens `start` to `end` from one slot to another."""

    source: int
    target: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Restore:
    """Copy a block of the prefix cache's pool to a slot, from token `start` on."""

    block: int
    slot: int
    start: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """Compute tokens `start` to `end` of a sequence's prompt.

    `forks` are other outputs or beams of this prompt, which this chunk completes: they get copies of its K/V, and
    outputs get its logits, if it has any.
    """

    sequence: Sequence
    start: int
    end: int
    forks: tuple[Sequence, ...] = ()

    @property
    def is_last(self) -> bool:
        return self.end == len(self.sequence.prompt.ids)


@dataclass(slots=True)
class Step:
    """What to do now, in the order of the fields.

    `sources` are lists of whole prompts of one length, each to be read in one run, but for their last tokens: those
    are the first that their rows read, which are among the `rows` already. `rows` are the outputs and beams to write a
    token of, row i in slot i, whose token goes to position `lengths[i]`. `started` are those that got a slot,
    `released` the jobs of those that lost one because nobody waits for them any more.
    """

    moves: list[Move] = field(default_factory=list)
    restores: list[Restore] = field(default_factory=list)
    sources: list[list[Chunk]] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    rows: list[Sequence] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    started: list[Sequence] = field(default_factory=list)
    released: list[Job] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        return not (self.chunks or self.rows or self.released)
