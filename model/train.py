"""The training loop: AdamW, schedule, clipping, averaging, checkpoints. What is trained is a loss and a data set.

A run owns a directory: `state.safetensors` (everything that resuming needs, replaced atomically), `metrics.jsonl`,
`curve.png`, and at the end the model itself (`model.safetensors`, `config.json`, `tokenizer.json`, `train.json`). A
resumed run is bit-equal to an uninterrupted one: the order of the data follows from the seed and the epoch, and the
state holds weights, moments, average, the random generator and the losses that the next line of metrics is the mean of.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn
from tqdm import tqdm

from model.config import ModelConfig, check_choices
from model.curve import Metrics, MetricsFile, plot
from model.data import Batch, Batches, digest
from model.optimizer import depth, learning_rate_scale, parameter_groups
from model.transformer import Classifier
from service.worker.bundle import file_spec

CHECKPOINT_HELP = "folder that a training wrote: model.safetensors, config.json, tokenizer.json, train.json"
Loss = Callable[[nn.Module, Any], Tensor]  # of a model and a batch
M = TypeVar("M", bound=nn.Module)


class DataSet(Protocol):
    """Gives an epoch's batches; the same ones whenever it is asked with the same arguments."""

    def digest(self) -> str:
        """A hash of all examples."""
        ...

    def epoch(self, number: int, *, batch_size: int, seed: int, pad_id: int) -> Batches[Any]: ...


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model is trained, apart from the data; the defaults are those of Devlin et al. 2019, appendix A.3."""

    learning_rate: float
    epochs: int = 3
    last_update: int | None = None  # ends the run there, short of what its schedule was made for; None: at the end
    batch_size: int = 32  # examples, or tokens: as the data set counts
    schedule: Literal["linear", "inverse-sqrt"] = "linear"  # how the rate falls after the warm-up
    warmup: float = 0.1  # share of the updates during which the rate grows
    beta2: float = 0.999  # decay of Adam's second moment
    weight_decay: float = 0.01
    layer_decay: float = 1.0  # the rate of each block is this times that of the block above it
    clip: float = 1.0  # largest norm of the gradient
    average: float = 0.0  # decay of the moving average of the weights each time it moves; 0: no average
    average_every: int = 10  # updates between two moves
    precision: Literal["float32", "bfloat16"] = "float32"  # "bfloat16": of matrices, weights and sums stay (autocast)
    seed: int = 0
    evaluate_every: int = 500  # updates
    save_every: int = 500  # updates

    def __post_init__(self) -> None:
        check_choices(self)

    @classmethod
    def from_json(cls, text: str) -> "TrainConfig":
        """A field that the text does not know has its default."""
        return cls(**json.loads(text))


def classification_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy with targets that are probabilities."""
    return F.cross_entropy(model(batch.ids, batch.mask).float(), batch.targets)


class Run:
    """One training run in its directory: the model, its optimizer and average, and the number of updates done."""

    def __init__(
        self,
        directory: Path,
        model: nn.Module,
        config: TrainConfig,
        *,
        architecture: ModelConfig,
        examples: DataSet,
        loss: Loss = classification_loss,
    ) -> None:
        self.directory, self.model, self.config = directory, model, config
        self.architecture, self.examples, self.loss, self.step = architecture, examples, loss, 0
        self.losses: list[float] = []  # since the last evaluation
        num_layers = max(depth(name, 0) for name, _ in model.named_parameters())
        groups = parameter_groups(model, config, num_layers)
        betas = (0.9, config.beta2)
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=1e-8, fused=True)
        self.parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.averaged = [parameter.detach().clone() for parameter in self.parameters] if config.average else []
        self.total = sum(len(self.epoch(number)) for number in range(config.epochs))
        self.last = self.total if config.last_update is None else config.last_update
        if not 0 < self.last <= self.total:
            raise ValueError(f"{directory}: the data give {self.total} updates, the run is to end at {self.last}")
        directory.mkdir(parents=True, exist_ok=True)

    def epoch(self, number: int) -> Batches[Any]:
        seed, pad_id = self.config.seed * 1000 + number, self.architecture.pad_id
        return self.examples.epoch(number, batch_size=self.config.batch_size, seed=seed, pad_id=pad_id)

    def batches(self) -> Iterator[Any]:
        """The batches that are still to come, from where `step` says."""
        passed = 0  # updates of the epochs before
        for batches in map(self.epoch, range(self.config.epochs)):
            for at in range(max(0, self.step - passed), len(batches)):
                yield batches[at]
            passed += len(batches)

    def update(self, batch: Any) -> float:
        """One step of the optimizer; returns the loss. FloatingPointError if the step would spoil the weights."""
        self.set_rate()
        precision = getattr(torch, self.config.precision)
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            loss = self.loss(self.model, batch)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
        if not (loss.isfinite() and norm.isfinite()):
            told = f"update {self.step + 1} has a loss of {loss.item()} and a gradient of norm {norm.item()}"
            raise FloatingPointError(f"{self.directory}: {told}; the state saved last is kept")
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.average()
        return loss.item()

    def set_rate(self) -> None:
        warmup, schedule = round(self.total * self.config.warmup), self.config.schedule
        scale = learning_rate_scale(self.step, total=self.total, warmup=warmup, schedule=schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * group["scale"] * scale

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
        tensors = {"generator": torch.get_rng_state(), "losses": torch.tensor(self.losses, dtype=torch.float64)}
        for at, parameter in enumerate(self.parameters):
            name = names[parameter]
            tensors[f"weight/{name}"] = parameter.detach()
            tensors |= {f"{key}/{name}": value for key, value in self.optimizer.state[parameter].items()}
            if self.averaged:
                tensors[f"average/{name}"] = self.averaged[at]
        return tensors

    @cached_property
    def made_of(self) -> dict[str, str]:
        """What else the next update depends on: a state goes on in a run of the same only."""
        frozen = digest(weight for weight in self.model.parameters() if not weight.requires_grad)
        model = json.dumps(asdict(self.architecture))
        return {"model": model, "frozen weights": frozen, "data": self.examples.digest()}

    def save(self) -> None:
        new = self.directory / "state.new"
        told = {"step": str(self.step), "config": json.dumps(asdict(self.config))}
        save_file(self.state(), new, metadata=told | self.made_of)
        os.replace(new, self.directory / "state.safetensors")

    def resume(self) -> bool:
        """Takes up the saved state if there is one; raises ValueError if it is of other settings, model or data."""
        path = self.directory / "state.safetensors"
        if not path.exists():
            return False
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        if TrainConfig.from_json(metadata["config"]) != self.config:
            raise ValueError(f"{path} was made by {metadata['config']}; remove it to train anew with {self.config}")
        for name, ours in self.made_of.items():
            if metadata.get(name) != ours:
                raise ValueError(f"{path} was made with other {name} than this run's; remove it to train anew")
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
        self.losses = tensors["losses"].tolist()
        torch.set_rng_state(tensors["generator"])


def train(run: Run, evaluate: Callable[[], Metrics], *, stop_at: int | None = None) -> None:
    """Runs to the end, or to update `stop_at`; resumes by itself. At the end the weights are their average, if any.

    `evaluate` is called with the weights (or their average) in place, and what it returns goes to the metrics file.
    """
    torch.manual_seed(run.config.seed)
    run.resume()
    metrics = MetricsFile(run.directory / "metrics.jsonl", step=run.step)
    began = time.perf_counter()
    run.model.train()
    bar = tqdm(run.batches(), initial=run.step, total=run.last, unit="update", desc=run.directory.name, mininterval=5)
    for batch in bar:
        if run.step in (stop_at, run.last):
            break
        run.losses.append(run.update(batch))
        if run.is_due(run.config.evaluate_every):
            scores = evaluated(run, evaluate) | {"loss": sum(run.losses) / len(run.losses)}
            metrics.write({"step": run.step, "rate": run.rate, "seconds": time.perf_counter() - began} | scores)
            bar.set_postfix(scores, refresh=False)
            run.losses = []
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


def save_checkpoint(
    directory: Path, config: ModelConfig, model: nn.Module, *, tokenizer: Path, provenance: dict[str, Any]
) -> None:
    """Writes model.safetensors, config.json, tokenizer.json and train.json, whose presence says that all is there."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "train.json").unlink(missing_ok=True)
    save_model(model, str(directory / "model.safetensors"))
    config.save(directory / "config.json")
    shutil.copyfile(tokenizer, directory / "tokenizer.json")
    new = directory / "train.json.new"
    new.write_text(json.dumps(provenance, indent=2) + "\n")
    new.replace(directory / "train.json")


def checkpoint_sha256(directory: Path) -> str:
    """Of the weights."""
    return file_spec(directory / "model.safetensors").sha256


def load_checkpoint(directory: Path, kind: type[M] = Classifier) -> tuple[ModelConfig, M]:  # type: ignore[assignment]
    """Reads what save_checkpoint wrote of a model of this kind; the model is in evaluation mode."""
    config = ModelConfig.load(directory / "config.json")
    model = kind(config)
    load_model(model, directory / "model.safetensors")
    return config, model.eval()
