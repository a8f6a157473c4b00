"""Attention maps and explanations: requests and results.

A field that is not set is not passed on: its default is the domain's alone.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from pydantic import ValidationError

from service.domain import (
    AttendedToken,
    AttentionMap,
    AttentionMaps,
    AttentionRequest,
    ExplainRequest,
    Explanation,
    GenerateOptions,
    Kind,
    Method,
    Part,
    Prediction,
    Reduce,
    Score,
    Timing,
    Usage,
)
from service.errors import InvalidRequest
from service.rpc.codec.received import received
from service.rpc.pb.attnd.v1 import inference_pb2 as pb
from service.validation import invalid

_KINDS: dict[Kind | None, pb.AttentionKind] = {
    None: pb.ATTENTION_KIND_UNSPECIFIED,
    "encoder": pb.ATTENTION_KIND_ENCODER,
    "decoder": pb.ATTENTION_KIND_DECODER,
    "cross": pb.ATTENTION_KIND_CROSS,
}
_REDUCES: dict[Reduce, pb.AttentionReduce] = {
    "none": pb.ATTENTION_REDUCE_NONE,
    "mean": pb.ATTENTION_REDUCE_MEAN,
    "max": pb.ATTENTION_REDUCE_MAX,
    "rollout": pb.ATTENTION_REDUCE_ROLLOUT,
}
_METHODS: dict[Method, pb.ExplainMethod] = {
    "occlusion": pb.EXPLAIN_METHOD_OCCLUSION,
    "rollout": pb.EXPLAIN_METHOD_ROLLOUT,
}
_PARTS: dict[Part | None, pb.TextPart] = {
    None: pb.TEXT_PART_UNSPECIFIED,
    "text": pb.TEXT_PART_TEXT,
    "text_pair": pb.TEXT_PART_TEXT_PAIR,
    "target": pb.TEXT_PART_TARGET,
}
_KIND_NAMES = {int(number): name for name, number in _KINDS.items()}
_REDUCE_NAMES: dict[int, Reduce] = {int(number): name for name, number in _REDUCES.items()}
_METHOD_NAMES: dict[int, Method] = {int(number): name for name, number in _METHODS.items()}
_PART_NAMES = {int(number): name for name, number in _PARTS.items()}

_OPTIONS = ("max_tokens", "temperature", "seed")


def encode_request(request: AttentionRequest) -> pb.AttentionRequest:
    """Raises InvalidRequest for text that no encoding can carry (lone surrogates)."""
    options = request.generate
    try:
        return pb.AttentionRequest(
            text=request.text,
            text_pair=request.text_pair,
            target=request.target,
            model=request.model,
            layers=_encode_chosen(request.layers),
            heads=_encode_chosen(request.heads),
            reduce=_REDUCES[request.reduce],
            kind=_KINDS[request.kind],
            generate=None
            if options is None
            else pb.GenerateOptions(**{name: getattr(options, name) for name in _OPTIONS}),
            top_k=request.top_k,
        )
    except UnicodeEncodeError as error:
        raise _no_unicode(error) from None


def _encode_chosen(chosen: Literal["all", "last"] | tuple[int, ...] | None) -> pb.Chosen | None:
    if chosen is None:
        return None
    if isinstance(chosen, tuple):
        return pb.Chosen(numbers=pb.Numbers(numbers=chosen))
    return pb.Chosen(all=True) if chosen == "all" else pb.Chosen(last=True)


def decode_request(message: pb.AttentionRequest) -> AttentionRequest:
    fields = _given(message, ("text_pair", "target", "top_k"))
    for name in ("layers", "heads"):
        if message.HasField(name):
            fields[name] = _decode_chosen(getattr(message, name))
    try:
        if message.HasField("generate"):
            fields["generate"] = _decode_options(message.generate)
        return AttentionRequest(
            text=message.text,
            model=message.model or None,
            reduce=_known(_REDUCE_NAMES, message.reduce or pb.ATTENTION_REDUCE_NONE, "reduce"),
            kind=_known(_KIND_NAMES, message.kind, "kind"),
            **fields,
        )
    except ValidationError as error:
        raise invalid(error) from None


def _decode_options(message: pb.GenerateOptions) -> GenerateOptions:
    try:
        return GenerateOptions(**_given(message, _OPTIONS))
    except ValidationError as error:
        wrong = invalid(error)
        raise InvalidRequest(f"generate.{wrong.message}", param=f"generate.{wrong.param}") from None


def _decode_chosen(message: pb.Chosen) -> str | tuple[int, ...]:
    kind = message.WhichOneof("chosen")
    return tuple(message.numbers.numbers) if kind == "numbers" else kind or ()


def _given(message: Any, names: Sequence[str]) -> dict[str, Any]:
    """Those of the named fields that are set."""
    return {name: getattr(message, name) for name in names if message.HasField(name)}


def _known(names: dict[int, Any], number: int, field: str) -> Any:
    if number not in names:
        raise InvalidRequest(f"{field}: expected 0 to {max(names)}, got {number}", param=field)
    return names[number]


def _no_unicode(error: UnicodeEncodeError) -> InvalidRequest:
    return InvalidRequest(f"not valid Unicode text: {error.reason}", param="text")


def request_bytes(request: AttentionRequest) -> bytes:
    """The message of an Attention call. Raises InvalidRequest."""
    return encode_request(request).SerializeToString()


def parse_request(data: bytes) -> AttentionRequest:
    """The request of an Attention call. Raises InvalidRequest, also when `data` is no such message."""
    return decode_request(received(pb.AttentionRequest, data))


def encode_summary(result: AttentionMaps) -> pb.AttentionSummary:
    target = result.target_tokens
    return pb.AttentionSummary(
        model=result.model,
        graph=result.graph,
        tokens=_encode_tokens(result.tokens),
        target_tokens=None if target is None else pb.AttendedTokens(tokens=_encode_tokens(target)),
        prediction=_encode_prediction(result.prediction),
        usage=pb.Usage(**vars(result.usage)),
        timing=pb.Timing(**vars(result.timing)),
    )


def _encode_prediction(prediction: Prediction) -> pb.Prediction:
    return pb.Prediction(scores=[pb.Score(**vars(score)) for score in prediction.scores], text=prediction.text)


def _encode_tokens(tokens: Sequence[AttendedToken]) -> list[pb.AttendedToken]:
    return [
        pb.AttendedToken(
            id=one.id, text=one.text, start=one.start, end=one.end, special=one.special, part=_PARTS[one.part]
        )
        for one in tokens
    ]


def _decode_tokens(messages: Sequence[pb.AttendedToken]) -> tuple[AttendedToken, ...]:
    return tuple(
        [AttendedToken(one.id, one.text, one.start, one.end, one.special, _PART_NAMES[one.part]) for one in messages]
    )


def encode_map(one: AttentionMap) -> pb.AttentionMap:
    return pb.AttentionMap(
        kind=_KINDS[one.kind],
        layer=one.layer,
        heads=None if one.heads is None else pb.Numbers(numbers=one.heads),
        shape=one.shape,
        weights=one.weights,
    )


def decode_map(message: pb.AttentionMap) -> AttentionMap:
    heads, queries, keys = message.shape
    return AttentionMap(
        kind=_KIND_NAMES[message.kind] or "encoder",
        layer=message.layer if message.HasField("layer") else None,
        heads=tuple(message.heads.numbers) if message.HasField("heads") else None,
        shape=(heads, queries, keys),
        weights=message.weights,
    )


def maps_bytes(result: AttentionMaps) -> Iterator[bytes]:
    """The messages of an Attention call, each made when it is its turn."""
    yield pb.AttentionResponse(summary=encode_summary(result)).SerializeToString()
    for one in result.maps:
        yield pb.AttentionResponse(map=encode_map(one)).SerializeToString()


def parse_maps(replies: Sequence[bytes]) -> AttentionMaps:
    """What a worker sent in all messages of an Attention call."""
    first, *others = [pb.AttentionResponse.FromString(data) for data in replies]
    summary = first.summary
    prediction = summary.prediction
    return AttentionMaps(
        model=summary.model,
        graph=summary.graph,
        tokens=_decode_tokens(summary.tokens),
        target_tokens=_decode_tokens(summary.target_tokens.tokens) if summary.HasField("target_tokens") else None,
        maps=tuple([decode_map(one.map) for one in others]),
        prediction=Prediction(
            scores=tuple([Score(one.label, one.score) for one in prediction.scores]),
            text=prediction.text if prediction.HasField("text") else None,
        ),
        usage=_decode_usage(summary.usage),
        timing=_decode_timing(summary.timing),
    )


def _decode_usage(message: pb.Usage) -> Usage:
    return Usage(message.prompt_tokens, message.truncated)


def _decode_timing(message: pb.Timing) -> Timing:
    return Timing(message.queue_seconds, message.tokenize_seconds, message.compute_seconds, message.total_seconds)


def explain_request_bytes(request: ExplainRequest) -> bytes:
    """The message of an Explain call. Raises InvalidRequest."""
    try:
        message = pb.ExplainRequest(
            text=request.text,
            text_pair=request.text_pair,
            model=request.model,
            method=_METHODS[request.method],
            label=request.label,
        )
    except UnicodeEncodeError as error:
        raise _no_unicode(error) from None
    return message.SerializeToString()


def parse_explain_request(data: bytes) -> ExplainRequest:
    """The request of an Explain call. Raises InvalidRequest, also when `data` is no such message."""
    message = received(pb.ExplainRequest, data)
    try:
        return ExplainRequest(
            text=message.text,
            model=message.model or None,
            method=_known(_METHOD_NAMES, message.method or pb.EXPLAIN_METHOD_OCCLUSION, "method"),
            **_given(message, ("text_pair", "label")),
        )
    except ValidationError as error:
        raise invalid(error) from None


def explanation_bytes(result: Explanation) -> bytes:
    """The reply of Explain."""
    return pb.ExplainResponse(
        model=result.model,
        method=_METHODS[result.method],
        label=result.label,
        score=result.score,
        tokens=_encode_tokens(result.tokens),
        scores=result.scores,
        usage=pb.Usage(**vars(result.usage)),
        timing=pb.Timing(**vars(result.timing)),
    ).SerializeToString()


def parse_explanation(data: bytes) -> Explanation:
    """What a worker replied to Explain."""
    message = pb.ExplainResponse.FromString(data)
    return Explanation(
        model=message.model,
        method=_METHOD_NAMES[message.method],
        label=message.label,
        score=message.score,
        tokens=_decode_tokens(message.tokens),
        scores=tuple(message.scores),
        usage=_decode_usage(message.usage),
        timing=_decode_timing(message.timing),
    )
