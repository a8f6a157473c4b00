"""Attention and explanations of a real (tiny, float32) model, in process, over HTTP and over gRPC.

The truth is the PyTorch module's explicit path, which shares no code with what serves.
"""

import asyncio
import base64
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reached import Running, array_of, call, serving

from service.backend import Backend
from service.domain import (
    AttentionMaps,
    AttentionRequest,
    ClassifyRequest,
    ExplainRequest,
    Score,
    TextInput,
)
from service.errors import AttndError, DeadlineExceeded, InvalidRequest, NotFound, Overloaded, TooLarge, Unsupported
from service.worker.classification.sequence import Job

tiny = pytest.importorskip("tiny", reason="the truth is computed with torch", exc_type=ImportError)
torch = pytest.importorskip("torch")

TEXT = "  w3 w4 unknown\tw49 é w7"
OFFSETS = [(0, 0), (2, 4), (5, 7), (8, 15), (16, 19), (20, 21), (22, 24), (0, 0)]
IDS = [1, 3, 4, 0, 49, 0, 7, 2]
NUM_LAYERS, NUM_HEADS = tiny.CONFIG.num_layers, tiny.CONFIG.num_heads


@pytest.fixture
async def running(tiny_bundles: dict[str, Path]) -> AsyncIterator[Running]:
    async with serving(tiny_bundles["float32"], threads=1) as running:
        yield running


@pytest.fixture(params=["local", "remote"])
def backend(running: Running, request: pytest.FixtureRequest) -> Backend:
    found: Backend = getattr(running, request.param)
    return found


def asking(text: str = TEXT, **fields: Any) -> AttentionRequest:
    return AttentionRequest(text=text, **fields)


def truth(ids: list[int], types: list[int] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(labels,) and (layers, heads, tokens, tokens)."""
    trace: list[Any] = []
    with torch.no_grad():
        logits = tiny.seeded_classifier()(
            torch.tensor([ids]), types=None if types is None else torch.tensor([types]), trace=trace
        )
    return logits.softmax(-1)[0].numpy(), np.stack([weights[0].numpy() for weights in trace])


def all_maps(result: AttentionMaps) -> np.ndarray:
    return np.stack([array_of(one) for one in result.maps])


async def test_every_layer_and_head_is_the_modules_own(backend: Backend) -> None:
    result = await backend.attention(asking(layers="all"), call())
    probabilities, expected = truth(IDS)
    assert [(one.kind, one.layer, one.heads) for one in result.maps] == [
        ("encoder", layer, tuple(range(NUM_HEADS))) for layer in range(NUM_LAYERS)
    ]
    assert all_maps(result).shape == (NUM_LAYERS, NUM_HEADS, len(IDS), len(IDS))
    np.testing.assert_allclose(all_maps(result), expected, atol=1e-4)
    np.testing.assert_allclose(all_maps(result).sum(-1), 1, atol=1e-5)
    scores = {score.label: score.score for score in result.prediction.scores}
    np.testing.assert_allclose([scores[label] for label in tiny.LABELS], probabilities, atol=1e-5)
    assert (result.model, result.graph) == ("tiny", "classify")
    assert (result.target_tokens, result.prediction.text) == (None, None)


@pytest.mark.parametrize("encoding", ["json", "base64"])
async def test_over_http_too(running: Running, encoding: str) -> None:
    reply = await running.ask(text=TEXT, layers="all", encoding=encoding)
    assert (reply.status, reply.headers["content-type"]) == (200, "application/json")
    maps = [
        np.array(one["weights"])
        if encoding == "json"
        else np.frombuffer(base64.b64decode(one["weights"]), "<f4").reshape(one["shape"])
        for one in reply.json["maps"]
    ]
    np.testing.assert_allclose(np.stack(maps), truth(IDS)[1], atol=1e-4)
    direct = await running.local.attention(asking(layers="all"), call())
    np.testing.assert_array_equal(np.stack(maps).astype(np.float32), all_maps(direct))
    assert [one["shape"] for one in reply.json["maps"]] == [[NUM_HEADS, len(IDS), len(IDS)]] * NUM_LAYERS
    assert reply.json["prediction"]["scores"] == [vars(score) for score in direct.prediction.scores]


async def test_tokens_tell_where_they_come_from(backend: Backend) -> None:
    tokens = (await backend.attention(asking(), call())).tokens
    assert [token.id for token in tokens] == IDS
    assert [(token.start, token.end) for token in tokens] == OFFSETS
    assert [token.special for token in tokens] == [True, *[False] * 6, True]
    assert [token.part for token in tokens] == [None, *["text"] * 6, None]
    assert [token.text for token in tokens] == ["[CLS]", "w3", "w4", "[UNK]", "w49", "[UNK]", "w7", "[SEP]"]


async def test_a_pair_tells_which_text_a_token_belongs_to(backend: Backend) -> None:
    result = await backend.attention(asking("w3 w4", text_pair="w5", layers="all"), call())
    assert [(token.part, token.start, token.end) for token in result.tokens] == [
        (None, 0, 0), ("text", 0, 2), ("text", 3, 5), (None, 0, 0), ("text_pair", 0, 2), (None, 0, 0),
    ]  # fmt: skip
    np.testing.assert_allclose(all_maps(result), truth([1, 3, 4, 2, 5, 2], [0, 0, 0, 0, 1, 1])[1], atol=1e-4)


async def test_reductions(backend: Backend) -> None:
    expected = truth(IDS)[1]
    mean = await backend.attention(asking(reduce="mean", layers="all"), call())
    np.testing.assert_allclose(all_maps(mean)[:, 0], expected.mean(1), atol=1e-4)
    highest = await backend.attention(asking(reduce="max", heads=(1, 3)), call())
    np.testing.assert_allclose(all_maps(highest)[0, 0], expected[-1, [1, 3]].max(0), atol=1e-4)
    rolled = await backend.attention(asking(reduce="rollout"), call())
    flow = np.eye(len(IDS))
    for weights in expected:
        mixed = 0.5 * weights.mean(0) + 0.5 * np.eye(len(IDS))
        flow = mixed / mixed.sum(-1, keepdims=True) @ flow
    np.testing.assert_allclose(all_maps(rolled)[0, 0], flow, atol=1e-4)
    assert [(one.layer, one.heads) for one in rolled.maps] == [(None, None)]


async def test_options_of_the_prediction(backend: Backend) -> None:
    whole = await backend.attention(asking(), call())
    cut = await backend.attention(asking(top_k=1), call())
    assert cut.prediction.scores == whole.prediction.scores[:1]
    assert [one.layer for one in whole.maps] == [NUM_LAYERS - 1]


async def test_the_prediction_is_the_one_that_classify_gives_to_the_bit(running: Running) -> None:
    result = await running.local.attention(asking(), call())
    alone = await running.local.classify(ClassifyRequest(input=(TextInput(TEXT),)), call())
    assert result.prediction.scores == alone.results[0]


async def test_neighbours_change_no_bit(running: Running) -> None:
    """With requests of all kinds in the same batches."""
    texts = [" ".join(f"w{3 + (at * 7 + word) % 47}" for word in range(1 + at % 12)) for at in range(24)]
    asked = [asking(text, layers=(at % NUM_LAYERS,), reduce=("none", "mean")[at % 2]) for at, text in enumerate(texts)]
    alone = [await running.local.attention(request, call()) for request in asked]
    plain = ClassifyRequest(input=tuple(TextInput(text) for text in texts))
    scores = await running.local.classify(plain, call())
    attended, classified = await asyncio.gather(
        asyncio.gather(*(running.local.attention(request, call()) for request in asked)),
        asyncio.gather(*(running.local.classify(plain, call()) for _ in range(3))),
    )
    assert [result.maps for result in attended] == [result.maps for result in alone]
    assert [result.prediction for result in attended] == [result.prediction for result in alone]
    assert [result.results for result in classified] == [scores.results] * 3


async def test_a_text_over_the_limit_is_cut_and_the_usage_says_so(backend: Backend) -> None:
    limit = tiny.CONFIG.max_length
    result = await backend.attention(asking("w5 " * 100, reduce="mean"), call())
    assert (len(result.tokens), result.usage.prompt_tokens, result.usage.truncated) == (limit, limit, 1)
    assert result.maps[0].shape == (1, limit, limit)


async def test_an_empty_text_has_special_tokens(backend: Backend) -> None:
    result = await backend.attention(asking(""), call())
    assert [token.special for token in result.tokens] == [True, True]
    np.testing.assert_allclose(all_maps(result)[0], truth([1, 2])[1][-1], atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"layers": (2,)}, InvalidRequest, "layers: the encoder attention has 2, numbered from 0 to 1, got 2"),
        ({"heads": (0, 4)}, InvalidRequest, "heads: the encoder attention has 4, numbered from 0 to 3, got 4"),
        ({"model": "other"}, NotFound, "no model 'other'"),
        ({"kind": "cross"}, NotFound, "no model for translation"),
        ({"kind": "decoder", "model": "tiny"}, Unsupported, "'tiny' is for classification, not generation"),
        ({"target": "w3", "model": "tiny"}, Unsupported, "'tiny' is for classification, not translation"),
    ],
)
async def test_what_cannot_be_told_is_said(
    backend: Backend, fields: dict[str, Any], error: type[AttndError], words: str
) -> None:
    with pytest.raises(error, match=words):
        await backend.attention(asking(**fields), call())


async def test_maps_over_the_limit_are_refused_before_they_are_computed(tiny_bundles: dict[str, Path]) -> None:
    size = 4 * NUM_HEADS * len(IDS) ** 2
    async with serving(tiny_bundles["float32"], threads=1, max_attention_bytes=size) as running:
        await running.local.attention(asking(), call())
        before = running.count("attnd_batch_size_count", model="tiny")
        reply = await running.ask(text=TEXT, layers="all")
        assert (reply.status, reply.json["error"]["code"]) == (413, "attention_too_large")
        words = f"have {2 * size} bytes (encoder: 2 layers, 4 heads, 8 x 8 tokens; reduce 'none'), the limit is {size}"
        assert words in reply.json["error"]["message"]
        assert running.count("attnd_batch_size_count", model="tiny") == before
        assert (await running.ask(text=TEXT, layers="all", reduce="mean")).status == 200


async def test_old_bundles_classify_and_say_what_they_lack(tiny_bundles: dict[str, Path], tmp_path: Path) -> None:
    old = tiny.without_attention(tiny_bundles["float32"], tmp_path / "old")
    async with serving(old, threads=1) as running:
        result = await running.local.classify(ClassifyRequest(input=(TextInput(TEXT),)), call())
        np.testing.assert_allclose(sorted(score.score for score in result.results[0]), sorted(truth(IDS)[0]), atol=1e-5)
        for reply in (await running.ask(text=TEXT), await running.explain(text=TEXT, method="rollout")):
            assert (reply.status, reply.json["error"]["code"]) == (501, "no_attention")
            assert "has no attention outputs; export it anew" in reply.json["error"]["message"]
        assert (await running.explain(text=TEXT)).status == 200


async def test_int8_rows_sum_to_one_and_belong_to_the_int8_prediction(tiny_bundles: dict[str, Path]) -> None:
    async with serving(tiny_bundles["int8"], threads=1) as running:
        result = await running.local.attention(asking(layers="all"), call())
        np.testing.assert_allclose(all_maps(result).sum(-1), 1, atol=1e-5)
        alone = await running.local.classify(ClassifyRequest(input=(TextInput(TEXT),)), call())
        assert result.prediction.scores == alone.results[0]


async def test_a_deadline_and_a_full_queue_are_those_of_classification(running: Running) -> None:
    with pytest.raises(DeadlineExceeded):
        await running.local.attention(asking(), call(-1.0))
    with pytest.raises(DeadlineExceeded):
        await running.local.explain(ExplainRequest(text=TEXT), call(-1.0))


def classify_one(running: Running, text: str, text_pair: str | None = None) -> Any:
    return running.local.classify(ClassifyRequest(input=(TextInput(text, text_pair),)), call())


def score_of(scores: tuple[Score, ...], label: str) -> float:
    return next(score.score for score in scores if score.label == label)


async def test_occlusion_is_classifying_the_variants_one_by_one(running: Running) -> None:
    words = ["w3", "w4", "w30", "w49", "w7"]
    found = await running.local.explain(ExplainRequest(text=" ".join(words)), call())
    whole = (await classify_one(running, " ".join(words))).results[0]
    assert (found.label, found.score) == (whole[0].label, whole[0].score)
    expected = []
    for hidden in range(len(words)):
        text = " ".join("unknown" if at == hidden else word for at, word in enumerate(words))
        expected.append(found.score - score_of((await classify_one(running, text)).results[0], found.label))
    assert found.scores == (0.0, *expected, 0.0)
    assert len({*found.scores}) > 4
    assert [token.text for token in found.tokens] == ["[CLS]", *words, "[SEP]"]


async def test_occlusion_of_pairs_and_of_the_other_label(backend: Backend, running: Running) -> None:
    whole = (await classify_one(running, "w3 w4", "w5")).results[0]
    other = whole[1].label
    found = await backend.explain(ExplainRequest(text="w3 w4", text_pair="w5", label=other), call())
    assert (found.label, found.score) == (other, whole[1].score)
    hidden = score_of((await classify_one(running, "w3 w4", "unknown")).results[0], other)
    assert found.scores[4] == found.score - hidden
    opposite = await backend.explain(ExplainRequest(text="w3 w4", text_pair="w5"), call())
    np.testing.assert_allclose(opposite.scores, [-score for score in found.scores], atol=1e-12)


async def test_an_explanation_by_rollout_is_what_the_first_position_has_seen(backend: Backend) -> None:
    found = await backend.explain(ExplainRequest(text=TEXT, method="rollout"), call())
    rolled = await backend.attention(asking(reduce="rollout"), call())
    np.testing.assert_array_equal(np.float32(found.scores), array_of(rolled.maps[0])[0, 0])
    assert sum(found.scores) == pytest.approx(1, abs=1e-5)
    assert (found.method, found.label) == ("rollout", rolled.prediction.scores[0].label)


async def test_an_explanation_over_http(running: Running) -> None:
    reply = await running.explain(text=TEXT, method="occlusion")
    assert reply.status == 200
    assert set(reply.json) == {"model", "method", "label", "score", "tokens", "scores", "usage", "timing"}
    assert len(reply.json["scores"]) == len(reply.json["tokens"]) == len(IDS)
    first = reply.json["tokens"][0]
    assert first == {"id": 1, "text": "[CLS]", "start": 0, "end": 0, "special": True, "part": None}


async def test_a_label_that_the_model_has_not_is_refused(backend: Backend) -> None:
    with pytest.raises(InvalidRequest, match="label: the model has NEGATIVE, POSITIVE, got 'NEUTRAL'") as caught:
        await backend.explain(ExplainRequest(text="w3", label="NEUTRAL"), call())
    assert caught.value.param == "label"


async def test_an_explanation_needs_a_place_for_each_variant(tiny_bundles: dict[str, Path]) -> None:
    async with serving(tiny_bundles["float32"], threads=1, max_inputs=4, max_queue=4) as running:
        found = await running.local.explain(ExplainRequest(text="w3 w4 w5"), call())
        assert len(found.scores) == 5
        with pytest.raises(TooLarge, match="5 inputs in one request, the limit is 4"):
            await running.local.explain(ExplainRequest(text="w3 w4 w5 w6"), call())
        await running.local.explain(ExplainRequest(text="w3 w4 w5"), call())  # the places are free again


async def test_an_explanation_that_does_not_fit_the_queue_is_refused_and_leaves_its_place(
    tiny_bundles: dict[str, Path],
) -> None:
    async with serving(tiny_bundles["float32"], threads=1, max_inputs=4, max_queue=4) as running:
        model: Any = running.local._served["tiny"]
        others = Job(2, call().progress)
        model._jobs._loop.admit(others)
        with pytest.raises(Overloaded, match="3 inputs wait, 3 more do not fit under the limit of 4") as refused:
            await running.local.explain(ExplainRequest(text="w3 w4 w5"), call())
        assert refused.value.retry_after_s > 0
        assert model._jobs._loop.num_waiting == 2


async def test_maps_bytes_and_seconds_are_counted(running: Running) -> None:
    await running.ask(text=TEXT, layers="all")
    await running.ask(text=TEXT, reduce="mean")
    await running.ask(text=TEXT, layers=[7])
    await running.explain(text=TEXT)
    every, mean = ({"model": "tiny", "reduce": reduce} for reduce in ("none", "mean"))
    assert running.count("attnd_attention_maps_total", **every) == NUM_LAYERS
    assert running.count("attnd_attention_bytes_total", **every) == 4 * NUM_LAYERS * NUM_HEADS * len(IDS) ** 2
    assert running.count("attnd_attention_maps_total", **mean) == 1
    assert running.count("attnd_attention_bytes_total", **mean) == 4 * len(IDS) ** 2
    assert running.count("attnd_attention_seconds_count", **mean) == 1
    for route, outcome, times in (("attention", "ok", 2), ("attention", "invalid", 1), ("explain", "ok", 1)):
        labels = {"route": f"/v1/{route}", "model": "tiny", "outcome": outcome}
        assert running.count("attnd_request_seconds_count", **labels) == times


async def test_plain_classification_fetches_logits_alone(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = running.local._served["tiny"]
    session = model._engine._session
    fetched: list[tuple[str, ...]] = []
    run: Callable[..., Any] = session.run

    def watched(feeds: Any, fetch: Any) -> Any:
        fetched.append(tuple(fetch))
        return run(feeds, fetch)

    monkeypatch.setattr(session, "run", watched)
    await classify_one(running, TEXT)
    await running.local.explain(ExplainRequest(text=TEXT), call())
    assert set(fetched) == {("logits",)}
    fetched.clear()
    await running.local.attention(asking(layers=(0,), reduce="mean"), call())
    assert fetched == [("logits", "attention.0")]
