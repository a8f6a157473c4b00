"""The engine's beam search against the reference in PyTorch, and by itself: rows, ends, and what is told."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from generations import call, collect, in_threads, serving
from tiny_translation import CONFIG, tiny_translator
from tiny_translator import seeded_translator, tiny_translation_bundle

from model.data import pad
from model.search import beam_search
from model.subwords import END_ID, PAD_ID, START_ID
from model.transformer import EncoderDecoder
from model.translate import greedy, until_end
from service.domain import TokenLogprob
from service.errors import EngineFailed
from service.metrics import Metrics
from service.worker.bundle import load_bundle
from service.worker.generation.beam_search import Beam, BeamSearch, Rated, placed
from service.worker.generation.generator import Generator
from service.worker.generation.likeliest import Likeliest
from service.worker.generation.scheduler import slots_for
from service.worker.generation.translator import TranslatorEngine

Rows = list[list[int]]  # what each row has read
Model = Callable[[Rows], Sequence[np.ndarray]]  # (vocabulary,) of each


likeliest = cache(Likeliest)


def make_search(num_beams: int, **options: Any) -> BeamSearch:
    neutral = {"end_ids": (END_ID,), "min_tokens": 0, "max_tokens": 20, "length_penalty": 1.0}
    return BeamSearch(num_beams=num_beams, **{**neutral, "describe": lambda logits, token: None, **options})


def step(search: BeamSearch, logits: Sequence[np.ndarray], *, more: int = 0) -> None:
    """A step with `more` likely tokens of each row than it asked for."""
    search.step(list(map(Rated, logits, likeliest().of(np.array(logits), search.num_likely + more))))


def run(search: BeamSearch, model: Model, *, more: int = 0) -> list[tuple[list[int], float]]:
    """Ids and score of what it finds. Rows are copied as an engine would: from rows that stay what they are."""
    rows: Rows = [[]] * search._num_beams
    while True:
        step(search, model(rows), more=more)
        if search.is_finished:
            return [([token for token, _ in beam.written], search.score(beam)) for beam in search.best]
        for parent, _ in search.continuations:
            assert search.continuations[parent][0] == parent
        rows = [[*rows[parent], token] for parent, token in search.continuations]


def translating(model: EncoderDecoder, source: Sequence[int]) -> Model:
    """The logits of `model`, without a cache."""

    @torch.no_grad()
    def logits(rows: Rows) -> Sequence[np.ndarray]:
        targets = torch.tensor([[START_ID, *row] for row in rows])
        found: np.ndarray = model(torch.tensor([source]).expand(len(rows), -1), targets)[:, -1].numpy()
        return found

    return logits


def table(*rows: Sequence[float]) -> Model:
    """The same probabilities in every row: those of the n-th token are rows[n], of the later ones the last's."""
    return lambda read: [np.log(np.array(rows[min(len(own), len(rows) - 1)], np.float32)) for own in read]


def certain(token: int) -> np.ndarray:
    """Logits of four tokens, of which one is possible."""
    return np.where(np.arange(4) == token, 0, -np.inf).astype(np.float32)


def agree(found: list[tuple[list[int], float]], expected: list[Any]) -> None:
    assert [ids for ids, _ in found] == [hypothesis.ids for hypothesis in expected]
    assert [score for _, score in found] == pytest.approx([one.score for one in expected], abs=1e-5)


@pytest.mark.parametrize("seed", range(100))
def test_it_finds_what_the_reference_finds(seed: int) -> None:
    draw = random.Random(seed)
    model = tiny_translator(seed=seed % 7, sharpness=draw.choice([1.0, 2.0])).eval()
    source = [*(draw.randrange(3, CONFIG.vocab_size) for _ in range(draw.randrange(1, 12))), END_ID]
    num_beams, limit, penalty = draw.choice([1, 2, 4, 5]), draw.randrange(1, 25), draw.choice([0.0, 1.0, 1.4])
    search = make_search(num_beams, max_tokens=limit, length_penalty=penalty)
    expected = beam_search(model, torch.tensor([source]), num_beams=num_beams, max_new=[limit], length_penalty=penalty)
    agree(run(search, translating(model, source)), expected[0])


@pytest.mark.parametrize("num_written", [300, 200])
async def test_a_hundred_sources_through_the_engine_get_what_the_reference_finds(
    tmp_path: Path, num_written: int
) -> None:
    """In one request, so that searches of all lengths share the rows."""
    draw = random.Random(0)
    sources = [[*draw.choices(range(3, 300), k=draw.randrange(1, 20)), END_ID] for _ in range(100)]
    model, options = seeded_translator(), {"num_beams": 4, "length_penalty": 0.8}
    directory = tiny_translation_bundle(tmp_path / "tiny", precision="float32", num_written=num_written)
    backend = await serving(make_translator(directory))
    found = await collect(backend, call(300), prompt=sources, max_tokens=12, **options)
    await backend.aclose()
    padded, limits = pad(sources, PAD_ID), [12] * len(sources)
    expected = beam_search(model, *padded, max_new=limits, num_written=num_written, **options)
    assert [found.ids(at) for at in range(len(sources))] == [until_end(best.ids) for best, *_ in expected]
    scores = [found.finish(at).score for at in range(len(sources))]
    assert scores == pytest.approx([best.score for best, *_ in expected], abs=1e-4)


def make_translator(directory: Path) -> Generator:
    bundle = load_bundle(directory)
    engine = TranslatorEngine(bundle, num_slots=slots_for(16), threads=1)
    return in_threads(bundle, [engine], Metrics((1.0,), {}), max_rows=16, max_waiting=400)


@pytest.mark.parametrize("seed", [1, 2])
def test_it_does_with_fewer_tokens_than_beams(seed: int) -> None:
    model = tiny_translator(replace(CONFIG, vocab_size=5), seed=seed, sharpness=2).eval()
    source = [3, 4, 4, END_ID]
    expected = beam_search(model, torch.tensor([source]), num_beams=200, max_new=[4])
    agree(run(make_search(200, max_tokens=4), translating(model, source)), expected[0])


@pytest.mark.parametrize("seed", range(5))
def test_one_beam_is_greedy(seed: int) -> None:
    model = tiny_translator(seed=seed, sharpness=2).eval()
    source = [5, 6, 7, 8, END_ID]
    (written,) = greedy(model, torch.tensor([source]), None)
    ((ids, _),) = run(make_search(1, max_tokens=len(written) + 1), translating(model, source))
    assert ids[: len(written)] == written


def test_the_first_child_of_a_beam_stays_and_the_others_take_rows_left_over() -> None:
    beams = [Beam(parent=parent, total=float(-at)) for at, parent in enumerate([2, 2, 0, 2])]
    assert placed(beams, 5) == [beams[2], beams[1], beams[0], beams[3], None]


def test_only_what_ends_among_the_first_k_is_finished() -> None:
    search = make_search(2, length_penalty=0.0)
    step(search, table([0.1, 0.3, 0.2, 0.4])([[], []]))  # the end, token 2, is the third
    assert search.best == []
    step(search, table([0.1, 0.3, 0.5, 0.1])([[3], [1]]))  # 3 2 and 1 2 are the first and the second
    assert [[token for token, _ in beam.written] for beam in search.best] == [[3, END_ID], [1, END_ID]]
    assert search.is_finished


def test_any_of_several_ends_ends_it() -> None:
    found = run(make_search(2, end_ids=(0, END_ID), length_penalty=0.0), table([0.35, 0.2, 0.4, 0.05]))
    assert [ids for ids, _ in found] == [[END_ID], [0]]
    assert [score for _, score in found] == pytest.approx(np.log([0.4, 0.35]))


def test_no_end_comes_before_min_tokens() -> None:
    found = run(make_search(2, end_ids=(0, END_ID), min_tokens=2), table([0.35, 0.2, 0.4, 0.05]))
    assert {len(ids) for ids, _ in found} == {3}
    assert all(not {0, END_ID} & {*ids[:2]} for ids, _ in found)


def test_without_an_end_it_goes_to_its_limit() -> None:
    found = run(make_search(3, end_ids=(), max_tokens=3), table([0.1, 0.2, 0.6, 0.1]))
    assert found[0][0] == [2, 2, 2]
    assert {len(ids) for ids, _ in found} == {3}


def test_the_likeliest_of_equals_is_the_lowest_token_of_the_first_row() -> None:
    found = run(make_search(3, end_ids=(), max_tokens=2), table([0.25] * 4))
    assert [ids for ids, _ in found] == [[0, 0], [0, 1], [0, 2]]


def test_tokens_are_described_from_the_logits_that_they_were_chosen_by() -> None:
    def describe(logits: np.ndarray, token: int) -> TokenLogprob:
        return TokenLogprob(token, "", b"", round(float(np.exp(logits[token])), 3))

    search = make_search(2, end_ids=(), max_tokens=2, describe=describe)
    run(search, table([0.1, 0.2, 0.6, 0.1], [0.5, 0.3, 0.15, 0.05]))
    told = [[(token, told.logprob) for token, told in beam.written if told] for beam in search.best]
    assert told == [[(2, 0.6), (0, 0.5)], [(2, 0.6), (1, 0.3)]]


def test_there_are_enough_that_live_whatever_else_ends() -> None:
    search = make_search(2, end_ids=(0, 1))
    step(search, table([0.1, 0.1, 0.5, 0.3])([[], []]))  # 2, 3
    step(search, [np.log(np.array(row, np.float32)) for row in ([0.32, 0.32, 0.34, 0.02], [0.49, 0.49, 0.01, 0.01])])
    assert search.continuations == [(0, 2), (0, 3)]  # the first and the sixth; between them all four that end
    assert [[token for token, _ in beam.written] for beam in search.best] == [[2, 0]]


@pytest.mark.parametrize("num_beams", [2, 3])
def test_more_likely_tokens_than_it_asked_for_change_nothing(num_beams: int) -> None:
    """They are there when a wider search runs beside it."""
    random = np.random.default_rng(num_beams)
    model = table(*random.dirichlet([0.5] * 12, size=6))
    alone, beside = (run(make_search(num_beams, max_tokens=8), model, more=more) for more in (0, 5))
    assert alone == beside


def test_what_is_impossible_is_never_written() -> None:
    search = make_search(3, length_penalty=0.0)
    step(search, [certain(1)] * 3)
    assert search.continuations == [(0, 1), (1, 0), (2, 0)]  # one lives
    step(search, [certain(END_ID)] * 3)
    assert search.is_finished  # none lives
    assert [([token for token, _ in beam.written], beam.total) for beam in search.best] == [([1, END_ID], 0.0)]


def test_a_beam_goes_on_from_the_row_where_it_lives() -> None:
    search = make_search(2)
    step(search, table([0.1, 0.5, 0.1, 0.3])([[], []]))
    step(search, [certain(END_ID), certain(0)])
    assert search.continuations == [(0, 0), (1, 0)]  # the beam of row 0 has ended
    step(search, table([0.1, 0.5, 0.1, 0.3])([[], []]))
    assert search.continuations == [(1, 3), (1, 1)]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("row", [0, 1])
def test_what_is_not_finite_fails(value: float, row: int) -> None:
    search = make_search(2)
    step(search, table([0.4, 0.3, 0.1, 0.2])([[], []]))
    logits = np.zeros((2, 4), np.float32)
    logits[row, 3] = value
    with pytest.raises(EngineFailed):
        step(search, logits)
