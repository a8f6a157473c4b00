"""model.translator_quality: what it has the engine write is what the PyTorch model writes."""

import pytest
import torch

from model.subwords import END_ID
from model.translate import greedy, translate
from model.translator_quality import quality, served, write
from service.worker.bundle import load_bundle
from service.worker.generation.translator import TranslatorEngine
from tests.tiny_translator import SENTENCES, seeded_translator, subwords, tiny_translation_bundle

SHORT = [sentence[:10] for sentence in SENTENCES]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> TranslatorEngine:
    directory = tiny_translation_bundle(tmp_path_factory.mktemp("exact") / "bundle", precision="float32")
    return TranslatorEngine(load_bundle(directory), num_slots=len(SHORT), threads=1)


def test_each_row_stops_at_its_end_or_its_limit(engine: TranslatorEngine) -> None:
    sources = [encoding.ids for encoding in subwords().encode_batch(SHORT)]
    limits = [1, 2, 20, 20, 20, 20]
    found = write(engine, sources, limits)
    for source, limit, one in zip(sources, limits, found, strict=True):
        (expected,) = greedy(seeded_translator(), torch.tensor([source]), None)
        assert one.ids == [*expected, END_ID][: len(one.ids)]
        assert len(one.ids) == len(one.logits) == min(limit, len(expected) + 1)
    assert len({len(one.ids) for one in found}) > 2  # some end before others


@pytest.mark.parametrize("texts", [SHORT, SHORT[:1] * 3])
def test_texts_are_translated_as_by_the_model(engine: TranslatorEngine, texts: list[str]) -> None:
    model, tokenizer = seeded_translator(), subwords()

    def search(*arguments: object) -> list[list[int]]:
        return served(engine, *arguments)  # type: ignore[arg-type]

    ours = translate(model, tokenizer, texts, search=search, batch_size=len(SHORT))
    assert ours == translate(model, tokenizer, texts)


def test_quality_counts_what_is_the_same(engine: TranslatorEngine) -> None:
    pairs = [(text, text) for text in SHORT]
    measured = quality(engine, seeded_translator(), subwords(), {"tiny": pairs})["tiny"]  # type: ignore[dict-item]
    assert measured["sentences"] == len(SHORT)
    for kind in ("greedy", "5 beams"):
        assert measured[kind]["same"] == 1.0
        assert measured[kind]["bleu"] == measured[kind]["bleu_of_checkpoint"]
