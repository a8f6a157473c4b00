"""model.translator_graph on the engine that serves: the PyTorch model's logits and attention, whatever is beside it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model.subwords import START_ID
from model.translator_graph import build_translator
from service.worker.bundle import load_bundle
from service.worker.generation.translator import TranslatorEngine
from service.worker.session import Session
from tests.tiny_translator import CONFIG, seeded_translator, tiny_translation_bundle

DRAW = np.random.default_rng(1)
SOURCES = [DRAW.integers(3, CONFIG.vocab_size, length).tolist() for length in (9, 1, 40)]
KEPT = [0, 3, 12]
TARGETS = DRAW.integers(3, CONFIG.vocab_size, (12, len(SOURCES)))  # (steps, rows)


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_translation_bundle(tmp_path_factory.mktemp("exact") / "bundle", precision="float32")


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_translation_bundle(tmp_path_factory.mktemp("int8") / "bundle")


def session(directory: Path, graph: str) -> Session:
    bundle = load_bundle(directory)
    return Session(bundle.graph_path(graph), bundle.graph(graph))


def decoded(directory: Path, rows: list[int]) -> np.ndarray:
    """(rows, steps, V): these sources read, then their targets fed side by side."""
    engine = TranslatorEngine(load_bundle(directory), num_slots=len(rows), threads=1)
    steps = [np.stack([engine.prefill(slot, SOURCES[row], 0, keep="last")[0] for slot, row in enumerate(rows)])]
    for at, tokens in enumerate(TARGETS):
        steps.append(engine.decode(tokens[rows].tolist(), [len(SOURCES[row]) + at for row in rows]).copy())
    return np.stack(steps, axis=1)


@torch.no_grad()
def reference(row: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Logits (T, V) and the weights of all attention, encoder, decoder, cross."""
    model, traces = seeded_translator(), ([], [], [])
    memory = model.encode(torch.tensor([SOURCES[row]]), trace=traces[0])
    target = torch.tensor([[START_ID, *TARGETS[:, row]]])
    logits, _ = model.decode(target, memory, trace=traces[1], cross_trace=traces[2])
    return logits[0].numpy(), [weights.numpy() for trace in traces for weights in trace]


def test_every_step_has_the_logits_of_the_module(exact: Path) -> None:
    """Rows whose sources have other lengths decode together."""
    for row, logits in enumerate(decoded(exact, [0, 1, 2])):
        np.testing.assert_allclose(logits, reference(row)[0], atol=1e-4, rtol=0)


def test_attention_is_that_of_the_module(exact: Path) -> None:
    tell = session(exact, "attention")
    for row, source in enumerate(SOURCES):
        feeds = {"ids": np.array([source]), "target_ids": np.array([[START_ID, *TARGETS[:, row]]])}
        logits, *weights = tell.run(feeds | {"keep": np.array(KEPT)})
        expected, traces = reference(row)
        np.testing.assert_allclose(logits[0], expected[KEPT], atol=1e-4, rtol=0)
        assert len(weights) == len(traces) == CONFIG.num_layers + 2 * CONFIG.num_decoder_layers
        for ours, theirs in zip(weights, traces, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("precision", ["exact", "shipped"])
def test_a_row_has_the_same_bits_in_any_company(precision: str, request: pytest.FixtureRequest) -> None:
    directory = request.getfixturevalue(precision)
    together = decoded(directory, [0, 1, 2])
    for row in range(len(SOURCES)):
        np.testing.assert_array_equal(decoded(directory, [row])[0], together[row])


def test_int8_stays_near(shipped: Path) -> None:
    ours = decoded(shipped, [0, 1, 2])
    theirs = np.stack([reference(row)[0] for row in range(len(SOURCES))])
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.99


def test_sources_of_one_length_have_the_same_bits_together(shipped: Path) -> None:
    encode, ids = session(shipped, "encode"), DRAW.integers(0, CONFIG.vocab_size, (7, 11))
    (together,) = encode.run({"ids": ids})
    for row in range(len(ids)):
        np.testing.assert_array_equal(encode.run({"ids": ids[row : row + 1]})[0][0], together[row])


def test_what_lies_behind_a_rows_length_is_never_read(shipped: Path) -> None:
    """Another's memory, or what an earlier request left there: here, not a number."""
    source = np.array([SOURCES[0]])
    (memory,) = session(shipped, "encode").run({"ids": source})
    found = np.split(memory[0].reshape(source.size, -1, 8).swapaxes(0, 1)[None], 2 * CONFIG.num_decoder_layers, axis=1)
    names = [f"{part}.{layer}" for layer in range(CONFIG.num_decoder_layers) for part in ("key", "value")]

    def logits(room: int) -> np.ndarray:
        feeds = {f"past_cross_{name}": one for name, one in zip(names, grown(found, room), strict=True)}
        feeds |= {f"past_{name}": np.full((1, 4, 1 + room, 8), np.nan, np.float32) for name in names}
        counts = {"lengths": [0], "longest": 1, "source_lengths": [source.size - 1], "longest_source": source.size}
        feeds |= {name: np.array(value, np.int32) for name, value in counts.items()}
        return session(shipped, "decode").run(feeds | {"ids": np.array([[START_ID]])}, ["logits"])[0]

    np.testing.assert_array_equal(logits(5), logits(0))
    assert np.isfinite(logits(5)).all()


def grown(tensors: list[np.ndarray], room: int) -> list[np.ndarray]:
    return [np.pad(one, ((0, 0), (0, 0), (0, room), (0, 0)), constant_values=np.nan) for one in tensors]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_order": "post"}, "norm_order is 'post'"),
        ({"positions": "learned"}, "positions"),
        ({"activation": "gelu"}, "activation"),
        ({"tie_embeddings": False}, "tie_embeddings"),
    ],
)
def test_what_the_graphs_do_not_compute_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_translator(replace(CONFIG, **change), "float32", places={}, file="x", num_written=300)  # type: ignore[arg-type]


def test_tokens_that_are_never_written_have_no_logits(tmp_path: Path, exact: Path) -> None:
    directory = tiny_translation_bundle(tmp_path / "bundle", precision="float32", num_written=270)
    source, written = SOURCES[0], TARGETS[0, 0] % 270
    few, all_of_them = (TranslatorEngine(load_bundle(one), num_slots=1, threads=1) for one in (directory, exact))
    assert (few.vocab_size, all_of_them.vocab_size) == (270, CONFIG.vocab_size)
    for engine in (few, all_of_them):
        engine.prefill(0, source, 0, keep="last")
    after = [engine.decode([written], [len(source)]) for engine in (few, all_of_them)]
    np.testing.assert_allclose(after[0], after[1][:, :270], atol=1e-5, rtol=0)
