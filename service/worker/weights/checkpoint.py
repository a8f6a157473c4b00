"""A checkpoint of the Llama family as this project sees it, whatever file it came from: sizes, named weights, texts.

Owns our names, the shapes that they must have, and what is checked before a file is believed. Knows no file format.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Names = Iterable[tuple[str, str]]  # (pattern of the foreign name's beginning, what stands there in ours)
HEAD, TOKEN = "head.weight", "decoder.stack.embedding.token.weight"
FAMILY: Mapping[str, Any] = {  # what every model of the family has in common
    "kind": "decoder",
    "norm": "rms",
    "norm_order": "pre",
    "positions": "rotary",
    "activation": "swiglu",
    "has_bias": False,
    "has_embedding_norm": False,
}


@dataclass(frozen=True, kw_only=True)
class Text:
    """What lies between texts and ids: the tokenizer's JSON, the ids that begin and end, the chat template's source."""

    tokenizer: str
    bos_id: int | None
    end_ids: tuple[int, ...]
    chat_template: str | None


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """`architecture` has the names of model.config's ModelConfig, and `shapes` those of its LanguageModel's weights."""

    architecture: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Floats]  # a weight in float32 by our name, rows in our order
    text: Text
    licence: str | None

    def tensor(self, name: str) -> Floats:
        return self.read(TOKEN if name == HEAD and self.architecture["tie_embeddings"] else name)


def check_variant(values: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]]) -> None:
    """Raises ValueError for a config that asks for what we do not compute; an absent key reads as None."""
    for key, known in allowed.items():
        if values.get(key) not in known:
            raise ValueError(f"{key} is {values.get(key)!r}, this importer reads {' or '.join(map(repr, known))}")


def rename(name: str, table: Names) -> str:
    """A foreign tensor's name -> ours. Raises ValueError for a name that the table does not know."""
    for pattern, ours in table:
        if match := re.match(pattern, name):
            return match.expand(ours) + name[match.end() :]
    raise ValueError(f"unexpected weight in checkpoint: {name}")


def expected_shapes(architecture: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    width, inner, vocabulary = (architecture[name] for name in ("width", "feed_forward", "vocab_size"))
    heads = architecture["num_heads"]
    kv_width = width // heads * (architecture["num_kv_heads"] or heads)
    block = {
        "attention_norm": (width,),
        "attention.query": (width, width),
        "attention.key": (kv_width, width),
        "attention.value": (kv_width, width),
        "attention.output": (width, width),
        "feed_forward_norm": (width,),
        "feed_forward.gate": (inner, width),
        "feed_forward.up": (inner, width),
        "feed_forward.down": (width, inner),
    }
    layers = range(architecture["num_layers"])
    shapes = {f"decoder.stack.blocks.{at}.{name}.weight": shape for at in layers for name, shape in block.items()}
    shapes |= {TOKEN: (vocabulary, width), "decoder.stack.norm.weight": (width,)}
    return shapes if architecture["tie_embeddings"] else shapes | {HEAD: (vocabulary, width)}


def check_shapes(checkpoint: Checkpoint) -> None:
    """Raises ValueError naming the first of the weights that are missing, unexpected or of another shape."""
    expected, found = expected_shapes(checkpoint.architecture), dict(checkpoint.shapes)
    if checkpoint.architecture["tie_embeddings"]:
        found.pop(HEAD, None)
    wrong = [f"{name} is missing" for name in expected.keys() - found.keys()]
    wrong += [f"{name} is unexpected" for name in found.keys() - expected.keys()]
    both = expected.keys() & found.keys()
    wrong += [f"{name} is {found[name]}, not {expected[name]}" for name in both if found[name] != expected[name]]
    if wrong:
        first = sorted(wrong)[:5]
        raise ValueError(f"{len(wrong)} weights are not as the sizes say: {'; '.join(first)}")
