"""What is missing in a checkpoint of any family, or damaged, is a ValueError that names it."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MPNetConfig,
    MPNetModel,
)

from model.importers.bert import load_bert
from model.importers.gpt2 import load_gpt2
from model.importers.llama import load_llama
from model.importers.mpnet import load_mpnet

SIZES = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 20,
}
FAMILIES: dict[str, tuple[Callable[[], Any], Callable[[Path], Any]]] = {
    "bert": (lambda: BertModel(BertConfig(**SIZES)), partial(load_bert, labels=("no", "yes"))),
    "mpnet": (lambda: MPNetModel(MPNetConfig(**SIZES)), partial(load_mpnet, labels=("no", "yes"))),
    "gpt2": (lambda: GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=16, n_head=2, n_layer=1)), load_gpt2),
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**SIZES)), load_llama),
}


@pytest.fixture(params=FAMILIES)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Callable[[Path], Any]]:
    torch.manual_seed(0)
    build, load = FAMILIES[request.param]
    build().save_pretrained(tmp_path)
    return tmp_path, load


def test_a_missing_key_is_named(saved: tuple[Path, Callable[[Path], Any]]) -> None:
    """Each key that a config cannot do without."""
    directory, load = saved
    path = directory / "config.json"
    values, errors = json.loads(path.read_text()), {}
    for key in values:
        path.write_text(json.dumps({other: value for other, value in values.items() if other != key}))
        try:
            load(directory)
        except ValueError as error:
            errors[key] = str(error)
    assert {"model_type", "vocab_size"} <= errors.keys()
    assert [error for key, error in errors.items() if key not in error] == []


def test_a_damaged_file_is_named(saved: tuple[Path, Callable[[Path], Any]]) -> None:
    directory, load = saved
    for content in (b"", (directory / "model.safetensors").read_bytes()[:-4]):
        (directory / "model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
            load(directory)
