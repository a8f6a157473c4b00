"""The training loop of classifiers: AdamW, schedule, length-grouped batches, clipping, averaging, checkpoints, curves.

A run owns a directory: `state.safetensors` (everything that resuming needs, replaced atomically), `metrics.jsonl`,
`curve.png`, and at the end the model itself (`model.safetensors`, `config.json`, `tokenizer.json`, `train.json`). A
resumed run is bit-equal to an uninterrupted one: the order of the data follows from the seed and the epoch, and the
state holds weights, moments, average and the random generator.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from model.config import ModelConfig
from model.data import Batch, Examples, length_grouped
from model.transformer import Classifier

Metrics = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model is trained, apart from the data; the defaults are those of Devlin et al. 2019, appendix A.3."""

    learning_rate: float
    epochs: int = 3
    last_update: int | None = None  # ends the run there, short of what its schedule was made for; None: at the end
    batch_size: int = 32
    warmup: float = 0.1  # share of the updates during which the rate grows
    weight_decay: float = 0.01
    layer_decay: float = 1.0  # the rate of each block is this times that of the block above it
    clip: float = 1.0  # largest norm of the gradient
    average: float = 0.0  # decay of the moving average of the weights each time it moves; 0: no average
    average_every: int = 10  # updates between two moves
    precision: str = "float32"  # "bfloat16": matrices in bfloat16, weights and sums in float32 (autocast)
    seed: int = 0
    evaluate_every: int = 500  # updates
    save_every: int = 500  # updates


def learning_rate_scale(step: int, *, total: int, warmup: int) -> float:
    """Linear from 0 to 1 over `warmup` updates, then linear to 0 at `total`; the first update has step 0."""
    if step < warmup:
        return (step + 1) / warmup
    return max(0.0, (total - step) / max(1, total - warmup))


def depth(name: str, num_layers: int) -> int:
    """How far a parameter is above the embeddings: 0 for those, 1 + i for block i, num_layers + 1 for the heads."""
    if "embedding" in name:
        return 0
    parts = name.split(".")
    return 1 + int(parts[parts.index("blocks") + 1]) if "blocks" in parts else num_layers + 1


def parameter_groups(model: nn.Module, config: TrainConfig, num_layers: int) -> list[dict[str, Any]]:
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


class Run:
    """One training run in its directory: the model, its optimizer and average, and the number of updates done."""

    def __init__(
        self, directory: Path, model: nn.Module, config: TrainConfig, *, examples: Examples, pad_id: int
    ) -> None:
        self.directory, self.model, self.config = directory, model, config
        self.examples, self.pad_id, self.step = examples, pad_id, 0
        num_layers = max(depth(name, 0) for name, _ in model.named_parameters())
        groups = parameter_groups(model, config, num_layers)
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.999), eps=1e-8, fused=True)
        self.parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.averaged = [parameter.detach().clone() for parameter in self.parameters] if config.average else []
        self.updates_an_epoch = math.ceil(len(examples) / config.batch_size)
        self.total = self.updates_an_epoch * config.epochs
        self.last = self.total if config.last_update is None else config.last_update
        directory.mkdir(parents=True, exist_ok=True)

    def batches(self) -> Iterator[Batch]:
        """The batches that are still to come, from where `step` says."""
        lengths = self.examples.lengths()
        for epoch in range(self.step // self.updates_an_epoch, self.config.epochs):
            order = length_grouped(lengths, self.config.batch_size, seed=self.config.seed * 1000 + epoch)
            for indices in order[self.step - epoch * self.updates_an_epoch :]:
                yield self.examples.batch(indices, self.pad_id)

    def update(self, batch: Batch) -> float:
        """One step of the optimizer; returns the loss, the cross-entropy with the targets."""
        scale = learning_rate_scale(self.step, total=self.total, warmup=round(self.total * self.config.warmup))
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * group["scale"] * scale
        precision = getattr(torch, self.config.precision)
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            logits = self.model(batch.ids, batch.mask)
        loss = F.cross_entropy(logits.float(), batch.targets)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.average()
        return loss.item()

    @property
    def rate(self) -> float:
        """The learning rate of the last update, that of the heads."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def is_due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.last

    @torch.no_grad()
    def average(self) -> None:
        """Moves the average towards the weights; early on faster, so that it forgets where it began."""
        moves, rest = divmod(self.step, self.config.average_every)
        if rest or not self.averaged:
            return
        decay = min(self.config.average, moves / (10 + moves))
        for mean, parameter in zip(self.averaged, self.parameters, strict=True):
            mean.lerp_(parameter, 1 - decay)

    def swap_average(self) -> None:
        """Exchanges the weights and their average; call it twice around what should see the average."""
        for mean, parameter in zip(self.averaged, self.parameters, strict=bool(self.averaged)):
            kept = parameter.detach().clone()
            parameter.data.copy_(mean)
            mean.copy_(kept)

    def state(self) -> dict[str, Tensor]:
        """Everything that the next update depends on, and that does not follow from the configuration and the step."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        tensors = {"generator": torch.get_rng_state()}
        for at, parameter in enumerate(self.parameters):
            name = names[parameter]
            tensors[f"weight/{name}"] = parameter.detach()
            tensors |= {f"{key}/{name}": value for key, value in self.optimizer.state[parameter].items()}
            if self.averaged:
                tensors[f"average/{name}"] = self.averaged[at]
        return tensors

    def save(self) -> None:
        new = self.directory / "state.new"
        save_file(self.state(), new, metadata={"step": str(self.step), "config": json.dumps(asdict(self.config))})
        os.replace(new, self.directory / "state.safetensors")

    def resume(self) -> bool:
        """Takes up the saved state if there is one; raises ValueError if it was made under another configuration."""
        path = self.directory / "state.safetensors"
        if not path.exists():
            return False
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        if json.loads(metadata["config"]) != asdict(self.config):
            raise ValueError(f"{path} was made by {metadata['config']}; remove it to train anew with {self.config}")
        self.restore(load_file(path))
        self.step = int(metadata["step"])
        return True

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for at, parameter in enumerate(self.parameters):
            name = names[parameter]
            parameter.copy_(tensors[f"weight/{name}"])
            keys = ("step", "exp_avg", "exp_avg_sq")
            self.optimizer.state[parameter] = {key: tensors[f"{key}/{name}"] for key in keys}
            if self.averaged:
                self.averaged[at].copy_(tensors[f"average/{name}"])
        torch.set_rng_state(tensors["generator"])


class MetricsFile:
    """metrics.jsonl, one JSON object a line; when a run resumes, lines after the saved step are dropped."""

    def __init__(self, path: Path, *, step: int) -> None:
        self.path = path
        kept = [line for line in read_metrics(path) if line["step"] <= step] if path.exists() else []
        path.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def write(self, values: Metrics) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")


def read_metrics(path: Path) -> list[Metrics]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def train(run: Run, evaluate: Callable[[], Metrics], *, stop_at: int | None = None) -> None:
    """Runs to the end, or to update `stop_at`; resumes by itself. At the end the weights are their average, if any.

    `evaluate` is called with the weights (or their average) in place, and what it returns goes to the metrics file.
    """
    torch.manual_seed(run.config.seed)
    run.resume()
    metrics = MetricsFile(run.directory / "metrics.jsonl", step=run.step)
    losses, began = [], time.perf_counter()
    run.model.train()
    bar = tqdm(run.batches(), initial=run.step, total=run.last, unit="update", desc=run.directory.name, mininterval=5)
    for batch in bar:
        if run.step in (stop_at, run.last):
            break
        losses.append(run.update(batch))
        if run.is_due(run.config.evaluate_every):
            scores = evaluated(run, evaluate) | {"loss": sum(losses) / len(losses)}
            metrics.write({"step": run.step, "rate": run.rate, "seconds": time.perf_counter() - began} | scores)
            bar.set_postfix(scores, refresh=False)
            losses = []
        if run.is_due(run.config.save_every):
            run.save()
    plot(run.directory)
    if run.step == run.last:
        run.swap_average()


def evaluated(run: Run, evaluate: Callable[[], Metrics]) -> Metrics:
    """What `evaluate` says of the average of the weights."""
    run.swap_average()
    scores = evaluate()
    run.swap_average()
    run.model.train()
    return scores


def plot(directory: Path) -> None:
    """Draws metrics.jsonl as curve.png: the loss, and every other score on a second axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = read_metrics(directory / "metrics.jsonl")
    if not lines:
        return
    steps = [line["step"] for line in lines]
    figure, left = pyplot.subplots(figsize=(8, 4.5))
    left.plot(steps, [line["loss"] for line in lines], color="tab:gray", label="training loss")
    left.set(xlabel="update", ylabel="loss", title=directory.name)
    right = left.twinx()
    right.set_ylabel("accuracy")
    for name in (name for name in lines[-1] if "accuracy" in name):
        right.plot(steps, [line.get(name, math.nan) for line in lines], label=name)
        right.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(directory / "curve.png", dpi=120)
    pyplot.close(figure)


def save_checkpoint(
    directory: Path, config: ModelConfig, model: nn.Module, *, tokenizer: Path, provenance: dict[str, Any]
) -> None:
    """Writes model.safetensors, config.json, tokenizer.json and train.json."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()}, directory / "model.safetensors"
    )
    config.save(directory / "config.json")
    shutil.copyfile(tokenizer, directory / "tokenizer.json")
    (directory / "train.json").write_text(json.dumps(provenance, indent=2) + "\n")


def load_checkpoint(directory: Path) -> tuple[ModelConfig, Classifier]:
    """Reads what save_checkpoint wrote; the model is in evaluation mode."""
    config = ModelConfig.load(directory / "config.json")
    model = Classifier(config)
    model.load_state_dict(load_file(directory / "model.safetensors"))
    return config, model.eval()
