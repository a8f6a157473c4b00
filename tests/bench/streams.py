"""The arithmetic of generation: what one reply delivered, and what many of them amount to.

A `Stream` is one answered request, a `StreamSample` one measurement of a server. Pure functions of what was received;
knows no server and no clock.
"""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import orjson

from .faults import Faults, counted, status_fault
from .figures import Latency, latency_of
from .sse import Reply


@dataclass(frozen=True, slots=True)
class Stream:
    """One request and what came of it. Instants in seconds of one clock.

    `arrivals` are the instants at which text came; empty for a reply that came in one piece. `tokens` is what the
    server says that it wrote. `fault`: why this is not what was asked for; empty when it is.
    """

    sent: float
    ended: float
    arrivals: tuple[float, ...]
    tokens: int
    prompt_tokens: int
    fault: str = ""

    @property
    def first(self) -> float:
        """Seconds to the first text; to the end of a reply that came in one piece."""
        return (self.arrivals[0] if self.arrivals else self.ended) - self.sent

    def tokens_within(self, opens: float, closes: float) -> float:
        """Tokens that came in [opens, closes); of a reply in one piece, the share of its time that lies within."""
        if self.arrivals:
            return self.tokens * sum(opens <= at < closes for at in self.arrivals) / len(self.arrivals)
        overlap = min(self.ended, closes) - max(self.sent, opens)
        return self.tokens * max(0.0, overlap) / (self.ended - self.sent)

    def gaps_within(self, opens: float, closes: float) -> list[float]:
        """Seconds between one arrival and the next, for those that ended in [opens, closes)."""
        return [after - before for before, after in itertools.pairwise(self.arrivals) if opens <= after < closes]


def stream_of(reply: Reply, num_tokens: int) -> Stream:
    """Read a reply in OpenAI's completions dialect, streamed or not, and check that it has exactly `num_tokens`."""
    try:
        found = [orjson.loads(event) for _, event in reply.events if event != b"[DONE]"]
        whole = orjson.loads(reply.body) if reply.body and not reply.fault else {}
    except orjson.JSONDecodeError as error:
        return Stream(reply.sent, reply.ended, (), 0, 0, f"not JSON: {error}")
    instants = [at for at, event in reply.events if event != b"[DONE]"]
    chunks = [*found, whole] if whole else found
    usage: Mapping[str, int] = next((chunk["usage"] for chunk in reversed(chunks) if chunk.get("usage")), {})
    arrivals = tuple(at for at, chunk in zip(instants, found, strict=True) if _text_of(chunk))
    if not arrivals:  # what came was no whole character yet
        arrivals = tuple(at for at, chunk in zip(instants, found, strict=True) if chunk.get("choices"))[:1]
    tokens = usage.get("completion_tokens", 0)
    fault = _fault(reply, chunks, tokens, num_tokens)
    return Stream(reply.sent, reply.ended, arrivals, tokens, usage.get("prompt_tokens", 0), fault)


def _text_of(chunk: Mapping[str, Any]) -> str:
    return "".join(choice.get("text", "") for choice in chunk.get("choices", ()))


def _fault(reply: Reply, chunks: Sequence[Mapping[str, Any]], tokens: int, wanted: int) -> str:
    """The first thing that is wrong with the reply; empty when nothing is."""
    reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk.get("choices", ()) if _ends(choice)]
    errors = [str(chunk["error"])[:200] for chunk in chunks if chunk.get("error")]
    checks = (
        (bool(reply.fault), reply.fault),
        (reply.status != 200, status_fault(reply.status, reply.body)),
        (bool(errors), f"an error in the stream: {', '.join(errors)}"),
        (bool(reply.events) and reply.events[-1][1] != b"[DONE]", "the stream ended without [DONE]"),
        (tokens != wanted, f"wrong number of tokens: {tokens} instead of {wanted}"),
        (reasons != ["length"], f"wrong finish reasons: {reasons} instead of one 'length'"),
    )
    return next((message for is_wrong, message in checks if is_wrong), "")


def _ends(choice: Mapping[str, Any]) -> bool:
    return choice.get("finish_reason") is not None


@dataclass(frozen=True, slots=True)
class StreamSample:
    """One measurement of one server under one load.

    `first` (seconds to the first token) is of the streams that were sent while it was measured, `gap` (seconds between
    tokens) of all. `prefill_per_s` is prompt tokens over the time to the first token; it means something when a stream
    is alone. `faults`: how many were not as asked for, by why. `client_cpu` is the generator's CPU seconds for each
    second.
    """

    tokens_per_s: float
    first: Latency
    gap: Latency
    prefill_per_s: float
    prompt_tokens: float  # of a stream, on average
    streams: int
    faults: Faults
    client_cpu: float

    @property
    def errors(self) -> int:
        return sum(self.faults.values())

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def stream_sample_from(found: Mapping[str, Any]) -> StreamSample:
    """The inverse of `StreamSample.as_dict`, for samples that another process printed."""
    latencies = {name: Latency(**found[name]) for name in ("first", "gap")}
    return StreamSample(**{**found, **latencies})


def sample_of(
    streams: Sequence[Stream], *, opens: float, closes: float, client_cpu: float, others: Sequence[Stream] = ()
) -> StreamSample:
    """What `streams` amount to in the window [opens, closes); of `others` only the faults count."""
    good = [stream for stream in streams if not stream.fault]
    timed = [stream for stream in good if stream.sent >= opens]
    waited = sum(stream.first for stream in timed)
    return StreamSample(
        tokens_per_s=sum(stream.tokens_within(opens, closes) for stream in good) / (closes - opens),
        first=latency_of([stream.first for stream in timed]),
        gap=latency_of([gap for stream in good for gap in stream.gaps_within(opens, closes)]),
        prefill_per_s=sum(stream.prompt_tokens for stream in timed) / waited if waited else 0.0,
        prompt_tokens=statistics.fmean(stream.prompt_tokens for stream in good) if good else 0.0,
        streams=len(good),
        faults=counted(stream.fault for stream in (*streams, *others) if stream.fault),
        client_cpu=client_cpu,
    )
