"""service.worker.generation.decoder: the reference's logits, and equal bits whatever neighbours, slot and cache."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from service.errors import BundleError, ConfigError
from service.worker.bundle import GraphSpec, TensorSpec, load_bundle
from service.worker.generation.decoder import DecoderEngine, kv_bytes_per_token, vocabulary_of
from service.worker.generation.kv_memory import BLOCK, KvMemory, KvShape, read_shape, reserve

tiny = pytest.importorskip("tiny", reason="exporting needs torch", exc_type=ImportError)

Logits = NDArray[np.float32]
LENGTHS = [5, 64, 1, 130, 63, 65, 17, 100, 2, 33, 128, 7, 90, 3, 150, 40]  # tokens in each of 16 slots
NUM_STEPS = 4


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("decoder")
    return {name: tiny.tiny_generation_bundle(folder / name, precision=name) for name in ("float32", "int8")}


def engine_of(directory: Path, *, num_slots: int = 2, num_blocks: int = 4, threads: int = 1) -> DecoderEngine:
    return DecoderEngine(load_bundle(directory), num_slots=num_slots, num_blocks=num_blocks, threads=threads)


@pytest.fixture(scope="module", params=["float32", "int8"])
def engine(request: pytest.FixtureRequest, bundles: dict[str, Path]) -> DecoderEngine:
    return engine_of(bundles[request.param], num_slots=17)


def random_ids(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, tiny.CHAT_CONFIG.vocab_size, length).tolist()


def read(engine: DecoderEngine, slot: int, ids: list[int], start: int = 0) -> Logits:
    """Prefills `ids` from `start` on, in pieces; the logits after the last."""
    for at in range(start, len(ids), BLOCK):
        piece = ids[at : at + BLOCK]
        logits = engine.prefill(slot, piece, at, keep="last" if at + BLOCK >= len(ids) else "none")
    return logits[0]


def continued(engine: DecoderEngine, rows: list[int]) -> list[list[Logits]]:
    """Sequences `rows` of LENGTHS side by side in slots 0, 1, ...: the logits of each after its prompt and steps."""
    prompts = [random_ids(LENGTHS[row], seed=row) for row in rows]
    found = [[read(engine, slot, ids)] for slot, ids in enumerate(prompts)]
    for step in range(NUM_STEPS):
        ids = [int(logits[-1].argmax()) for logits in found]
        together = engine.decode(ids, [len(prompt) + step for prompt in prompts])
        assert together.shape == (len(rows), engine.vocab_size)
        for logits, row in zip(found, together, strict=True):
            logits.append(row.copy())
    return found


@torch.no_grad()
def reference(ids: list[int]) -> Logits:
    """(T, vocabulary) of the PyTorch module, without a cache."""
    return tiny.seeded_chat_model()(torch.tensor([ids]))[0][0].numpy()


def test_pieces_of_prefill_and_decode_give_the_logits_of_the_reference(bundles: dict[str, Path]) -> None:
    engine = engine_of(bundles["float32"])
    ids = random_ids(150, seed=1)
    expected = reference(ids)
    found = [engine.prefill(1, ids[at : at + BLOCK], at, keep="all") for at in (0, BLOCK)]
    np.testing.assert_allclose(np.concatenate(found), expected[:128], atol=1e-4, rtol=0)
    engine.move(1, 0, 0, 128)
    for at in range(128, 150):
        np.testing.assert_allclose(engine.decode([ids[at]], [at])[0], expected[at], atol=1e-4, rtol=0)


def test_whatever_is_kept_of_a_prefill_is_the_same(engine: DecoderEngine) -> None:
    ids = random_ids(40, seed=2)
    everything = engine.prefill(0, ids, 0, keep="all")
    assert everything.shape == (40, engine.vocab_size)
    np.testing.assert_array_equal(engine.prefill(0, ids, 0, keep="last"), everything[-1:])
    after = engine.decode([3], [40]).copy()
    assert engine.prefill(0, ids, 0, keep="none").shape == (0, engine.vocab_size)
    np.testing.assert_array_equal(engine.decode([3], [40]), after)


def test_a_prefill_s_logits_are_the_caller_s_own(engine: DecoderEngine) -> None:
    first = engine.prefill(0, [1, 2, 3], 0, keep="last")
    copy = first.copy()
    engine.prefill(0, [4, 5, 6], 0, keep="last")
    np.testing.assert_array_equal(first, copy)


@pytest.mark.parametrize("size", [8, 16, 40])
@pytest.mark.parametrize("length", [BLOCK, 51, 34])
def test_a_chunk_in_pieces_gives_the_same_bits(engine: DecoderEngine, size: int, length: int) -> None:
    ids = random_ids(length, seed=12)
    whole = engine.prefill(0, ids, 0, keep="all")
    cuts = [*range(0, length - 1, size), length]
    pieces = [engine.prefill(1, ids[at:end], at, keep="all") for at, end in itertools.pairwise(cuts)]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)


def test_rows_of_any_lengths_are_bit_equal_to_each_alone(engine: DecoderEngine) -> None:
    alone = [continued(engine, [row])[0] for row in range(len(LENGTHS))]
    for rows in ([0, 1], [3, 2, 1], [14, 0, 5, 2, 9], list(range(16)), list(range(15, -1, -1))):
        for row, logits in zip(rows, continued(engine, rows), strict=True):
            np.testing.assert_array_equal(logits, alone[row], err_msg=f"row {row} among {rows}")


def test_a_prefill_of_one_token_is_bit_equal_to_a_decode(engine: DecoderEngine) -> None:
    ids = random_ids(70, seed=9)
    read(engine, 0, ids)
    decoded = engine.decode([7], [70]).copy()
    read(engine, 5, ids)
    np.testing.assert_array_equal(engine.prefill(5, [7], 70, keep="last"), decoded)


def test_the_number_of_threads_does_not_change_a_bit(bundles: dict[str, Path]) -> None:
    for name, directory in bundles.items():
        one, two = (continued(engine_of(directory, threads=threads), [3, 5]) for threads in (1, 2))
        np.testing.assert_array_equal(one, two, err_msg=name)


def test_a_prefill_above_them_does_not_disturb_the_rows_that_decode(engine: DecoderEngine) -> None:
    undisturbed = [continued(engine, [row])[0] for row in (0, 7)]
    prompts = [random_ids(LENGTHS[row], seed=row) for row in (0, 7)]
    found = [[read(engine, slot, ids)] for slot, ids in enumerate(prompts)]
    for step in range(NUM_STEPS):
        engine.prefill(2, random_ids(BLOCK, seed=step), BLOCK * (step % 2), keep="none")
        ids = [int(logits[-1].argmax()) for logits in found]
        together = engine.decode(ids, [len(prompt) + step for prompt in prompts])
        for logits, row in zip(found, together, strict=True):
            logits.append(row.copy())
    np.testing.assert_array_equal(found, undisturbed)


def test_a_sequence_goes_on_with_the_same_bits_in_another_slot(engine: DecoderEngine) -> None:
    ids = random_ids(70, seed=3)
    read(engine, 0, ids)
    expected = [engine.decode([token], [70 + at]).copy() for at, token in enumerate((4, 5))]
    read(engine, 16, ids)
    read(engine, 0, random_ids(90, seed=4))  # what was there before
    engine.move(16, 0, 0, 70)
    engine.move(0, 0, 0, 70)
    for at, token in enumerate((4, 5)):
        np.testing.assert_array_equal(engine.decode([token], [70 + at]), expected[at])


def test_a_prompt_behind_restored_blocks_has_the_bits_of_a_whole_prefill(engine: DecoderEngine) -> None:
    ids = random_ids(150, seed=5)
    whole = read(engine, 3, ids)
    engine.save(3, 0, 2)
    engine.save(3, BLOCK, 0)
    read(engine, 3, random_ids(150, seed=6))
    read(engine, 9, random_ids(150, seed=7))
    for num_blocks in (1, 2):
        for at, block in enumerate((2, 0)[:num_blocks]):
            engine.restore(block, 9, at * BLOCK)
        np.testing.assert_array_equal(read(engine, 9, ids, num_blocks * BLOCK), whole)


def test_a_saved_block_that_is_not_restored_would_show(engine: DecoderEngine) -> None:
    ids = random_ids(150, seed=5)
    whole = read(engine, 3, ids)
    read(engine, 9, random_ids(150, seed=7))
    assert (read(engine, 9, ids, BLOCK) != whole).any()


@pytest.mark.parametrize(
    "call",
    [
        lambda engine: engine.prefill(17, [1], 0, keep="last"),
        lambda engine: engine.prefill(-1, [1], 0, keep="last"),
        lambda engine: engine.prefill(0, [], 0, keep="last"),
        lambda engine: engine.prefill(0, [1, 2], 255, keep="last"),
        lambda engine: engine.prefill(0, [1], -1, keep="last"),
        lambda engine: engine.decode([1, 1], [3, 256]),
        lambda engine: engine.decode([1] * 18, [3] * 18),
        lambda engine: engine.save(0, 193, 0),
        lambda engine: engine.restore(0, 17, 0),
    ],
)
def test_a_place_that_does_not_exist_is_never_written(engine: DecoderEngine, call: object) -> None:
    with pytest.raises(ValueError, match="there are 17 slots of 256 tokens"):
        call(engine)  # type: ignore[operator]


def test_a_context_can_be_filled_to_its_last_token(engine: DecoderEngine) -> None:
    ids = random_ids(256, seed=8)
    whole = read(engine, 4, ids)
    read(engine, 0, ids[:255])
    assert engine.decode([ids[255]], [255])[0].argmax() == whole.argmax()


def test_warm_up_runs_the_smallest_and_the_largest_step(bundles: dict[str, Path]) -> None:
    for num_slots in (1, 3):
        engine_of(bundles["int8"], num_slots=num_slots, num_blocks=0).warm_up()


def test_a_token_takes_keys_and_values_of_every_layer(bundles: dict[str, Path]) -> None:
    config = tiny.CHAT_CONFIG
    expected = 2 * config.num_layers * config.kv_heads * config.head_width * 4
    assert kv_bytes_per_token(load_bundle(bundles["int8"])) == expected


def resident_bytes() -> int:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="counts pages as Linux does")
def test_memory_is_taken_by_tokens_that_were_written_and_by_no_others() -> None:
    shape = KvShape(num_layers=8, num_heads=2, width=64)  # 8 kB a token
    before = resident_bytes()
    memory = KvMemory(shape, num_slots=16, max_tokens=8192, num_blocks=1024)  # 1.6 GB
    for slot in (0, 15):
        memory.slots[:, slot, :, :128] = 1.0
    memory.save(15, 64, 1000)
    memory.restore(1000, 7, 64)
    memory.move(15, 3, 0, 128)
    written = (2 * 128 + 64 + 64 + 128) * shape.bytes_per_token
    assert written <= resident_bytes() - before <= 1.5 * written
    assert (memory.slots[:, 3, :, :128] == 1).all()


def test_a_machine_that_cannot_reserve_the_memory_says_so() -> None:
    with pytest.raises(ConfigError, match="bytes for keys and values cannot be reserved"):
        reserve((2**40, 2**20))


def test_another_provider_is_refused_unless_fallback_is_allowed(bundles: dict[str, Path]) -> None:
    bundle = load_bundle(bundles["int8"])
    with pytest.raises(ConfigError, match="provider is 'cuda', generation runs on the cpu only"):
        DecoderEngine(bundle, num_slots=1, num_blocks=0, threads=1, provider="cuda")
    DecoderEngine(bundle, num_slots=1, num_blocks=0, threads=1, provider="cuda", fallback=True)


def spec_of(**axes: tuple[int | str, ...]) -> GraphSpec:
    tensors = {name: TensorSpec(name=name.replace("__", "."), dtype="float32", axes=axes[name]) for name in axes}
    inputs = tuple(one for name, one in tensors.items() if name != "logits")
    return GraphSpec(file="decode.onnx", inputs=inputs, outputs=tuple(t for n, t in tensors.items() if n == "logits"))


@pytest.mark.parametrize(
    "axes",
    [
        {},
        {"past_key__0": ("B", 2, "S", 8)},
        {"past_key__0": ("B", 2, "S", 8), "past_value__0": ("B", 2, "S", 4)},
        {"past_key__0": ("B", 2, "S", 8), "past_value__1": ("B", 2, "S", 8)},
        {"past_key__0": ("B", "G", "S", 8), "past_value__0": ("B", "G", "S", 8)},
        {"past_key__0": ("B", 2), "past_value__0": ("B", 2)},
    ],
)
def test_a_graph_without_keys_and_values_of_one_shape_is_refused(axes: dict[str, tuple[int | str, ...]]) -> None:
    with pytest.raises(BundleError, match=r"decode\.onnx"):
        read_shape(spec_of(**axes))


@pytest.mark.parametrize("axes", [{}, {"logits": ("B", 9)}, {"logits": ("B", "K", "V")}])
def test_a_graph_without_a_vocabulary_is_refused(axes: dict[str, tuple[int | str, ...]]) -> None:
    with pytest.raises(BundleError, match="must have an output logits"):
        vocabulary_of(spec_of(**axes))
