"""Where a model looked: attention maps that belong to a prediction, and what its tokens contributed to it."""

from collections.abc import Callable
from dataclasses import dataclass as plain
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, PlainValidator
from pydantic.dataclasses import dataclass

from service.domain.call import Timing
from service.domain.classify import Score, TopK, Usage
from service.domain.models import ModelId

Kind = Literal["encoder", "decoder", "cross"]
Reduce = Literal["none", "mean", "max", "rollout"]
Method = Literal["occlusion", "rollout"]
Part = Literal["text", "text_pair", "target"]

MAX_CHOSEN = 1024  # layers, or heads, in one request

_STRICT = ConfigDict(extra="forbid", strict=True)


def _chosen(words: tuple[str, ...], noun: str) -> Callable[[Any], Any]:
    """Checks one of `words`, or a list of numbers of which each is there once."""
    expected = f"expected {', '.join(map(repr, words))} or a list of {noun} numbers"

    def check(value: Any) -> Any:
        if isinstance(value, str) and value in words:
            return value
        if not isinstance(value, (list, tuple)) or not value:
            raise ValueError(expected)
        if len(value) > MAX_CHOSEN:
            raise ValueError(f"at most {MAX_CHOSEN} numbers are taken, not {len(value)}")
        if not all(type(item) is int and 0 <= item < 2**31 for item in value):
            raise ValueError(f"{expected} from 0")
        if len(set(value)) < len(value):
            raise ValueError("each number may be there once")
        return tuple(value)

    return check


Layers = Annotated[
    Literal["all", "last"] | tuple[int, ...],
    PlainValidator(_chosen(("all", "last"), "layer"), json_schema_input_type=Literal["all", "last"] | list[int]),
]
Heads = Annotated[
    Literal["all"] | tuple[int, ...],
    PlainValidator(_chosen(("all",), "head"), json_schema_input_type=Literal["all"] | list[int]),
]


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class GenerateOptions:
    """How a model that writes goes on before its attention is told; the fields are those of GenerateRequest.

    `max_tokens` None: 32, and for a translation as many as it takes.
    """

    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=10, strict=False)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class AttentionRequest:
    """A text (or a pair) to read, and which of the model's attention maps to tell.

    A model that classifies reads the text; its encoder attends to it. One that continues texts reads it as a prompt,
    just as it stands (no chat template), and writes on; its decoder attends to the prompt and to what it wrote. One
    that translates reads its sentence (as for `generate`, without what stands around it; a text of several is refused)
    and writes the translation of that; it has three kinds: encoder (source to source), decoder (translation to
    translation) and cross (translation to source).

    `layers` None: the last one, and for a rollout all of them. `reduce`: every chosen head as it is (none), the mean or
    the greatest weight over them, one map a layer; or the rollout over the chosen layers, one map. `kind` None: all
    that the model has. `target`: a translation to force, where the model would translate itself. `generate`: how a
    model that writes does. `top_k` is the prediction's: so many of the best labels (all when None). A text over the
    limit of a model that classifies is cut, and the usage says so; one that writes refuses it.

    Rollout (Abnar and Zuidema 2020, "Quantifying Attention Flow in Transformers", section 3) follows attention through
    the layers, from the lowest up: A = 0.5 W + 0.5 I, where W is the mean over the heads and I the residual path, rows
    made to sum to 1, and the product of all A. It tells how much of each token may have reached a position if attention
    were all that moves information.
    """

    text: str
    text_pair: str | None = None
    target: str | None = None
    model: ModelId | None = None
    layers: Layers | None = None
    heads: Heads = "all"
    reduce: Reduce = "none"
    kind: Kind | None = None
    generate: GenerateOptions | None = None
    top_k: TopK | None = None

    def __post_init__(self) -> None:
        if self.target is not None and self.generate is not None:
            raise ValueError("target and generate do not go together: a forced translation leaves nothing to write")
        if self.reduce == "rollout" and self.kind == "cross":
            raise ValueError("reduce rollout does not go with kind cross: a token has no path to itself there")


def attention_tasks(request: AttentionRequest) -> tuple[str, ...]:
    """The tasks of models that have what `request` asks for, the likeliest first."""
    if request.target is not None or request.kind == "cross":
        return ("translation",)
    if request.generate is not None or request.kind == "decoder":
        return ("generation", "translation")
    return (
        ("classification", "translation")
        if request.kind == "encoder"
        else ("classification", "translation", "generation")
    )


@plain(frozen=True)
class AttendedToken:
    """A token that the model read or wrote.

    `text` is the tokenizer's own name for it. `start` and `end` are the characters that it came from in `part` of the
    request, or of the text that was written (target); a `special` token comes from none: its part is None and both are
    0.
    """

    id: int
    text: str
    start: int
    end: int
    special: bool
    part: Part | None


@plain(frozen=True)
class AttentionMap:
    """The weights of one layer, or of several together.

    Queries and keys are the reply's tokens: of an encoder `tokens`, of a model that continues texts `tokens` followed
    by `target_tokens`, of a translator's decoder `target_tokens`, of cross attention `target_tokens` by `tokens`. A
    token's row says where the model looked as it read that token; a model that writes did so to choose the next.

    `shape` is (heads, queries, keys), and `weights` are so many float32, little endian: each row says how much a query
    looks at each key and sums to 1 (not so with `reduce` max). `layer` is None for a rollout, `heads` where they are
    reduced to one.
    """

    kind: Kind
    layer: int | None
    heads: tuple[int, ...] | None
    shape: tuple[int, int, int]
    weights: bytes


@plain(frozen=True)
class Prediction:
    """What the model made of the text while it looked: the scores of labels, highest first, or a text."""

    scores: tuple[Score, ...] = ()
    text: str | None = None


@plain(frozen=True)
class AttentionMaps:
    """Maps that belong to the prediction.

    `graph` is the bundle's graph that they came from. "classify" gave the prediction itself, in the same run.
    "attention" has the weights and the precision of the graphs that write, and read the text again with what they had
    written. Of a model that continues texts it computes a prompt with their bits, and what they wrote token by token as
    if it were a prompt; of a translator it comes near to their logits.
    The tokens are those of the text (and its pair); `target_tokens` those that were written, for models that write: a
    translation's begin with the token it starts from, and what ended an output is not there. There is no padding.
    """

    model: str
    graph: str
    tokens: tuple[AttendedToken, ...]
    target_tokens: tuple[AttendedToken, ...] | None
    maps: tuple[AttentionMap, ...]
    prediction: Prediction
    usage: Usage
    timing: Timing

    @property
    def num_bytes(self) -> int:
        return sum(len(one.weights) for one in self.maps)


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class ExplainRequest:
    """A text (or a pair) whose label is to be explained, token by token. `label` None: the one with the highest score.

    occlusion: how much the label's score falls when a token is hidden from the model (replaced by its mask token, or
    the unknown one where it has none), each by itself; negative when it rises (Zeiler and Fergus 2014, "Visualizing and
    Understanding Convolutional Networks", section 4; Li et al. 2016, "Understanding Neural Networks through
    Representation Erasure"). It is an effect on this very model, measured; but one token at a time, so that two that
    say the same hide each other, scores do not add up, and a text with a hole is not what the model was trained on.
    Special tokens stay, and score 0.

    rollout: the share of each token in what the position that the label is read from has seen, by attention alone
    (Abnar and Zuidema 2020; see AttentionRequest). It costs one run, is never negative, sums to 1, special tokens
    included, and is the same for every label: it says where the model looked, not whether what it saw spoke for the
    label or against it. Attention is not an explanation: other weights can give the same prediction (Jain and Wallace
    2019, "Attention is not Explanation").
    """

    text: str
    text_pair: str | None = None
    model: ModelId | None = None
    method: Method = "occlusion"
    label: str | None = None


@plain(frozen=True)
class Explanation:
    """A score for each token; what it means depends on `method`, see ExplainRequest.

    `score` is what the model gives `label` for the whole text.
    """

    model: str
    method: Method
    label: str
    score: float
    tokens: tuple[AttendedToken, ...]
    scores: tuple[float, ...]
    usage: Usage
    timing: Timing
