"""The bundles that are shipped: what their manifests promise, and a few texts that must come out right."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from generations import collect

from service.config import Settings
from service.domain import TextInput
from service.metrics import Metrics
from service.worker.bundle import load_bundle
from service.worker.classification.engine import ClassificationEngine, Tokens
from service.worker.load import load_models
from service.worker.local import LocalBackend
from service.worker.tokenizer import Tokenizer

ZOO = Path(__file__).parents[1] / "model" / "zoo"
PIPELINE_DEFAULT = 0.9106  # accuracy on SST-2's dev set of the default model of pipeline("sentiment-analysis")


def manifest(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ZOO / name / "manifest.json").read_text())
    return found


def test_sentiment_is_verified_and_better_than_the_pipeline_s_default() -> None:
    promised = manifest("sentiment")
    quality = promised["quality"]
    assert promised["verification"]["passed"]
    assert quality["accuracy"] > PIPELINE_DEFAULT
    assert abs(quality["accuracy"] - quality["accuracy_of_checkpoint"]) <= 0.003


def test_translation_is_verified_in_both_precisions_and_loses_little_in_int8() -> None:
    promised = manifest("translation")
    assert all(promised["verification"][precision]["passed"] for precision in ("float32", "int8"))
    for scores in promised["quality"]["bleu"].values():
        for search in ("greedy", "5 beams"):
            assert min(scores[search]["bleu"], scores[search]["bleu_of_checkpoint"]) > 40
            assert scores[search]["bleu_of_checkpoint"] - scores[search]["bleu"] <= 0.3


SENTIMENTS = {
    "a gripping, funny film": "POSITIVE",
    "two hours of my life gone": "NEGATIVE",
    "one of the best performances of the year , warm and wise .": "POSITIVE",
    "the plot is a mess and nobody in it can act .": "NEGATIVE",
    "not bad at all": "POSITIVE",
}


def test_sentiment_is_right_on_plain_sentences_and_the_same_bits_alone_and_among_others() -> None:
    bundle = load_bundle(ZOO / "sentiment")
    engine, tokenizer = ClassificationEngine(bundle), Tokenizer(bundle.tokenizer_path, 512)
    texts = [*SENTIMENTS, *(f"{text} {'and more of it ' * at}" for at, text in enumerate(SENTIMENTS))]
    encoded = tokenizer.encode([TextInput(text) for text in texts], truncate=True)
    tokens = [Tokens(one.ids, one.type_ids) for one in encoded]
    alone = np.concatenate([engine.logits([one]) for one in tokens])
    assert [engine.labels[at] for at in alone.argmax(-1)[: len(SENTIMENTS)]] == list(SENTIMENTS.values())
    for order in (range(len(tokens)), random.Random(0).sample(range(len(tokens)), len(tokens) // 2)):
        assert np.array_equal(engine.logits([tokens[at] for at in order]), alone[list(order)])


TRANSLATIONS = {
    "A dog runs through the snow.": ("Ein Hund", "Schnee"),
    "Two children are playing in the garden.": ("Zwei Kinder", "Garten"),
    "I don't know where he is.": ("Ich weiß nicht", "wo er ist"),
    "The train is late again.": ("Der Zug", "spät"),
}


async def test_translation_is_right_on_plain_sentences() -> None:
    metrics = Metrics((1.0,), {})
    settings = Settings(models=("translation",), threads=1)
    backend = LocalBackend(lambda: load_models(settings, metrics), drain_timeout_s=5.0)
    await backend.start()
    try:
        for num_beams in (1, 4):
            found = await collect(backend, prompt=list(TRANSLATIONS), num_beams=num_beams, max_tokens=40)
            for at, words in enumerate(TRANSLATIONS.values()):
                assert all(word in found.text(at) for word in words), found.text(at)
    finally:
        await backend.aclose()
