"""Does a decoder's second graph tell the attention that the model pays? Every layer and head, and its logits, too.

The reference is the PyTorch module's explicit path, which shares no code with the graph.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from model.checks import Found, difference, largest
from model.export_decoder import ATTENTION_GRAPH
from model.transformer import LanguageModel
from service.worker.bundle import Bundle
from service.worker.session import Session

MAX_DIFFERENCE = 1e-4  # of float32 weights, which go to 1
MAX_MOVED = 0.05  # of int8 weights: the share of a row that lies elsewhere, on average over a text
MAX_FROM_ONE = 1e-5  # of a row's sum

Ids = Sequence[int]
Floats = NDArray[np.float32]


@torch.no_grad()
def reference(model: LanguageModel, ids: Ids) -> Floats:
    """(layers, H, T, T)."""
    trace: list[torch.Tensor] = []
    model(torch.tensor([list(ids)]), trace=trace)
    return torch.cat(trace).numpy()


def attention(bundle: Bundle, model: LanguageModel, texts: Sequence[Ids], decoded: Callable[[Ids], Floats]) -> Found:
    """Weights against the module's; logits (T, V) must be the bits that the first graph has `decoded`."""
    session = Session(bundle.graph_path(ATTENTION_GRAPH), bundle.graph(ATTENTION_GRAPH))
    gaps = []
    for ids in texts:
        told = np.ones(len(bundle.graph(ATTENTION_GRAPH).outputs) - 1, np.int64)
        logits, *weights = session.run({"ids": np.array([ids]), "keep": np.arange(len(ids)), "told": told})
        ours, theirs = np.concatenate(weights), reference(model, ids)
        moved = float(np.abs(ours - theirs).sum(-1).mean()) / 2
        gaps.append((difference(ours, theirs), moved, difference(ours.sum(-1), 1), difference(logits[0], decoded(ids))))
    furthest, moved, from_one, from_decoded = map(largest, zip(*gaps, strict=True))
    is_near = furthest <= MAX_DIFFERENCE if bundle.manifest.precision == "float32" else moved <= MAX_MOVED
    return is_near and from_one <= MAX_FROM_ONE and not from_decoded, (
        f"largest difference {furthest:.2e}, {moved:.2%} of a row elsewhere, rows sum to 1 to {from_one:.0e}; "
        f"logits differ from the first graph's by {from_decoded:.0e}"
    )
