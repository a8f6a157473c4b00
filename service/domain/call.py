"""The circumstances of a request, and where its time went."""

import time
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Timing:
    """Where a request's time went, in seconds.

    tokenize: from admission until all texts were tokens. queue: from there until the first of them entered a batch.
    compute: from there until the last of them left the engine. total: from the request's first byte (of a message in a
    stream: from when it was taken) to the result, in the process that says so.
    """

    queue_seconds: float
    tokenize_seconds: float
    compute_seconds: float
    total_seconds: float


@dataclass(frozen=True)
class GenerateTiming:
    """Where a generation's time went, in seconds.

    tokenize: from admission until all prompts were tokens. queue: from there until the engine began with the first of
    them. prefill: from there to the first token, be it a beam's. decode: from then to the last. first_token: from the
    request's first byte to the first token of an output: a search has none before it is over. total: to the last event.
    Stages never reached have 0.
    """

    queue_seconds: float
    tokenize_seconds: float
    prefill_seconds: float
    decode_seconds: float
    first_token_seconds: float
    total_seconds: float

    @property
    def compute_seconds(self) -> float:
        """What every request has: from the engine's start on it until it was done with it."""
        return self.prefill_seconds + self.decode_seconds


@dataclass(slots=True)
class Progress:
    """How far a request has come, as `time.monotonic()` instants in seconds; None where it has not been yet.

    The one mutable thing about a call: whoever does the work marks it, and however the request ends, its timing is read
    from here.
    """

    begun: float = field(default_factory=time.monotonic)
    admitted: float | None = None
    tokenized: float | None = None
    started: float | None = None
    prefilled: float | None = None  # when the first token was written, be it a beam's
    first_token: float | None = None  # of an output
    finished: float | None = None
    is_told_late: bool = False  # its tokens wait for others before they are told
    untold_gaps: list[float | None] = field(default_factory=list)  # of tokens that are told late, or not one by one

    def leave_untold(self, gap: float | None) -> None:
        """A token was written whose event says nothing, so many seconds after the one before it in its output.

        Several threads may say so at once.
        """
        self.untold_gaps.append(gap)

    def timing(self, now: float) -> Timing:
        """The stage that was under way at `now` gets the time until then; stages never reached get 0."""
        admitted = now if self.admitted is None else self.admitted
        tokenized = now if self.tokenized is None else self.tokenized
        started = now if self.started is None else self.started
        finished = now if self.finished is None else self.finished
        return Timing(
            queue_seconds=max(0.0, started - tokenized),
            tokenize_seconds=max(0.0, tokenized - admitted),
            compute_seconds=max(0.0, finished - started),
            total_seconds=now - self.begun,
        )

    def generate_timing(self, now: float) -> GenerateTiming:
        """As `timing`, for a generation."""
        written = self.first_token if self.prefilled is None else self.prefilled
        prefilled = now if written is None else written
        until_first = self.timing(prefilled)
        return GenerateTiming(
            queue_seconds=until_first.queue_seconds,
            tokenize_seconds=until_first.tokenize_seconds,
            prefill_seconds=0.0 if self.started is None else prefilled - self.started,
            decode_seconds=0.0 if written is None else (self.finished or now) - written,
            first_token_seconds=0.0 if self.first_token is None else self.first_token - self.begun,
            total_seconds=now - self.begun,
        )


@dataclass(frozen=True, slots=True)
class Call:
    """The circumstances of a request: who asked, through which route, until when, and how far it is.

    `deadline` is a `time.monotonic()` instant in seconds. `wants_tokens` False: of a generation the whole texts are
    enough, each in its Finish, and tokens may be left out as far as nothing but their text was asked for.
    """

    request_id: str
    route: str
    deadline: float
    progress: Progress = field(default_factory=Progress)
    wants_tokens: bool = True
