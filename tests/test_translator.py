"""service.worker.generation.translator: the reference's logits, and equal bits whatever neighbours and slot."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from service.errors import BundleError, ConfigError
from service.worker.bundle import load_bundle
from service.worker.generation.decoder import kv_bytes_per_token
from service.worker.generation.translator import TranslatorEngine

tiny = pytest.importorskip("tests.tiny_translator", reason="exporting needs torch", exc_type=ImportError)

Logits = NDArray[np.float32]
MAX_TOKENS = 64
LENGTHS = [5, 64, 1, 30, 63, 17, 2, 33, 48, 7, 21, 3, 50, 40, 12, 9]  # tokens of 16 sources
NUM_STEPS = 6


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("translator")
    return {name: tiny.tiny_translation_bundle(folder / name, precision=name) for name in ("float32", "int8")}


def engine_of(directory: Path, *, num_slots: int = 3, threads: int = 1) -> TranslatorEngine:
    return TranslatorEngine(load_bundle(directory), num_slots=num_slots, threads=threads)


@pytest.fixture(scope="module", params=["float32", "int8"])
def engine(request: pytest.FixtureRequest, bundles: dict[str, Path]) -> TranslatorEngine:
    return engine_of(bundles[request.param], num_slots=17)


def random_ids(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, tiny.CONFIG.vocab_size, length).tolist()


def source_of(row: int) -> list[int]:
    return random_ids(LENGTHS[row], seed=row)


def read(engine: TranslatorEngine, slot: int, source: list[int]) -> Logits:
    logits: Logits = engine.prefill(slot, source, 0, keep="last")[0]
    return logits


def steps(engine: TranslatorEngine, logits: list[Logits], lengths: list[int]) -> list[list[Logits]]:
    """Rows in slots 0, 1, ... after greedy steps; `logits` are each row's last ones, `lengths` what the slots hold."""
    found = [[row] for row in logits]
    for step in range(NUM_STEPS):
        ids = [int(row[-1].argmax()) for row in found]
        together = engine.decode(ids, [length + step for length in lengths])
        for row, after in zip(found, together, strict=True):
            row.append(after.copy())
    return found


def translated(engine: TranslatorEngine, rows: list[int]) -> list[list[Logits]]:
    """Sources `rows` side by side in slots 0, 1, ..."""
    return steps(
        engine, [read(engine, slot, source_of(row)) for slot, row in enumerate(rows)], [LENGTHS[r] for r in rows]
    )


@torch.no_grad()
def reference(source: list[int], target: list[int]) -> Logits:
    """(1 + T, vocabulary) of the PyTorch module without a cache: after the start token and after each of `target`."""
    model = tiny.seeded_translator()
    logits, _ = model.decode(torch.tensor([[1, *target]]), model.encode(torch.tensor([source]), None), None)
    found: Logits = logits[0].numpy()
    return found


@pytest.mark.parametrize("length", [1, 20, MAX_TOKENS])
def test_every_token_has_the_logits_of_the_reference(bundles: dict[str, Path], length: int) -> None:
    engine = engine_of(bundles["float32"])
    source, target = random_ids(length, seed=1), random_ids(MAX_TOKENS - 1, seed=2)
    expected = reference(source, target)
    np.testing.assert_allclose(read(engine, 0, source), expected[0], atol=1e-4, rtol=0)
    for at, token in enumerate(target):
        np.testing.assert_allclose(engine.decode([token], [length + at])[0], expected[1 + at], atol=1e-4, rtol=0)


def test_rows_of_any_lengths_are_bit_equal_to_each_alone(engine: TranslatorEngine) -> None:
    alone = [translated(engine, [row])[0] for row in range(len(LENGTHS))]
    for rows in ([0, 1], [3, 2, 1], [14, 0, 5, 2, 9], list(range(16)), list(range(15, -1, -1))):
        for row, logits in zip(rows, translated(engine, rows), strict=True):
            np.testing.assert_array_equal(logits, alone[row], err_msg=f"row {row} among {rows}")


def test_translations_of_different_lengths_are_bit_equal_to_each_alone(engine: TranslatorEngine) -> None:
    """Row 1 is some tokens further than the row 0 that joins it."""
    expected = translated(engine, [8])[0]
    read(engine, 1, source_of(8))
    read(engine, 0, source_of(3))
    for step in range(3):
        engine.prefill(1, [int(expected[step].argmax())], LENGTHS[8] + step, keep="last")
    for step in range(3):
        ids = [5, int(expected[3 + step].argmax())]
        rows = engine.decode(ids, [LENGTHS[3] + step, LENGTHS[8] + 3 + step])
        np.testing.assert_array_equal(rows[1], expected[4 + step])


def test_a_single_token_can_be_read_in_any_slot(engine: TranslatorEngine) -> None:
    read(engine, 0, source_of(3))
    expected = engine.decode([7], [LENGTHS[3]]).copy()
    read(engine, 5, source_of(3))
    np.testing.assert_array_equal(engine.prefill(5, [7], LENGTHS[3], keep="last"), expected)


def test_sources_read_together_leave_the_bits_of_each_alone(engine: TranslatorEngine) -> None:
    sources, slots = [random_ids(21, seed) for seed in range(4)], [3, 0, 2, 1]
    alone = []
    for source in sources:
        alone += steps(engine, [read(engine, 0, source)], [21])
    engine.encode(slots, sources)
    first = engine.decode([source[-1] for slot in range(4) for source in [sources[slots.index(slot)]]], [20] * 4).copy()
    together = steps(engine, list(first), [21] * 4)
    for slot, expected in zip(slots, alone, strict=True):
        np.testing.assert_array_equal(together[slot], expected)


def test_a_source_s_last_token_is_read_beside_tokens_of_translations(engine: TranslatorEngine) -> None:
    expected = translated(engine, [3])[0]
    first = read(engine, 1, source_of(8)).copy()
    read(engine, 0, source_of(3))
    engine.encode([1], [source_of(8)])
    rows = engine.decode([int(expected[0].argmax()), source_of(8)[-1]], [LENGTHS[3], LENGTHS[8] - 1])
    np.testing.assert_array_equal(rows, [expected[1], first])


@pytest.mark.parametrize(
    ("slots", "sources"),
    [
        ([0, 17], [[3], [4]]),
        ([-1], [[3]]),
        ([0], [[]]),
        ([0], [[3] * 65]),
        ([0, 1], [[3], [4, 5]]),
        ([0], [[3], [4]]),
        ([0, 1], [[3]]),
    ],
)
def test_sources_that_do_not_fit_are_refused(
    engine: TranslatorEngine, slots: list[int], sources: list[list[int]]
) -> None:
    with pytest.raises(ValueError, match=r"to be one length, for slots .*: there are 17 slots"):
        engine.encode(slots, sources)


def test_the_number_of_threads_does_not_change_a_bit(bundles: dict[str, Path]) -> None:
    for name, directory in bundles.items():
        one, two = (translated(engine_of(directory, threads=threads), [3, 5]) for threads in (1, 2))
        np.testing.assert_array_equal(one, two, err_msg=name)


def test_a_source_is_forgotten_when_another_is_read(engine: TranslatorEngine) -> None:
    expected = translated(engine, [2])[0]
    translated(engine, [1])
    np.testing.assert_array_equal(translated(engine, [2])[0], expected)


def test_reading_a_source_above_them_does_not_disturb_rows(engine: TranslatorEngine) -> None:
    expected = translated(engine, [3, 8])
    found = [[read(engine, slot, source_of(row))] for slot, row in enumerate((3, 8))]
    for step in range(NUM_STEPS):
        read(engine, 2, source_of(step))
        ids = [int(row[-1].argmax()) for row in found]
        for row, after in zip(found, engine.decode(ids, [LENGTHS[3] + step, LENGTHS[8] + step]), strict=True):
            row.append(after.copy())
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("num_written", [0, 1, 4])
def test_a_sequence_goes_on_with_the_same_bits_in_another_slot(engine: TranslatorEngine, num_written: int) -> None:
    expected = translated(engine, [3])[0]
    read(engine, 16, source_of(3))
    ids = [int(logits.argmax()) for logits in expected]
    for at in range(num_written):
        engine.prefill(16, [ids[at]], LENGTHS[3] + at, keep="last")
    translated(engine, [1])  # what was there before
    engine.move(16, 0, 0, LENGTHS[3] + num_written)
    engine.move(0, 0, 0, LENGTHS[3] + num_written)
    for at in range(num_written, NUM_STEPS):
        np.testing.assert_array_equal(engine.decode([ids[at]], [LENGTHS[3] + at])[0], expected[at + 1])


def test_beams_of_one_source_exchange_only_what_lies_behind_it(engine: TranslatorEngine) -> None:
    source, length = source_of(8), LENGTHS[8]
    read(engine, 0, source)
    engine.move(0, 1, 0, length)
    engine.decode([10, 20], [length, length])
    engine.decode([11, 21], [length + 1, length + 1])
    engine.move(1, 0, length, length + 2)
    both = engine.decode([22, 23], [length + 2, length + 2]).copy()
    read(engine, 0, source)
    for at, token in enumerate((20, 21)):
        engine.decode([token], [length + at])
    np.testing.assert_array_equal(engine.decode([22], [length + 2])[0], both[0])
    np.testing.assert_array_equal(engine.decode([23], [length + 2])[0], both[1])


def test_what_is_not_moved_would_show(engine: TranslatorEngine) -> None:
    expected = translated(engine, [3])[0]
    read(engine, 1, source_of(3))
    translated(engine, [1])
    engine.move(1, 0, LENGTHS[3], LENGTHS[3])  # the translation without its source
    with pytest.raises(ValueError, match=r"\[30\] tokens in slots 0 to 1"):
        engine.decode([int(expected[0].argmax())], [LENGTHS[3]])


def test_a_prefill_s_logits_are_the_caller_s_own(engine: TranslatorEngine) -> None:
    first = engine.prefill(0, [4, 5, 6], 0, keep="last")
    copy = first.copy()
    engine.prefill(0, [7, 8], 0, keep="last")
    engine.decode([3], [2])
    np.testing.assert_array_equal(first, copy)


@pytest.mark.parametrize(
    "call",
    [
        lambda engine: engine.prefill(17, [1], 0, keep="last"),
        lambda engine: engine.prefill(-1, [1], 0, keep="last"),
        lambda engine: engine.prefill(0, [], 0, keep="last"),
        lambda engine: engine.prefill(0, [1] * 65, 0, keep="last"),
        lambda engine: engine.prefill(0, [1], 64, keep="last"),
        lambda engine: engine.decode([1], [64]),  # behind one token of source and 63 of its translation
        lambda engine: engine.decode([1, 1], [1, 0]),
        lambda engine: engine.decode([1] * 18, [30] * 18),
    ],
)
def test_a_place_that_does_not_exist_is_never_written(engine: TranslatorEngine, call: Any) -> None:
    for slot in range(17):
        engine.prefill(slot, [3, 4] if slot == 1 else [3], 0, keep="last")
    with pytest.raises(ValueError, match="there are 17 slots of 64 tokens of source, and as many behind them"):
        call(engine)


@pytest.mark.parametrize(
    "call",
    [
        lambda engine: engine.prefill(0, [1, 2], 0, keep="all"),
        lambda engine: engine.prefill(0, [1, 2], 0, keep="none"),
        lambda engine: engine.prefill(0, [1, 2], 2, keep="last"),
    ],
)
def test_a_source_cannot_be_read_in_pieces(engine: TranslatorEngine, call: Any) -> None:
    with pytest.raises(ValueError, match="a source is read whole, for its end"):
        call(engine)


def test_warm_up_runs_the_smallest_and_the_largest_step(bundles: dict[str, Path]) -> None:
    for num_slots in (1, 3):
        engine_of(bundles["int8"], num_slots=num_slots).warm_up()


def test_a_token_takes_keys_and_values_of_the_source_and_of_its_own(bundles: dict[str, Path]) -> None:
    assert kv_bytes_per_token(load_bundle(bundles["int8"])) == 2 * 2 * tiny.CONFIG.num_decoder_layers * 32 * 4


def test_another_provider_is_refused_unless_fallback_is_allowed(bundles: dict[str, Path]) -> None:
    bundle = load_bundle(bundles["int8"])
    with pytest.raises(ConfigError, match="provider is 'cuda', generation runs on the cpu only"):
        TranslatorEngine(bundle, num_slots=1, threads=1, provider="cuda")
    TranslatorEngine(bundle, num_slots=1, threads=1, provider="cuda", fallback=True)


def without_start(manifest: dict[str, Any]) -> None:
    manifest["generation"].update(bos_id=None)


def without_a_cross_layer(manifest: dict[str, Any]) -> None:
    decode = manifest["graphs"]["decode"]
    gone = ("past_cross_key.1", "past_cross_value.1")
    decode["inputs"] = [one for one in decode["inputs"] if one["name"] not in gone]


def with_a_wider_memory(manifest: dict[str, Any]) -> None:
    manifest["graphs"]["encode"]["outputs"][0]["axes"][-1] += 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_start, "names no generation"),
        (without_a_cross_layer, "2 layers have keys and values of their own, 1 of the source"),
        (with_a_wider_memory, r"encode gives \[129\] numbers a token, decode reads KvShape\(num_layers=2"),
    ],
)
def test_a_bundle_that_does_not_go_together_is_refused(
    bundles: dict[str, Path], tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    import tiny as bundle_tools

    for file in bundles["int8"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    bundle_tools.change_manifest(tmp_path, change)
    with pytest.raises(BundleError, match=message):
        engine_of(tmp_path)
