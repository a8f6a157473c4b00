"""protobuf <-> domain: nothing is lost on the way, and what is wrong is refused in words."""

import dataclasses
import inspect
import typing

import pytest

from service import domain
from service.domain import Classification, ClassifyRequest, ModelInfo, Score, TextInput, Timing, Usage
from service.errors import InvalidRequest, Overloaded
from service.rpc import codec
from service.rpc.pb.attnd.v1 import inference_pb2 as pb


def one(text: str = "good", **fields: typing.Any) -> ClassifyRequest:
    return ClassifyRequest(input=(TextInput(text),), **fields)


REQUESTS = [
    one(),
    ClassifyRequest(input=(TextInput(""), TextInput("naïve 🎬"), TextInput("a", ""), TextInput("a", "b"))),
    one(model="sentiment", top_k=1, function_to_apply="softmax", truncate=False),
    one(top_k=2**31 - 1, function_to_apply="sigmoid"),
    one(function_to_apply="none"),
]
CLASSIFICATIONS = [
    Classification(
        model="sentiment",
        results=((Score("POSITIVE", 0.1 + 0.2), Score("NEGATIVE", 1e-300)), (), (Score("", -1.5),)),
        usage=Usage(prompt_tokens=2**32 - 1, truncated=3),
        timing=Timing(0.1, 1e-9, 0.3, 12345.678901234567),
    )
]
MODELS = [
    ModelInfo(
        id="sentiment",
        task="classification",
        created=1_700_000_000,
        facts={
            "labels": ["NEGATIVE", "POSITIVE"],
            "limits": {"max_tokens": 512},
            "quality": {"accuracy": 0.9206, "is_measured": True},
            "trained_on": None,
        },
    )
]
# What travels in a message: (examples, to the wire and back). What they contain is covered by them.
CODECS = {
    ClassifyRequest: (REQUESTS, lambda request: codec.decode_request(codec.encode_request(request))),
    Classification: (CLASSIFICATIONS, lambda result: codec.decode_classification(codec.encode_classification(result))),
    ModelInfo: (MODELS, lambda model: codec.decode_model(codec.encode_model(model))),
}
# The circumstances of a call travel as metadata and grpc-timeout, how far it is stays at home: test_rpc_client.py.
NOT_IN_MESSAGES = {domain.Call, domain.Progress}


def classes_in_domain() -> set[type]:
    return {cls for _, cls in inspect.getmembers(domain, inspect.isclass) if cls.__module__ == domain.__name__}


def reachable(cls: type) -> set[type]:
    """`cls` and every class of domain.py that its fields are made of."""
    found = {cls}
    waiting = list(typing.get_type_hints(cls).values())
    while waiting:
        hint = waiting.pop()
        waiting.extend(typing.get_args(hint))
        if hint in classes_in_domain() - found:
            found |= reachable(hint)
    return found


def test_every_class_of_the_domain_has_a_codec() -> None:
    covered = set().union(*(reachable(cls) for cls in CODECS)) | NOT_IN_MESSAGES
    assert classes_in_domain() == covered


@pytest.mark.parametrize("cls", CODECS, ids=lambda cls: cls.__name__)
def test_a_round_trip_changes_nothing(cls: type) -> None:
    examples, round_trip = CODECS[cls]
    assert [round_trip(example) for example in examples] == examples


@pytest.mark.parametrize("cls", CODECS, ids=lambda cls: cls.__name__)
def test_the_examples_leave_no_field_at_its_default(cls: type) -> None:
    examples, _ = CODECS[cls]
    for field in dataclasses.fields(cls):
        assert any(getattr(example, field.name) != field.default for example in examples), field.name


def test_whole_numbers_in_facts_stay_whole() -> None:
    facts = codec.decode_model(codec.encode_model(MODELS[0])).facts
    assert repr(facts["limits"]) == "{'max_tokens': 512}"


def test_an_unset_field_is_the_default() -> None:
    message = pb.ClassifyRequest(inputs=[pb.TextInput(text="good")])
    assert codec.parse_classify(message.SerializeToString()) == one()


@pytest.mark.parametrize(
    ("message", "param", "words"),
    [
        (pb.ClassifyRequest(), "input", "at least 1"),
        (pb.ClassifyRequest(inputs=[pb.TextInput(text="a")], top_k=0), "top_k", "greater than or equal to 1, got 0"),
        (pb.ClassifyRequest(inputs=[pb.TextInput(text="a")], top_k=2**31), "top_k", "less than or equal to 2147483647"),
        (pb.ClassifyRequest(inputs=[pb.TextInput(text="a")], model="m" * 129), "model", "at most 128"),
        (pb.ClassifyRequest(inputs=[pb.TextInput(text="a")], function_to_apply=9), "function_to_apply", "got 9"),
    ],
)
def test_a_value_out_of_range_names_field_and_value(message: pb.ClassifyRequest, param: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        codec.parse_classify(message.SerializeToString())
    assert caught.value.param == param


@pytest.mark.parametrize("data", [b"\xff", b"\x0a\x7fshort", b"\x0a\x04\x0a\x02\xff\xfe"], ids=["tag", "cut", "utf-8"])
@pytest.mark.parametrize("parse", [codec.parse_classify, codec.parse_stream_request])
def test_bytes_that_are_no_message_are_refused(parse: typing.Callable[[bytes], ClassifyRequest], data: bytes) -> None:
    framed = data if parse is codec.parse_classify or data == b"\xff" else bytes([0x0A, len(data)]) + data
    with pytest.raises(InvalidRequest) as caught:
        parse(framed)
    assert caught.value.code == "invalid_protobuf"


def test_text_that_has_no_encoding_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="surrogates"):
        codec.encode_request(one("\ud800"))


def test_a_stream_reply_is_a_result_or_an_error() -> None:
    reply = pb.ClassifyStreamResponse.FromString(codec.stream_result(CLASSIFICATIONS[0]))
    assert codec.decode_classification(reply.response) == CLASSIFICATIONS[0]
    error = Overloaded("the queue is full (8)", retry_after_s=0.25, param="input")
    reply = pb.ClassifyStreamResponse.FromString(codec.stream_error(error))
    assert reply.error == pb.Error(
        status=8, message="the queue is full (8)", code="overloaded", param="input", retry_after_seconds=0.25
    )
