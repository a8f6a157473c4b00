"""What the service's own engine generates with no server around it: a bare loop over prompts, tokenization included.

Runs as a process (`python -m tests.bench.generation_ceiling < plan.json`), because its threads must be gone before
anything else is measured. It is the load of `stream_generator` without a wire: so many rows decode together, and a row
that has its tokens is filled at once with the next prompt.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from service.domain import GenerateRequest
from service.worker.bundle import load_bundle
from service.worker.generation.decoder import DecoderEngine
from service.worker.generation.kv_memory import BLOCK
from service.worker.generation.sampling import Sampler

from .prompts import Prompt, PromptPlan, plan_from, prompts_of

Logits = NDArray[np.float32]
Choose = Callable[[Logits], int]


@dataclass(frozen=True, slots=True)
class BarePlan:
    """As StreamLoad: `rows` at once, each of `num_tokens`, for `seconds` once every row has begun."""

    bundle: str
    prompts: PromptPlan
    rows: int
    num_tokens: int
    seconds: float
    threads: int
    sampling: dict[str, Any] = field(default_factory=dict)  # of a GenerateRequest; empty: greedy


class Engine(Protocol):
    """What the loop needs of `service.worker.generation.decoder.DecoderEngine`."""

    def prefill(self, slot: int, ids: Sequence[int], start: int, *, keep: Any) -> Logits: ...

    def decode(self, ids: Sequence[int], lengths: Sequence[int]) -> Logits: ...


@dataclass(slots=True)
class Row:
    last: int  # the token to feed
    length: int  # tokens read
    left: int  # tokens to write
    choose: Choose


class BareLoop:
    """Rows 0 to `rows` - 1, always full. `encode` gives a prompt's ids, `chooser` how a row's tokens are chosen."""

    def __init__(
        self, engine: Engine, plan: BarePlan, encode: Callable[[Prompt], Sequence[int]], chooser: Callable[[], Choose]
    ) -> None:
        self.num_written = 0
        self._engine, self._plan = engine, plan
        self._encode, self._chooser = encode, chooser
        self._prompts: Iterator[Prompt] = prompts_of(plan.prompts)
        # The first of each is cut short by its place, so that rows do not end in step.
        shares = [max(2, plan.num_tokens * (row + 1) // plan.rows) for row in range(plan.rows)]
        self._rows = [self._begin(row, share) for row, share in enumerate(shares)]

    def step(self) -> None:
        """One token for every row; then those that are finished begin again."""
        rows = self._rows
        logits = self._engine.decode([row.last for row in rows], [row.length for row in rows])
        for place, row in enumerate(rows):
            row.last = row.choose(logits[place])
            row.length += 1
            row.left -= 1
        self.num_written += len(rows)
        for place, row in enumerate(rows):
            if row.left == 0:
                rows[place] = self._begin(place, self._plan.num_tokens)

    def _begin(self, place: int, num_tokens: int) -> Row:
        """Read the next prompt into a row; its logits give the first token."""
        ids = self._encode(next(self._prompts))
        for start in range(0, len(ids), BLOCK):
            is_last = start + BLOCK >= len(ids)
            logits = self._engine.prefill(place, ids[start : start + BLOCK], start, keep="last" if is_last else "none")
        choose = self._chooser()
        self.num_written += 1
        return Row(last=choose(logits[0]), length=len(ids), left=num_tokens - 1, choose=choose)


def rate_of(loop: BareLoop, seconds: float, now: Callable[[], float] = time.perf_counter) -> float:
    """Tokens a second."""
    begin, written = now(), loop.num_written
    while (elapsed := now() - begin) < seconds:
        loop.step()
    return (loop.num_written - written) / elapsed


def run(plan: BarePlan) -> float:
    bundle = load_bundle(Path(plan.bundle))
    engine = DecoderEngine(bundle, num_slots=plan.rows, num_blocks=0, threads=plan.threads, spin=True)
    tokenizer = Tokenizer.from_file(str(bundle.tokenizer_path))

    def encode(prompt: Prompt) -> Sequence[int]:
        return tokenizer.encode(prompt).ids if isinstance(prompt, str) else prompt

    def chooser() -> Choose:
        if not plan.sampling:
            return lambda logits: int(logits.argmax())
        request = GenerateRequest(prompt=("-",), ignore_eos=True, **plan.sampling)
        warmth, vocab = plan.sampling["temperature"], engine.vocab_size
        return Sampler(request, temperature=warmth, seed=1, prompt_ids=(), end_ids=(), vocab_size=vocab).sample

    return rate_of(BareLoop(engine, plan, encode, chooser), plan.seconds)


def bare_plan_from(described: dict[str, Any]) -> BarePlan:
    """The inverse of `asdict`, after a way through JSON."""
    return BarePlan(**{**described, "prompts": plan_from(described["prompts"])})


def main() -> None:
    print(json.dumps(run(bare_plan_from(json.load(sys.stdin)))))


if __name__ == "__main__":
    main()
