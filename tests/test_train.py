"""The training loop on tiny models: bit-exact resuming, schedule, clipping, grouping, weight decay, overfitting."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from model.config import ModelConfig
from model.curve import MetricsFile, read_metrics
from model.data import Batch, Examples, length_grouped, one_hot
from model.evaluate import accuracy, predict
from model.objective import translation_loss
from model.optimizer import learning_rate_scale, parameter_groups
from model.pairs import EncodedPairs, Ragged, Variants
from model.train import Loss, Run, TrainConfig, classification_loss, load_checkpoint, save_checkpoint, train
from model.transformer import Classifier, EncoderDecoder
from tests.tiny_translation import CONFIG as TRANSLATOR
from tests.tiny_translation import tiny_translator

CONFIG = ModelConfig(
    kind="encoder",
    vocab_size=30,
    width=16,
    num_heads=2,
    num_layers=2,
    feed_forward=32,
    max_length=16,
    dropout=0.1,
    attention_dropout=0.1,
    num_labels=2,
    labels=("no", "yes"),
)
SCHEDULE = TrainConfig(
    learning_rate=1e-2, epochs=2, batch_size=4, average=0.9, average_every=1, evaluate_every=3, save_every=7
)

TRANSLATING = TrainConfig(
    learning_rate=1e-2,
    epochs=4,
    batch_size=24,
    schedule="inverse-sqrt",
    beta2=0.98,
    average=0.9,
    average_every=1,
    evaluate_every=3,
    save_every=4,
)


def toy_examples(count: int = 30) -> Examples:
    """Texts of several lengths; the label says whether id 7 is the first."""
    draw = torch.Generator().manual_seed(5)
    labels = [index % 2 for index in range(count)]
    ids = [
        [7 if label else 8, *torch.randint(9, 30, (1 + index % 5,), generator=draw).tolist()]
        for index, label in enumerate(labels)
    ]
    return Examples(ids, one_hot(labels))


def make_run(
    directory: Path,
    config: TrainConfig = SCHEDULE,
    *,
    architecture: ModelConfig = CONFIG,
    examples: Examples | None = None,
    loss: Loss = classification_loss,
    num_frozen: int = 0,
) -> Run:
    torch.manual_seed(1)
    model = Classifier(architecture)
    for block in model.body.stack.blocks[:num_frozen]:
        block.requires_grad_(False)
    return Run(
        directory,
        model,
        config,
        architecture=architecture,
        examples=toy_examples() if examples is None else examples,
        loss=loss,
    )


def no_scores() -> dict[str, float]:
    return {}


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    for (name, ours), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("stop_at", [7, 11])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(tmp_path: Path, stop_at: int, precision: str) -> None:
    config = replace(SCHEDULE, precision=precision)
    whole = make_run(tmp_path / "whole", config)
    train(whole, no_scores)
    train(make_run(tmp_path / "cut", config), no_scores, stop_at=stop_at)  # its last state is of update 7
    resumed = make_run(tmp_path / "cut", config)
    torch.manual_seed(99)  # whatever the generator was, the state brings its own
    train(resumed, no_scores)
    assert resumed.step == whole.step == 16
    assert_same_weights(resumed.model, whole.model)
    for ours, theirs in zip(resumed.averaged, whole.averaged, strict=True):
        assert torch.equal(ours, theirs)

    def told(run: Run) -> list[dict[str, float]]:
        lines = read_metrics(run.directory / "metrics.jsonl")
        return [{key: line[key] for key in ("step", "rate", "loss")} for line in lines]

    assert told(resumed) == told(whole)
    assert (resumed.directory / "curve.png").stat().st_size > 0


def test_a_state_of_another_configuration_is_refused(tmp_path: Path) -> None:
    train(make_run(tmp_path), no_scores)
    with pytest.raises(ValueError, match="remove it to train anew"):
        make_run(tmp_path, replace(SCHEDULE, learning_rate=2e-2)).resume()


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"architecture": replace(CONFIG, activation="relu")}, "model"),
        ({"architecture": replace(CONFIG, dropout=0.2)}, "model"),
        ({"num_frozen": 2}, "frozen weights"),
        ({"examples": toy_examples(8)}, "data"),
        ({"examples": replace(toy_examples(), targets=1 - toy_examples().targets)}, "data"),
        ({"examples": replace(toy_examples(), ids=toy_examples().ids[::-1])}, "data"),
    ],
)
def test_a_state_of_another_model_or_other_data_is_refused(tmp_path: Path, changes: dict[str, Any], name: str) -> None:
    train(make_run(tmp_path, num_frozen=1), no_scores, stop_at=7)
    assert make_run(tmp_path, num_frozen=1).resume()
    run = make_run(tmp_path, **{"num_frozen": 1} | changes)
    with pytest.raises(ValueError, match=rf"state\.safetensors was made with other {name} than this run's; remove it"):
        train(run, no_scores)


def test_a_translation_state_of_other_pairs_is_refused(tmp_path: Path) -> None:
    train(make_translation_run(tmp_path), no_scores, stop_at=4)
    run = make_translation_run(tmp_path)
    run.examples.corpora[2].targets.flat[5] += 1  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="was made with other data"):
        run.resume()


def test_frozen_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    train(make_run(tmp_path, num_frozen=1), no_scores, stop_at=7)
    run = make_run(tmp_path, num_frozen=1)
    run.model.get_submodule("body.stack.blocks.0.attention.query").weight.data[0, 0] += 1  # type: ignore[operator]
    with pytest.raises(ValueError, match="was made with other frozen weights"):
        run.resume()


@pytest.mark.parametrize(("last_update", "num_updates"), [(17, 16), (0, 16), (None, 0)])
def test_a_run_without_so_many_updates_is_refused(tmp_path: Path, last_update: int | None, num_updates: int) -> None:
    examples = toy_examples() if num_updates else Examples([], torch.zeros(0, 2))
    with pytest.raises(
        ValueError, match=rf"the data give {num_updates} updates, the run is to end at {last_update or 0}"
    ):
        make_run(tmp_path, replace(SCHEDULE, last_update=last_update), examples=examples)


def test_a_state_that_does_not_know_a_newer_field_has_its_default(tmp_path: Path) -> None:
    train(make_run(tmp_path), no_scores, stop_at=7)
    path = tmp_path / "state.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    config = json.loads(metadata["config"])
    del config["schedule"], config["beta2"]
    save_file(load_file(path), path, metadata=metadata | {"config": json.dumps(config)})
    run = make_run(tmp_path)
    assert run.resume()
    assert run.step == 7


@pytest.mark.parametrize(("name", "value"), [("schedule", "cosine"), ("precision", "float8")])
def test_an_unknown_choice_is_refused(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is '{value}', known are"):
        replace(SCHEDULE, **{name: value})


def test_schedule_grows_then_falls_to_zero() -> None:
    scale = [learning_rate_scale(step, total=10, warmup=4) for step in range(11)]
    assert scale == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0.0])


def test_schedule_falls_with_the_inverse_square_root() -> None:
    """Vaswani et al. 2017, equation 3: min(n^-0.5, n * w^-1.5), here as a share of its peak at n = w."""
    scale = [learning_rate_scale(n - 1, total=50, warmup=4, schedule="inverse-sqrt") for n in range(1, 41)]
    assert scale == pytest.approx([min(n**-0.5, n * 4**-1.5) * 4**0.5 for n in range(1, 41)])
    assert scale[3] == 1.0


def test_gradients_are_clipped_before_the_update(tmp_path: Path) -> None:
    clip = 1e-3
    run = make_run(tmp_path, replace(SCHEDULE, clip=clip, average=0.0))
    norms: list[float] = []
    run.optimizer.register_step_pre_hook(
        lambda *_: norms.append(
            torch.cat([p.grad.flatten() for p in run.parameters if p.grad is not None]).norm().item()
        )
    )
    for batch in run.batches():
        run.update(batch)
    assert len(norms) == 16
    assert max(norms) <= clip * 1.001


@pytest.mark.parametrize(
    "spoil",
    [lambda loss: loss * float("nan"), lambda loss: loss + float("inf"), lambda loss: (loss * 0).sqrt()],
    ids=["loss not a number", "loss infinite", "gradient not a number"],
)
def test_a_loss_or_a_gradient_that_is_not_finite_ends_the_run_before_it_spoils_anything(
    tmp_path: Path, spoil: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
        value = classification_loss(model, batch)
        return spoil(value) if run.step == 8 else value

    run = make_run(tmp_path, loss=loss)
    with pytest.raises(FloatingPointError, match=r"update 9 has a loss of (nan|inf|0\.0) and a gradient of norm"):
        train(run, no_scores)
    assert all(parameter.isfinite().all() for parameter in [*run.parameters, *run.averaged])
    whole, resumed = make_run(tmp_path / "whole"), make_run(tmp_path)
    for one in (whole, resumed):
        train(one, no_scores)
    assert_same_weights(resumed.model, whole.model)
    assert resumed.step == 16


def test_norms_and_biases_do_not_decay_and_lower_blocks_learn_slower() -> None:
    model = Classifier(CONFIG)
    config = replace(SCHEDULE, weight_decay=0.1, layer_decay=0.5)
    groups = parameter_groups(model, config, CONFIG.num_layers)
    told = {id(p): group for group in groups for p in group["params"]}
    assert len(told) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert told[id(parameter)]["weight_decay"] == (0.0 if name.endswith("bias") or "norm" in name else 0.1), name
    assert told[id(model.head.weight)]["scale"] == 1.0
    assert told[id(model.body.stack.blocks[1].attention.query.weight)]["scale"] == 0.5
    assert told[id(model.body.stack.blocks[0].attention.query.weight)]["scale"] == 0.25
    assert told[id(model.body.stack.embedding.token.weight)]["scale"] == 0.125


def test_frozen_weights_stay(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = Classifier(CONFIG)
    embedding = model.body.stack.embedding.requires_grad_(False)
    before = embedding.token.weight.clone()
    train(Run(tmp_path, model, SCHEDULE, architecture=CONFIG, examples=toy_examples()), no_scores)
    assert torch.equal(embedding.token.weight, before)


def test_length_grouping_covers_each_example_once_and_pads_little() -> None:
    lengths = [1 + (index * 7) % 20 for index in range(103)]
    batches = length_grouped(lengths, 8, seed=3)
    assert sorted(index for batch in batches for index in batch) == list(range(103))
    assert {len(batch) for batch in batches} == {8, 103 % 8}
    padded = sum(max(lengths[i] for i in batch) * len(batch) for batch in batches)
    assert padded <= 1.1 * sum(lengths)


def test_length_grouping_follows_its_seed() -> None:
    lengths = [1 + index % 5 for index in range(40)]
    assert length_grouped(lengths, 4, seed=1) == length_grouped(lengths, 4, seed=1)
    assert length_grouped(lengths, 4, seed=1) != length_grouped(lengths, 4, seed=2)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_tiny_model_learns_a_toy_set(tmp_path: Path, precision: str) -> None:
    config = replace(SCHEDULE, epochs=12, precision=precision)
    examples = toy_examples()
    run = make_run(tmp_path, config)
    train(run, lambda: {"accuracy": accuracy(predict(run.model, examples, pad_id=0), examples.targets)})
    assert accuracy(predict(run.model, examples, pad_id=0), examples.targets) == 1.0
    first, *_, last = read_metrics(tmp_path / "metrics.jsonl")
    assert last["loss"] < 0.1 * first["loss"]
    assert last["accuracy"] == 1.0


def test_the_average_is_what_is_left_at_the_end(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    seen: list[torch.Tensor] = []
    train(run, lambda: seen.append(run.model.head.weight.detach().clone()) or {})
    assert torch.equal(seen[-1], run.model.head.weight)
    at = next(index for index, parameter in enumerate(run.parameters) if parameter is run.model.head.weight)
    assert not torch.equal(run.averaged[at], run.model.head.weight)


def test_predictions_keep_the_order_of_the_examples() -> None:
    torch.manual_seed(0)
    model = Classifier(CONFIG)
    examples = toy_examples(13)
    together = predict(model, examples, pad_id=0, batch_size=4)
    alone = [predict(model, Examples([ids], examples.targets[:1]), pad_id=0)[0] for ids in examples.ids]
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-6, rtol=1e-5)
    assert model.training


def make_translation_run(directory: Path, config: TrainConfig = TRANSLATING) -> Run:
    draw = torch.Generator().manual_seed(5)
    lists = [[*torch.randint(3, 40, (1 + index % 7,), generator=draw).tolist(), 2] for index in range(60)]
    corpora = [EncodedPairs(Ragged.of(lists[at:][:20]), Ragged.of(lists[at + 20 :][:20])) for at in (0, 20)]
    corpora.append(EncodedPairs(Ragged.of(lists), Ragged.of(lists)))
    loss = partial(translation_loss, pad_id=0, smoothing=0.1)
    return Run(directory, tiny_translator(), config, architecture=TRANSLATOR, examples=Variants(corpora, 1), loss=loss)


@pytest.mark.parametrize("stop_at", [4, 9])
def test_a_resumed_translation_run_is_bit_equal_to_an_uninterrupted_one(tmp_path: Path, stop_at: int) -> None:
    """Epochs of different numbers of batches."""
    whole = make_translation_run(tmp_path / "whole")
    assert len({len(whole.epoch(number)) for number in range(4)}) > 1
    train(whole, no_scores)
    train(make_translation_run(tmp_path / "cut"), no_scores, stop_at=stop_at)
    resumed = make_translation_run(tmp_path / "cut")
    torch.manual_seed(99)
    train(resumed, no_scores)
    assert resumed.step == whole.step == whole.total
    assert_same_weights(resumed.model, whole.model)


def test_the_second_moment_decays_as_configured(tmp_path: Path) -> None:
    run = make_translation_run(tmp_path)
    assert {group["betas"] for group in run.optimizer.param_groups} == {(0.9, 0.98)}


def test_metrics_after_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (3, 6, 9)))
    metrics = MetricsFile(path, step=6)
    metrics.write({"step": 7})
    assert [line["step"] for line in read_metrics(path)] == [3, 6, 7]


def test_a_run_whose_last_line_of_metrics_is_cut_goes_on(tmp_path: Path) -> None:
    train(make_run(tmp_path), no_scores, stop_at=8)
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 9, "ra')
    train(make_run(tmp_path), no_scores)
    assert [line["step"] for line in read_metrics(path)] == [3, 6, 9, 12, 15, 16]


def test_metrics_are_kept_if_dropping_lines_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 3}\n{"step": 9}\n')

    def write_half(self: Path, text: str) -> None:
        with self.open("w") as file:
            file.write(text[:4])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(KeyboardInterrupt):
        MetricsFile(path, step=6)
    assert [line["step"] for line in read_metrics(path)] == [3, 9]


def test_a_checkpoint_loads_as_it_was_saved(tmp_path: Path) -> None:
    tokenizer = tmp_path / "given.json"
    tokenizer.write_text("{}")
    model = Classifier(CONFIG).eval()
    save_checkpoint(tmp_path / "best", CONFIG, model, tokenizer=tokenizer, provenance={"seed": 1})
    config, loaded = load_checkpoint(tmp_path / "best")
    assert config == CONFIG
    assert_same_weights(loaded, model)
    assert not loaded.training
    assert sorted(path.name for path in (tmp_path / "best").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "train.json",
    ]


@pytest.mark.parametrize("interrupted_at", ["config.json", "train.json"])
def test_a_checkpoint_that_is_not_saved_to_its_end_is_none(
    interrupted_at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not over a checkpoint that was complete either: `train.json` says that all is there."""
    tokenizer, write_text = tmp_path / "given.json", Path.write_text
    tokenizer.write_text("{}")

    def interrupted(path: Path, text: str) -> int:
        if path.name.startswith(interrupted_at):
            write_text(path, text[:3])
            raise OSError("no space")
        return write_text(path, text)

    saved = partial(save_checkpoint, tmp_path / "best", CONFIG, Classifier(CONFIG), tokenizer=tokenizer, provenance={})
    saved()
    monkeypatch.setattr(Path, "write_text", interrupted)
    with pytest.raises(OSError, match="no space"):
        saved()
    assert not (tmp_path / "best/train.json").exists()


def test_a_tied_encoder_decoder_loads_as_it_was_saved(tmp_path: Path) -> None:
    tokenizer = tmp_path / "given.json"
    tokenizer.write_text("{}")
    model = tiny_translator()
    save_checkpoint(tmp_path / "best", TRANSLATOR, model, tokenizer=tokenizer, provenance={})
    config, loaded = load_checkpoint(tmp_path / "best", EncoderDecoder)
    assert config == TRANSLATOR
    assert_same_weights(loaded, model)
    assert loaded.head.weight is loaded.decoder.stack.embedding.token.weight
    assert len(loaded.encoder.stack.blocks) == 2
    assert len(loaded.decoder.stack.blocks) == 1
