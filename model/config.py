"""The shape of a transformer as plain numbers and choices; owns the JSON form, knows nothing of torch."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

SIZES = (
    "vocab_size",
    "width",
    "num_heads",
    "num_kv_heads",
    "num_layers",
    "num_decoder_layers",
    "feed_forward",
    "max_length",
)


def check_choices(config: "DataclassInstance") -> None:
    """Raises ValueError for a field whose Literal type does not have its value."""
    for name, kind in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if get_origin(kind) is Literal and value not in get_args(kind):
            raise ValueError(f"{name} is {value!r}, known are {', '.join(map(repr, get_args(kind)))}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything `model.transformer` needs to build a model, and nothing about how it is trained.

    The defaults of the choices are those of BERT (Devlin et al. 2019); see `original`, `gpt2` and `llama` style in the
    tests for others.
    """

    kind: Literal["encoder", "decoder", "encoder-decoder"]
    vocab_size: int
    width: int  # d_model, the residual stream
    num_heads: int
    num_layers: int  # of the encoder, of the decoder, or of each of the two
    feed_forward: int  # d_ff, the inner width of the feed-forward network
    max_length: int  # the number of positions
    num_kv_heads: int | None = None  # grouped-query attention when fewer than num_heads; None: as many as num_heads
    num_decoder_layers: int | None = None  # of an encoder-decoder's decoder; None: num_layers
    num_types: int = 0  # segment types (BERT: 2); 0: none
    norm: Literal["layer", "rms"] = "layer"
    norm_order: Literal["pre", "post"] = "post"
    norm_eps: float = 1e-12
    positions: Literal["sinusoidal", "learned", "rotary"] = "learned"
    rope_theta: float = 10_000.0
    relative_buckets: int = 0  # of a learned bias for each distance between query and key (MPNet: 32); 0: none
    activation: Literal["relu", "gelu", "gelu-tanh", "swiglu"] = "gelu"  # "gelu" is exact (erf), "gelu-tanh" is GPT-2's
    has_bias: bool = True  # in the linear layers of attention and feed-forward
    has_embedding_norm: bool = True  # normalise the sum of the embeddings, as BERT does
    scale_embeddings: bool = False  # multiply token embeddings by sqrt(width), as Vaswani et al. 2017 do
    tie_embeddings: bool = True  # the language-model head shares the token embedding
    dropout: float = 0.0  # of embeddings and residual branches
    attention_dropout: float = 0.0  # of attention weights
    pad_id: int = 0
    num_labels: int = 0  # classes of the classification head; 0: none
    pooling: Literal["first", "last", "mean"] = "first"  # which position speaks for the sequence
    has_pooler: bool = True  # a tanh layer between pooling and classification, as BERT has
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_choices(self)
        for name in SIZES:
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"{name} is {size}, at least 1 is needed")
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, it must be at least 0 and below 1")
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not a multiple of num_heads {self.num_heads}")
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.kv_heads}")
        if self.positions == "rotary" and self.head_width % 2:
            raise ValueError(f"rotary positions need an even head width, not {self.head_width}")
        if self.labels and len(self.labels) != self.num_labels:
            raise ValueError(f"{len(self.labels)} labels named, num_labels is {self.num_labels}")

    @property
    def head_width(self) -> int:
        return self.width // self.num_heads

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Raises ValueError on a key that this version does not know."""
        values = json.loads(text)
        unknown = sorted(values.keys() - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"unknown keys in model config: {', '.join(unknown)}")
        return cls(**{**values, "labels": tuple(values.get("labels", ()))})

    def save(self, path: Path) -> None:
        path.write_text(self.to_json())

    @classmethod
    def load(cls, path: Path) -> Self:
        return cls.from_json(path.read_text())
