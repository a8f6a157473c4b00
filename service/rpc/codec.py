"""protobuf <-> domain: the only file that knows both.

Decoding what a caller sent raises `InvalidRequest`; what a worker sent is trusted to be well-formed.
"""

from collections.abc import Mapping
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import DecodeError
from google.protobuf.struct_pb2 import Struct
from pydantic import ValidationError

from service.domain import Classification, ClassifyRequest, FunctionToApply, ModelInfo, Score, TextInput, Timing, Usage
from service.errors import AttndError, InvalidRequest
from service.rpc import errors
from service.rpc.pb.attnd.v1 import inference_pb2 as pb
from service.validation import invalid

_FUNCTIONS: dict[FunctionToApply | None, pb.FunctionToApply] = {
    None: pb.FUNCTION_TO_APPLY_UNSPECIFIED,
    "softmax": pb.FUNCTION_TO_APPLY_SOFTMAX,
    "sigmoid": pb.FUNCTION_TO_APPLY_SIGMOID,
    "none": pb.FUNCTION_TO_APPLY_NONE,
}
_FUNCTION_NAMES = {int(number): name for name, number in _FUNCTIONS.items()}


def encode_request(request: ClassifyRequest) -> pb.ClassifyRequest:
    """Raises InvalidRequest for text that no encoding can carry (lone surrogates)."""
    try:
        inputs = [pb.TextInput(text=item.text, text_pair=item.text_pair) for item in request.input]
        return pb.ClassifyRequest(
            inputs=inputs,
            model=request.model,
            top_k=request.top_k,
            function_to_apply=_FUNCTIONS[request.function_to_apply],
            truncate=request.truncate,
        )
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"not valid Unicode text: {error.reason}", param="input") from None


def decode_request(message: pb.ClassifyRequest) -> ClassifyRequest:
    function = message.function_to_apply
    if function not in _FUNCTION_NAMES:
        raise InvalidRequest(
            f"function_to_apply: expected 0 to {max(_FUNCTION_NAMES)}, got {function}", param="function_to_apply"
        )
    try:
        return ClassifyRequest(
            input=tuple([_decode_input(item) for item in message.inputs]),
            model=message.model or None,
            top_k=message.top_k if message.HasField("top_k") else None,
            function_to_apply=_FUNCTION_NAMES[function],
            truncate=message.truncate if message.HasField("truncate") else True,
        )
    except ValidationError as error:
        raise invalid(error) from None


def _decode_input(message: pb.TextInput) -> TextInput:
    return TextInput(message.text, message.text_pair if message.HasField("text_pair") else None)


def parse_classify(data: bytes) -> ClassifyRequest:
    """The request of a Classify call. Raises InvalidRequest, also when `data` is no such message."""
    try:
        message = pb.ClassifyRequest.FromString(data)
    except DecodeError:
        raise InvalidRequest("the message is not a valid attnd.v1.ClassifyRequest", code="invalid_protobuf") from None
    return decode_request(message)


def parse_stream_request(data: bytes) -> ClassifyRequest:
    """The request in one message of a ClassifyStream call. Raises InvalidRequest."""
    try:
        message = pb.ClassifyStreamRequest.FromString(data)
    except DecodeError:
        raise InvalidRequest(
            "the message is not a valid attnd.v1.ClassifyStreamRequest", code="invalid_protobuf"
        ) from None
    return decode_request(message.request)


def encode_classification(result: Classification) -> pb.ClassifyResponse:
    timing = result.timing
    return pb.ClassifyResponse(
        model=result.model,
        results=[_encode_scores(scores) for scores in result.results],
        usage=pb.Usage(prompt_tokens=result.usage.prompt_tokens, truncated=result.usage.truncated),
        timing=pb.Timing(
            queue_seconds=timing.queue_seconds,
            tokenize_seconds=timing.tokenize_seconds,
            compute_seconds=timing.compute_seconds,
            total_seconds=timing.total_seconds,
        ),
    )


def _encode_scores(scores: tuple[Score, ...]) -> pb.Scores:
    return pb.Scores(scores=[pb.Score(label=score.label, score=score.score) for score in scores])


def decode_classification(message: pb.ClassifyResponse) -> Classification:
    usage, timing = message.usage, message.timing
    return Classification(
        model=message.model,
        results=tuple(tuple(Score(score.label, score.score) for score in row.scores) for row in message.results),
        usage=Usage(usage.prompt_tokens, usage.truncated),
        timing=Timing(timing.queue_seconds, timing.tokenize_seconds, timing.compute_seconds, timing.total_seconds),
    )


def encode_model(model: ModelInfo) -> pb.Model:
    """`facts` are JSON values; a number in them travels as a double."""
    facts = Struct()
    facts.update(model.facts)
    return pb.Model(id=model.id, task=model.task, created=model.created, facts=facts)


def decode_model(message: pb.Model) -> ModelInfo:
    facts: Mapping[str, Any] = MessageToDict(message.facts)
    return ModelInfo(message.id, message.task, message.created, {key: _whole(value) for key, value in facts.items()})


def _whole(value: Any) -> Any:
    """JSON does not tell 512 from 512.0, people do."""
    if isinstance(value, dict):
        return {key: _whole(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def encode_models(models: list[ModelInfo]) -> pb.ListModelsResponse:
    return pb.ListModelsResponse(models=[encode_model(model) for model in models])


def decode_models(message: pb.ListModelsResponse) -> list[ModelInfo]:
    return [decode_model(model) for model in message.models]


def stream_result(result: Classification) -> bytes:
    """One reply of ClassifyStream."""
    return pb.ClassifyStreamResponse(response=encode_classification(result)).SerializeToString()


def stream_error(error: AttndError) -> bytes:
    """The reply of ClassifyStream to a request that failed."""
    return pb.ClassifyStreamResponse(
        error=pb.Error(
            status=errors.status_of(error).value[0],
            message=error.message,
            code=error.code,
            param=error.param,
            retry_after_seconds=errors.retry_after_s(error),
        )
    ).SerializeToString()


def classification_bytes(result: Classification) -> bytes:
    """The reply of Classify."""
    return encode_classification(result).SerializeToString()


def models_bytes(models: list[ModelInfo]) -> bytes:
    """The reply of ListModels."""
    return encode_models(models).SerializeToString()


def parse_classification(data: bytes) -> Classification:
    """What a worker replied to Classify."""
    return decode_classification(pb.ClassifyResponse.FromString(data))


def parse_models(data: bytes) -> list[ModelInfo]:
    """What a worker replied to ListModels."""
    return decode_models(pb.ListModelsResponse.FromString(data))
