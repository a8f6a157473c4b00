"""LocalBackend and what is under it, on an engine made of plain Python: batching, refusals, deadlines, ends."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from service.domain import Call, ClassifyRequest, TextInput
from service.errors import (
    AttndError,
    DeadlineExceeded,
    EngineFailed,
    NotFound,
    Overloaded,
    TooLarge,
    Unavailable,
    Unsupported,
)
from service.metrics import Metrics
from service.observed import Observed
from service.worker.classification.classifier import Classifier
from service.worker.local import LocalBackend
from service.worker.tokenizer import HUGE_TEXT, LONG_TEXT

LABELS = ("NO", "YES")
WORDS = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "good": 3, "bad": 4, "poison": 5, "word": 6}
MAX_TOKENS = 12


class FakeEngine:
    """Logits are (number of 'bad', number of 'good'); 'poison' makes the batch fail; closed `gate` holds it up."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.batches: list[list[tuple[int, ...]]] = []

    def logits(self, batch: Sequence[Any]) -> np.ndarray:
        self.entered.set()
        self.gate.wait(timeout=10)
        self.batches.append([tuple(tokens.ids) for tokens in batch])
        if any(WORDS["poison"] in tokens.ids for tokens in batch):
            raise RuntimeError("poisoned")
        rows = [(tokens.ids.count(WORDS["bad"]), tokens.ids.count(WORDS["good"])) for tokens in batch]
        return np.array(rows, dtype=np.float32)


@pytest.fixture
def tokenizer_path(tmp_path: Path) -> Path:
    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return path


Make = Callable[..., Classifier]


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics((0.001, 1.0), {})


@pytest.fixture
def make(tokenizer_path: Path, engine: FakeEngine, metrics: Metrics) -> Make:
    def make_classifier(**limits: int) -> Classifier:
        manifest = SimpleNamespace(
            id="tiny",
            task="classification",
            created=0,
            labels=LABELS,
            problem_type="single_label_classification",
            limits=SimpleNamespace(max_tokens=MAX_TOKENS),
            architecture={},
            facts=dict,
        )
        bundle: Any = SimpleNamespace(manifest=manifest, tokenizer_path=tokenizer_path)
        sizes = {
            "num_threads": 1,
            "max_batch_tokens": 1024,
            "max_waiting": 64,
            "max_inputs": 32,
            "max_attention_bytes": 4096,
        } | limits
        fake: Any = engine
        return Classifier(bundle, fake, metrics, **sizes)

    return make_classifier


async def started(*classifiers: Classifier, drain_timeout_s: float = 5.0) -> LocalBackend:
    backend = LocalBackend(lambda: classifiers, drain_timeout_s=drain_timeout_s)
    await backend.start()
    return backend


@pytest.fixture
async def backend(make: Make) -> AsyncIterator[LocalBackend]:
    backend = await started(make())
    yield backend
    await backend.aclose()


def call(seconds: float = 30.0) -> Call:
    return Call("id", "/v1/classify", time.monotonic() + seconds)


def request(*texts: str, **options: Any) -> ClassifyRequest:
    return ClassifyRequest(input=tuple(TextInput(text=text) for text in texts), **options)


async def entered(engine: FakeEngine) -> None:
    assert await asyncio.to_thread(engine.entered.wait, 10)


async def test_scores_come_in_input_order_best_first_with_usage_and_timing(backend: LocalBackend) -> None:
    result = await backend.classify(request("bad bad word", "good"), call())
    assert [scores[0].label for scores in result.results] == ["NO", "YES"]
    assert result.results[0][0].score == pytest.approx(np.exp(2) / (np.exp(2) + 1))
    assert result.model == "tiny"
    assert (result.usage.prompt_tokens, result.usage.truncated) == (5 + 3, 0)
    timing = result.timing
    stages = timing.queue_seconds + timing.tokenize_seconds + timing.compute_seconds
    assert 0 < stages <= timing.total_seconds


async def test_options_reach_the_scores(backend: LocalBackend) -> None:
    result = await backend.classify(request("good good", top_k=1, function_to_apply="none"), call())
    assert [(score.label, score.score) for score in result.results[0]] == [("YES", 2.0)]


async def test_pairs_are_encoded_as_pairs(backend: LocalBackend) -> None:
    pair = ClassifyRequest(input=(TextInput(text="good", text_pair="bad bad"),))
    assert (await backend.classify(pair, call())).usage.prompt_tokens == 6


@pytest.mark.parametrize("text", ["good", "good " * 50, "good " * 1000], ids=len)
async def test_an_empty_second_text_is_none(backend: LocalBackend, text: str) -> None:
    single, pair = ((TextInput(text, second),) for second in (None, ""))
    expected, found = [await backend.classify(ClassifyRequest(input=one), call()) for one in (single, pair)]
    assert (found.results, found.usage) == (expected.results, expected.usage)
    said = []
    for one in (single, pair):
        try:
            await backend.classify(ClassifyRequest(input=one, truncate=False), call())
        except TooLarge as error:
            said.append(error.message)
    assert said == said[:1] * (2 if expected.usage.truncated else 0)


async def test_what_waits_runs_in_one_batch(make: Make, engine: FakeEngine) -> None:
    backend = await started(make())
    engine.gate.clear()
    first = asyncio.ensure_future(backend.classify(request("word"), call()))
    await entered(engine)
    rest = [asyncio.ensure_future(backend.classify(request("good"), call())) for _ in range(9)]
    await asyncio.sleep(0)
    engine.gate.set()
    await asyncio.gather(first, *rest)
    assert [len(batch) for batch in engine.batches] == [1, 9]
    await backend.aclose()


async def test_two_engine_threads_share_what_waits(make: Make, engine: FakeEngine) -> None:
    backend = await started(make(num_threads=2))
    await backend.classify(request(*["good"] * 32), call())
    assert sorted(len(batch) for batch in engine.batches) == [8, 8, 16]
    await backend.aclose()


async def test_a_long_text_is_cut_and_reported_or_refused(backend: LocalBackend) -> None:
    text = " ".join(["good"] * 50)
    result = await backend.classify(request(text, "bad"), call())
    assert (result.usage.truncated, result.usage.prompt_tokens) == (1, MAX_TOKENS + 3)
    with pytest.raises(TooLarge, match=r"input\.1 has 52 tokens, the limit is 12") as caught:
        await backend.classify(request("bad", text, truncate=False), call())
    assert caught.value.param == "input.1"


class WatchedTokenizer:
    """Tells in which thread it was asked; closed `gate` holds it up."""

    def __init__(self, classifier: Classifier) -> None:
        self._watched: Any = classifier._tokenizer
        self.threads: list[threading.Thread] = []
        self.gate = threading.Event()
        self.gate.set()
        classifier._tokenizer = self  # type: ignore[assignment]

    def encode(self, inputs: Any, **how: Any) -> Any:
        self.threads.append(threading.current_thread())
        assert self.gate.wait(10)
        return self._watched.encode(inputs, **how)


async def test_a_very_long_text_is_tokenized_beside_the_event_loop(make: Make) -> None:
    classifier = make()
    tokenizer, backend = WatchedTokenizer(classifier), await started(classifier)
    for length in (LONG_TEXT - 5, LONG_TEXT, HUGE_TEXT):
        assert (await backend.classify(request("good " * (length // 5 + 1)), call())).usage.truncated == 1
    here = threading.current_thread()
    assert [thread is here for thread in tokenizer.threads] == [True, False, False]
    await backend.aclose()


@pytest.mark.parametrize("length", [LONG_TEXT, HUGE_TEXT])
async def test_a_deadline_and_a_client_that_leaves_end_the_wait_for_the_tokenizer(make: Make, length: int) -> None:
    classifier = make(max_waiting=1)
    tokenizer, backend = WatchedTokenizer(classifier), await started(classifier)
    tokenizer.gate.clear()
    long = request("good" * length)
    with pytest.raises(DeadlineExceeded):
        await backend.classify(long, call(0.02))
    leaving = asyncio.ensure_future(backend.classify(long, call()))
    await asyncio.sleep(0.01)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    assert not tokenizer.gate.is_set()
    tokenizer.gate.set()
    assert await backend.classify(request("good"), call())  # the one place is free
    await backend.aclose()


async def test_draining_has_an_end_while_a_text_is_tokenized(make: Make) -> None:
    classifier = make()
    tokenizer, backend = WatchedTokenizer(classifier), await started(classifier, drain_timeout_s=0.02)
    tokenizer.gate.clear()
    taken = [asyncio.ensure_future(backend.classify(request("good" * HUGE_TEXT), call())) for _ in range(2)]
    await asyncio.sleep(0)
    await backend.aclose()
    for one in taken:
        with pytest.raises(Unavailable, match="stopping"):
            await one
    tokenizer.gate.set()
    assert len(tokenizer.threads) == 1
    await asyncio.to_thread(tokenizer.threads[0].join, 10)
    assert not tokenizer.threads[0].is_alive()


async def test_too_many_inputs_are_refused_with_the_limit(backend: LocalBackend) -> None:
    with pytest.raises(TooLarge, match="33 inputs in one request, the limit is 32"):
        await backend.classify(request(*["good"] * 33), call())


async def test_unknown_and_unable_models(make: Make) -> None:
    other = make()
    object.__setattr__(other.info, "id", "writer")
    object.__setattr__(other.info, "task", "generation")
    backend = await started(make(), other)
    with pytest.raises(NotFound, match=r"no model 'x' is served; served are: tiny, writer"):
        await backend.classify(request("good", model="x"), call())
    with pytest.raises(Unsupported, match=r"'writer' is for generation, not classification; .*: tiny"):
        await backend.classify(request("good", model="writer"), call())
    assert (await backend.classify(request("good"), call())).model == "tiny"
    await backend.aclose()


async def test_a_full_queue_refuses_before_tokenizing(
    make: Make, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = make(max_waiting=2)
    backend = await started(classifier)
    engine.gate.clear()
    running = asyncio.ensure_future(backend.classify(request("word"), call()))
    await entered(engine)
    waiting = asyncio.ensure_future(backend.classify(request("good", "bad"), call()))
    await asyncio.sleep(0)
    monkeypatch.setattr(classifier, "_encode", None)  # would fail if it were called
    with pytest.raises(Overloaded, match="2 inputs wait, 1 more do not fit under the limit of 2") as caught:
        await backend.classify(request("good"), call())
    assert caught.value.retry_after_s == 1.0  # nothing has been finished yet
    engine.gate.set()
    await asyncio.gather(running, waiting)
    await backend.aclose()


async def test_a_deadline_drops_waiting_work(make: Make, engine: FakeEngine) -> None:
    backend = await started(make())
    engine.gate.clear()
    running = asyncio.ensure_future(backend.classify(request("word"), call()))
    await entered(engine)
    with pytest.raises(DeadlineExceeded, match=r"the deadline passed after 0\.0"):
        await backend.classify(request("good"), call(0.02))
    engine.gate.set()
    await running
    await backend.aclose()
    assert engine.batches == [[(1, 6, 2)]]  # the expired input never ran


async def test_a_deadline_that_has_passed_already_does_no_work(backend: LocalBackend, engine: FakeEngine) -> None:
    with pytest.raises(DeadlineExceeded):
        await backend.classify(request("good"), call(-1.0))
    assert engine.batches == []


async def test_cancelling_removes_waiting_work_and_frees_its_places(make: Make, engine: FakeEngine) -> None:
    backend = await started(make(max_waiting=1))
    engine.gate.clear()
    running = asyncio.ensure_future(backend.classify(request("word"), call()))
    await entered(engine)
    abandoned = asyncio.ensure_future(backend.classify(request("bad"), call()))
    await asyncio.sleep(0)
    abandoned.cancel()
    with pytest.raises(asyncio.CancelledError):
        await abandoned
    follower = asyncio.ensure_future(backend.classify(request("good"), call()))  # fits again
    await asyncio.sleep(0)
    engine.gate.set()
    await asyncio.gather(running, follower)
    await backend.aclose()
    assert engine.batches == [[(1, 6, 2)], [(1, 3, 2)]]


async def test_one_failing_input_does_not_disturb_its_neighbours(make: Make, engine: FakeEngine) -> None:
    backend = await started(make())
    engine.gate.clear()
    first = asyncio.ensure_future(backend.classify(request("word"), call()))
    await entered(engine)
    good, poisoned, bad = (
        asyncio.ensure_future(backend.classify(request(text), call())) for text in ("good", "poison", "bad")
    )
    await asyncio.sleep(0)
    engine.gate.set()
    await first
    assert (await good).results[0][0].label == "YES"
    assert (await bad).results[0][0].label == "NO"
    with pytest.raises(EngineFailed, match="the engine failed on input 0"):
        await poisoned
    await backend.aclose()


async def test_a_dead_engine_thread_fails_its_own_model_and_turns_readiness_red(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier, other = make(), make()
    other.info = replace(other.info, id="other")
    backend = await started(classifier, other)
    assert backend.failure is None

    def broken(_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(classifier._jobs._loop, "_finish", broken)
    with pytest.raises(EngineFailed):
        await backend.classify(request("good"), call())
    with pytest.raises(Unavailable, match="the engine of tiny has failed"):
        await backend.models()
    assert backend.failure == "the engine of tiny has failed"
    for dead in (request("good"), request("good", model="tiny")):
        with pytest.raises(Unavailable, match="the engine of tiny has failed"):
            await backend.classify(dead, call())
    assert (await backend.classify(request("good", model="other"), call())).results[0][0].label == "YES"
    await backend.aclose()


async def test_it_refuses_while_loading_and_while_draining_but_finishes_what_it_took(
    make: Make, engine: FakeEngine
) -> None:
    classifier = make()
    backend = LocalBackend(lambda: [classifier], drain_timeout_s=5.0)
    with pytest.raises(Unavailable, match="being loaded"):
        await backend.classify(request("good"), call())
    await backend.start()
    engine.gate.clear()
    taken = asyncio.ensure_future(backend.classify(request("good"), call()))
    await entered(engine)
    closing = asyncio.ensure_future(backend.aclose())
    await asyncio.sleep(0)
    with pytest.raises(Unavailable, match="draining"):
        await backend.models()
    engine.gate.set()
    assert (await taken).results[0][0].label == "YES"
    await closing


async def test_draining_has_an_end(make: Make, engine: FakeEngine) -> None:
    backend = await started(make(), drain_timeout_s=0.02)
    engine.gate.clear()
    stuck = asyncio.ensure_future(backend.classify(request("good"), call()))
    await entered(engine)
    threading.Timer(0.2, engine.gate.set).start()
    closing = asyncio.ensure_future(backend.aclose())
    with pytest.raises(Unavailable, match="stopping"):
        await stuck
    await closing


def sample(metrics: Metrics, name: str, **labels: str) -> float:
    return metrics.registry.get_sample_value(name, labels) or 0.0


@pytest.mark.parametrize(
    ("seconds", "text", "error", "outcome"),
    [
        (30.0, "good", None, "ok"),
        (-1.0, "good", DeadlineExceeded, "deadline"),
        (30.0, "poison", EngineFailed, "error"),
    ],
)
async def test_every_request_is_counted_once_whatever_its_end(
    backend: LocalBackend, metrics: Metrics, seconds: float, text: str, error: type[AttndError] | None, outcome: str
) -> None:
    observed = Observed(backend, metrics)
    await observed.models()
    if error is None:
        await observed.classify(request(text), call(seconds))
    else:
        with pytest.raises(error):
            await observed.classify(request(text), call(seconds))
    labels = {"route": "/v1/classify", "model": "tiny", "outcome": outcome}
    for stage in ("", "_queue", "_tokenize", "_compute"):
        assert sample(metrics, f"attnd_request{stage}_seconds_count", **labels) == 1
    assert sample(metrics, "attnd_requests_in_flight", route="/v1/classify") == 0


async def test_a_cancelled_request_is_counted_as_cancelled(
    backend: LocalBackend, metrics: Metrics, engine: FakeEngine
) -> None:
    observed = Observed(backend, metrics)
    engine.gate.clear()
    task = asyncio.ensure_future(observed.classify(request("good"), call()))
    await entered(engine)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    engine.gate.set()
    labels = {"route": "/v1/classify", "model": "", "outcome": "cancelled"}
    assert sample(metrics, "attnd_request_seconds_count", **labels) == 1


async def test_batches_are_measured(backend: LocalBackend, metrics: Metrics) -> None:
    await backend.classify(request("good", "bad bad"), call())
    assert sample(metrics, "attnd_real_tokens_total", model="tiny") == 3 + 4
    assert sample(metrics, "attnd_padded_tokens_total", model="tiny") >= 3 + 4
    assert sample(metrics, "attnd_batch_size_sum", model="tiny") == 2
    assert sample(metrics, "attnd_queue_inputs", model="tiny") == 0
