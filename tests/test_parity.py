"""The served fp32 bundle gives what transformers' pipeline("text-classification") gives, to 1e-5, for every option."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast, pipeline

from model.export import Options, export
from model.importers.bert import load_bert
from model.train import save_checkpoint
from service.config import Settings
from service.domain import Call, ClassifyRequest, TextInput
from service.metrics import Metrics
from service.worker.load import load_models
from service.worker.local import LocalBackend

LABELS = ("bad", "so-so", "good")
MAX_LENGTH = 24
TEXTS = ["w3 w4 w5", "w7", "w9 w9 unknown w12 w30 w41", " ".join(f"w{index}" for index in range(3, 50))]

Pair = dict[str, str]


class Served:
    """Our side, with the pipeline's way of answering."""

    def __init__(self, backend: LocalBackend) -> None:
        self.backend = backend

    async def __call__(self, inputs: list[Any], **options: Any) -> list[list[dict[str, Any]]]:
        request = ClassifyRequest(
            input=tuple(TextInput(**(one if isinstance(one, dict) else {"text": one})) for one in inputs), **options
        )
        result = await self.backend.classify(request, Call("id", "test", time.monotonic() + 60))
        return [[{"label": one.label, "score": one.score} for one in scores] for scores in result.results]


def save_theirs(directory: Path) -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=MAX_LENGTH,
        initializer_range=0.3,
        id2label=dict(enumerate(LABELS)),
    )
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(directory)
    return model


@pytest.fixture(params=["single_label_classification", "multi_label_classification", "regression"])
async def sides(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[tuple[Served, Any]]:
    theirs = save_theirs(tmp_path / "theirs")
    theirs.config.problem_type = request.param
    tiny.save_tokenizer(tmp_path / "tokenizer.json")
    config, ours = load_bert(tmp_path / "theirs", labels=LABELS)
    provenance = {"recipe": "tests", "created": 0}
    save_checkpoint(tmp_path / "ours", config, ours, tokenizer=tmp_path / "tokenizer.json", provenance=provenance)
    bundle = tmp_path / "bundle"
    export(tmp_path / "ours", bundle, Options(id="parity", precision="float32", problem_type=request.param))

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"),
        model_max_length=MAX_LENGTH,
        pad_token="[UNK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],  # as BERT's own tokenizer has them
    )
    classify = pipeline("text-classification", model=theirs, tokenizer=tokenizer)

    settings = Settings(models=(str(bundle),))
    metrics = Metrics(settings.latency_buckets, {})
    backend = LocalBackend(lambda: load_models(settings, metrics), drain_timeout_s=5.0)
    await backend.start()
    yield Served(backend), classify
    await backend.aclose()


def assert_same(ours: list[list[dict[str, Any]]], theirs: list[list[dict[str, Any]]]) -> None:
    assert [[one["label"] for one in scores] for scores in ours] == [[one["label"] for one in row] for row in theirs]
    for our_scores, their_scores in zip(ours, theirs, strict=True):
        assert [one["score"] for one in our_scores] == pytest.approx([one["score"] for one in their_scores], abs=1e-5)


async def test_every_text_and_option_scores_as_the_pipeline_does(sides: tuple[Served, Any]) -> None:
    served, classify = sides
    for options in ({}, {"top_k": 1}, {"top_k": 2}, {"function_to_apply": "sigmoid"}, {"function_to_apply": "softmax"},
                    {"function_to_apply": "none"}):  # fmt: skip
        theirs = classify(TEXTS, **{"top_k": None, "truncation": True} | options)
        if options.get("top_k") == 1:
            theirs = [one if isinstance(one, list) else [one] for one in theirs]
        assert_same(await served(TEXTS, **options), theirs)


async def test_a_pair_scores_as_the_pipeline_does(sides: tuple[Served, Any]) -> None:
    served, classify = sides
    for second in ("", "w5 w6 w7"):
        pair: Pair = {"text": "w3 w4", "text_pair": second}
        theirs = classify([pair], top_k=None, truncation=True)
        assert_same(await served([pair]), theirs if isinstance(theirs[0], list) else [theirs])
    swapped = await served([{"text": pair["text_pair"], "text_pair": pair["text"]}])
    assert swapped != await served([pair])


async def test_scores_are_the_same_bits_alone_and_among_neighbours(sides: tuple[Served, Any]) -> None:
    served, _ = sides
    alone = [(await served([text]))[0] for text in TEXTS]
    together = await asyncio.gather(*(served([text]) for text in TEXTS * 8))
    assert [scores[0] for scores in together] == alone * 8
