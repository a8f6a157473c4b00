"""GGUF files of the Llama family into LanguageModel. The reading is `service.worker.weights.gguf_file`'s."""

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from model.config import ModelConfig
from model.importers.weights import load_strictly
from model.transformer import LanguageModel
from service.worker.weights.checkpoint import HEAD, Text
from service.worker.weights.gguf_file import read_gguf


@dataclass(frozen=True)
class Checkpoint:
    """What a GGUF file holds. The chat template in `text` is Jinja source, to be run in a sandbox only."""

    config: ModelConfig
    model: LanguageModel
    tokenizer: Tokenizer
    text: Text
    licence: str | None


def load_gguf(path: Path) -> Checkpoint:
    """Reads one file; raises ValueError on an unsupported variant and on missing, unexpected or misshapen weights."""
    source = read_gguf(path)
    config = ModelConfig(**source.architecture)
    model = LanguageModel(config)
    state = {name: torch.from_numpy(source.tensor(name)) for name in {*source.shapes, HEAD}}
    load_strictly(model, state, path)
    return Checkpoint(
        config=config,
        model=model,
        tokenizer=Tokenizer.from_str(source.text.tokenizer),
        text=source.text,
        licence=source.licence,
    )
