"""Generations from request to events, on a tiny seeded model: the same bits in any company, and every way to end."""

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import until
from generations import Collected, WatchedEngine, call, collect, make_generator, serving

from service.domain import Finish, GenerateRequest, Message, Start, Token
from service.errors import (
    DeadlineExceeded,
    EngineFailed,
    InvalidRequest,
    Overloaded,
    TooLarge,
    Unavailable,
)
from service.metrics import Metrics
from service.worker.generation import loop
from service.worker.generation.generator import Generator
from service.worker.generation.prompts import PromptReader
from service.worker.local import LocalBackend
from service.worker.tokenizer import HUGE_TEXT, LONG_TEXT

tiny = pytest.importorskip("tiny", reason="exporting needs torch", exc_type=ImportError)

PROMPT = "hello, the world in the rain"
LONG = "the hour in the hall, all the while the well will hold, and all in the hold will hear the call " * 2


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("chat")
    return {name: tiny.tiny_generation_bundle(folder / name, precision=name) for name in ("float32", "int8")}


@pytest.fixture
def metrics() -> Metrics:
    return Metrics((0.001, 1.0), {})


class Running:
    """A backend of one generator, with its engine in reach."""

    def __init__(self, generator: Generator, engine: WatchedEngine, backend: LocalBackend) -> None:
        self.generator, self.engine, self.backend = generator, engine, backend

    async def collect(self, **fields: Any) -> Collected:
        return await collect(self.backend, **{"prompt": PROMPT, "max_tokens": 12, "ignore_eos": True} | fields)

    @property
    def num_busy(self) -> int:
        return self.generator._lanes.num_running


Start_ = Callable[..., Awaitable[Running]]


@pytest.fixture
async def run(bundles: dict[str, Path], metrics: Metrics) -> AsyncIterator[Start_]:
    """Starts a backend; all of them end with the test."""
    started: list[Running] = []

    async def start(precision: str = "int8", *, drain_timeout_s: float = 5.0, **sizes: int) -> Running:
        generator, engine = make_generator(bundles[precision], metrics, **sizes)
        backend = await serving(generator, drain_timeout_s=drain_timeout_s)
        started.append(Running(generator, engine, backend))
        return started[-1]

    yield start
    for one in started:
        one.engine.gate.set()
        await one.backend.aclose()


@pytest.fixture
async def running(run: Start_) -> Running:
    return await run()


def facts(collected: Collected, index: int = 0) -> list[tuple[int, Any]]:
    """Tokens with their log-probabilities and those of the alternatives, to the bit."""
    return [(token.id, token.logprob) for token in collected.tokens(index)]


# --- what it says


async def test_events_come_in_order_and_add_up(running: Running) -> None:
    found = await running.collect()
    assert [type(event).__name__ for event in found.events] == ["Start", *["Token"] * 12, "Finish", "End"]
    assert found.start == Start("tiny-chat", found.end.usage.prompt_tokens)
    assert (found.end.usage.completion_tokens, found.finish().finish_reason) == (12, "length")
    timing = found.end.timing
    stages = timing.queue_seconds + timing.tokenize_seconds + timing.prefill_seconds + timing.decode_seconds
    assert 0 < timing.first_token_seconds < timing.total_seconds
    assert 0 < stages <= timing.total_seconds


@pytest.mark.parametrize("prompt", [PROMPT, LONG])
async def test_greedy_is_the_reference_on_the_same_weights(run: Start_, prompt: str) -> None:
    import torch

    from model.transformer import generate

    running = await run("float32")
    ids = tiny.chat_tokenizer().encode(prompt).ids
    reference = generate(tiny.seeded_chat_model(), torch.tensor([ids]), max_new=20)[0, len(ids) :].tolist()
    assert (await running.collect(prompt=prompt, max_tokens=20)).ids() == reference


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 5}], ids=["greedy", "seeded"])
async def test_a_request_gets_the_same_bits_alone_and_among_neighbours(run: Start_, sampling: dict[str, Any]) -> None:
    """Neighbours of all lengths join and leave while it runs; it shares its beginning with some."""
    running = await run(max_rows=16)
    options = {"logprobs": 3, "prompt": LONG[:150], "max_tokens": 40} | sampling
    alone = await running.collect(**options)

    async def neighbour(number: int) -> Collected:
        await asyncio.sleep(0.002 * (number % 5))
        prompt = LONG[: 7 + 9 * number] if number % 2 else str(number) * (3 * number)
        return await running.collect(prompt=prompt, max_tokens=3 + 5 * (number % 7), temperature=0.7)

    first = [asyncio.ensure_future(neighbour(number)) for number in range(1, 16)]
    among, *_ = await asyncio.gather(running.collect(**options), *first)
    assert max(running.engine.rows) > 8
    assert facts(among) == facts(alone)
    assert among.text() == alone.text()


async def test_a_prefix_from_the_cache_gives_the_same_bits(run: Start_) -> None:
    without, with_cache = await run(num_blocks=0), await run(num_blocks=16)
    options = {"prompt": LONG, "logprobs": 2}
    expected = await without.collect(**options)
    fresh, again = await with_cache.collect(**options), await with_cache.collect(**options)
    assert facts(expected) == facts(fresh) == facts(again)
    num_prompt = expected.end.usage.prompt_tokens
    assert num_prompt > 64
    assert [one.end.usage.cached_tokens for one in (expected, fresh, again)] == [0, 0, (num_prompt - 1) // 64 * 64]
    longer = await with_cache.collect(prompt=LONG[:150] + "or in the cold")
    assert longer.end.usage.cached_tokens == 64
    assert facts(longer) == facts(await without.collect(prompt=LONG[:150] + "or in the cold"))


async def test_outputs_of_one_prompt_are_the_outputs_that_single_requests_get(running: Running) -> None:
    options = {"temperature": 1.5, "logprobs": 1}
    several = await running.collect(prompt=[PROMPT, LONG], n=2, seed=7, **options)
    for index, (prompt, seed) in enumerate([(PROMPT, 7), (PROMPT, 8), (LONG, 7), (LONG, 8)]):
        assert facts(several, index) == facts(await running.collect(prompt=prompt, seed=seed, **options))
    assert several.text(0) != several.text(1)
    usage = several.end.usage
    assert usage.completion_tokens == 4 * 12
    assert usage.prompt_tokens == sum(len(tiny.chat_tokenizer().encode(text).ids) for text in (PROMPT, LONG))


async def test_without_a_seed_every_request_is_another(running: Running) -> None:
    texts = {(await running.collect(temperature=2.0)).text() for _ in range(4)}
    assert len(texts) > 1


async def test_no_temperature_is_the_manifest_s(running: Running) -> None:
    assert (await running.collect()).ids() == (await running.collect(temperature=0)).ids()  # the manifest says 0


async def test_a_stop_string_ends_it_and_is_not_shown(running: Running) -> None:
    whole = (await running.collect()).text()
    stop = whole[5:8]
    found = await running.collect(stop=["never", stop])
    assert found.text() == whole[: whole.index(stop)]
    assert (found.finish().finish_reason, found.finish().stop) == ("stop", stop)
    assert running.num_busy <= 1


async def test_a_stop_id_and_an_end_id_end_it(running: Running) -> None:
    ids = (await running.collect()).ids()
    found = await running.collect(stop_token_ids=[ids[4]])
    at = ids.index(ids[4])
    assert (found.ids(), found.finish().stop, found.finish().finish_reason) == (ids[:at], ids[4], "stop")
    biased = await running.collect(logit_bias={tiny.END_IDS[0]: 100}, ignore_eos=False)
    assert (biased.ids(), biased.finish().finish_reason, biased.finish().stop) == ([], "stop", None)
    assert biased.end.usage.completion_tokens == 1


async def test_an_end_can_be_ignored_or_put_off(running: Running) -> None:
    bias = {"logit_bias": {tiny.END_IDS[0]: 100}, "max_tokens": 5}
    assert (await running.collect(**bias)).ids() == [tiny.END_IDS[0]] * 5
    assert len((await running.collect(**bias, ignore_eos=False, min_tokens=3)).ids()) == 3


async def test_without_max_tokens_it_writes_until_the_model_s_limit(running: Running) -> None:
    for wanted in (None, 1000):
        found = await running.collect(max_tokens=wanted)
        usage = found.end.usage
        assert usage.prompt_tokens + usage.completion_tokens == tiny.CHAT_CONFIG.max_length
        assert found.finish().finish_reason == "length"


async def test_an_echo_gives_the_prompt_s_log_probabilities_cached_or_not(running: Running) -> None:
    await running.collect(prompt=LONG)
    found = await running.collect(prompt=[LONG, PROMPT], echo=True, logprobs=2, n=2)
    assert [prompt.prompt for prompt in sorted(found.prompts, key=lambda one: one.prompt)] == [0, 1]
    tokens = next(one.tokens for one in found.prompts if one.prompt == 0)
    ids = tiny.chat_tokenizer().encode(LONG).ids
    assert [token.id for token in tokens] == ids
    assert b"".join(token.bytes for token in tokens).decode() == LONG
    assert (tokens[0].logprob, len(tokens[1].top)) == (0.0, 2)
    # The log-probability of a prompt's token is the one it has when it is written.
    at = 70
    forced = await running.collect(prompt=ids[:at], max_tokens=1, logprobs=0, logit_bias={ids[at]: 100})
    assert forced.tokens()[0].logprob is not None
    assert forced.tokens()[0].logprob.logprob == pytest.approx(tokens[at].logprob, abs=1e-5)


async def test_a_chat_is_the_prompt_that_its_template_makes(running: Running) -> None:
    chat = await running.collect(prompt=None, messages=[Message("user", "hello")])
    text = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert chat.ids() == (await running.collect(prompt=text)).ids()


async def test_a_very_long_prompt_is_tokenized_beside_the_event_loop_and_refused(running: Running) -> None:
    with pytest.raises(
        TooLarge, match=r"prompt\.1 has \d+ tokens; with at least one to write, the limit is 256"
    ) as caught:
        await running.collect(prompt=["a", "b" * LONG_TEXT])
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt.1")
    assert running.generator._lanes.num_waiting == 0


async def test_of_huge_texts_the_tokens_are_not_all_counted(running: Running) -> None:
    huge = "the hour in the hall " * 50_000
    quoted = "<|im_end|> " * 50_000
    chats: list[dict[str, Any]] = [{"prompt": None, "messages": [Message("user", text)]} for text in (huge, quoted)]
    for fields in ({"prompt": huge}, *chats):
        with pytest.raises(TooLarge, match=r" has more than 256 tokens; with at least one to write, the limit is 256"):
            await running.collect(**fields)
    with pytest.raises(TooLarge, match=r"^prompt\.0 has more than 256 tokens;"):  # none of 16 bytes
        await running.collect(prompt="b" * HUGE_TEXT)
    with pytest.raises(TooLarge, match=rf"^prompt\.0 has {HUGE_TEXT - 1} tokens;"):
        await running.collect(prompt="b" * (HUGE_TEXT - 1))


@pytest.mark.parametrize("length", [LONG_TEXT, HUGE_TEXT])
async def test_a_deadline_and_a_client_that_leaves_end_the_wait_for_the_tokenizer(
    running: Running, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    gate, threads, read = threading.Event(), [], PromptReader.read

    def held(*arguments: Any) -> Any:
        threads.append(threading.current_thread())
        assert gate.wait(10)
        return read(*arguments)

    monkeypatch.setattr(PromptReader, "read", held)
    events = running.backend.generate(GenerateRequest(prompt=("b" * length,)), call(0.02))
    with pytest.raises(DeadlineExceeded):
        await anext(events)
    leaving = asyncio.ensure_future(running.collect(prompt="b" * length))
    await asyncio.sleep(0.01)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    assert running.generator._lanes.num_waiting == 0
    gate.set()
    assert (await running.collect()).finish().finish_reason == "length"
    assert [thread is threading.current_thread() for thread in (threads[0], threads[-1])] == [False, True]


# --- beam search


class Continuing:
    """A language model that the reference search takes for an encoder-decoder: its source is the prompt.

    What a row has read is kept as its keys, so that the search puts it in order; nothing else is remembered.
    """

    def encode(self, source: Any, mask: None) -> Any:
        return source[..., None]

    def decode(self, ids: Any, memory: Any, mask: None, *, past: Any) -> Any:
        import torch

        from model.transformer import KeyValue, LayerCache

        read = ids[:, 1:] if past is None else torch.cat((past[0].own.key, ids), dim=1)  # without the start token
        logits, _ = tiny.seeded_chat_model()(torch.cat((memory[..., 0], read), dim=1))
        return logits, [LayerCache(KeyValue(read, read), None)]


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
async def test_a_search_finds_what_the_reference_finds_on_the_same_weights(run: Start_, length_penalty: float) -> None:
    import torch

    from model.search import beam_search
    from model.subwords import END_ID

    running = await run("float32")
    options = {"num_beams": 3, "length_penalty": length_penalty}
    for prompt in (PROMPT, LONG, "a"):
        ids = tiny.chat_tokenizer().encode(prompt).ids
        model: Any = Continuing()
        (expected,) = beam_search(model, torch.tensor([ids]), max_new=[16], **options)
        found = await running.collect(prompt=prompt, max_tokens=16, n=3, stop_token_ids=[END_ID], logprobs=0, **options)
        assert [found.ids(place) for place in range(3)] == [
            [token for token in hypothesis.ids if token != END_ID] for hypothesis in expected
        ]
        for place, hypothesis in enumerate(expected):
            total = sum(token.logprob.logprob for token in found.tokens(place) if token.logprob)
            if found.finish(place).finish_reason == "length":
                assert total / 16**length_penalty == pytest.approx(hypothesis.score, abs=1e-4)


async def test_a_search_tells_its_outputs_when_it_is_over_the_best_first(running: Running) -> None:
    found = await running.collect(num_beams=4, n=2, logprobs=1)
    told = [(type(event).__name__, getattr(event, "index", None)) for event in found.events]
    one = [("Token", 0)] * 12 + [("Finish", 0)]
    other = [("Token", 1)] * 12 + [("Finish", 1)]
    assert told == [("Start", None), *one, *other, ("End", None)]
    totals = [sum(token.logprob.logprob for token in found.tokens(at) if token.logprob) for at in range(2)]
    assert totals[0] > totals[1]
    assert totals[0] > sum(
        token.logprob.logprob for token in (await running.collect(logprobs=0)).tokens() if token.logprob
    )  # true of these weights: greedy does not find it
    usage = found.end.usage
    assert (usage.completion_tokens, usage.prompt_tokens) == (24, len(tiny.chat_tokenizer().encode(PROMPT).ids))
    await until(lambda: running.num_busy == 0)


async def test_a_search_has_no_first_token_before_it_is_over(running: Running) -> None:
    running.engine.gate.clear()
    circumstances = call()
    searching = asyncio.ensure_future(
        collect(running.backend, circumstances, prompt=PROMPT, num_beams=2, max_tokens=3, ignore_eos=True)
    )
    steps: list[float | None] = []
    decode = running.engine.decode
    running.engine.decode = lambda *read: (steps.append(circumstances.progress.first_token), decode(*read))[1]
    running.engine.gate.set()
    await searching
    assert steps == [None, None]
    assert circumstances.progress.first_token is not None


async def test_a_search_gets_the_same_bits_alone_and_among_neighbours(run: Start_) -> None:
    """Its beams are forked, copied and moved among rows that come and go, and among those of other searches."""
    running = await run(max_rows=16)
    options = {"num_beams": 4, "n": 4, "logprobs": 3, "prompt": LONG[:150], "max_tokens": 40}
    alone = await running.collect(**options)

    async def neighbour(number: int) -> Collected:
        await asyncio.sleep(0.002 * (number % 5))
        beams = {"num_beams": 3} if number % 3 == 0 else {"temperature": 0.7}
        return await running.collect(prompt=LONG[: 7 + 9 * number], max_tokens=3 + 5 * (number % 7), **beams)

    first = [asyncio.ensure_future(neighbour(number)) for number in range(1, 16)]
    among, *_ = await asyncio.gather(running.collect(**options), *first)
    assert max(running.engine.rows) > 8
    for place in range(4):
        assert facts(among, place) == facts(alone, place)
        assert among.text(place) == alone.text(place)
    await until(lambda: running.num_busy == 0)


async def test_searches_whose_likeliest_tokens_cannot_be_found_fail_and_nobody_else_does(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    (lane,) = running.generator._lanes._lanes

    def failing(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(lane._likeliest, "of", failing)
        plain = asyncio.ensure_future(running.collect())
        with pytest.raises(EngineFailed, match="failed on output 0"):
            await running.collect(num_beams=2)
        assert len((await plain).ids()) == 12
    assert len((await running.collect(num_beams=2)).ids()) == 12
    await until(lambda: running.num_busy == 0)


async def test_each_prompt_of_a_request_is_a_search_of_its_own(run: Start_) -> None:
    running = await run(max_rows=5)
    options = {"num_beams": 3, "n": 2, "logprobs": 0}
    several = await running.collect(prompt=[PROMPT, LONG, "a"], **options)
    for place, prompt in enumerate([PROMPT, LONG, "a"]):
        single = await running.collect(prompt=prompt, **options)
        assert [facts(several, 2 * place + at) for at in range(2)] == [facts(single, at) for at in range(2)]
    assert (several.end.usage.completion_tokens, several.end.usage.cached_tokens) == (6 * 12, 0)
    again = await running.collect(prompt=[PROMPT, LONG], **options)
    assert again.end.usage.cached_tokens == (len(tiny.chat_tokenizer().encode(LONG).ids) - 1) // 64 * 64


async def test_the_ends_of_a_search(running: Running) -> None:
    one = await running.collect(num_beams=2, max_tokens=1)
    assert (len(one.ids()), one.finish().finish_reason) == (1, "length")
    ids = (await running.collect(num_beams=2)).ids()
    stopped = await running.collect(num_beams=2, n=2, stop_token_ids=[ids[0]], max_tokens=4)
    assert (stopped.ids(), stopped.finish().stop, stopped.finish().finish_reason) == ([], ids[0], "stop")
    put_off = await running.collect(num_beams=2, stop_token_ids=[ids[0]], min_tokens=3, max_tokens=8)
    assert len(put_off.ids()) >= 3
    assert ids[0] not in put_off.ids()


async def test_a_search_echoes_its_prompt_once(running: Running) -> None:
    plain = await running.collect(prompt=LONG, echo=True, logprobs=1)
    found = await running.collect(prompt=LONG, echo=True, logprobs=1, num_beams=3, n=2)
    assert found.prompts == plain.prompts


async def test_a_search_that_is_left_frees_its_slots(running: Running, metrics: Metrics) -> None:
    searching = asyncio.ensure_future(running.collect(num_beams=4, max_tokens=200))
    await until(lambda: len(running.engine.rows) > 2)
    searching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await searching
    await until(lambda: running.num_busy == 0)
    await until(lambda: sample(metrics, "attnd_release_seconds_count") == 4)
    assert len((await running.collect(num_beams=4)).ids()) == 12


async def test_a_search_fails_as_one_and_disturbs_nobody(running: Running) -> None:
    """One of its beams reads what the engine cannot; its neighbour goes on."""
    expected = await running.collect(max_tokens=30, logprobs=1)
    beams = await running.collect(prompt=LONG, num_beams=3, n=3, max_tokens=20)
    (poison, *_) = {token for at in (1, 2) for token in beams.ids(at)[2:]} - {*expected.ids(), *beams.ids()}
    running.engine.gate.clear()
    healthy = asyncio.ensure_future(running.collect(max_tokens=30, logprobs=1))
    ill = asyncio.ensure_future(running.collect(prompt=LONG, num_beams=3, n=3, max_tokens=20))
    running.engine.poison = poison
    await asyncio.sleep(0)
    running.engine.gate.set()
    with pytest.raises(EngineFailed, match="the engine failed on output 0"):
        await ill
    assert facts(await healthy) == facts(expected)
    await until(lambda: running.num_busy == 0)


# --- what it refuses


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"num_beams": 5}, TooLarge, "num_beams is 5, the limit is 4"),
        ({"num_beams": 2, "n": 3}, InvalidRequest, "n is 3, a search with 2 beams finds no more"),
        ({"num_beams": 2, "stop": "x"}, InvalidRequest, "stop goes with num_beams 1 only, not 2"),
        ({"num_beams": 2, "repetition_penalty": 1.1}, InvalidRequest, "repetition_penalty goes with num_beams 1 only"),
        ({"prompt": [[268]]}, InvalidRequest, "prompt.0: token ids are below 268, got 268"),
        ({"prompt": ""}, InvalidRequest, "prompt.0 has no tokens"),
        ({"logit_bias": {400: 1.0}}, InvalidRequest, "logit_bias: token ids are below 268, got 400"),
        (
            {"min_tokens": 300, "max_tokens": None},
            TooLarge,
            "min_tokens is 300, the 20 tokens of prompt leave room for 236",
        ),
        ({"n": 65}, TooLarge, r"65 outputs or beams .* \(prompts or sentences: 1, n: 65\), the limit is 64"),
        ({"prompt": ["a"] * 22, "num_beams": 3}, TooLarge, r"66 .* \(prompts or sentences: 22, num_beams: 3\), .* 64"),
        ({"prompt": ["a"] * 65}, TooLarge, r"65 .* \(prompts or sentences: 65\), .* 64"),
    ],
)
async def test_what_the_model_cannot_do_is_said(
    running: Running, fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        await running.collect(**fields)
    assert (running.generator._lanes.num_waiting, running.generator._open) == (0, {})


async def test_a_full_queue_refuses_before_tokenizing(run: Start_, monkeypatch: pytest.MonkeyPatch) -> None:
    running = await run(max_rows=1, max_waiting=2)
    running.engine.gate.clear()
    first = asyncio.ensure_future(running.collect())
    await until(lambda: running.num_busy == 1)
    second = asyncio.ensure_future(running.collect(n=2))
    await until(lambda: running.generator._lanes.num_waiting == 2)
    monkeypatch.setattr(running.generator, "_read", None)  # would fail if it were called
    with pytest.raises(Overloaded, match="2 outputs wait, 1 more do not fit under the limit of 2") as caught:
        await running.collect()
    assert caught.value.retry_after_s > 0
    running.engine.gate.set()
    await asyncio.gather(first, second)


@pytest.mark.parametrize(
    ("fields", "param"), [({}, "prompt"), ({"n": 2}, "n"), ({"n": 2, "num_beams": 2}, "num_beams")]
)
async def test_what_makes_a_request_too_large_is_named(run: Start_, fields: dict[str, int], param: str) -> None:
    running = await run(max_waiting=2)
    with pytest.raises(TooLarge) as caught:
        await running.collect(prompt=["a"] * 3, **fields)
    assert (caught.value.param, caught.value.code) == (param, "too_many_outputs")


async def test_when_to_come_back_depends_on_what_an_output_takes_not_its_request(
    run: Start_, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an engine with one slot the outputs of a request follow each other: none has it as long as all together."""
    ticks = itertools.count(1.0)
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=ticks.__next__))
    running = await run(max_rows=1)
    learn, learned = running.generator._learn, list[float]()
    monkeypatch.setattr(running.generator, "_learn", lambda seconds: (learned.append(seconds), learn(seconds)))
    await running.collect(n=8)
    await until(lambda: len(learned) == 8)
    assert sum(learned) <= next(ticks)
    assert min(learned) <= running.generator._output_seconds <= max(learned)


# --- how it ends


def sample(metrics: Metrics, name: str, **labels: str) -> float:
    return metrics.registry.get_sample_value(name, {"model": "tiny-chat", **labels}) or 0.0


async def test_a_generation_that_is_left_frees_its_slot_before_the_next_step(
    running: Running, metrics: Metrics
) -> None:
    left = running.backend.generate(GenerateRequest(prompt=PROMPT, n=3, max_tokens=200, ignore_eos=True), call())
    async with aclosing(left) as events:
        async for event in events:
            if isinstance(event, Token):
                break
        running.engine.gate.clear()
        num_steps = len(running.engine.rows)
    running.engine.gate.set()
    await until(lambda: running.num_busy == 0)
    assert len(running.engine.rows) <= num_steps + 2  # the one under way, and one that had been planned
    await until(lambda: sample(metrics, "attnd_release_seconds_count") == 3)
    await running.collect()


async def test_a_task_that_is_cancelled_while_it_waits_gives_its_place_back(run: Start_) -> None:
    running = await run(max_rows=1, max_waiting=1)
    running.engine.gate.clear()
    first = asyncio.ensure_future(running.collect())
    await until(lambda: running.num_busy == 1)
    second = asyncio.ensure_future(running.collect())
    await until(lambda: running.generator._lanes.num_waiting == 1)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    assert running.generator._lanes.num_waiting == 0
    running.engine.gate.set()
    assert len((await first).ids()) == 12


@pytest.mark.parametrize("seconds", [-1.0, 0.02])
async def test_a_deadline_ends_it_and_frees_its_slot(running: Running, seconds: float) -> None:
    running.engine.gate.clear()
    with pytest.raises(DeadlineExceeded, match="the deadline passed after"):
        await collect(running.backend, call(seconds), prompt=PROMPT)
    running.engine.gate.set()
    await until(lambda: running.num_busy == 0)
    await running.collect()


async def test_one_failing_output_does_not_disturb_its_neighbours(running: Running) -> None:
    """The engine fails on the whole step, whatever row is to blame; then each row is tried alone."""
    expected = await running.collect(max_tokens=30, logprobs=1)
    running.engine.gate.clear()
    healthy = [asyncio.ensure_future(running.collect(max_tokens=30, logprobs=1)) for _ in range(2)]
    ill = asyncio.ensure_future(running.collect(prompt=LONG, max_tokens=200, logit_bias={267: 100}))
    running.engine.poison = 267  # read at the first step of decode
    await asyncio.sleep(0)
    running.engine.gate.set()
    with pytest.raises(EngineFailed, match="the engine failed on output 0"):
        await ill
    assert [facts(one) for one in await asyncio.gather(*healthy)] == [facts(expected)] * 2
    await until(lambda: running.num_busy == 0)


async def test_a_prompt_that_fails_fails_alone(running: Running) -> None:
    running.engine.poison = 267
    with pytest.raises(EngineFailed):
        await running.collect(prompt=[[5] * 70 + [267] * 10])
    assert len((await running.collect()).ids()) == 12
    assert running.num_busy <= 1


async def test_a_dead_engine_thread_fails_what_is_open_and_turns_readiness_red(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(running.generator._lanes._lanes[0]._loop, "_execute", broken)
    with pytest.raises(EngineFailed, match="the engine of tiny-chat has failed"):
        await running.collect()
    with pytest.raises(Unavailable, match="the engine of tiny-chat has failed"):
        await running.backend.models()
    with pytest.raises(Unavailable):
        await running.collect()


async def test_draining_finishes_what_was_accepted(running: Running) -> None:
    running.engine.gate.clear()
    taken = asyncio.ensure_future(running.collect(n=3))
    await until(lambda: running.num_busy > 0)
    closing = asyncio.ensure_future(running.backend.aclose())
    await asyncio.sleep(0)
    with pytest.raises(Unavailable, match="draining"):
        await running.collect()
    running.engine.gate.set()
    assert [len((await taken).ids(index)) for index in range(3)] == [12] * 3
    await closing


async def test_draining_has_an_end(run: Start_) -> None:
    running = await run(drain_timeout_s=0.02)
    running.engine.gate.clear()
    stuck = asyncio.ensure_future(running.collect())
    await until(lambda: running.num_busy > 0)
    threading.Timer(0.2, running.engine.gate.set).start()
    closing = asyncio.ensure_future(running.backend.aclose())
    with pytest.raises(Unavailable, match="stopping"):
        await stuck
    await closing


async def test_a_reader_that_stops_after_the_last_finish_leaves_nothing(running: Running) -> None:
    async with aclosing(running.backend.generate(GenerateRequest(prompt=PROMPT, max_tokens=3), call())) as events:
        async for event in events:
            if isinstance(event, Finish):
                break
    await until(lambda: running.num_busy == 0)
    assert running.generator._open == {}


async def test_steps_prefixes_and_memory_are_measured(running: Running, metrics: Metrics) -> None:
    num_prompt = (await running.collect(prompt=LONG)).end.usage.prompt_tokens
    await running.collect(prompt=LONG)
    await until(lambda: running.num_busy == 0)
    assert sample(metrics, "attnd_step_tokens_total", phase="decode") == 2 * 11
    cached = (num_prompt - 1) // 64 * 64
    assert sample(metrics, "attnd_step_tokens_total", phase="prefill") == 2 * num_prompt - cached
    assert sample(metrics, "attnd_prefix_cache_queried_tokens_total") == 2 * num_prompt
    assert sample(metrics, "attnd_prefix_cache_hit_tokens_total") == cached
    assert sample(metrics, "attnd_kv_cache_used_tokens") == num_prompt // 64 * 64
    assert sample(metrics, "attnd_kv_cache_capacity_tokens") == 5 * 256 + 16 * 64
    assert (sample(metrics, "attnd_running_sequences"), sample(metrics, "attnd_queue_inputs")) == (0, 0)
