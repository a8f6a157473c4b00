"""A classification: its request, its result, and the replies of a stream of them."""

from pydantic import ValidationError

from service.domain import (
    Classification,
    ClassifyRequest,
    FunctionToApply,
    Score,
    TextInput,
    Timing,
    Usage,
    check_num_inputs,
)
from service.errors import AttndError, InvalidRequest
from service.rpc import errors
from service.rpc.codec.received import received
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
    check_num_inputs(len(message.inputs))
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


def request_bytes(request: ClassifyRequest) -> bytes:
    """The message of a Classify call. Raises InvalidRequest."""
    return encode_request(request).SerializeToString()


def parse_request(data: bytes) -> ClassifyRequest:
    """The request of a Classify call. Raises InvalidRequest, also when `data` is no such message."""
    return decode_request(received(pb.ClassifyRequest, data))


def parse_stream_request(data: bytes) -> ClassifyRequest:
    """The request in one message of a ClassifyStream call. Raises InvalidRequest."""
    return decode_request(received(pb.ClassifyStreamRequest, data).request)


def encode_classification(result: Classification) -> pb.ClassifyResponse:
    """The fields have the names that they have in the domain. Dictionaries: messages in it would cost twice as much."""
    return pb.ClassifyResponse(
        model=result.model,
        results=[{"scores": map(vars, scores)} for scores in result.results],
        usage=vars(result.usage),
        timing=vars(result.timing),
    )


def decode_classification(message: pb.ClassifyResponse) -> Classification:
    usage, timing = message.usage, message.timing
    return Classification(
        model=message.model,
        results=tuple(tuple(Score(score.label, score.score) for score in row.scores) for row in message.results),
        usage=Usage(usage.prompt_tokens, usage.truncated),
        timing=Timing(timing.queue_seconds, timing.tokenize_seconds, timing.compute_seconds, timing.total_seconds),
    )


def stream_result(result: Classification) -> bytes:
    """One reply of ClassifyStream."""
    return pb.ClassifyStreamResponse(response=encode_classification(result)).SerializeToString()


def stream_error(error: AttndError) -> bytes:
    """The reply of ClassifyStream to a request that failed."""
    message, param = errors.told(error)
    return pb.ClassifyStreamResponse(
        error=pb.Error(
            status=errors.status_of(error).value[0],
            message=message,
            code=error.code,
            param=param,
            retry_after_seconds=errors.retry_after_s(error),
        )
    ).SerializeToString()


def classification_bytes(result: Classification) -> bytes:
    """The reply of Classify."""
    return encode_classification(result).SerializeToString()


def parse_classification(data: bytes) -> Classification:
    """What a worker replied to Classify."""
    return decode_classification(pb.ClassifyResponse.FromString(data))
