import json

import pytest
from pydantic import TypeAdapter, ValidationError

from service.domain import ClassifyRequest, GenerateRequest, TextInput
from service.errors import InvalidRequest
from service.validation import invalid

ADAPTER = TypeAdapter(ClassifyRequest)


def error_of(body: str | bytes) -> InvalidRequest:
    with pytest.raises(ValidationError) as caught:
        ADAPTER.validate_json(body)
    return invalid(caught.value)


def error_for(**fields: object) -> InvalidRequest:
    return error_of(json.dumps(fields))


@pytest.mark.parametrize("body", ["", "{", "[", "nul", '{"input": "a"', b'{"input": "\xff"}', '{"input": "\\ud800"}'])
def test_what_is_not_json_says_so(body):
    error = error_of(body)
    assert error.code == "invalid_json"
    assert error.param is None
    assert error.message.startswith("the body is not valid JSON: ")
    assert "Invalid JSON" not in error.message


@pytest.mark.parametrize("body", ["[]", "1", "null", '"text"'])
def test_json_that_is_no_object_names_the_body(body):
    error = error_of(body)
    assert error.param is None
    assert error.message.startswith("the body: ")
    assert error.code == "invalid_request"


def test_a_missing_field_is_named():
    error = error_for(model="sentiment")
    assert error.param == "input"
    assert error.message.startswith("input: ")
    assert "sentiment" not in error.message  # the whole body is no field's value


def test_an_unknown_field_is_named_without_its_value():
    error = error_for(input="a", topk=3)
    assert error.param == "topk"
    assert "got" not in error.message


@pytest.mark.parametrize(
    ("fields", "param", "limit", "value"),
    [
        ({"input": "a", "top_k": 0}, "top_k", "greater than or equal to 1", "got 0"),
        ({"input": "a", "top_k": "3"}, "top_k", "valid integer", "got '3'"),
        ({"input": "a", "top_k": True}, "top_k", "valid integer", "got True"),
        ({"input": "a", "model": ""}, "model", "at least 1 character", "got ''"),
        ({"input": "a", "truncate": "yes"}, "truncate", "valid boolean", "got 'yes'"),
        ({"input": "a", "function_to_apply": "relu"}, "function_to_apply", "'softmax', 'sigmoid' or 'none'", "'relu'"),
        ({"input": 7}, "input", "expected a string", "got 7"),
        ({"input": None}, "input", "expected a string", "got None"),
        ({"input": ["a", 7]}, "input.1", "", "got 7"),
        ({"input": ["a", {"text": 7}]}, "input.1.text", "valid string", "got 7"),
        ({"input": {"text": "a", "text_pair": 7}}, "input.text_pair", "valid string", "got 7"),
        ({"input": {"text_pair": "b"}}, "input.text", "required", ""),
        ({"input": [["a", "b"]]}, "input.0", "", "got ['a', 'b']"),
    ],
)
def test_the_message_names_path_limit_and_value(fields, param, limit, value):
    error = error_for(**fields)
    assert error.param == param
    assert error.message.startswith(param + ": ")
    assert limit in error.message
    assert value in error.message


def test_the_reason_reads_on_after_the_colon():
    assert error_for(input="a", top_k=0).message == "top_k: input should be greater than or equal to 1, got 0"


def test_a_long_value_is_cut():
    error = error_for(input="a", model="m" * 10_000)
    assert len(error.message) < 200
    assert error.message.endswith("...")


@pytest.mark.parametrize(("wrong", "more"), [(1, ""), (2, "(1 more problem)"), (4, "(3 more problems)")])
def test_the_first_failure_is_said_and_the_others_counted(wrong, more):
    bad = {"model": 1, "top_k": 0, "truncate": 0, "function_to_apply": 0}
    error = error_for(input="a", **dict(list(bad.items())[:wrong]))
    assert error.param == "model"
    assert error.message.endswith(more)
    assert ("more problem" in error.message) is bool(more)


@pytest.mark.parametrize("field", ["prompt", "messages"])
def test_an_empty_list_is_told_so(field):
    assert error_for(input=[]).message == "input: at least one is needed, got none"
    with pytest.raises(ValidationError) as caught:
        GenerateRequest(**{field: ()})
    assert invalid(caught.value).message == f"{field}: at least one is needed, got none"


def test_a_list_with_one_bad_input_is_one_problem():
    assert "more problem" not in error_for(input=[7]).message


def test_thousands_of_bad_inputs_are_one_failure():
    with pytest.raises(ValidationError) as caught:
        ADAPTER.validate_json('{"input": [' + ",".join(["1"] * 10_000) + "]}")
    assert caught.value.error_count() <= 2


def test_a_field_named_by_the_caller_is_cut_too():
    error = error_for(input="a", **{"k" * 10_000: 1})
    assert len(error.message) < 200
    assert error.param is not None
    assert len(error.param) < 100


@pytest.mark.parametrize("name", ["str", "dataclass", "function-wrap"])
def test_a_field_with_a_name_that_pydantic_uses_is_named(name):
    assert error_for(input="a", **{name: 1}).param == name


def test_a_request_built_from_python_fails_in_the_same_words():
    with pytest.raises(ValidationError) as caught:
        ClassifyRequest(input=(TextInput("a"),), top_k=0)
    assert invalid(caught.value).message == error_for(input="a", top_k=0).message
    with pytest.raises(ValidationError) as caught:
        ClassifyRequest(input=())
    assert invalid(caught.value).message == error_for(input=[]).message


def test_fields_of_which_one_must_be_given_are_no_one_value():
    with pytest.raises(ValidationError) as caught:
        GenerateRequest()
    error = invalid(caught.value)
    assert error.message == "the body: exactly one of prompt and messages must be given"
    assert error.param is None


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"min_tokens": 3, "max_tokens": 2}, "min_tokens", "min_tokens (3) must not be over max_tokens (2)"),
        (
            {"num_beams": 4, "temperature": 0.5},
            "temperature",
            "temperature must be 0 with num_beams 4, got 0.5: a search does not sample",
        ),
        ({"prompt": ["a", "b"], "n": 65}, "n", "prompts times n must be at most 128, got 130"),
    ],
)
def test_of_fields_that_do_not_go_together_one_is_named(fields, param, message):
    with pytest.raises(InvalidRequest) as caught:
        GenerateRequest(**{"prompt": "a"} | fields)
    assert (caught.value.param, caught.value.message) == (param, message)
