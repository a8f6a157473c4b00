"""How memory for keys and values is divided, and what is refused."""

from pathlib import Path

import pytest

from service.errors import ConfigError
from service.worker.generation.kv_budget import DEFAULT_BYTES, KvPlan, divide, kv_budget
from service.worker.machine import available_memory

SLOT = 1000 * 128  # bytes of a sequence of 128 tokens
BLOCK = 1000 * 64


def plan(budget: int, *, num_lanes: int = 1, max_rows: int = 4, has_prefixes: bool = True) -> KvPlan:
    sizes = {"bytes_per_token": 1000, "max_tokens": 128, "max_rows": max_rows}
    return divide(budget, num_lanes=num_lanes, has_prefixes=has_prefixes, **sizes)


def used(found: KvPlan) -> int:
    return found.num_slots * SLOT + found.num_blocks * BLOCK


def test_a_quarter_and_what_is_left_over_is_for_prefixes() -> None:
    assert plan(20 * SLOT) == KvPlan(max_rows=4, num_slots=5, num_blocks=30)
    assert plan(4 * SLOT) == KvPlan(max_rows=2, num_slots=3, num_blocks=2)


def test_without_prefixes_everything_is_for_sequences() -> None:
    assert plan(4 * SLOT, has_prefixes=False) == KvPlan(max_rows=3, num_slots=4, num_blocks=0)


@pytest.mark.parametrize("budget", [SLOT, SLOT + BLOCK, 2 * SLOT, 3 * SLOT - 1, 7 * SLOT, 100 * SLOT])
@pytest.mark.parametrize("max_rows", [1, 2, 16])
@pytest.mark.parametrize("has_prefixes", [True, False])
def test_a_plan_never_takes_more_than_there_is(budget: int, max_rows: int, has_prefixes: bool) -> None:
    found = plan(budget, max_rows=max_rows, has_prefixes=has_prefixes)
    assert used(found) <= budget
    assert 1 <= found.max_rows <= max_rows


def test_each_lane_gets_an_equal_part() -> None:
    assert plan(9 * SLOT, num_lanes=3, has_prefixes=False) == plan(3 * SLOT, has_prefixes=False)
    message = f"{3 * SLOT - 1} bytes .* 128 tokens in each of 3 lanes, which takes {3 * SLOT} "
    with pytest.raises(ConfigError, match=message):
        plan(3 * SLOT - 1, num_lanes=3)


def test_what_holds_not_one_sequence_is_refused_with_the_numbers() -> None:
    with pytest.raises(
        ConfigError, match=r"127999 bytes do not hold one sequence of 128 tokens, which takes 128000"
    ) as caught:
        plan(SLOT - 1)
    assert caught.value.param == "kv_cache_bytes"


def test_the_default_leaves_half_of_the_memory() -> None:
    assert kv_budget(0, None) == kv_budget(0, 100 * DEFAULT_BYTES) == DEFAULT_BYTES
    assert kv_budget(0, 1000) == 500


def test_more_than_the_machine_has_is_refused_with_the_numbers() -> None:
    assert kv_budget(1000, 1000) == 1000
    assert kv_budget(1000, None) == 1000
    with pytest.raises(ConfigError, match="kv_cache_bytes is 1001, the memory that is available is 1000 bytes"):
        kv_budget(1001, 1000)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_memory_is_the_machine_s_cut_to_what_the_container_leaves(tmp_path: Path) -> None:
    assert available_memory(tmp_path) is None
    write(tmp_path / "proc/meminfo", "MemTotal: 4000 kB\nMemAvailable:   3000 kB\n")
    assert available_memory(tmp_path) == 3000 * 1024
    write(tmp_path / "proc/self/cgroup", "1:cpu:/old\n0::/pod/one\n")
    write(tmp_path / "sys/fs/cgroup/pod/one/memory.max", "max\n")
    write(tmp_path / "sys/fs/cgroup/pod/one/memory.current", "5\n")
    assert available_memory(tmp_path) == 3000 * 1024
    write(tmp_path / "sys/fs/cgroup/pod/memory.max", "1000000\n")
    write(tmp_path / "sys/fs/cgroup/pod/memory.current", "300000\n")
    assert available_memory(tmp_path) == 700_000
    write(tmp_path / "sys/fs/cgroup/memory.max", "100\n")
    write(tmp_path / "sys/fs/cgroup/memory.current", "300\n")
    assert available_memory(tmp_path) == 0
