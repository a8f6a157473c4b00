"""The reference beam search: against greedy, against trying everything, alone and in a batch; texts through a model."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.data import pad
from model.search import Hypothesis, beam, beam_search
from model.subwords import END_ID, START_ID, load_subwords, train_subwords
from model.transformer import EncoderDecoder
from model.translate import Search, greedy, translate
from tests.tiny_translation import CONFIG, tiny_translator
from tests.tiny_translator import seeded_translator, subwords

SOURCES = [[5, 6, 7, 8, END_ID], [9, END_ID], [10, 11, 12, END_ID]]


def log_probability(model: EncoderDecoder, source: Tensor, ids: list[int]) -> float:
    """Of the ids after the start token, from one pass with teacher forcing."""
    with torch.no_grad():
        log_p = model(source, torch.tensor([[START_ID, *ids[:-1]]]))[0].log_softmax(-1)
    return sum(log_p[at, token].item() for at, token in enumerate(ids))


def everything(vocab_size: int, max_new: int) -> list[list[int]]:
    """Each sequence that ends, and each of `max_new` tokens that does not."""
    others = [token for token in range(vocab_size) if token != END_ID]
    ended = [[*ids, END_ID] for n in range(max_new) for ids in itertools.product(others, repeat=n)]
    return ended + [list(ids) for ids in itertools.product(others, repeat=max_new)]


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 1.5])
@pytest.mark.parametrize("seed", [1, 2])
def test_a_beam_wide_enough_finds_what_trying_everything_finds(length_penalty: float, seed: int) -> None:
    model = tiny_translator(replace(CONFIG, vocab_size=5), seed=seed, sharpness=2).eval()
    source = torch.tensor([[3, 4, 4, END_ID]])
    scored = [
        (log_probability(model, source, ids) / len(ids) ** length_penalty, ids) for ids in everything(5, max_new=4)
    ]
    found = beam_search(model, source, num_beams=400, max_new=[4], length_penalty=length_penalty)[0]
    assert len(found) == len(scored) == 341
    for (score, ids), ours in zip(sorted(scored, reverse=True), found, strict=True):
        assert ours.score == pytest.approx(score, abs=1e-4)
        assert ours.ids == ids or abs(score - log_probability(model, source, ours.ids)) < 1e-4 or length_penalty


@pytest.mark.parametrize("seed", range(5))
def test_one_beam_is_greedy(seed: int) -> None:
    model = tiny_translator(seed=seed, sharpness=2).eval()
    source, mask = pad(SOURCES, 0)
    assert beam(model, source, mask, num_beams=1) == greedy(model, source, mask)


@pytest.mark.parametrize("search", [greedy, beam])
def test_a_translation_that_does_not_end_stays_within_the_model(search: Search) -> None:
    model = tiny_translator().eval()
    model.head.weight.data[END_ID] = 0
    source = torch.randint(3, 40, (1, CONFIG.max_length))
    (ids,) = search(model, source, None)
    assert len(ids) == CONFIG.max_length - 1


def test_a_text_of_more_tokens_than_the_model_reads_is_refused() -> None:
    model, tokenizer = seeded_translator(), subwords()
    text = "a" * (CONFIG.max_length - 1)
    assert len(translate(model, tokenizer, [text])) == 1
    with pytest.raises(ValueError, match=r"a text has 66 tokens, the model reads 64"):
        translate(model, tokenizer, ["b", text + "aa"])


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_scores_are_the_log_probabilities_of_the_ids(length_penalty: float) -> None:
    model = tiny_translator(sharpness=2).eval()
    source = torch.tensor([SOURCES[0]])
    found = beam_search(model, source, num_beams=3, max_new=[12], length_penalty=length_penalty)[0]
    assert len(found) == 3
    assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)
    for hypothesis in found:
        expected = log_probability(model, source, hypothesis.ids) / len(hypothesis.ids) ** length_penalty
        assert hypothesis.score == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("seed", range(6))
def test_the_best_of_the_beam_is_never_below_greedy(seed: int) -> None:
    """True of these seeds, not of every model: a beam can lose the greedy path."""
    model = tiny_translator(seed=seed, sharpness=2).eval()
    source = torch.tensor([SOURCES[0]])
    ids = [*greedy(model, source, None)[0], END_ID][:20]
    best = beam_search(model, source, num_beams=5, max_new=[20])[0][0]
    assert best.score >= log_probability(model, source, ids) / len(ids) - 1e-5


def same(one: list[Hypothesis], other: list[Hypothesis]) -> bool:
    return [h.ids for h in one] == [h.ids for h in other] and all(
        math.isclose(a.score, b.score, abs_tol=1e-5) for a, b in zip(one, other, strict=True)
    )


def test_a_source_is_searched_in_a_batch_as_alone() -> None:
    model = tiny_translator(sharpness=2).eval()
    together = beam_search(model, *pad(SOURCES, 0), num_beams=4, max_new=[15, 3, 9])
    for ids, limit, found in zip(SOURCES, (15, 3, 9), together, strict=True):
        assert same(beam_search(model, torch.tensor([ids]), num_beams=4, max_new=[limit])[0], found)


def test_a_longer_hypothesis_wins_under_a_greater_penalty() -> None:
    model = tiny_translator(replace(CONFIG, vocab_size=5), sharpness=0.3).eval()
    source = torch.tensor([[3, 4, 4, END_ID]])
    lengths = [
        len(beam_search(model, source, num_beams=400, max_new=[4], length_penalty=penalty)[0][0].ids)
        for penalty in (0.0, 3.0)
    ]
    assert lengths[0] < lengths[1]


def test_texts_come_back_in_their_order(tmp_path: Path) -> None:
    texts = ["a b c d", "a", "c d a", "", "b b"]
    train_subwords(texts, 270).save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_subwords(tmp_path / "tokenizer.json")
    model = tiny_translator(replace(CONFIG, vocab_size=tokenizer.get_vocab_size()), sharpness=2)
    together = translate(model, tokenizer, texts, batch_size=2)
    assert together == [translate(model, tokenizer, [text])[0] for text in texts]
    assert len(set(together)) > 1
    assert model.training
