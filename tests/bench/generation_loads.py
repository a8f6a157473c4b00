"""What generation is measured under: so many streams at once, prompts of 512 tokens, long prompts among short chats."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .generation_contenders import Contender, Room
from .prompts import PromptPlan
from .servers import Server
from .stream_generator import Arrivals, StreamLoad

KINDS = ("streams", "prefill", "mixed")
Sampling = Literal["greedy", "sampled"]

NEW_TOKENS = 64
STREAM_WORDS = (10, 20, 40, 80, 160)  # of a prompt, each as often as the others
CHAT_WORDS = (10, 20, 40)
PREFILL_TOKENS = 512
CHATS = 8
LONG_TOKENS, LONG_ANSWER, LONG_PERIOD_S = 1500, 16, 6.0


@dataclass(frozen=True, slots=True)
class GenerationLoad:
    """One row of the table for every contender. `kind` is one of KINDS."""

    kind: str
    concurrency: int
    sampling: Sampling = "greedy"

    @property
    def name(self) -> str:
        return f"{self.sampling} c{self.concurrency}" if self.kind == "streams" else self.kind

    @property
    def room(self) -> Room:
        """What a server has to be started for. Long prompts take turns, so one slot more is enough for them."""
        if self.kind == "streams":
            return Room(self.concurrency, 512)
        return Room(1, 1024) if self.kind == "prefill" else Room(CHATS + 1, 2048)

    def fits(self, contender: Contender) -> bool:
        """Gaps between tokens are not to be had from a server that does not stream."""
        return contender.streams or self.kind != "mixed"

    def prompts(self, corpus: str | None, seed: int) -> PromptPlan:
        if self.kind == "prefill":
            return PromptPlan((PREFILL_TOKENS,), unit="ids", seed=seed)
        return PromptPlan(CHAT_WORDS if self.kind == "mixed" else STREAM_WORDS, seed=seed, corpus=corpus)


def loads_of(kinds: Sequence[str], concurrencies: Sequence[int], samplings: Sequence[str]) -> list[GenerationLoad]:
    """In measuring order."""
    found = [
        GenerationLoad("streams", concurrency, sampling)  # type: ignore[arg-type]
        for concurrency in concurrencies
        for sampling in samplings
        if "streams" in kinds
    ]
    found += [GenerationLoad("prefill", 1)] if "prefill" in kinds else []
    return found + ([GenerationLoad("mixed", CHATS)] if "mixed" in kinds else [])


def stream_load(
    load: GenerationLoad, contender: Contender, server: Server, *, corpus: str | None, seed: int, seconds: float
) -> StreamLoad:
    """What the generator does to one server. The same seed sends the same prompts."""
    long = Arrivals(PromptPlan((LONG_TOKENS,), unit="ids", seed=seed), LONG_PERIOD_S, LONG_ANSWER)
    is_mixed = load.kind == "mixed"
    return StreamLoad(
        host="127.0.0.1",
        port=server.port,
        path=server.path,
        template=contender.template(is_sampled=load.sampling == "sampled"),
        prompts=load.prompts(corpus, seed),
        concurrency=load.concurrency,
        num_tokens=1 if load.kind == "prefill" else NEW_TOKENS,
        seconds=max(seconds, LONG_PERIOD_S) if is_mixed else seconds,
        streams=contender.streams,
        arrivals=long if is_mixed else None,
    )
