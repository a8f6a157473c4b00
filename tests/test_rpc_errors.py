"""The exception tree <-> gRPC statuses: total, and nothing is lost on the way."""

import inspect

import pytest
from google.rpc.error_details_pb2 import BadRequest, RetryInfo
from google.rpc.status_pb2 import Status
from grpc import StatusCode

from service import errors
from service.errors import AttndError, EngineFailed, InvalidRequest, Overloaded, Unavailable
from service.rpc.errors import error_from, rich_status, status_of

ALL = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, AttndError)]
OF_START_UP = {AttndError, errors.BundleError, errors.ConfigError}


@pytest.mark.parametrize("cls", ALL)
def test_the_table_is_total(cls: type[AttndError]) -> None:
    assert isinstance(status_of(cls("why")), StatusCode)


def test_no_two_errors_of_a_request_share_a_status() -> None:
    of_requests = [cls for cls in ALL if cls not in OF_START_UP]
    assert len({status_of(cls("why")) for cls in of_requests}) == len(of_requests)


@pytest.mark.parametrize("cls", [cls for cls in ALL if cls not in OF_START_UP])
@pytest.mark.parametrize(("param", "code"), [(None, None), ("input.3.text", "special")])
def test_an_error_survives_the_round_trip(cls: type[AttndError], param: str | None, code: str | None) -> None:
    error = cls("at most 3, got 4: ü", param=param, code=code)
    back = error_from(status_of(error), error.message, rich_status(error))
    assert type(back) is cls
    assert vars(back) | {"code": back.code} == vars(error) | {"code": error.code}


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
    back = error_from(StatusCode.UNAVAILABLE, "connection refused", details)
    assert type(back) is Unavailable
    assert (back.message, back.code, back.retry_after_s) == ("connection refused", "unavailable", 1.0)


def test_a_call_that_grpc_ended_itself_can_be_tried_elsewhere() -> None:
    assert type(error_from(StatusCode.CANCELLED, "CANCELLED")) is Unavailable


def test_a_status_that_is_not_ours_is_a_failure() -> None:
    assert type(error_from(StatusCode.DATA_LOSS, "?")) is EngineFailed


def test_other_clients_find_the_standard_details() -> None:
    status = Status.FromString(rich_status(InvalidRequest("top_k: too small", param="top_k")))
    violation = BadRequest()
    assert status.details[1].Unpack(violation)
    assert violation.field_violations[0] == BadRequest.FieldViolation(field="top_k", description="top_k: too small")
    status = Status.FromString(rich_status(Overloaded("full", retry_after_s=1.5)))
    retry = RetryInfo()
    assert status.details[1].Unpack(retry)
    assert (retry.retry_delay.seconds, retry.retry_delay.nanos) == (1, 500_000_000)
