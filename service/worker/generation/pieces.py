"""How much of the prompts one step reads, and where a prompt is cut. Numbers only: knows no sequence and no queue."""

from service.worker.generation.prefix_cache import CHUNK

# What a step may spend on prompts, in units of a token at a prompt's start. Beside rows it is about twice what they
# cost, so that few gaps between two tokens are over three times the usual one; else how long a newcomer may wait.
IDLE_BUDGET = 4 * CHUNK
GRAIN = 16  # tokens; pieces of prompts are multiples of this
LEAST = 8  # what is left of a budget when it is not worth a run of the graph
FAR = 2048  # tokens of context at which a token costs twice as much as at the start


def budget_beside(num_rows: int) -> int:
    return max(GRAIN, 4 * num_rows) if num_rows else IDLE_BUDGET


def piece(start: int, end: int, budget: int) -> tuple[int, int]:
    """Where a piece of (start, end) ends that costs up to `budget`, and what it costs; a small rest is not left."""
    num_tokens = max(1, budget * FAR // (FAR + start) // GRAIN) * GRAIN
    end = end if end - start <= num_tokens + GRAIN // 2 else start + num_tokens
    return end, (end - start) * (FAR + start) // FAR
