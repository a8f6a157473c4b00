"""From what a caller asks to see of a model's attention to the layers and heads that it has. Policy only."""

from collections.abc import Sequence

from service.domain import AttentionRequest
from service.errors import InvalidRequest, TooLarge
from service.worker.classification.sequence import View


def view_of(request: AttentionRequest, *, num_layers: int, num_heads: int) -> View:
    """Raises InvalidRequest for a layer or a head that the model has not."""
    wanted = request.layers or ("all" if request.reduce == "rollout" else "last")
    if isinstance(wanted, str):
        layers = tuple(range(num_layers)) if wanted == "all" else (num_layers - 1,)
    else:
        layers = _existing(wanted, num_layers, "layer")
    heads = range(num_heads) if isinstance(request.heads, str) else _existing(request.heads, num_heads, "head")
    return View(layers, tuple(heads), request.reduce)


def rollout_of_all(*, num_layers: int, num_heads: int) -> View:
    return View(tuple(range(num_layers)), tuple(range(num_heads)), "rollout")


def check_size(view: View, num_tokens: int, max_bytes: int) -> None:
    """Raises TooLarge when what `view` asks for of `num_tokens` tokens has more than `max_bytes`."""
    num_bytes = view.num_bytes(num_tokens)
    if num_bytes > max_bytes:
        num_layers, num_heads = len(view.layers), len(view.heads)
        message = (
            f"the maps asked for have {num_bytes} bytes ({num_layers} layers, {num_heads} heads, reduce "
            f"{view.reduce!r}, {num_tokens} tokens), the limit is {max_bytes}; choose fewer layers or heads, or reduce"
        )
        raise TooLarge(message, param="layers", code="attention_too_large")


def _existing(numbers: Sequence[int], count: int, noun: str) -> tuple[int, ...]:
    for number in numbers:
        if number >= count:
            message = f"{noun}s: the model has {count}, numbered from 0 to {count - 1}, got {number}"
            raise InvalidRequest(message, param=f"{noun}s")
    return tuple(numbers)
