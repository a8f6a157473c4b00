"""service.worker.attention.maps and views: reductions, the rollout by hand, which layers and heads are meant."""

from typing import Any

import numpy as np
import pytest

from service.domain import AttentionMap, AttentionRequest, Reduce
from service.errors import InvalidRequest, TooLarge
from service.worker.attention.maps import maps_of, rollout, shares
from service.worker.attention.views import Sizes, View, check_size, rollout_of_all, views_of


def array_of(one: AttentionMap) -> np.ndarray:
    return np.frombuffer(one.weights, "<f4").reshape(one.shape)


def layer(*rows: list[float]) -> np.ndarray:
    return np.array(rows, np.float32)[None]


def random_layers(num_layers: int = 3, num_heads: int = 4, num_tokens: int = 5) -> dict[int, np.ndarray]:
    raw = np.random.default_rng(0).random((num_layers, num_heads, num_tokens, num_tokens), np.float32)
    return dict(enumerate(raw / raw.sum(-1, keepdims=True)))


def test_a_rollout_computed_by_hand() -> None:
    """A0 = [[1, 0], [.25, .75]] and A1 = [[.75, .25], [0, 1]], so that A1 A0 is this."""
    first, second = layer([1, 0], [0.5, 0.5]), layer([0.5, 0.5], [0, 1])
    np.testing.assert_allclose(rollout([first, second]), [[0.8125, 0.1875], [0.25, 0.75]], atol=1e-7)
    np.testing.assert_allclose(rollout([second, first]), [[0.75, 0.25], [0.1875, 0.8125]], atol=1e-7)


def test_a_rollout_takes_the_mean_of_the_heads_and_makes_rows_sum_to_one() -> None:
    heads = np.concatenate([layer([1, 0], [0, 1]), layer([0, 1], [1, 0])])
    np.testing.assert_allclose(rollout([heads]), [[0.75, 0.25], [0.25, 0.75]], atol=1e-7)
    np.testing.assert_allclose(rollout([layer([0.5, 0], [0, 1])]), [[1, 0], [0, 1]], atol=1e-7)  # (.75, 0) / .75


def test_no_attention_leaves_every_token_to_itself() -> None:
    np.testing.assert_array_equal(rollout([np.eye(4, dtype=np.float32)[None]] * 6), np.eye(4))


def test_every_head_as_it_is() -> None:
    weights = random_layers()
    found = maps_of(View("encoder", (2, 0), (3, 1), "none"), weights)
    assert [(one.kind, one.layer, one.heads, one.shape) for one in found] == [
        ("encoder", 2, (3, 1), (2, 5, 5)),
        ("encoder", 0, (3, 1), (2, 5, 5)),
    ]
    for one in found:
        assert one.layer is not None
        np.testing.assert_array_equal(array_of(one), weights[one.layer][[3, 1]])
        assert len(one.weights) == 4 * 2 * 5 * 5


@pytest.mark.parametrize(("reduce", "by"), [("mean", np.mean), ("max", np.max)])
def test_reductions_are_over_the_chosen_heads(reduce: Reduce, by: Any) -> None:
    weights = random_layers()
    for heads in ((0, 1, 2, 3), (2,), (3, 0)):
        (one,) = maps_of(View("cross", (1,), heads, reduce), weights)
        assert (one.kind, one.layer, one.heads, one.shape) == ("cross", 1, None, (1, 5, 5))
        np.testing.assert_allclose(array_of(one)[0], by(weights[1][list(heads)], axis=0), atol=1e-7)


def test_a_rollout_goes_from_the_lowest_layer_up_however_they_are_named() -> None:
    weights = random_layers()
    (one,) = maps_of(View("decoder", (2, 0, 1), (0, 1, 2, 3), "rollout"), weights)
    assert (one.kind, one.layer, one.heads, one.shape) == ("decoder", None, None, (1, 5, 5))
    np.testing.assert_array_equal(array_of(one)[0], rollout([weights[0], weights[1], weights[2]]))
    np.testing.assert_allclose(array_of(one).sum(-1), 1, atol=1e-6)


def test_shares_are_those_of_the_position_that_is_read() -> None:
    rolled = AttentionMap("encoder", None, None, (1, 2, 2), np.array([1, 0, 0.5, 0.5], "<f4").tobytes())
    assert shares(rolled, "first") == [1, 0]
    assert shares(rolled, "last") == [0.5, 0.5]
    assert shares(rolled, "mean") == [0.75, 0.25]


def view(**fields: Any) -> View:
    (found,) = views_of(AttentionRequest(text="a", **fields), {"encoder": (6, 12)})
    return found


def test_what_is_meant_when_nothing_is_said() -> None:
    assert view() == View("encoder", (5,), tuple(range(12)), "none")
    assert view(reduce="rollout") == View("encoder", tuple(range(6)), tuple(range(12)), "rollout")
    assert rollout_of_all(num_layers=6, num_heads=12) == view(reduce="rollout")


def test_what_is_said_is_meant() -> None:
    assert view(layers="last", reduce="rollout").layers == (5,)
    assert view(layers="all", heads=(11, 0), reduce="max") == View("encoder", tuple(range(6)), (11, 0), "max")
    assert view(layers=(3, 1)).layers == (3, 1)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"layers": (0, 6)}, "layers: the encoder attention has 6, numbered from 0 to 5, got 6"),
        ({"heads": (12,)}, "heads: the encoder attention has 12, numbered from 0 to 11, got 12"),
    ],
)
def test_what_the_model_has_not_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        view(**fields)
    assert caught.value.param == next(iter(fields))


@pytest.mark.parametrize(
    ("fields", "num_bytes"),
    [
        ({}, 4 * 12 * 100),
        ({"layers": "all"}, 4 * 6 * 12 * 100),
        ({"layers": "all", "reduce": "mean"}, 4 * 6 * 100),
        ({"layers": "all", "reduce": "rollout"}, 4 * 100),
        ({"layers": (0, 1), "heads": (3,)}, 4 * 2 * 100),
    ],
)
def test_the_size_is_that_of_what_is_told(fields: dict[str, Any], num_bytes: int) -> None:
    asked = view(**fields)
    assert asked.num_bytes((10, 10)) == num_bytes
    check_size([asked], {"encoder": (10, 10)}, num_bytes)
    with pytest.raises(TooLarge, match=f"have {num_bytes} bytes .* 10 x 10 tokens.*, the limit is {num_bytes - 1}"):
        check_size([asked], {"encoder": (10, 10)}, num_bytes - 1)
    told = maps_of(asked, {at: weights.repeat(3, 0) for at, weights in random_layers(6, 4, 10).items()})
    assert sum(len(one.weights) for one in told) == num_bytes


TRANSLATOR: Sizes = {"encoder": (6, 4), "decoder": (2, 4), "cross": (2, 4)}


def views(**fields: Any) -> list[tuple[str, tuple[int, ...]]]:
    found = views_of(AttentionRequest(text="a", **fields), TRANSLATOR)
    return [(one.kind, one.layers) for one in found]


def test_each_kind_has_layers_of_its_own() -> None:
    assert views() == [("encoder", (5,)), ("decoder", (1,)), ("cross", (1,))]
    assert views(layers="all", kind="decoder") == [("decoder", (0, 1))]
    assert views(layers=(5,), kind="encoder") == [("encoder", (5,))]
    with pytest.raises(InvalidRequest, match="layers: the decoder attention has 2, numbered from 0 to 1, got 5"):
        views(layers=(5,))


def test_a_rollout_follows_every_kind_but_cross_attention() -> None:
    assert views(reduce="rollout") == [("encoder", tuple(range(6))), ("decoder", (0, 1))]
    with pytest.raises(ValueError, match="rollout does not go with kind cross"):
        views(reduce="rollout", kind="cross")


def test_the_sizes_of_all_kinds_count_together() -> None:
    asked = views_of(AttentionRequest(text="a"), TRANSLATOR)
    shapes = {"encoder": (10, 10), "decoder": (7, 7), "cross": (7, 10)}
    num_bytes = 4 * 4 * (100 + 49 + 70)
    check_size(asked, shapes, num_bytes)
    with pytest.raises(TooLarge, match=f"have {num_bytes} bytes .*; cross: 1 layers, 4 heads, 7 x 10 tokens"):
        check_size(asked, shapes, num_bytes - 1)
