"""How much of the prompts one step reads, and where a prompt is cut. Numbers only: knows no sequence and no queue."""

from service.worker.generation.prefix_cache import CHUNK

# Costs are in units of a token at a prompt's start. To run the graph over a piece of it costs RUN more, as weights
# and earlier keys are fetched, however few its tokens are. A step of r rows and no prompt costs about 14 + 1.75 r.
# Prompts may cost about twice as much, so that few gaps between two tokens are over three times as long as those
# without; with many rows somewhat more, as newcomers are many, too. Where nothing is written, their wait alone counts.
IDLE_BUDGET = 4 * CHUNK
GRAIN = 8  # tokens; pieces of prompts are multiples of this
RUN = 8
FAR = 1100  # tokens of context at which everything costs twice as much as at the start
LEAST = 8  # what is left of a budget when it is not worth a run of the graph


def budget_beside(num_rows: int) -> int:
    return max(31, 6 * num_rows) if num_rows else IDLE_BUDGET


def cost(num_tokens: int, start: int) -> int:
    """Of a piece of so many tokens behind `start` others."""
    return -(-(num_tokens + RUN) * (FAR + start) // FAR)


def piece(start: int, end: int, budget: int) -> int:
    """Where a piece of (start, end) ends that costs up to `budget`, or else GRAIN tokens; a small rest is not left."""
    num_tokens = max(1, (budget * FAR // (FAR + start) - RUN) // GRAIN) * GRAIN
    return end if end - start <= num_tokens + GRAIN // 2 else start + num_tokens
