"""How the memory for keys and values is divided among sequences under way and prefixes to be used again."""

from dataclasses import dataclass

from service.errors import ConfigError
from service.worker.generation.prefix_cache import CHUNK
from service.worker.generation.scheduler import slots_for

DEFAULT_BYTES = 2 * 2**30  # where there is twice as much
PREFIX_SHARE = 4  # one part in so many is for prefixes, and whatever the sequences leave over


@dataclass(frozen=True, slots=True)
class KvPlan:
    """`max_rows` sequences at once, in `num_slots` slots of the model's full length, and `num_blocks` of prefixes.

    Of one lane, if there are several.
    """

    max_rows: int
    num_slots: int
    num_blocks: int


def kv_budget(wanted: int, available: int | None) -> int:
    """Bytes to use: `wanted`, or a default where that is 0. Raises ConfigError if they are not there."""
    if not wanted:
        return DEFAULT_BYTES if available is None else min(DEFAULT_BYTES, available // 2)
    if available is not None and wanted > available:
        message = f"kv_cache_bytes is {wanted}, the memory that is available is {available} bytes"
        raise ConfigError(message, param="kv_cache_bytes")
    return wanted


def divide(
    budget: int, *, num_lanes: int, bytes_per_token: int, max_tokens: int, max_rows: int, has_prefixes: bool
) -> KvPlan:
    """In every lane at most `max_rows` sequences of `max_tokens`, in `budget` bytes for all; fewer if it takes that.

    Raises ConfigError if not even one sequence fits in each.
    """
    slot_bytes = max_tokens * bytes_per_token
    if budget < num_lanes * slot_bytes:
        each = f" in each of {num_lanes} lanes" if num_lanes > 1 else ""
        message = (
            f"kv_cache_bytes: {budget} bytes do not hold one sequence of {max_tokens} tokens{each}, "
            f"which takes {num_lanes * slot_bytes} ({bytes_per_token} a token)"
        )
        raise ConfigError(message, param="kv_cache_bytes")
    budget //= num_lanes
    for_slots = max(slot_bytes, budget - budget // PREFIX_SHARE) if has_prefixes else budget
    fitting = for_slots // slot_bytes
    rows = max(1, min(max_rows, fitting - 1))
    left = budget - slots_for(rows) * slot_bytes
    return KvPlan(rows, slots_for(rows), left // (CHUNK * bytes_per_token) if has_prefixes else 0)
