"""What every importer does alike: read safetensors, tie the head, load without a gap.

Knows no family of models.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn


def read_safetensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or of the files that model.safetensors.index.json lists.

    Raises ValueError when the index names a tensor that its file does not hold.
    """
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        return load_file(directory / "model.safetensors")
    places: dict[str, str] = json.loads(index.read_text())["weight_map"]
    state: dict[str, Tensor] = {}
    for file in sorted(set(places.values())):
        state |= load_file(directory / file)
    if absent := sorted(places.keys() - state.keys()):
        raise ValueError(f"{index}: tensors that no file holds: {', '.join(absent)}")
    return state


def tie_head(state: dict[str, Tensor], *, head: str, token: str) -> None:
    """Gives the head of a tied model its name; raises ValueError if the checkpoint holds another matrix there."""
    if head in state and not torch.equal(state[head], state[token]):
        raise ValueError(f"the config ties the embeddings, but {head} differs from {token}")
    state[head] = state[token]


def load_strictly(model: nn.Module, state: dict[str, Tensor], source: Path) -> None:
    """Copies `state` into `model`; raises ValueError naming every missing, unexpected or misshapen weight."""
    expected = model.state_dict()
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    misshapen = [
        f"{name} is {tuple(state[name].shape)}, not {tuple(expected[name].shape)}"
        for name in sorted(expected.keys() & state.keys())
        if state[name].shape != expected[name].shape
    ]
    if missing or unexpected or misshapen:
        raise ValueError(
            f"{source}: missing weights {missing}, unexpected weights {unexpected}, misshapen weights {misshapen}"
        )
    model.load_state_dict(state)
