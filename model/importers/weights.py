"""What every importer does alike: read config and safetensors, tie the head, load without a gap.

Knows no family of models.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn


class Values(dict[str, Any]):
    """What config.json says; a key that is asked for and not there is a ValueError that names it."""

    def __init__(self, path: Path) -> None:
        super().__init__(json.loads(path.read_text()))
        self.path = path

    def __missing__(self, key: str) -> Any:
        raise ValueError(f"{self.path}: {key} is missing")


def read_safetensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or of the files that model.safetensors.index.json lists.

    Raises ValueError for a file that is damaged, and when the index names a tensor that its file does not hold.
    """
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        return read_file(directory / "model.safetensors")
    places: dict[str, str] = json.loads(index.read_text())["weight_map"]
    state: dict[str, Tensor] = {}
    for file in sorted(set(places.values())):
        state |= read_file(directory / file)
    if absent := sorted(places.keys() - state.keys()):
        raise ValueError(f"{index}: tensors that no file holds: {', '.join(absent)}")
    return state


def read_file(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def tie_head(state: dict[str, Tensor], *, head: str, token: str) -> None:
    """Gives the head of a tied model its name; raises ValueError if the checkpoint holds another matrix there."""
    if token not in state:
        return  # load_strictly names what is missing
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
