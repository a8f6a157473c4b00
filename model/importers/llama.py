"""Llama-family checkpoints (safetensors + config.json) into LanguageModel.

Reads what transformers' LlamaForCausalLM saves, in one file or several. Mistral without a sliding window has the same
tensors and is read too. Variants that would compute something else (scaled rotary positions, biases, heads of another
width) are refused, not approximated. Names and variants are `service.worker.weights.safetensors_files`'s.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from model.config import ModelConfig
from model.importers.weights import Values, load_strictly, read_safetensors, tie_head
from model.transformer import LanguageModel
from service.worker.weights.checkpoint import HEAD, TOKEN, rename
from service.worker.weights.safetensors_files import NAMES, UNUSED, architecture


def llama_config(values: dict[str, Any]) -> ModelConfig:
    """transformers' LlamaConfig, as in config.json; raises ValueError for a variant that we do not carry."""
    return ModelConfig(**architecture(values))


def llama_state(tensors: dict[str, Tensor], *, is_tied: bool) -> dict[str, Tensor]:
    """A checkpoint's tensors under our names, in float32."""
    state = {rename(name, NAMES): tensor.float() for name, tensor in tensors.items() if not UNUSED.match(name)}
    if is_tied:
        tie_head(state, head=HEAD, token=TOKEN)
    return state


def load_llama(directory: Path) -> tuple[ModelConfig, LanguageModel]:
    """Builds a LanguageModel from a directory with config.json and model.safetensors, whole or sharded.

    Raises ValueError on an unsupported variant, a missing key, and missing, unexpected or misshapen weights.
    """
    config = llama_config(Values(directory / "config.json"))
    model = LanguageModel(config)
    state = llama_state(read_safetensors(directory), is_tied=config.tie_embeddings)
    load_strictly(model, state, directory)
    return config, model
