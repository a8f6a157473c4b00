"""What is known of one generation while its events cross the seam: tokens, gaps between them, how its outputs ended."""

from collections.abc import Callable

from service.domain import Call, End, Event, Finish, GenerateTiming, Start, Token
from service.metrics import Metrics

Clock = Callable[[], float]


class Tally:
    """`take` every event, in order. What happens per token costs a few microseconds: it counts with kept series."""

    __slots__ = (
        "_call",
        "_clock",
        "_count_token",
        "_last",
        "_metrics",
        "_observe_gap",
        "end",
        "finish_reasons",
        "model",
        "num_tokens",
        "start",
    )

    def __init__(self, call: Call, metrics: Metrics, clock: Clock) -> None:
        """`clock` gives seconds as `time.monotonic` does."""
        self._call = call
        self._metrics = metrics
        self._clock = clock
        self._last: dict[int, float] = {}  # output -> when its latest token came
        self.model = ""  # until its start tells
        self.num_tokens = 0
        self.finish_reasons: dict[str, int] = {}
        self.start: Start | None = None
        self.end: End | None = None

    def take(self, event: Event) -> None:
        if isinstance(event, Token):
            self._take_token(event.index)
        elif isinstance(event, Finish):
            self._take_finish(event)
        elif isinstance(event, Start):
            self._take_start(event)
        elif isinstance(event, End):
            self._take_end(event)

    def _take_token(self, index: int) -> None:
        if self._call.progress.is_told_late:  # this is not when it was written
            return
        now = self._clock()
        before = self._last.get(index)
        if before is not None:
            self._observe_gap(now - before)
        self._last[index] = now
        self.num_tokens += 1
        self._count_token()

    def _take_start(self, start: Start) -> None:
        progress = self._call.progress
        if progress.first_token is None:  # a worker in another process does not mark our call
            progress.first_token = self._clock()
        self.start = start
        self.model = start.model
        self._observe_gap = self._metrics.token_gap.labels(start.model).observe
        self._count_token = self._metrics.generated_tokens(start.model).inc
        self._metrics.observe_prompt(self._call.route, start.model, start.prompt_tokens)

    def _take_finish(self, finish: Finish) -> None:
        reason = finish.finish_reason
        self.finish_reasons[reason] = self.finish_reasons.get(reason, 0) + 1
        self._metrics.finished_outputs(self.model, reason).inc()

    def _take_end(self, end: End) -> None:
        self.end = end
        usage = end.usage
        if usage.completion_tokens > self.num_tokens:  # tokens that nobody was shown, as the one that ends a text
            self._metrics.generated_tokens(self.model).inc(usage.completion_tokens - self.num_tokens)
        self.num_tokens = usage.completion_tokens
        self._metrics.cached_tokens.labels(self._call.route, self.model).observe(usage.cached_tokens)

    def take_untold(self) -> None:
        """Counts the tokens that events told of late or not at all, as far as they came; once, at the end."""
        gaps = tuple(self._call.progress.untold_gaps)  # an engine may still be adding to them
        if not gaps:
            return
        self._metrics.token_gap.labels(self.model).observe_all([gap for gap in gaps if gap is not None])
        if self.end is None:  # else its usage has them
            self._metrics.generated_tokens(self.model).inc(len(gaps))
            self.num_tokens += len(gaps)

    def timing(self) -> GenerateTiming:
        """Where the time went until now: the worker's own stages once there is an end, else as far as it came."""
        now, progress = self._clock(), self._call.progress
        if self.end is None:
            return progress.generate_timing(now)
        told = self.end.timing
        first_token_seconds = told.first_token_seconds
        if self._call.wants_tokens and progress.first_token is not None:  # else what was told came at the end only
            first_token_seconds = progress.first_token - progress.begun
        return GenerateTiming(
            told.queue_seconds,
            told.tokenize_seconds,
            told.prefill_seconds,
            told.decode_seconds,
            first_token_seconds,
            now - progress.begun,
        )

    def fields(self, timing: GenerateTiming) -> dict[str, object]:
        """The fields of a log line that only generations have; without what is not known."""
        fields: dict[str, object] = {"completion_tokens": self.num_tokens}
        if self.start is not None:
            fields |= {
                "prompt_tokens": self.start.prompt_tokens,
                "first_token_seconds": round(timing.first_token_seconds, 6),
                "finish_reasons": self.finish_reasons,
            }
        if self.num_tokens > 1 and timing.decode_seconds > 0:
            fields["tokens_per_second"] = round((self.num_tokens - 1) / timing.decode_seconds, 3)
        if self.end is not None:
            fields["cached_tokens"] = self.end.usage.cached_tokens
        return fields
