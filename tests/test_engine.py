"""service.worker.classification.engine: packing, and the same bits for a sequence whatever its neighbours are."""

import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import CONFIG, change_manifest, random_ids, without_attention

from service.errors import BundleError
from service.worker.bundle import load_bundle
from service.worker.classification.engine import ClassificationEngine, Tokens, pack, padded_length


@pytest.fixture(scope="module", params=["float32", "int8"])
def engine(request: pytest.FixtureRequest, tiny_bundles: dict[str, Path]) -> ClassificationEngine:
    return ClassificationEngine(load_bundle(tiny_bundles[request.param]))


def test_padded_length_is_the_next_multiple_of_16() -> None:
    assert [padded_length(length) for length in (1, 15, 16, 17, 32, 33, 512)] == [16, 16, 16, 32, 32, 48, 512]


def test_pack_puts_the_sequences_one_after_the_other() -> None:
    feeds = pack([Tokens([7, 8, 9], [0, 0, 1]), Tokens([5])], 4, watched=[1])
    assert {name: array.tolist() for name, array in feeds.items()} == {
        "input_ids": [7, 8, 9, 5],
        "token_type_ids": [0, 0, 1, 0],
        "position_ids": [0, 1, 2, 0],
        "sequence_ids": [0, 0, 0, 1],
        "slots": [[0, 1, 2, -1], [3, -1, -1, -1]],
        "watched": [1],
    }
    assert all(array.dtype == np.int64 for array in feeds.values())


def test_rows_come_back_in_the_order_of_the_batch(engine: ClassificationEngine) -> None:
    batch = [Tokens(ids) for ids in random_ids(9, seed=3)]
    together = engine.logits(batch)
    assert together.shape == (9, CONFIG.num_labels)
    assert together.dtype == np.float32
    np.testing.assert_array_equal(engine.logits(batch[::-1]), together[::-1])
    assert len(np.unique(together, axis=0)) == 9


def test_batched_is_bit_equal_to_alone(engine: ClassificationEngine) -> None:
    batch = [Tokens(ids) for ids in random_ids(63, seed=4)]
    alone = np.concatenate([engine.logits([tokens]) for tokens in batch])
    for size in (2, 3, 8, 31, 63):
        parts = [engine.logits(batch[start : start + size]) for start in range(0, len(batch), size)]
        np.testing.assert_array_equal(np.concatenate(parts), alone)


def test_threads_do_not_change_a_bit(tiny_bundles: dict[str, Path], engine: ClassificationEngine) -> None:
    batch = [Tokens(ids) for ids in random_ids(40, seed=5)]
    for name, directory in tiny_bundles.items():
        bundle = load_bundle(directory)
        one, two = (ClassificationEngine(bundle, threads=threads).logits(batch) for threads in (1, 2))
        np.testing.assert_array_equal(one, two, err_msg=name)


def test_engine_threads_may_share_one_engine(engine: ClassificationEngine) -> None:
    batches = [[Tokens(ids) for ids in random_ids(12, seed=seed)] for seed in range(4)]
    expected = [engine.logits(batch) for batch in batches]
    found: dict[int, np.ndarray] = {}
    threads = [threading.Thread(target=lambda at=at: found.update({at: engine.logits(batches[at])})) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for at in range(4):
        np.testing.assert_array_equal(found[at], expected[at])


def test_attention_has_no_padding_and_changes_no_logit(engine: ClassificationEngine) -> None:
    batch = [Tokens(ids) for ids in random_ids(31, seed=6)]
    watched = range(0, 31, 2)
    logits, weights = engine.attend(batch, [1, 0], watched)
    np.testing.assert_array_equal(logits, engine.logits(batch))
    assert sorted(weights) == list(watched)
    for at, found in weights.items():
        num_tokens = len(batch[at].ids)
        alone = engine.attend([batch[at]], [0, 1], [0])[1][0]
        assert sorted(found) == [0, 1]
        for layer, rows in found.items():
            assert rows.shape == (CONFIG.num_heads, num_tokens, num_tokens)
            np.testing.assert_array_equal(rows, alone[layer])
            np.testing.assert_allclose(rows.sum(-1), 1, atol=1e-5)


def test_only_what_is_asked_for_is_fetched(engine: ClassificationEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[list[str]] = []
    run = engine._session.run

    def watched(feeds: Any, fetch: Any) -> Any:
        fetched.append(list(fetch))
        return run(feeds, fetch)

    monkeypatch.setattr(engine._session, "run", watched)
    engine.logits([Tokens([1, 2])])
    engine.warm_up()
    assert set(map(tuple, fetched)) == {("logits",)}
    fetched.clear()
    engine.attend([Tokens([1, 2])], [1], [0])
    assert fetched == [["logits", "attention.1"]]


def test_a_bundle_without_attention_outputs_still_classifies(tiny_bundles: dict[str, Path], tmp_path: Path) -> None:
    whole = ClassificationEngine(load_bundle(tiny_bundles["float32"]))
    old = ClassificationEngine(load_bundle(without_attention(tiny_bundles["float32"], tmp_path / "old")))
    assert (whole.num_layers, whole.num_heads) == (CONFIG.num_layers, CONFIG.num_heads)
    assert (old.num_layers, old.num_heads) == (0, 0)
    batch = [Tokens(ids) for ids in random_ids(9, seed=7)]
    np.testing.assert_array_equal(old.logits(batch), whole.logits(batch))


def test_token_types_count(engine: ClassificationEngine) -> None:
    ids = [1, 5, 2, 6, 2]
    first, pair = engine.logits([Tokens(ids), Tokens(ids, [0, 0, 0, 1, 1])])
    assert not np.array_equal(first, pair)
    np.testing.assert_array_equal(engine.logits([Tokens(ids, [0] * 5)])[0], first)


def test_warm_up_stays_within_the_limits(engine: ClassificationEngine) -> None:
    engine.warm_up()
    assert (engine.labels, engine.max_tokens) == (CONFIG.labels, CONFIG.max_length)


def test_labels_that_are_not_the_graphs_are_refused(tiny_bundles: dict[str, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_bundles["float32"], tmp_path / "copy"))
    change_manifest(copy, lambda values: values.update(labels=["a", "b", "c"]))
    with pytest.raises(BundleError, match=r"labels are \['a', 'b', 'c'\], the graph's logits 2"):
        ClassificationEngine(load_bundle(copy))


def test_a_limit_that_is_not_the_graphs_is_refused(tiny_bundles: dict[str, Path], tmp_path: Path) -> None:
    def claim(values: dict[str, Any]) -> None:
        values["limits"]["max_tokens"] = values["architecture"]["max_length"] = 100

    copy = Path(shutil.copytree(tiny_bundles["float32"], tmp_path / "copy"))
    change_manifest(copy, claim)
    with pytest.raises(BundleError, match=r"limits\.max_tokens is 100, but 64 cannot be computed"):
        ClassificationEngine(load_bundle(copy)).warm_up()


def test_a_bundle_without_the_graph_is_refused(tiny_bundles: dict[str, Path]) -> None:
    bundle = load_bundle(tiny_bundles["float32"])
    bundle.manifest.graphs.clear()  # type: ignore[attr-defined]
    with pytest.raises(BundleError, match="no graph 'classify'"):
        ClassificationEngine(bundle)
