"""What a run measured as it went: metrics.jsonl, and the learning curve drawn from it."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Metrics = dict[str, float]


class MetricsFile:
    """metrics.jsonl, one JSON object a line; when a run resumes, lines after the saved step are dropped."""

    def __init__(self, path: Path, *, step: int) -> None:
        self.path = path
        kept = [line for line in read_metrics(path) if line["step"] <= step] if path.exists() else []
        new = path.with_suffix(".new")
        new.write_text("".join(json.dumps(line) + "\n" for line in kept))
        new.replace(path)

    def write(self, values: Metrics) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")


def read_metrics(path: Path) -> list[Metrics]:
    """Without what follows the last newline, a line that was not written to its end."""
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def plot(directory: Path) -> None:
    """Draws metrics.jsonl as curve.png: the loss, and the scores on a second axis."""
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
    draw_scores(left.twinx(), lines)
    figure.tight_layout()
    figure.savefig(directory / "curve.png", dpi=120)
    pyplot.close(figure)


def draw_scores(axis: "Axes", lines: list[Metrics]) -> None:
    """Every BLEU if there is one, else every accuracy."""
    kind = "bleu" if any("bleu" in name for name in lines[-1]) else "accuracy"
    axis.set_ylabel("BLEU" if kind == "bleu" else kind)
    steps = [line["step"] for line in lines]
    for name in (name for name in lines[-1] if kind in name):
        axis.plot(steps, [line.get(name, math.nan) for line in lines], label=name)
        axis.legend(loc="lower right")
