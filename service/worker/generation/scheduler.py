"""What the engine does next. Policy only: no arrays, no sockets, no threads, no clock.

Slots 0 to B-1 hold the B rows of a decode step, an output each or a beam of a search; prompts are read in slots above
those. Every step continues every row by a token, and reads a bounded piece of the waiting prompts, so that a long one
stalls nobody. A prompt that is complete joins the rows at the next step; what has ended or whose caller has gone leaves
before it, and its hole is filled. Prompts are cut at every multiple of CHUNK from their own start, and between those
at multiples of GRAIN, as the budget has it, but never so that only a few tokens are left. Such pieces give the same
bits as the whole (tests and model.verify_decoder compare them), so that a prompt's never depend on what else runs.
Prompts that must stay whole are a translator's sources: all of its prompts are. Those of one length are read in one run
and join the rows of the very step, which give them their first tokens.

Whose piece is read: in turn that of the shortest prompt and that of the one with the lowest rank, so that short ones
are soon done and long ones too. A request's n-th output ranks like the first of a request that came n requests later.

The beams of a search start together. While there is no room for all of them nobody that ranks behind them starts, so
that a wide search does not starve under narrow requests. The price: up to that moment the rows that are free stay free,
one fewer than it has beams at most, and whoever came later waits, too. Behind a search as wide as `max_rows` that is as
long as the longest output under way. Letting some pass first would only put the same wait off.
"""

from bisect import insort
from collections.abc import Collection
from collections.abc import Sequence as Several

from service.worker.generation.pieces import LEAST, budget_beside, cost, piece
from service.worker.generation.prefix_cache import CHUNK, Block, PrefixCache
from service.worker.generation.sequence import Job, Sequence
from service.worker.generation.step import Chunk, Move, Restore, Step


def slots_for(max_rows: int) -> int:
    """Slots that `max_rows` outputs need: one spare, so that two can change places."""
    return max_rows + (max_rows > 1)


class Scheduler:
    """At most `max_rows` outputs or beams hold a slot."""

    def __init__(self, *, max_rows: int, num_blocks: int) -> None:
        self._max_rows = max_rows
        self._cache = PrefixCache(num_blocks)
        self._first_block: Block | None = self._cache.root if num_blocks else None
        self._waiting: list[Sequence] = []  # by rank
        self._prefilling: list[Sequence] = []
        self._rows: list[Sequence] = []
        self._num_jobs = 0
        self._num_added = 0
        self._num_picked = 0
        self.num_waiting = 0  # rows

    @property
    def num_running(self) -> int:
        return len(self._rows) + len(self._prefilling)

    @property
    def num_kept_tokens(self) -> int:
        """Tokens whose K/V are in use: those of rows that hold a slot and go on, and those of the prefix cache."""
        rows = (*self._rows, *self._prefilling)
        return sum([one.num_computed for one in rows if not one.has_left]) + CHUNK * self._cache.num_used

    # --- from the asyncio thread

    def add(self, sequences: Several[Sequence]) -> None:
        """Queue outputs of one job; of a search the beam that leads."""
        for offset, sequence in enumerate(sequences):
            sequence.rank = (self._num_jobs + offset, self._num_added)
            sequence.num_known = len(self._cache.find(sequence.reusable))
            self._num_added += 1
            if not sequence.job.is_closed:
                insort(self._waiting, sequence, key=_rank)
                self.num_waiting += len(sequence.rows)
        self._num_jobs += 1

    def close(self, job: Job) -> None:
        """Nobody waits for `job` any more: its places are free now, its slots before the next step."""
        job.is_closed = True
        for one in [one for one in self._waiting if one.job is job]:
            self._leave_queue(one)

    # --- from the engine thread

    def next_step(self) -> Step:
        step = Step()
        self._inherit(step)
        self._drop_unfinished_prompts(step)
        self._settle_rows(step)
        if self._waiting or self._prefilling:
            self._plan_prompts(step, budget_beside(len(self._rows)))
        step.rows = list(self._rows)
        step.lengths = [row.num_computed for row in self._rows]
        for row in self._rows:
            row.num_computed += 1
        return step

    def computed(self, chunk: Chunk) -> int | None:
        """`chunk` is in its slot. Returns the block of the pool for the CHUNK tokens that it completes, if any."""
        sequence = chunk.sequence
        if sequence.block is None or chunk.end % CHUNK:
            return None
        block, is_new = self._cache.insert(sequence.block, sequence.prompt.chunks[chunk.end // CHUNK - 1])
        self._stand_on(sequence, block)
        return block.index if block is not None and is_new else None

    def finish(self, sequence: Sequence) -> None:
        """`sequence` is complete or has failed; it leaves before the next step, and its followers do."""
        for row in sequence.rows:
            row.is_finished = True

    # --- leaving and joining

    def _inherit(self, step: Step) -> None:
        """Beams take over what their parent, which stays where it is, has behind the prompt."""
        for row in self._rows:
            if row.parent is not None and not row.has_left:
                step.moves.append(Move(row.parent.slot, row.slot, len(row.prompt.ids), row.num_computed))

    def _drop_unfinished_prompts(self, step: Step) -> None:
        for sequence in [one for one in self._prefilling if one.has_left]:
            self._prefilling.remove(sequence)
            self._free(sequence, step)

    def _settle_rows(self, step: Step) -> None:
        """Rows that ended leave; complete prompts take their places, or new ones; the last rows fill what is left."""
        holes = [place for place, row in enumerate(self._rows) if row.has_left]
        for place in holes:
            self._free(self._rows[place], step)
        for sequence in sorted((one for one in self._prefilling if one.is_prefilled), key=lambda one: one.slot):
            self._prefilling.remove(sequence)
            self._stand_on(sequence, None)
            if holes:
                place = holes.pop(0)
                self._rows[place] = sequence
            else:
                place = len(self._rows)
                self._make_way(sequence, place, step)
                self._rows.append(sequence)
            _move(sequence, place, step)
        for place in reversed(holes):  # from the last, so that no hole is filled with another
            last = self._rows.pop()
            if place < len(self._rows):
                self._rows[place] = last
                _move(last, place, step)

    def _make_way(self, joining: Sequence, slot: int, step: Step) -> None:
        for sequence in self._prefilling:
            if sequence.slot == slot:
                _move(sequence, self._free_slot(slot + 1, besides=joining.slot), step)

    def _free_slot(self, lowest: int, *, besides: int = -1) -> int:
        """There always is one: a slot is spare."""
        taken = {besides, *(one.slot for one in self._prefilling)}
        return next(slot for slot in range(lowest, slots_for(self._max_rows)) if slot not in taken)

    def _free(self, sequence: Sequence, step: Step) -> None:
        self._stand_on(sequence, None)
        if sequence.job.is_closed:
            step.released.append(sequence.job)

    # --- prompts

    def _plan_prompts(self, step: Step, budget: int) -> None:
        """Sources, or pieces of prompts, that together cost at most about `budget`."""
        passed_over: set[Sequence] = set()
        least = LEAST if self._rows else CHUNK
        while budget >= least and (sequence := self._pick(passed_over)) is not None:
            if sequence.slot < 0 and self._is_coming(sequence):
                passed_over.add(sequence)
                continue
            plan = self._plan_sources if sequence.prompt.is_whole else self._plan_chunk
            if not (spent := plan(sequence, step, budget)):
                break
            budget -= spent
            self._num_picked += 1

    def _plan_chunk(self, sequence: Sequence, step: Step, budget: int) -> int:
        """A piece of one prompt. Gives what it costs; 0: it is too dear for this step, and the next begins with it."""
        start, limit = sequence.next_chunk
        end = piece(start, limit, budget)
        spent = cost(end - start, start)
        if step.chunks and spent > budget:
            return 0
        if sequence.slot < 0:
            self._take_slots(sequence, step)
            self._restore(sequence, step)
        sequence.num_computed = end
        forks = self._fork(sequence, step) if sequence.is_prefilled else ()
        step.chunks.append(Chunk(sequence, start, end, forks))
        return spent

    def _plan_sources(self, first: Sequence, step: Step, budget: int) -> int:
        """A source, whatever it costs, and others of its length. Gives what they cost."""
        num_tokens = len(first.prompt.ids)
        alike = [one for one in self._startable() if len(one.prompt.ids) == num_tokens and one is not first]
        sources: list[Chunk] = []
        for one in (first, *alike):
            if sources and num_tokens * len(sources) + num_tokens > budget:
                break
            if one.slot < 0 and len(one.rows) <= self._num_places:
                self._take_slots(one, step)
                one.num_computed = num_tokens - 1  # the last is for the first step of decoding
                sources.append(Chunk(one, 0, num_tokens, self._fork(one, step)))
        step.sources.append(sources)
        return num_tokens * len(sources)

    @property
    def _num_places(self) -> int:
        return self._max_rows - len(self._rows) - len(self._prefilling)

    def _pick(self, passed_over: Collection[Sequence]) -> Sequence | None:
        """The prompt to read a piece of: of those that have a slot and, while places are free, of those that wait."""
        candidates = [one for one in self._prefilling if one.is_reading]
        candidates += [one for one in self._startable() if one not in passed_over]
        by = _rank if self._num_picked % 2 else _shortest
        return min(candidates, key=by, default=None)

    def _startable(self) -> list[Sequence]:
        """Those that wait and have room, up to the first that has none; what a search needs is left to it."""
        room, startable = self._num_places, []
        for one in self._waiting:
            if len(one.rows) > room:
                break
            startable.append(one)
            room -= len(one.rows) if one.followers else 0
        return startable

    def _is_coming(self, sequence: Sequence) -> bool:
        """Whether the next chunk it needs is the next that another prompt is computing: then it waits for that."""
        known = self._cache.find(sequence.reusable)
        sequence.num_known = len(known)
        if len(known) == len(sequence.reusable):
            return False
        behind, wanted = known[-1] if known else self._cache.root, sequence.reusable[len(known)]
        return any(
            one.block is behind and len(one.prompt.chunks) > len(known) and one.prompt.chunks[len(known)] == wanted
            for one in self._prefilling
        )

    def _take_slots(self, sequence: Sequence, step: Step) -> None:
        self._leave_queue(sequence)
        joined = self._rows if sequence.prompt.is_whole else self._prefilling
        for row in sequence.rows:
            row.slot = self._free_slot(len(self._rows))
            joined.append(row)
            step.started.append(row)

    def _leave_queue(self, sequence: Sequence) -> None:
        self._waiting.remove(sequence)
        self.num_waiting -= len(sequence.rows)

    def _restore(self, sequence: Sequence, step: Step) -> None:
        """Nothing is evicted between plan and execution: only computed chunks need room, and they come later."""
        blocks = self._cache.find(sequence.reusable)
        self._cache.use(blocks)
        step.restores += [Restore(block.index, sequence.slot, at * CHUNK) for at, block in enumerate(blocks)]
        sequence.num_computed = sequence.num_cached = len(blocks) * CHUNK
        self._stand_on(sequence, blocks[-1] if blocks else self._first_block)

    def _fork(self, sequence: Sequence, step: Step) -> tuple[Sequence, ...]:
        """The other beams or outputs of the prompt that is being completed, these as far as it is their turn."""
        forks = sequence.followers or self._siblings(sequence, step)
        for fork in forks:
            fork.num_computed = sequence.num_computed
        return forks

    def _siblings(self, sequence: Sequence, step: Step) -> tuple[Sequence, ...]:
        """Waiting outputs of the same prompt whose turn it is: they start."""
        started = []
        for one in self._waiting[: self._num_places]:
            if one.prompt is sequence.prompt and one in self._startable():
                self._take_slots(one, step)
                started.append(one)
        return tuple(started)

    def _stand_on(self, sequence: Sequence, block: Block | None) -> None:
        """Hold the block behind which the next chunk of `sequence` is to be inserted, let go of the one before."""
        if block is not None:
            self._cache.hold(block)
        if sequence.block is not None:
            self._cache.release(sequence.block)
        sequence.block = block


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.rank


def _shortest(sequence: Sequence) -> tuple[int, tuple[int, int]]:
    return sequence.num_missing, sequence.rank


def _move(sequence: Sequence, slot: int, step: Step) -> None:
    if sequence.slot != slot:
        if sequence.num_computed:
            step.moves.append(Move(sequence.slot, slot, 0, sequence.num_computed))
        sequence.slot = slot
