"""From what a caller asks to see of a model's attention to the layers and heads that it has. Policy only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from service.domain import AttentionRequest, Kind, Reduce
from service.errors import InvalidRequest, TooLarge

FLOAT_BYTES = 4

Shape = tuple[int, int]  # queries, keys
Sizes = Mapping[Kind, tuple[int, int]]  # what a model has: layers, heads


@dataclass(frozen=True, slots=True)
class View:
    """Which attention weights of one kind are wanted. The layers and heads are ones that the model has."""

    kind: Kind
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    reduce: Reduce

    def num_bytes(self, shape: Shape) -> int:
        """What is told of a run with so many queries and keys."""
        num_layers = 1 if self.reduce == "rollout" else len(self.layers)
        num_heads = len(self.heads) if self.reduce == "none" else 1
        return FLOAT_BYTES * num_layers * num_heads * shape[0] * shape[1]


def views_of(request: AttentionRequest, sizes: Sizes) -> tuple[View, ...]:
    """One for each kind that is asked for, of those that the model has.

    Raises InvalidRequest for a layer or a head that the model has not.
    """
    kinds = [request.kind] if request.kind else [one for one in sizes if one != "cross" or request.reduce != "rollout"]
    return tuple(_view(request, kind, *sizes[kind]) for kind in kinds)


def _view(request: AttentionRequest, kind: Kind, num_layers: int, num_heads: int) -> View:
    wanted = request.layers or ("all" if request.reduce == "rollout" else "last")
    if isinstance(wanted, str):
        layers = tuple(range(num_layers)) if wanted == "all" else (num_layers - 1,)
    else:
        layers = _existing(wanted, num_layers, "layer", kind)
    heads = range(num_heads) if isinstance(request.heads, str) else _existing(request.heads, num_heads, "head", kind)
    return View(kind, layers, tuple(heads), request.reduce)


def rollout_of_all(*, num_layers: int, num_heads: int) -> View:
    """Of an encoder."""
    return View("encoder", tuple(range(num_layers)), tuple(range(num_heads)), "rollout")


def check_size(views: Sequence[View], shapes: Mapping[Kind, Shape], max_bytes: int) -> None:
    """Raises TooLarge when what `views` ask for has more than `max_bytes`."""
    num_bytes = sum(view.num_bytes(shapes[view.kind]) for view in views)
    if num_bytes > max_bytes:
        asked = "; ".join(
            "{}: {} layers, {} heads, {} x {}".format(view.kind, len(view.layers), len(view.heads), *shapes[view.kind])
            for view in views
        )
        message = (
            f"the maps asked for have {num_bytes} bytes ({asked} tokens; reduce {views[0].reduce!r}), the limit is "
            f"{max_bytes}; choose fewer layers or heads, or reduce"
        )
        raise TooLarge(message, param="layers", code="attention_too_large")


def _existing(numbers: Sequence[int], count: int, noun: str, kind: Kind) -> tuple[int, ...]:
    for number in numbers:
        if number >= count:
            message = f"{noun}s: the {kind} attention has {count}, numbered from 0 to {count - 1}, got {number}"
            raise InvalidRequest(message, param=f"{noun}s")
    return tuple(numbers)
