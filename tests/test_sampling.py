"""generation.sampling: the definitions of the field, against transformers' processors and exact distributions."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from service.domain import GenerateRequest
from service.errors import EngineFailed, InvalidRequest
from service.worker.generation.sampling import (
    Sampler,
    candidates,
    check_ids,
    drawn,
    likeliest,
    log_sums,
    logprobs,
    nucleus,
)

Logits = NDArray[np.float32]
VOCABULARY = 3000
PROMPT = [5, 17, 17, 2999]


def random_logits(seed: int, *, size: int = VOCABULARY, scale: float = 3.0) -> Logits:
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32) * np.float32(scale)


def sampler(
    *, temperature: float = 1.0, seed: int = 0, end_ids: tuple[int, ...] = (0,), size: int = VOCABULARY, **fields: Any
) -> Sampler:
    return Sampler(
        GenerateRequest(prompt="x", **fields),
        temperature=temperature,
        seed=seed,
        prompt_ids=PROMPT if size > max(PROMPT) else [],
        end_ids=end_ids,
        vocab_size=size,
    )


def probabilities(logits: Logits, **options: Any) -> NDArray[np.float64]:
    """What `candidates` makes of them, as a distribution over the vocabulary."""
    ids, weights = candidates(logits, **options)
    found = np.zeros(len(logits))
    found[np.arange(len(logits)) if ids is None else ids] = weights
    return found / found.sum()


# --- the likeliest


def test_greedy_takes_the_likeliest_and_of_equals_the_lowest() -> None:
    logits = random_logits(0)
    assert sampler(temperature=0).sample(logits) == int(logits.argmax())
    logits[[70, 20, 2000]] = 50
    for temperature in (0, 1e-9, 1e-6):
        assert sampler(temperature=temperature).sample(logits) == 20


@pytest.mark.parametrize("count", [1, 2, 20, 46, 47, 1000, 3000])
@pytest.mark.parametrize("size", [3000, 3008])
def test_the_likeliest_are_those_of_a_stable_sort(count: int, size: int) -> None:
    different = random_logits(count, size=size)
    for logits in (different, np.round(different)):  # full of equals
        expected = np.argsort(-logits, kind="stable")[:count]
        assert likeliest(logits, count).tolist() == sorted(expected.tolist())


# --- which tokens may be drawn, and how likely each is


def warped(logits: Logits, options: dict[str, Any]) -> NDArray[np.float64]:
    """What transformers makes of them, in the same order."""
    torch = pytest.importorskip("torch")
    warpers = pytest.importorskip("transformers.generation.logits_process")
    scores = torch.from_numpy(logits)[None].double() / options["temperature"]
    for name, warper in (
        ("top_k", warpers.TopKLogitsWarper),
        ("top_p", warpers.TopPLogitsWarper),
        ("min_p", warpers.MinPLogitsWarper),
    ):
        if name in options:
            scores = warper(options[name])(None, scores)
    return scores.softmax(-1)[0].numpy()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 1},
        {"top_k": 50},
        {"top_k": 2999},
        {"top_p": 0.1},
        {"top_p": 0.9},
        {"top_p": 0.999},
        {"min_p": 0.05},
        {"min_p": 1.0},
        {"top_k": 40, "top_p": 0.8},
        {"top_k": 500, "min_p": 0.1},
        {"top_p": 0.95, "min_p": 0.02},
        {"top_k": 60, "top_p": 0.9, "min_p": 0.03},
    ],
    ids=str,
)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_filters_are_those_of_transformers(options: dict[str, Any], temperature: float) -> None:
    for seed in range(3):
        logits = random_logits(seed)
        everything = {"temperature": temperature} | options
        expected, found = warped(logits, everything), probabilities(logits, **everything)
        np.testing.assert_array_equal(found > 0, expected > 0)
        np.testing.assert_allclose(found, expected, rtol=2e-5)


def test_top_p_keeps_the_fewest_tokens_that_reach_it() -> None:
    """By the definition, at every size of vocabulary and shape of distribution, also where equals abound."""
    for seed in range(40):
        draw = np.random.default_rng(seed)
        logits = random_logits(
            seed, size=int(draw.integers(1, 5000)), scale=float(draw.choice([0.0, 0.01, 0.5, 3, 20]))
        )
        logits = np.round(logits * 4) / 4 if seed % 2 else logits
        weights = np.exp(logits - logits.max())
        top_p = float(draw.choice([1e-9, 0.2, 0.5, 0.9, 0.99999, 1 - 1e-12]))
        order = np.argsort(-weights, kind="stable")
        sums = weights[order].cumsum(dtype=np.float64)
        found = nucleus(weights, top_p)
        count = len(found)
        assert set(found.tolist()) == set(order[:count].tolist())
        assert sums[count - 1] >= top_p * sums[-1] * (1 - 1e-12)
        assert count == 1 or sums[count - 2] <= top_p * sums[-1] * (1 + 1e-12)


def test_among_equals_filters_keep_the_lowest_ids() -> None:
    logits = np.zeros(1000, np.float32)
    assert np.flatnonzero(probabilities(logits, temperature=1.0, top_k=7)).tolist() == list(range(7))
    assert np.flatnonzero(probabilities(logits, temperature=1.0, top_p=0.25)).tolist() == list(range(250))


def test_min_p_1_keeps_what_is_as_likely_as_the_likeliest() -> None:
    logits = np.array([1, 3, 2, 3, 0], np.float32)
    assert probabilities(logits, temperature=0.7, min_p=1.0).tolist() == [0, 0.5, 0, 0.5, 0]


# --- bias, penalties, bans


def adjusted(logits: Logits, fields: dict[str, Any], drawn: list[int], end_ids: tuple[int, ...] = (0,)) -> Logits:
    """What the sampler draws from, after it has drawn `drawn`."""
    one = sampler(end_ids=end_ids, temperature=0, **fields)
    for token in drawn:
        forced = np.full(VOCABULARY, -1e6, np.float32)
        forced[token] = 1e6
        assert one.sample(forced) == token
    before = logits.copy()
    found = one._adjusted(logits)
    np.testing.assert_array_equal(logits, before)
    return found


@pytest.mark.parametrize("penalty", [0.5, 1.3])
def test_the_repetition_penalty_is_that_of_transformers_over_prompt_and_output(penalty: float) -> None:
    torch = pytest.importorskip("torch")
    processors = pytest.importorskip("transformers.generation.logits_process")
    logits, output = random_logits(1), [8, 8, 1234]
    processor = processors.RepetitionPenaltyLogitsProcessor(penalty=penalty)
    expected = processor(torch.tensor([PROMPT + output]), torch.from_numpy(logits)[None].clone())[0].numpy()
    np.testing.assert_array_equal(adjusted(logits, {"repetition_penalty": penalty}, output), expected)


def test_presence_and_frequency_count_the_output_only() -> None:
    logits = random_logits(2)
    found = adjusted(logits, {"presence_penalty": 0.5, "frequency_penalty": -0.25}, [7, 9, 7, 7])
    expected = logits.copy()
    expected[7] -= np.float32(3 * -0.25 + 0.5)
    expected[9] -= np.float32(-0.25 + 0.5)
    np.testing.assert_array_equal(found, expected)


def test_bias_comes_before_the_penalties() -> None:
    torch = pytest.importorskip("torch")
    processors = pytest.importorskip("transformers.generation.logits_process")
    logits = random_logits(3)
    bias = {17: 100.0, 5: -100.0, 42: 1.5}
    biased = processors.SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()])
    scores = biased(torch.tensor([[1]]), torch.from_numpy(logits)[None].clone())
    repeated = processors.RepetitionPenaltyLogitsProcessor(penalty=1.5)
    expected = repeated(torch.tensor([[*PROMPT, 42]]), scores)[0].numpy()
    expected[42] -= 0.5
    fields = {"logit_bias": bias, "repetition_penalty": 1.5, "presence_penalty": 0.5}
    np.testing.assert_allclose(adjusted(logits, fields, [42]), expected, rtol=1e-6)


def test_end_and_stop_tokens_are_banned_until_there_are_min_tokens() -> None:
    logits = np.arange(10, dtype=np.float32)  # 9 is the likeliest, then 8, 7
    one = sampler(temperature=0, min_tokens=2, end_ids=(9,), stop_token_ids=[8], size=10)
    assert [one.sample(logits) for _ in range(4)] == [7, 7, 9, 9]
    other = sampler(temperature=2.0, min_tokens=256, end_ids=(9,), size=10)
    assert 9 not in {other.sample(logits) for _ in range(256)}


def test_no_option_changes_the_logits_in_place() -> None:
    logits = random_logits(4)
    before = logits.copy()
    fields = {"logit_bias": {1: 3.0}, "repetition_penalty": 1.2, "presence_penalty": 1.0, "min_tokens": 5}
    one = sampler(temperature=0.8, top_k=30, top_p=0.9, min_p=0.01, **fields)
    for _ in range(5):
        one.sample(logits)
    np.testing.assert_array_equal(logits, before)


# --- drawing


def test_draws_are_as_frequent_as_the_distribution_says() -> None:
    """Chi-squared with 49 degrees of freedom: over 94.1 once in 10,000 times for a right sampler; the seed is fixed."""
    logits = random_logits(5, size=1200, scale=1.0)
    options = {"top_k": 60, "top_p": 0.97}
    expected = probabilities(logits, temperature=0.9, **options)
    one = sampler(temperature=0.9, seed=3, size=1200, **options)
    num_draws = 8_000
    counts = np.bincount([one.sample(logits) for _ in range(num_draws)], minlength=1200)
    kept = expected > 0
    assert counts[~kept].sum() == 0
    assert 45 <= kept.sum() <= 60
    assert ((counts - num_draws * expected)[kept] ** 2 / (num_draws * expected[kept])).sum() < 94.1


def test_a_draw_is_the_inverse_of_the_running_sum() -> None:
    weights = np.random.default_rng(6).random(1000) * (np.arange(1000) % 3 > 0)
    sums = weights.cumsum()
    for uniform in np.random.default_rng(7).random(300):
        assert drawn(weights, float(uniform)) == sums.searchsorted(uniform * sums[-1], side="right")


def test_a_weight_of_zero_is_never_drawn() -> None:
    for weights in ([0, 1, 0], [0] * 300 + [1] + [0] * 300, [1] + [0] * 299, [0] * 256 + [0.1, 0]):
        for uniform in (0.0, 0.5, 1 - 2**-53):
            assert weights[drawn(np.array(weights, np.float64), uniform)] > 0


def test_the_same_seed_draws_the_same_tokens_and_another_seed_others() -> None:
    steps = [random_logits(seed, scale=1.0) for seed in range(20)]

    def text(seed: int) -> list[int]:
        one = sampler(seed=seed, top_p=0.99)
        return [one.sample(logits) for logits in steps]

    assert text(11) == text(11)
    assert len({tuple(text(seed)) for seed in (11, 12, -11, 2**63 - 1, -(2**63))}) == 5


def test_samplers_do_not_share_a_stream() -> None:
    logits = random_logits(8, scale=1.0)
    alone, among, other = sampler(seed=1), sampler(seed=1), sampler(seed=2)
    expected = [alone.sample(logits) for _ in range(20)]
    found = []
    for _ in range(20):
        other.sample(logits)
        found.append(among.sample(logits))
    assert found == expected


# --- refusals


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("fields", [{"temperature": 0}, {"temperature": 1}, {"logit_bias": {1234: -100.0}}])
def test_logits_that_are_not_finite_are_the_engine_s_failure(value: float, fields: dict[str, Any]) -> None:
    logits = random_logits(9)
    logits[1234] = value
    with pytest.raises(EngineFailed, match="not finite"):
        sampler(**fields).sample(logits)


def test_an_impossible_token_is_no_failure_unless_all_are() -> None:
    logits = np.full(3000, -np.inf, np.float32)
    for temperature in (0, 1):
        with pytest.raises(EngineFailed, match="not finite"):
            sampler(temperature=temperature).sample(logits)
    logits[7] = -3.0
    assert [sampler(temperature=temperature).sample(logits) for temperature in (0, 1)] == [7, 7]


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"logit_bias": {1: 1.0, 3000: 1.0}}, "logit_bias"), ({"stop_token_ids": [3000]}, "stop_token_ids")],
)
def test_a_token_outside_of_the_vocabulary_is_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest, match=f"{param}: token ids are below 3000, got 3000") as caught:
        sampler(**fields)
    assert caught.value.param == param


def test_check_ids_names_the_first_wrong_one() -> None:
    check_ids([0, 9], 10, "prompt")
    with pytest.raises(InvalidRequest, match="prompt: token ids are below 10, got 10"):
        check_ids([3, 10, 11], 10, "prompt")


# --- log-probabilities


def test_logprobs_are_those_of_log_softmax() -> None:
    logits = random_logits(10)
    exact = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum())
    chosen, top = logprobs(logits, 77, 20)
    assert chosen == pytest.approx(exact[77], abs=1e-6)
    assert [token for token, _ in top] == np.argsort(-logits, kind="stable")[:20].tolist()
    np.testing.assert_allclose([value for _, value in top], np.sort(exact)[::-1][:20], atol=1e-6)
    assert logprobs(logits, 77, 0) == (chosen, [])


def test_logprobs_of_equals_stand_in_the_order_of_ids() -> None:
    logits = np.zeros(100, np.float32)
    logits[[90, 30]] = 1
    assert [token for token, _ in logprobs(logits, 0, 4)[1]] == [30, 90, 0, 1]


def test_logprobs_never_exceed_0_and_are_the_same_bits_wherever_the_row_lies() -> None:
    certain = np.full(1000, -100, np.float32)
    certain[3] = 100
    assert logprobs(certain, 3, 1) == (0.0, [(3, 0.0)])
    row = random_logits(11, size=1001)
    places = np.zeros((3, 1001), np.float32)
    places[:] = row
    assert len({logprobs(place, 5, 0)[0] for place in (row, *places)}) == 1


@pytest.mark.parametrize("size", [2, 77, 1001, 8000, 8193, 50257])
def test_the_log_sum_of_a_row_is_the_same_bits_alone_and_in_any_block(size: int) -> None:
    row = random_logits(12, size=size)
    alone = log_sums(row)
    assert alone == pytest.approx(np.log(np.exp(row.astype(np.float64)).sum()), abs=1e-6)
    for num_rows in (1, 2, 5, 16):
        for place in range(num_rows):
            block = random_logits(place, size=num_rows * size, scale=9.0).reshape(num_rows, size)
            block[place] = row
            assert log_sums(block)[place] == alone


@pytest.mark.parametrize(("first", "value"), [(999, np.nan), (999, np.inf), (0, -np.inf)])
def test_a_row_without_a_finite_greatest_has_no_log_sum(first: int, value: float) -> None:
    block = random_logits(13).reshape(3, 1000)
    block[1, first:] = value
    with pytest.raises(EngineFailed, match="not finite"):
        log_sums(block)
