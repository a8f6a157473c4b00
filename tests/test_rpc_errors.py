"""The exception tree <-> gRPC statuses: total, and nothing is lost on the way."""

import inspect
from dataclasses import fields
from typing import Any

import pytest
from google.rpc.error_details_pb2 import BadRequest, RetryInfo
from google.rpc.status_pb2 import Status
from grpc import StatusCode

from service import errors
from service.domain import (
    AttentionRequest,
    ClassifyRequest,
    ExplainRequest,
    GenerateOptions,
    GenerateRequest,
    Message,
    TextInput,
)
from service.errors import AttndError, EngineFailed, InvalidRequest, Overloaded, TooLarge, Unavailable
from service.rpc.errors import error_from, rich_status, status_of, told
from service.rpc.pb.attnd.v1 import inference_pb2 as pb

ALL = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, AttndError)]
OF_START_UP = {AttndError, errors.BundleError, errors.ConfigError}


@pytest.mark.parametrize("cls", ALL)
def test_the_table_is_total(cls: type[AttndError]) -> None:
    assert isinstance(status_of(cls("why")), StatusCode)


def test_no_two_errors_of_a_request_share_a_status() -> None:
    of_requests = [cls for cls in ALL if cls not in OF_START_UP]
    assert len({status_of(cls("why")) for cls in of_requests}) == len(of_requests)


@pytest.mark.parametrize("cls", [cls for cls in ALL if cls not in OF_START_UP])
@pytest.mark.parametrize(("param", "code"), [(None, None), ("input.3.text", "special"), ("prompt", None)])
def test_an_error_survives_the_round_trip(cls: type[AttndError], param: str | None, code: str | None) -> None:
    error = cls("at most 3, got 4: ü", param=param, code=code)
    back = error_from(status_of(error), error.message, rich_status(error))
    assert type(back) is cls
    assert vars(back) | {"code": back.code} == vars(error) | {"code": error.code}


@pytest.mark.parametrize(
    ("message", "param", "told_message", "told_param"),
    [
        ("input: at most 3 inputs a request, got 4", "input", "inputs: at most 3 inputs a request, got 4", "inputs"),
        ("input.3.text: input should be a string", "input.3.text", "inputs.3.text: input should be a string",
         "inputs.3.text"),
        ("input 3 has 600 tokens, the limit is 512", "input.3", "input 3 has 600 tokens, the limit is 512", "inputs.3"),
        ("sentence 2 of prompt.0 has 300 tokens", "prompt.0", "sentence 2 of prompts.0 has 300 tokens", "prompts.0"),
        ("9 outputs in one request (prompts: 9)", "prompt", "9 outputs in one request (prompts: 9)", "prompts"),
        ("messages.1.role: no", "messages.1.role", "messages.1.role: no", "messages.1.role"),
        ("the prompt is wrong", None, "the prompt is wrong", None),
    ],
)  # fmt: skip
def test_a_field_is_called_what_the_proto_calls_it_on_the_way(
    message: str, param: str | None, told_message: str, told_param: str | None
) -> None:
    error = InvalidRequest(message, param=param)
    assert told(error) == (told_message, told_param)
    status = Status.FromString(rich_status(error))
    assert status.message == told_message
    back = error_from(status_of(error), told_message, rich_status(error))
    assert (back.message, back.param) == (message, param)


DOMAIN_AND_PROTO = [
    (ClassifyRequest, pb.ClassifyRequest),
    (TextInput, pb.TextInput),
    (GenerateRequest, pb.GenerateRequest),
    (Message, pb.Message),
    (AttentionRequest, pb.AttentionRequest),
    (GenerateOptions, pb.GenerateOptions),
    (ExplainRequest, pb.ExplainRequest),
]


@pytest.mark.parametrize(("ours", "proto"), DOMAIN_AND_PROTO, ids=lambda cls: cls.__name__)
def test_every_field_of_a_request_is_told_by_a_name_that_the_proto_has(ours: Any, proto: Any) -> None:
    names = {told(InvalidRequest("no", param=field.name))[1] for field in fields(ours)}
    assert names <= set(proto.DESCRIPTOR.fields_by_name)


@pytest.mark.parametrize("cls", [Overloaded, Unavailable])
def test_when_to_come_back_survives_the_round_trip(cls: type[Overloaded] | type[Unavailable]) -> None:
    error = cls("later", retry_after_s=12.345)
    back = error_from(status_of(error), error.message, rich_status(error))
    assert isinstance(back, cls)
    assert back.retry_after_s == 12.345


def test_an_error_of_start_up_is_our_fault() -> None:
    error = errors.BundleError("no manifest")
    back = error_from(status_of(error), error.message, rich_status(error))
    assert type(back) is EngineFailed
    assert back.code == "bundle_error"


@pytest.mark.parametrize("details", [b"", b"\xff garbage", Status().SerializeToString()])
def test_a_status_without_details_is_the_plain_error(details: bytes) -> None:
    back = error_from(StatusCode.UNAVAILABLE, "ipv4:10.0.0.7:50051: connection refused", details)
    assert type(back) is Unavailable
    assert (back.message, back.code, back.retry_after_s) == ("a worker cannot be reached", "unavailable", 1.0)


def test_a_call_that_grpc_ended_itself_can_be_tried_elsewhere() -> None:
    assert type(error_from(StatusCode.CANCELLED, "CANCELLED")) is Unavailable


def test_a_message_that_grpc_takes_for_too_large_is_not_tried_again() -> None:
    assert type(error_from(StatusCode.RESOURCE_EXHAUSTED, "Received message larger than max (9 vs. 8)")) is TooLarge


def test_a_status_that_is_not_ours_is_a_failure() -> None:
    assert type(error_from(StatusCode.DATA_LOSS, "?")) is EngineFailed


@pytest.mark.parametrize("status", StatusCode, ids=lambda status: status.name)
def test_what_grpc_itself_says_is_not_told(status: StatusCode) -> None:
    assert "10.0.0.7" not in error_from(status, "ipv4:10.0.0.7:50051: connection refused").message


def test_other_clients_find_the_standard_details() -> None:
    status = Status.FromString(rich_status(InvalidRequest("top_k: too small", param="top_k")))
    violation = BadRequest()
    assert status.details[1].Unpack(violation)
    assert violation.field_violations[0] == BadRequest.FieldViolation(field="top_k", description="top_k: too small")
    status = Status.FromString(rich_status(Overloaded("full", retry_after_s=1.5)))
    retry = RetryInfo()
    assert status.details[1].Unpack(retry)
    assert (retry.retry_delay.seconds, retry.retry_delay.nanos) == (1, 500_000_000)
