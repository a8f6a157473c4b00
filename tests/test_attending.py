"""Attention of real (tiny) models that write: in process, over HTTP and over gRPC.

The truth is the PyTorch module's explicit path, which shares no code with what serves.
"""

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import until
from reached import Running, array_of, call, serving

from service.backend import Backend
from service.domain import (
    AttendedToken,
    AttentionMaps,
    AttentionRequest,
    Finish,
    GenerateOptions,
    GenerateRequest,
    Token,
)
from service.errors import (
    AttndError,
    DeadlineExceeded,
    EngineFailed,
    InvalidRequest,
    Overloaded,
    TooLarge,
    Unavailable,
    Unsupported,
)
from service.worker.bundle import load_bundle
from service.worker.generation import attend
from service.worker.generation.attended_text import AttendedText
from service.worker.generation.attention_graph import AttentionGraph
from service.worker.generation.prompt_tokenizer import PromptTokenizer
from service.worker.generation.sentences import as_read, sentence_spans
from service.worker.tokenizer import HUGE_TEXT

tiny = pytest.importorskip("tiny", reason="the truth is computed with torch", exc_type=ImportError)
tiny_translator = pytest.importorskip("tiny_translator")
torch = pytest.importorskip("torch")

PROMPT = "the weather é 🎬"
SOURCE = "A dog reads a book."
NUM_LAYERS, NUM_HEADS = tiny.CHAT_CONFIG.num_layers, tiny.CHAT_CONFIG.num_heads
MAKE = {"chat": tiny.tiny_generation_bundle, "translation": tiny_translator.tiny_translation_bundle}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """By model and precision."""
    folder = tmp_path_factory.mktemp("attending")
    return {
        (name, precision): make(folder / f"{name}-{precision}", precision=precision)
        for name, make in MAKE.items()
        for precision in ("float32", "int8")
    }


@pytest.fixture
async def chat(bundles: dict[tuple[str, str], Path]) -> AsyncIterator[Running]:
    async with serving(bundles["chat", "float32"], threads=1) as running:
        yield running


@pytest.fixture
async def translation(bundles: dict[tuple[str, str], Path]) -> AsyncIterator[Running]:
    async with serving(bundles["translation", "float32"], threads=1) as running:
        yield running


def reached(running: Running, way: str) -> Backend:
    found: Backend = getattr(running, way)
    return found


def asking(text: str = PROMPT, *, max_tokens: int | None = 6, **fields: Any) -> AttentionRequest:
    options = None if max_tokens is None else GenerateOptions(max_tokens=max_tokens)
    return AttentionRequest(text=text, **{"generate": options} | fields)


def ids_of(tokens: tuple[AttendedToken, ...] | None) -> list[int]:
    return [one.id for one in tokens or ()]


def chat_truth(ids: list[int]) -> np.ndarray:
    """(layers, heads, T, T)."""
    trace: list[Any] = []
    with torch.no_grad():
        tiny.seeded_chat_model()(torch.tensor([ids]), trace=trace)
    return torch.cat(trace).numpy()


def translation_truth(source: list[int], target: list[int]) -> dict[str, np.ndarray]:
    """(layers, heads, queries, keys) of each kind."""
    model = tiny_translator.seeded_translator()
    encoder, decoder, cross = ([], [], [])  # type: ignore[var-annotated]
    with torch.no_grad():
        memory = model.encode(torch.tensor([source]), trace=encoder)
        model.decode(torch.tensor([target]), memory, trace=decoder, cross_trace=cross)
    traces = {"encoder": encoder, "decoder": decoder, "cross": cross}
    return {kind: torch.cat(trace).numpy() for kind, trace in traces.items()}


async def generated(running: Running, **fields: Any) -> tuple[list[int], str]:
    events = [event async for event in running.local.generate(GenerateRequest(**fields), call())]
    text = "".join(event.text for event in events if isinstance(event, Token | Finish))
    return [event.id for event in events if isinstance(event, Token)], text


def stacked(result: AttentionMaps, kind: str = "decoder") -> np.ndarray:
    return np.stack([array_of(one) for one in result.maps if one.kind == kind])


@pytest.mark.parametrize("way", ["local", "remote"])
async def test_a_decoder_s_rows_of_prompt_and_output_are_the_module_s(chat: Running, way: str) -> None:
    result = await reached(chat, way).attention(asking(layers="all"), call())
    assert (result.model, result.graph, result.usage.prompt_tokens) == ("tiny-chat", "attention", len(result.tokens))
    ids, text = await generated(chat, prompt=PROMPT, max_tokens=6)
    assert (ids_of(result.target_tokens), result.prediction.text) == (ids, text)
    expected = chat_truth([*ids_of(result.tokens), *ids])
    assert [(one.kind, one.layer, one.heads) for one in result.maps] == [
        ("decoder", layer, tuple(range(NUM_HEADS))) for layer in range(NUM_LAYERS)
    ]
    np.testing.assert_allclose(stacked(result), expected, atol=1e-4)
    np.testing.assert_allclose(stacked(result).sum(-1), 1, atol=1e-5)
    assert not np.triu(stacked(result), 1).any()


async def test_over_http_the_same(chat: Running) -> None:
    reply = await chat.ask(text=PROMPT, generate={"max_tokens": 6}, layers=[1], heads=[2, 0])
    direct = await chat.local.attention(asking(layers=(1,), heads=(2, 0)), call())
    assert (reply.status, reply.json["graph"], reply.json["prediction"]) == (
        200, "attention", {"text": direct.prediction.text},
    )  # fmt: skip
    np.testing.assert_array_equal(np.array(reply.json["maps"][0]["weights"], np.float32), array_of(direct.maps[0]))
    assert [one["id"] for one in reply.json["target_tokens"]] == ids_of(direct.target_tokens)


async def test_tokens_say_where_they_stand_in_prompt_and_output(chat: Running) -> None:
    result = await chat.local.attention(asking(max_tokens=24), call())
    for tokens, text, part in (
        (result.tokens, PROMPT, "text"),
        (result.target_tokens or (), result.prediction.text or "", "target"),
    ):
        assert {token.part for token in tokens} == {part}
        assert all(0 <= token.start < token.end <= len(text) for token in tokens)
        assert "".join(text[at] for at in sorted({at for one in tokens for at in range(one.start, one.end)})) == text


async def test_reductions_of_a_causal_map(chat: Running) -> None:
    (mean,) = (await chat.local.attention(asking(reduce="mean"), call())).maps
    result = await chat.local.attention(asking(reduce="rollout"), call())
    expected = chat_truth([*ids_of(result.tokens), *ids_of(result.target_tokens)])
    np.testing.assert_allclose(array_of(mean)[0], expected[-1].mean(0), atol=1e-4)
    flow = np.eye(expected.shape[-1])
    for weights in expected:
        flow = (0.5 * weights.mean(0) + 0.5 * np.eye(len(flow))) @ flow
    np.testing.assert_allclose(array_of(result.maps[0])[0], flow, atol=1e-4)


async def test_a_seed_and_a_temperature_are_the_generator_s(chat: Running) -> None:
    options = GenerateOptions(max_tokens=12, temperature=1.0, seed=7)
    result = await chat.local.attention(asking(generate=options), call())
    ids, _ = await generated(chat, prompt=PROMPT, max_tokens=12, temperature=1.0, seed=7)
    assert ids_of(result.target_tokens) == ids
    assert ids != ids_of((await chat.local.attention(asking(max_tokens=12), call())).target_tokens)


async def test_a_decoder_writes_32_tokens_when_nothing_is_said(chat: Running) -> None:
    asked = await chat.local.attention(AttentionRequest(text=PROMPT), call())
    ids, _ = await generated(chat, prompt=PROMPT, max_tokens=32)
    assert ids_of(asked.target_tokens) == ids


@pytest.mark.parametrize("name", ["chat", "translation"])
async def test_int8_maps_belong_to_the_int8_text(bundles: dict[tuple[str, str], Path], name: str) -> None:
    async with serving(bundles[name, "int8"], threads=1) as running:
        result = await running.local.attention(asking(layers="all"), call())
        ids, text = await generated(running, prompt=PROMPT, max_tokens=6)
        assert (ids_of(result.target_tokens)[-len(ids) :], result.prediction.text) == (ids, text)
        for one in result.maps:
            np.testing.assert_allclose(array_of(one).sum(-1), 1, atol=1e-5)


async def test_maps_over_the_limit_are_refused_before_anything_is_written(
    bundles: dict[tuple[str, str], Path],
) -> None:
    num_prompt = len(tiny.chat_tokenizer().encode(PROMPT).ids)
    size = 4 * NUM_HEADS * (num_prompt + 6) ** 2
    async with serving(bundles["chat", "float32"], threads=1, max_attention_bytes=size) as running:
        with pytest.raises(TooLarge, match=f"have {2 * size} bytes .*the limit is {size}") as refused:
            await running.local.attention(asking(layers="all"), call())
        assert refused.value.code == "attention_too_large"
        assert running.count("attnd_step_rows_count", model="tiny-chat") == 0
        assert len((await running.local.attention(asking(), call())).maps) == 1


async def test_plain_text_opens_no_second_graph(chat: Running) -> None:
    await generated(chat, prompt=PROMPT, max_tokens=2)
    model: Any = chat.local._served["tiny-chat"]
    graph = model.attending._graph
    assert "_session" not in vars(graph)
    await chat.local.attention(asking(), call())
    assert "_session" in vars(graph)


@pytest.mark.parametrize("way", ["local", "remote"])
@pytest.mark.parametrize("target", [None, "Ein Hund liest <s> é."])
async def test_a_translator_has_three_kinds(translation: Running, way: str, target: str | None) -> None:
    request = AttentionRequest(text=SOURCE, layers="all", target=target)
    result = await reached(translation, way).attention(request, call())
    source, written = ids_of(result.tokens), ids_of(result.target_tokens)
    tokenizer = tiny_translator.subwords()
    tokenizer.encode_special_tokens = True
    assert source == tokenizer.encode(SOURCE).ids
    ids, text = await generated(translation, prompt=SOURCE, max_tokens=None)
    if target is not None:
        ids, text = tokenizer.encode(target).ids[:-1], target
    assert (written, result.prediction.text) == ([1, *ids], text)
    expected = translation_truth(source, written)
    for kind, weights in expected.items():
        np.testing.assert_allclose(stacked(result, kind), weights, atol=1e-4, err_msg=kind)
        np.testing.assert_allclose(stacked(result, kind).sum(-1), 1, atol=1e-5)
    assert stacked(result, "cross").shape[2:] == (len(written), len(source))


@pytest.mark.parametrize("text", ["  A dog. \n", "* * *\nA dog \t reads\u200b a book. 42", "Mr. A reads."])
async def test_a_translator_reads_the_sentence_that_generate_reads(translation: Running, text: str) -> None:
    result = await translation.local.attention(asking(text), call())
    ids, written = await generated(translation, prompt=text, max_tokens=6)
    assert ids_of(result.target_tokens) == [1, *ids]
    assert result.prediction.text
    assert result.prediction.text in written
    (start, end) = next(sentence_spans(text))
    tokenizer = tiny_translator.subwords()
    assert ids_of(result.tokens) == tokenizer.encode(as_read(text[start:end])).ids
    places = sorted({at for one in result.tokens if not one.special for at in range(one.start, one.end)})
    assert places == list(range(start, end))


@pytest.mark.parametrize("way", ["local", "remote"])
@pytest.mark.parametrize("target", [None, "Ein Hund."])
@pytest.mark.parametrize(
    ("text", "has"),
    [
        ("A dog. A book.", "2 sentences, at most 1"),
        ("A dog\nreads. A book?\n\nIt reads.", "4 sentences, at most 1"),
        ("A dog. " * 200, "more than 128 sentences, at most 1"),
        ("", "nothing to translate"),
        ("\n* * *", "nothing to translate"),
    ],
)
async def test_a_translator_attends_to_one_sentence(
    translation: Running, way: str, target: str | None, text: str, has: str
) -> None:
    with pytest.raises(InvalidRequest, match=f"^text has {has}") as refused:
        await reached(translation, way).attention(AttentionRequest(text=text, target=target), call())
    assert (refused.value.param, refused.value.code) == ("text", "invalid_request")


async def test_several_sentences_are_refused_over_http(translation: Running) -> None:
    reply = await translation.ask(text="A dog. A book.")
    assert (reply.status, reply.json["error"]["param"], reply.json["error"]["code"]) == (422, "text", "invalid_request")


async def test_tokens_of_a_translation_say_where_they_stand(translation: Running) -> None:
    result = await translation.local.attention(AttentionRequest(text=SOURCE, target="Ein Hund."), call())
    assert result.tokens[-1].special
    assert result.tokens[0].start == 0
    start, *others = result.target_tokens or ()
    assert (start.special, start.part, start.text) == (True, None, "<s>")
    assert {one.part for one in others} == {"target"}
    assert (others[0].start, others[-1].end) == (0, len("Ein Hund."))


async def test_one_kind_and_the_rollouts_of_a_translator(translation: Running) -> None:
    cross = await translation.local.attention(asking(SOURCE, kind="cross", layers=(0,), reduce="max"), call())
    source, written = ids_of(cross.tokens), ids_of(cross.target_tokens)
    expected = translation_truth(source, written)
    assert [(one.kind, one.layer, one.heads) for one in cross.maps] == [("cross", 0, None)]
    np.testing.assert_allclose(array_of(cross.maps[0])[0], expected["cross"][0].max(0), atol=1e-4)
    rolled = await translation.local.attention(asking(SOURCE, reduce="rollout"), call())
    assert [one.kind for one in rolled.maps] == ["encoder", "decoder"]


@pytest.mark.parametrize(
    ("name", "fields", "error", "words"),
    [
        ("chat", {"text": ""}, InvalidRequest, "text has no tokens"),
        ("chat", {"text": "x" * 256}, TooLarge, "text has 256 tokens, at most 255 can be attended to"),
        ("chat", {"text_pair": "a"}, InvalidRequest, "text_pair is for models that classify"),
        ("chat", {"top_k": 1}, InvalidRequest, "top_k is for models that classify"),
        ("chat", {"layers": (2,)}, InvalidRequest, "layers: the decoder attention has 2"),
        ("chat", {"kind": "cross", "model": "tiny-chat"}, Unsupported, "'tiny-chat' is for generation, not trans"),
        ("chat", {"target": "a", "generate": None, "model": "tiny-chat"}, Unsupported, "is for generation, not trans"),
        ("translation", {"text": "x" * 64}, TooLarge, "text has 66 tokens, at most 64"),
        ("translation", {"target": "x" * 64, "generate": None}, TooLarge, "target has 66 tokens, at most 64"),
    ],
)
async def test_what_cannot_be_told_is_said(
    bundles: dict[tuple[str, str], Path], name: str, fields: dict[str, Any], error: type[AttndError], words: str
) -> None:
    async with serving(bundles[name, "float32"], threads=1) as running:
        with pytest.raises(error, match=words):
            await running.local.attention(asking(**fields), call())


async def test_a_bundle_without_the_graph_writes_and_says_what_it_lacks(
    bundles: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    old = tiny.without_graph(bundles["chat", "float32"], tmp_path / "old", "attention")
    async with serving(old, threads=1) as running:
        assert (await generated(running, prompt=PROMPT, max_tokens=3))[0]
        reply = await running.ask(text=PROMPT)
        assert (reply.status, reply.json["error"]["code"]) == (501, "no_attention")


async def test_a_late_request_gets_no_maps(chat: Running) -> None:
    with pytest.raises(DeadlineExceeded):
        await chat.local.attention(asking(), call(-1.0))


async def test_maps_that_come_too_late_are_given_up(translation: Running) -> None:
    with pytest.raises(DeadlineExceeded, match="the deadline passed"):
        await translation.local.attention(AttentionRequest(text=SOURCE, target="Ein"), call(-1.0))


async def test_a_run_that_fails_fails_its_request_alone(chat: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(AttentionGraph, "run", broken)
        with pytest.raises(EngineFailed, match="the attention graph of tiny-chat failed"):
            await chat.local.attention(asking(), call())
    assert (await chat.local.attention(asking(), call())).maps


async def test_text_is_written_while_maps_are_made_one_by_one(chat: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    held, begun, run = threading.Event(), [], AttentionGraph.run

    def hold(*arguments: Any) -> Any:
        begun.append(threading.current_thread())
        held.wait(timeout=30)
        return run(*arguments)

    monkeypatch.setattr(AttentionGraph, "run", hold)
    asked = [asyncio.ensure_future(chat.local.attention(asking(), call())) for _ in range(2)]
    await until(lambda: len(begun) == 1)
    assert len((await generated(chat, prompt=PROMPT, max_tokens=40))[0]) == 40
    assert len(begun) == 1
    held.set()
    first, second = await asyncio.gather(*asked)
    assert first.maps == second.maps
    assert begun[0] is begun[1]


async def test_the_event_loop_reads_short_texts_only(translation: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    threads, read = [], AttendedText.read

    def watched(self: AttendedText, text: str) -> tuple[AttendedToken, ...]:
        threads.append(threading.current_thread())
        return read(self, text)

    monkeypatch.setattr(AttendedText, "read", watched)
    await translation.local.attention(AttentionRequest(text=SOURCE, target="Ein Hund."), call())
    for texts in ({"text": "x" * attend.LONG_TEXT}, {"text": SOURCE, "target": "x" * attend.LONG_TEXT}):
        with pytest.raises(TooLarge):
            await translation.local.attention(AttentionRequest(**texts), call())
    here = threading.current_thread()
    assert [thread is here for thread in threads] == [True, True, False, True, False]


async def test_of_huge_texts_the_tokens_are_counted_before_they_are_named(
    chat: Running, translation: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AttendedText, "read", None)  # would fail if it were called
    huge, solid = "the hour in the hall " * 50_000, "b" * HUGE_TEXT
    with pytest.raises(TooLarge, match=r"text has more than 255 tokens, at most 255 can be attended to"):
        await chat.local.attention(AttentionRequest(text=huge), call())
    for running in (chat, translation):
        with pytest.raises(TooLarge, match=r"text has more than \d+ tokens, at most \d+ can be attended to"):
            await running.local.attention(AttentionRequest(text=solid), call())


async def test_a_deadline_ends_the_wait_for_a_long_text(chat: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    monkeypatch.setattr(AttendedText, "read", lambda *_: gate.wait(10))
    with pytest.raises(DeadlineExceeded):
        await chat.local.attention(AttentionRequest(text="x" * attend.LONG_TEXT), call(0.02))
    assert not gate.is_set()
    gate.set()


async def test_who_leaves_while_waiting_for_maps_gives_up_the_turn(
    chat: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, begun, run = threading.Event(), [], AttentionGraph.run

    def hold(*arguments: Any) -> Any:
        begun.append(arguments)
        held.wait(timeout=30)
        return run(*arguments)

    monkeypatch.setattr(AttentionGraph, "run", hold)
    model: Any = chat.local._served["tiny-chat"]
    staying, leaving = (asyncio.ensure_future(chat.local.attention(asking(), call())) for _ in range(2))
    await until(lambda: len(model.attending._runs) == 2)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    held.set()
    assert (await staying).maps
    assert len(begun) == 1
    assert model.attending._num_open == 0


async def test_more_than_can_wait_are_refused(chat: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attend, "MAX_OPEN", 2)
    found = await asyncio.gather(*(chat.local.attention(asking(), call()) for _ in range(3)), return_exceptions=True)
    assert [type(one) for one in found] == [AttentionMaps, AttentionMaps, Overloaded]
    assert (await chat.local.attention(asking(), call())).maps


async def test_after_the_end_no_maps_are_begun(chat: Running) -> None:
    model: Any = chat.local._served["tiny-chat"]
    await model.attending.aclose(1.0)
    with pytest.raises(Unavailable, match="stopping"):
        await model.attending.attention(asking(), call(), model.generate)


async def test_maps_are_counted_and_so_are_their_bytes(translation: Running) -> None:
    reply = await translation.ask(text=SOURCE, reduce="mean")
    labels = {"model": "tiny-translation", "reduce": "mean"}
    assert translation.count("attnd_attention_maps_total", **labels) == len(reply.json["maps"]) == 3
    size = sum(4 * one["shape"][1] * one["shape"][2] for one in reply.json["maps"])
    assert translation.count("attnd_attention_bytes_total", **labels) == size
    assert translation.count("attnd_attention_seconds_count", **labels) == 1


def test_a_token_inside_of_a_character_stands_where_the_character_does(
    bundles: dict[tuple[str, str], Path],
) -> None:
    tokenizer = PromptTokenizer(load_bundle(bundles["chat", "int8"]).tokenizer_path)
    first, second = tokenizer.encode("é")
    ids = [*tokenizer.encode("a"), first, second, *tokenizer.encode("<|im_start|>!"), first]
    written = AttendedText(tokenizer, start_id=None).written(ids, tokenizer.decode(ids))
    assert (written.text, written.ids) == ("aé!\ufffd", ids)
    places = [(0, 1), (1, 2), (1, 2), (2, 3), (2, 3), (3, 4)]
    assert [(one.start, one.end) for one in written.tokens] == places
    assert written.tokens[3].text == "<|im_start|>"
