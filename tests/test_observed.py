"""What the seam counts, times and logs, on a clock of the test's own."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest
from fakes import CHAT, MODEL, FakeBackend, until

from service.domain import (
    AttentionRequest,
    Call,
    Classification,
    ClassifyRequest,
    End,
    Event,
    ExplainRequest,
    Finish,
    GenerateRequest,
    GenerateTiming,
    GenerateUsage,
    ModelInfo,
    Progress,
    PromptTokens,
    Start,
    TextInput,
    Token,
)
from service.errors import (
    AttndError,
    BundleError,
    Cancelled,
    ConfigError,
    DeadlineExceeded,
    EngineFailed,
    InvalidRequest,
    NotFound,
    Overloaded,
    TooLarge,
    Unauthenticated,
    Unavailable,
    Unsupported,
)
from service.metrics import Metrics
from service.observed import NO_ROUTE, Observed, outcome_of

BUCKETS = (0.001, 0.01, 0.1, 1.0)
ROUTE = "/v1/generate"
GENERATE = GenerateRequest(prompt="to be or not", n=2)
START = Start(CHAT.id, 4)
END = End(GenerateUsage(4, 3, cached_tokens=2), GenerateTiming(0.5, 0.25, 1.0, 2.0, 99.0, 99.0))

SECONDS = ["", "_queue", "_tokenize", "_compute", "_first_token", "_prefill", "_decode"]
HISTOGRAMS = [f"attnd_request{stage}_seconds" for stage in SECONDS] + ["attnd_request_completion_tokens"]

Step = tuple[float, Event | BaseException]


class Clock:
    """Seconds that pass when a test lets them; a day's worth has passed already."""

    def __init__(self) -> None:
        self.now = 86_400.0

    def __call__(self) -> float:
        return self.now


class Scripted:
    """A backend whose generations are a list of steps: so many seconds later, this event or error."""

    def __init__(self, clock: Clock, steps: list[Step]) -> None:
        self.clock, self.steps = clock, steps
        self.num_closed = 0

    async def generate(self, request: GenerateRequest, call: Call) -> AsyncGenerator[Event, None]:
        try:
            for seconds, step in self.steps:
                self.clock.now += seconds
                if isinstance(step, BaseException):
                    raise step
                yield step
        finally:
            await asyncio.sleep(0)  # closing may take a turn of the loop, and is waited for
            self.num_closed += 1

    async def classify(self, request: ClassifyRequest, call: Call) -> Classification:
        """Fails as the last step does, at once."""
        assert isinstance(self.steps[-1][1], BaseException)
        raise self.steps[-1][1]

    async def models(self) -> list[ModelInfo]:
        return [MODEL, CHAT]


class Seam:
    """An Observed over scripted steps, its metrics and its log lines."""

    def __init__(self, steps: list[Step]) -> None:
        self.clock = Clock()
        self.backend: Any = Scripted(self.clock, steps)
        self.metrics = Metrics(BUCKETS, {})
        self.lines: list[dict[str, Any]] = []
        self.observed = Observed(self.backend, self.metrics, log=self.lines.append, clock=self.clock)
        self.call = Call("id-1", ROUTE, deadline=1e9, progress=Progress(begun=self.clock.now))

    async def run(self, request: GenerateRequest = GENERATE) -> list[Event]:
        await self.observed.models()
        return [event async for event in self.observed.generate(request, self.call)]

    def sample(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, labels)

    def of(self, name: str, outcome: str, model: str = CHAT.id) -> float | None:
        return self.sample(name, route=ROUTE, model=model, outcome=outcome)

    def ends(self) -> dict[str, dict[str, float]]:
        """How many requests each histogram of requests has, by outcome."""
        found: dict[str, dict[str, float]] = {}
        for family in self.metrics.registry.collect():
            for sample in family.samples:
                if sample.name.endswith("_count") and "outcome" in sample.labels:
                    by_outcome = found.setdefault(family.name, {})
                    outcome = sample.labels["outcome"]
                    by_outcome[outcome] = by_outcome.get(outcome, 0.0) + sample.value
        return found


def two_outputs() -> list[Step]:
    """Two outputs that interleave: tokens of 0 at 3, 5 and 5.25 s, of 1 at 4 and 7 s; the latter ends without more."""
    return [
        (3.0, START),
        (0.0, Token(0, 7, "a")),
        (1.0, Token(1, 7, "b")),
        (1.0, Token(0, 7, "c")),
        (0.25, Token(0, 7, "d")),
        (1.75, Token(1, 7, "")),
        (0.0, Finish(1, "stop", "!")),
        (0.0, Finish(0, "length")),
        (1.0, End(GenerateUsage(4, 5, cached_tokens=2), END.timing)),
    ]


async def test_events_pass_as_they_are() -> None:
    seam = Seam(two_outputs())
    assert await seam.run() == [event for _, event in two_outputs()]


async def test_stages_of_a_generation_are_exact() -> None:
    seam = Seam(two_outputs())
    await seam.run()
    sums = {stage: seam.of(f"attnd_request{stage}_seconds_sum", "ok") for stage in SECONDS}
    assert sums == {
        "": 8.0,
        "_queue": 0.5,
        "_tokenize": 0.25,
        "_compute": 3.0,
        "_first_token": 3.0,
        "_prefill": 1.0,
        "_decode": 2.0,
    }


async def test_gaps_are_those_between_tokens_of_the_same_output() -> None:
    seam = Seam(two_outputs())
    await seam.run()
    assert seam.sample("attnd_inter_token_seconds_count", model=CHAT.id) == 3
    assert seam.sample("attnd_inter_token_seconds_sum", model=CHAT.id) == 2.0 + 0.25 + 3.0
    assert seam.sample("attnd_inter_token_seconds_bucket", model=CHAT.id, le="0.25") == 1


async def test_tokens_and_finish_reasons_are_counted() -> None:
    seam = Seam(two_outputs())
    await seam.run()
    assert seam.sample("attnd_generated_tokens_total", model=CHAT.id) == 5
    assert seam.of("attnd_request_completion_tokens_sum", "ok") == 5
    assert seam.sample("attnd_request_prompt_tokens_sum", route=ROUTE, model=CHAT.id) == 4
    assert seam.sample("attnd_request_cached_tokens_sum", route=ROUTE, model=CHAT.id) == 2
    for reason in ("stop", "length"):
        assert seam.sample("attnd_finished_outputs_total", model=CHAT.id, finish_reason=reason) == 1


async def test_tokens_that_were_never_shown_are_counted_at_the_end() -> None:
    seam = Seam([(1.0, START), (0.0, Token(0, 7, "a")), (0.0, Finish(0, "stop")), (0.0, END)])
    await seam.run()
    assert seam.sample("attnd_generated_tokens_total", model=CHAT.id) == END.usage.completion_tokens == 3
    assert seam.of("attnd_request_completion_tokens_sum", "ok") == 3


@pytest.mark.parametrize(("end", "outcome"), [(END, "ok"), (DeadlineExceeded("late"), "deadline")])
async def test_tokens_without_events_and_their_gaps_are_counted_however_it_ends(
    end: Event | BaseException, outcome: str
) -> None:
    steps: list[Step] = [(1.0, end)] if outcome == "deadline" else [(1.0, START), (0.0, Finish(0, "stop")), (0.0, end)]
    seam = Seam(steps)
    for gap in (None, 0.5, 1.5):
        seam.call.progress.leave_untold(gap)
    with contextlib.suppress(DeadlineExceeded):
        await seam.run()
    assert seam.sample("attnd_inter_token_seconds_count", model=CHAT.id) == 2
    assert seam.sample("attnd_inter_token_seconds_sum", model=CHAT.id) == 2.0
    assert seam.sample("attnd_generated_tokens_total", model=CHAT.id) == 3
    assert seam.of("attnd_request_completion_tokens_sum", outcome) == 3


async def test_the_first_token_is_when_the_worker_says_so_where_it_does() -> None:
    seam = Seam(two_outputs())
    seam.call.progress.first_token = seam.clock.now + 2.5
    await seam.run()
    assert seam.of("attnd_request_first_token_seconds_sum", "ok") == 2.5


async def test_where_no_token_is_told_the_first_is_when_the_end_says_it_was() -> None:
    seam = Seam([(4.0, START), (0.0, Finish(0, "stop")), (0.0, END)])
    seam.call = replace(seam.call, wants_tokens=False)
    await seam.run()
    assert seam.of("attnd_request_first_token_seconds_sum", "ok") == END.timing.first_token_seconds == 99.0


async def test_echoed_prompts_are_not_tokens() -> None:
    seam = Seam(
        [(1.0, START), (5.0, PromptTokens(0, ())), (0.0, Token(0, 1, "a")), (0.0, Finish(0, "stop")), (0.0, END)]
    )
    await seam.run()
    assert seam.of("attnd_request_first_token_seconds_sum", "ok") == 1.0
    assert seam.sample("attnd_inter_token_seconds_count", model=CHAT.id) == 0


ENDS = [
    (InvalidRequest("no"), "invalid"),
    (TooLarge("no"), "invalid"),
    (NotFound("no"), "invalid"),
    (Unauthenticated("no"), "invalid"),
    (Unsupported("no"), "invalid"),
    (Overloaded("no"), "overloaded"),
    (DeadlineExceeded("no"), "deadline"),
    (Cancelled("no"), "cancelled"),
    (asyncio.CancelledError(), "cancelled"),
    (Unavailable("no"), "error"),
    (EngineFailed("no"), "error"),
    (ValueError("no"), "error"),
]


def test_every_error_has_an_outcome() -> None:
    assert set(AttndError.__subclasses__()) - {type(error) for error, _ in ENDS} == {ConfigError, BundleError}
    for error, outcome in ENDS:
        assert outcome_of(error) == outcome


@pytest.mark.parametrize(("error", "outcome"), ENDS)
@pytest.mark.parametrize("num_tokens", [None, 0, 1, 2])
async def test_every_end_is_in_every_histogram_once(error: BaseException, outcome: str, num_tokens: int | None) -> None:
    """Before the start (None) and at every place after it."""
    steps: list[Step] = [] if num_tokens is None else [(2.0, START)]
    steps += [(0.5, Token(0, 7, "a"))] * (num_tokens or 0)
    seam = Seam([*steps, (3.0, error)])
    with pytest.raises(type(error)) as caught:
        await seam.run()
    assert caught.value is error
    assert seam.ends() == {name: {outcome: 1.0} for name in HISTOGRAMS}
    assert seam.backend.num_closed == 1
    assert seam.sample("attnd_requests_in_flight", route=ROUTE) == 0
    assert [line["outcome"] for line in seam.lines] == [outcome]
    assert seam.of("attnd_request_completion_tokens_sum", outcome) == (num_tokens or 0)
    first_token_s = 3.0 if num_tokens is None else 2.0
    assert seam.of("attnd_request_first_token_seconds_sum", outcome) == first_token_s
    assert seam.sample("attnd_inter_token_seconds_sum", model=CHAT.id) == {None: None, 2: 0.5}.get(num_tokens, 0.0)
    cancelled = seam.sample("attnd_cancelled_generations_total", model=CHAT.id)
    assert cancelled == (1 if outcome == "cancelled" else None)


@pytest.mark.parametrize(
    ("seconds", "error", "outcome"),
    [
        (12.0, asyncio.CancelledError(), "deadline"),
        (10.0, asyncio.CancelledError(), "deadline"),
        (9.6, asyncio.CancelledError(), "deadline"),  # of 10 seconds, rounded up by who sent them
        (9.4, asyncio.CancelledError(), "cancelled"),
        (10.0, Cancelled("left"), "deadline"),
        (12.0, Overloaded("no"), "overloaded"),
    ],
)
async def test_who_leaves_when_the_time_is_up_did_not_cancel(
    seconds: float, error: BaseException, outcome: str
) -> None:
    seam = Seam([(seconds, error)])
    seam.call = replace(seam.call, deadline=seam.clock.now + 10.0)
    with pytest.raises(type(error)):
        await seam.run()
    with contextlib.suppress(BaseException):
        await seam.observed.classify(ClassifyRequest(input=(TextInput("a"),)), seam.call)
    assert [line["outcome"] for line in seam.lines] == [outcome, outcome]
    assert seam.ends()["attnd_request_seconds"] == {outcome: 2.0}
    assert seam.ends()["attnd_request_first_token_seconds"] == {outcome: 1.0}


async def test_a_reader_that_stops_when_the_time_is_up_did_not_cancel() -> None:
    seam = Seam([(12.0, START), (0.0, Token(0, 7, "a"))])
    seam.call = replace(seam.call, deadline=seam.clock.now + 10.0)
    async with aclosing(seam.observed.generate(GENERATE, seam.call)) as events:
        await anext(events)
    assert [(line["outcome"], line["error"]) for line in seam.lines] == [("deadline", "GeneratorExit")]


async def test_an_end_is_in_every_histogram_once() -> None:
    seam = Seam(two_outputs())
    await seam.run()
    assert seam.ends() == {name: {"ok": 1.0} for name in HISTOGRAMS}


async def test_the_stages_of_a_generation_that_failed_are_as_far_as_it_came() -> None:
    seam = Seam([(3.0, EngineFailed("no"))])
    progress, begun = seam.call.progress, seam.clock.now
    progress.admitted, progress.tokenized, progress.started = begun + 0.5, begun + 0.75, begun + 2.0
    with pytest.raises(EngineFailed):
        await seam.run()
    sums = [seam.of(f"attnd_request{stage}_seconds_sum", "error") for stage in SECONDS]
    assert sums == [3.0, 1.25, 0.25, 1.0, 3.0, 1.0, 0.0]


async def test_closing_it_closes_what_is_behind_it_and_counts_as_cancelled() -> None:
    seam = Seam(two_outputs())
    await seam.observed.models()
    async with aclosing(seam.observed.generate(GENERATE, seam.call)) as events:
        async for event in events:
            assert seam.sample("attnd_requests_in_flight", route=ROUTE) == 1
            if event == Token(0, 7, "c"):
                break
    assert seam.backend.num_closed == 1
    assert seam.ends() == {name: {"cancelled": 1.0} for name in HISTOGRAMS}
    assert seam.sample("attnd_inter_token_seconds_sum", model=CHAT.id) == 2.0
    assert seam.sample("attnd_cancelled_generations_total", model=CHAT.id) == 1
    assert seam.sample("attnd_requests_in_flight", route=ROUTE) == 0


async def test_cancelling_who_awaits_it_closes_what_is_behind_it() -> None:
    backend = FakeBackend()
    backend.served = [MODEL, CHAT]
    backend.hold()
    metrics = Metrics(BUCKETS, {})
    observed = Observed(backend, metrics)
    await observed.models()

    async def read() -> list[Event]:
        return [event async for event in observed.generate(GENERATE, Call("id", ROUTE, deadline=1e9))]

    task = asyncio.ensure_future(read())
    await until(lambda: backend.num_waiting == 1)
    assert metrics.registry.get_sample_value("attnd_requests_in_flight", {"route": ROUTE}) == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert backend.num_cancelled == 1
    labels = {"route": ROUTE, "model": CHAT.id, "outcome": "cancelled"}
    assert metrics.registry.get_sample_value("attnd_request_seconds_count", labels) == 1
    assert metrics.registry.get_sample_value("attnd_requests_in_flight", {"route": ROUTE}) == 0


async def test_who_stops_reading_after_the_end_was_served_well() -> None:
    seam = Seam(two_outputs())
    await seam.observed.models()
    async with aclosing(seam.observed.generate(GENERATE, seam.call)) as events:
        async for event in events:
            if isinstance(event, End):
                assert seam.of("attnd_request_seconds_count", "ok") == 1  # counted before it is passed on
                break
    assert seam.ends() == {name: {"ok": 1.0} for name in HISTOGRAMS}
    assert len(seam.lines) == 1


async def test_a_generation_without_an_end_is_an_error() -> None:
    seam = Seam(two_outputs()[:4])
    with pytest.raises(EngineFailed, match="broke off"):
        await seam.run()
    assert seam.ends() == {name: {"error": 1.0} for name in HISTOGRAMS}


async def test_the_line_of_a_good_generation() -> None:
    seam = Seam(two_outputs())
    await seam.run()
    assert seam.lines == [
        {
            "request_id": "id-1",
            "route": ROUTE,
            "model": CHAT.id,
            "outcome": "ok",
            "total_seconds": 8.0,
            "queue_seconds": 0.5,
            "compute_seconds": 3.0,
            "prompt_tokens": 4,
            "completion_tokens": 5,
            "cached_tokens": 2,
            "first_token_seconds": 3.0,
            "tokens_per_second": 2.0,
            "finish_reasons": {"stop": 1, "length": 1},
        }
    ]


async def test_the_line_counts_outputs_that_ended_alike() -> None:
    seam = Seam([(0.0, START), (0.0, Finish(0, "stop")), (0.0, Finish(1, "stop")), (0.0, END)])
    await seam.run()
    assert seam.lines[0]["finish_reasons"] == {"stop": 2}


async def test_the_line_of_a_generation_that_never_started() -> None:
    seam = Seam([(0.5, Overloaded("the queue is full (7)"))])
    with pytest.raises(Overloaded):
        await seam.run()
    assert seam.lines == [
        {
            "request_id": "id-1",
            "route": ROUTE,
            "model": CHAT.id,
            "outcome": "overloaded",
            "total_seconds": 0.5,
            "queue_seconds": 0.0,
            "compute_seconds": 0.0,
            "completion_tokens": 0,
            "error": "the queue is full (7)",
        }
    ]


async def test_the_line_of_a_generation_that_was_left() -> None:
    seam = Seam(two_outputs())
    async with aclosing(seam.observed.generate(GENERATE, seam.call)) as events:
        async for event in events:
            if event == Token(0, 7, "d"):
                break
    (line,) = seam.lines
    assert (line["outcome"], line["error"], line["completion_tokens"]) == ("cancelled", "GeneratorExit", 4)
    assert line["tokens_per_second"] == round(3 / 2.25, 3)
    assert line["finish_reasons"] == {}
    assert "cached_tokens" not in line


async def test_only_our_own_faults_leave_a_traceback(caplog: pytest.LogCaptureFixture) -> None:
    for error, is_logged in [(InvalidRequest("no"), False), (Unavailable("no"), False), (ValueError("no"), True)]:
        caplog.clear()
        with pytest.raises(type(error)):
            await Seam([(1.0, START), (1.0, error)]).run()
        assert bool(caplog.records) == is_logged


@pytest.mark.parametrize(
    ("wanted", "served", "label"),
    [
        (None, [MODEL, CHAT], CHAT.id),
        (CHAT.id, [MODEL, CHAT], CHAT.id),
        (MODEL.id, [MODEL, CHAT], MODEL.id),  # a served model, if the wrong one
        ("x" * 100, [MODEL, CHAT], ""),
        (None, [MODEL], ""),
        (CHAT.id, [], ""),
    ],
)
async def test_a_request_that_fails_is_labelled_only_with_names_of_served_models(
    wanted: str | None, served: list[ModelInfo], label: str
) -> None:
    backend = FakeBackend(error=InvalidRequest("no"))
    backend.served = served
    metrics = Metrics(BUCKETS, {})
    observed = Observed(backend, metrics)
    await observed.models()
    with pytest.raises(InvalidRequest):
        async for _ in observed.generate(GenerateRequest(prompt="a", model=wanted), Call("id", ROUTE, deadline=1e9)):
            pass
    labels = {sample.labels["model"] for family in metrics.registry.collect() for sample in family.samples
              if "model" in sample.labels}  # fmt: skip
    assert labels == {label}


async def test_a_translation_model_is_known_where_no_other_generates() -> None:
    translation = ModelInfo("to-french", "translation", 1, {})
    backend = FakeBackend(error=InvalidRequest("no"))
    backend.served = [MODEL, translation]
    lines: list[dict[str, object]] = []
    observed = Observed(backend, Metrics(BUCKETS, {}), log=lines.append)
    await observed.models()
    with pytest.raises(InvalidRequest):
        async for _ in observed.generate(GenerateRequest(prompt="a"), Call("id", ROUTE, deadline=1e9)):
            pass
    assert [line["model"] for line in lines] == ["to-french"]


async def test_the_line_of_a_classification() -> None:
    lines: list[dict[str, Any]] = []
    observed = Observed(FakeBackend(), Metrics(BUCKETS, {}), log=lines.append, clock=lambda: 7.5)
    call = Call("id", "/v1/classify", 1e9, Progress(begun=7.0))
    await observed.classify(ClassifyRequest(input=(TextInput("a fine film"),)), call)
    assert lines == [
        {
            "request_id": "id",
            "route": "/v1/classify",
            "model": MODEL.id,
            "outcome": "ok",
            "total_seconds": 0.5,  # here; the backend, which may be elsewhere, says 0.0051
            "queue_seconds": 0.001,
            "compute_seconds": 0.004,
            "inputs": 1,
            "prompt_tokens": 5,
            "truncated": 0,
        }
    ]


async def test_the_lines_of_attention_and_of_an_explanation() -> None:
    lines: list[dict[str, Any]] = []
    metrics = Metrics(BUCKETS, {})
    observed = Observed(FakeBackend(), metrics, log=lines.append, clock=lambda: 7.5)
    progress = Progress(begun=7.0)
    await observed.attention(AttentionRequest(text="a film", layers="all"), Call("id", "/v1/attention", 1e9, progress))
    await observed.explain(ExplainRequest(text="a film", method="rollout"), Call("id", "/v1/explain", 1e9, progress))
    common = {"request_id": "id", "model": MODEL.id, "outcome": "ok", "prompt_tokens": 3}
    common |= {"total_seconds": 0.5, "queue_seconds": 0.001, "compute_seconds": 0.004}
    assert lines == [
        common | {"route": "/v1/attention", "maps": 3, "bytes": 3 * 4 * 2 * 9},
        common | {"route": "/v1/explain", "method": "rollout"},
    ]
    told = {"model": MODEL.id, "reduce": "none"}
    values = metrics.registry.get_sample_value
    assert values("attnd_attention_maps_total", told) == 3
    assert values("attnd_attention_bytes_total", told) == 3 * 4 * 2 * 9
    assert values("attnd_attention_seconds_sum", told) == 0.5


async def test_attention_that_fails_is_counted_once_and_tells_no_maps() -> None:
    metrics = Metrics(BUCKETS, {})
    observed = Observed(FakeBackend(error=TooLarge("too many")), metrics)
    await observed.models()
    for work in (
        observed.attention(AttentionRequest(text="a"), Call("id", "/r", 1e9)),
        observed.explain(ExplainRequest(text="a"), Call("id", "/r", 1e9)),
    ):
        with pytest.raises(TooLarge):
            await work
    values = metrics.registry.get_sample_value
    labels = {"route": "/r", "model": MODEL.id, "outcome": "invalid"}
    assert values("attnd_request_seconds_count", labels) == 2
    assert values("attnd_attention_maps_total", {"model": MODEL.id, "reduce": "none"}) is None
    assert values("attnd_requests_in_flight", {"route": "/r"}) == 0


def test_a_request_that_never_became_one_is_counted_with_its_route() -> None:
    seam = Seam([])
    seam.clock.now += 0.25
    seam.observed.rejected(seam.call, InvalidRequest("not JSON"))
    assert seam.of("attnd_request_seconds_sum", "invalid", model="") == 0.25
    assert [(line["outcome"], line["error"]) for line in seam.lines] == [("invalid", "not JSON")]


def test_what_came_to_no_route_is_counted_as_such_and_has_a_line() -> None:
    seam = Seam([])
    seam.observed.turned_away("id-2", seam.clock.now - 0.25, InvalidRequest("this is not an HTTP/1.1 request"))
    assert seam.sample("attnd_request_seconds_sum", route=NO_ROUTE, model="", outcome="invalid") == 0.25
    (line,) = seam.lines
    assert (line["request_id"], line["route"], line["outcome"]) == ("id-2", "none", "invalid")
    assert (line["total_seconds"], line["error"]) == (0.25, "this is not an HTTP/1.1 request")


def test_who_leaves_before_the_request_is_complete_cancelled() -> None:
    seam = Seam([])
    seam.observed.turned_away("id-2", seam.clock.now - 1e6, Cancelled("left"))
    assert seam.ends()["attnd_request_seconds"] == {"cancelled": 1.0}
