import inspect
import re

import pytest

from service import errors
from service.errors import AttndError, Overloaded, Unavailable

CLASSES = [
    value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, AttndError)
]  # a new one is tested without being named here
LEAVES = [value for value in CLASSES if value is not AttndError]


def test_the_tree_in_the_docstring_is_the_tree():
    drawn = re.findall(r"[|`]-- (\w+)  ", errors.__doc__ or "")
    assert drawn == [leaf.__name__ for leaf in LEAVES]


def test_every_error_is_one_step_below_the_root():
    assert {leaf.__bases__ for leaf in LEAVES} == {(AttndError,)}


def test_codes_are_stable_words_and_distinct():
    codes = [error.code for error in CLASSES]
    assert len(set(codes)) == len(codes)
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*", code) for code in codes)


@pytest.mark.parametrize("error_class", CLASSES)
def test_an_error_carries_message_param_and_code(error_class):
    plain = error_class("too many: 3 of 2")
    assert (plain.message, str(plain), plain.param, plain.code) == (
        "too many: 3 of 2", "too many: 3 of 2", None, error_class.code,
    )  # fmt: skip
    special = error_class("no", param="input.0", code="special")
    assert (special.param, special.code) == ("input.0", "special")
    assert error_class("again").code == error_class.code  # one error's code does not stick to its class


@pytest.mark.parametrize("error_class", [Overloaded, Unavailable])
def test_what_passes_says_when_to_come_back(error_class):
    assert error_class("later").retry_after_s > 0
    assert error_class("later", retry_after_s=0.25).retry_after_s == 0.25
