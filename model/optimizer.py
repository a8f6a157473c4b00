"""Which weights learn at what rate: the schedule, and groups of parameters by kind and by depth."""

from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from model.train import TrainConfig


def learning_rate_scale(step: int, *, total: int, warmup: int, schedule: str = "linear") -> float:
    """Linear from 0 to 1 over `warmup` updates, then linear to 0 at `total`; the first update has step 0.

    Or, after the warm-up, with the inverse square root of the number of the update (Vaswani et al. 2017, section 5.3).
    """
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "inverse-sqrt":
        return (max(1, warmup) / (step + 1)) ** 0.5
    return max(0.0, (total - step) / max(1, total - warmup))


def depth(name: str, num_layers: int) -> int:
    """How far a parameter is above the embeddings: 0 for those, 1 + i for block i, num_layers + 1 for the heads."""
    if "embedding" in name:
        return 0
    parts = name.split(".")
    return 1 + int(parts[parts.index("blocks") + 1]) if "blocks" in parts else num_layers + 1


def parameter_groups(model: nn.Module, config: "TrainConfig", num_layers: int) -> list[dict[str, Any]]:
    """No weight decay on vectors (biases and norms), and the learning rate falling with depth."""
    groups: dict[tuple[bool, int], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        groups.setdefault((parameter.ndim > 1, depth(name, num_layers)), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": config.weight_decay if is_matrix else 0.0,
            "scale": config.layer_decay ** (num_layers + 1 - level),
        }
        for (is_matrix, level), parameters in groups.items()
    ]
