"""protobuf <-> domain: nothing is lost on the way, and what is wrong is refused in words."""

import dataclasses
import inspect
import typing

import pytest

from service import domain
from service.domain import (
    MAX_INPUTS,
    AttendedToken,
    AttentionMap,
    AttentionMaps,
    AttentionRequest,
    Classification,
    ClassifyRequest,
    End,
    Event,
    ExplainRequest,
    Explanation,
    Finish,
    GenerateOptions,
    GenerateRequest,
    GenerateTiming,
    GenerateUsage,
    Message,
    ModelInfo,
    Prediction,
    PromptTokens,
    Score,
    Start,
    TextInput,
    Timing,
    Token,
    TokenLogprob,
    Usage,
)
from service.errors import InvalidRequest, Overloaded, TooLarge
from service.rpc.codec import attend, classify, generate, models
from service.rpc.pb.attnd.v1 import inference_pb2 as pb


def one(text: str = "good", **fields: typing.Any) -> ClassifyRequest:
    return ClassifyRequest(input=(TextInput(text),), **fields)


def one_event(event: Event) -> Event:
    """To the wire and back."""
    (arrived,) = generate.parse_events(generate.events_bytes([event]))
    return arrived


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
GENERATE_REQUESTS = [
    GenerateRequest(prompt="one"),
    GenerateRequest(prompt=("", "naïve 🎬", (0, 2**32 - 1), ())),
    GenerateRequest(messages=(Message("system", ""), Message("user", "naïve 🎬"), Message("assistant", "yes\0"))),
    GenerateRequest(
        prompt=(5,),
        model="chat",
        max_tokens=2**31 - 1,
        min_tokens=2**31 - 1,
        temperature=0.1 + 0.2,
        top_k=2**31 - 1,
        top_p=1e-300,
        min_p=0.3,
        repetition_penalty=1.1,
        presence_penalty=-2.0,
        frequency_penalty=0.7,
        logit_bias={0: -100.0, 2**32 - 1: 0.1 + 0.2},
        stop=("\n", "naïve 🎬"),
        stop_token_ids=(0, 2**32 - 1),
        ignore_eos=True,
        seed=-(2**63),
        n=128,
        logprobs=20,
        echo=True,
        length_penalty=-0.5,
    ),
    GenerateRequest(prompt="zeros, which are not the same as nothing", temperature=0.0, seed=0, logprobs=0),
    GenerateRequest(prompt="as much as there is room for", max_tokens=None, seed=2**63 - 1),
    GenerateRequest(prompt="beams", num_beams=16, length_penalty=0.0),
]
ALTERNATIVES = (TokenLogprob(7, "naïve", "naïve".encode(), -0.0), TokenLogprob(0, "", b"", -1e300))
LOGPROB = TokenLogprob(2**32 - 1, "\ufffd", b"\xf0\x9f", float("-inf"), ALTERNATIVES)
TIMING = GenerateTiming(1e-9, 0.1 + 0.2, 0.3, 12345.678901234567, 1e-300, 7.0)
ATTENTION_REQUESTS = [
    AttentionRequest(text="good"),
    AttentionRequest(
        text="", text_pair="", target="", layers="all", heads=(0, 2**31 - 1), reduce="mean", kind="encoder"
    ),
    AttentionRequest(text="naïve 🎬", model="translation", layers="last", reduce="max", kind="cross", top_k=2**31 - 1),
    AttentionRequest(text="a", layers=(3, 1), reduce="rollout", kind="decoder", generate=GenerateOptions()),
    AttentionRequest(text="a", generate=GenerateOptions(max_tokens=1, temperature=0.0, seed=-(2**63))),
]
TOKENS = (
    AttendedToken(101, "[CLS]", 0, 0, True, None),
    AttendedToken(2**32 - 1, "naïve 🎬", 3, 2**32 - 1, False, "text"),
    AttendedToken(7, "", 0, 1, False, "text_pair"),
)
MAPS = (
    AttentionMap("encoder", 0, (0, 11), (2, 1, 1), b"\0\0\x80\x3f\0\0\0\x40"),
    AttentionMap("cross", 5, None, (1, 2, 1), bytes(8)),
    AttentionMap("decoder", None, None, (1, 1, 2), bytes(range(8))),
)
PREDICTION = Prediction(scores=(Score("POSITIVE", 0.1 + 0.2),))
SHORT_TIMING = Timing(0.1, 1e-9, 0.3, 12345.678901234567)
ATTENTIONS = [
    AttentionMaps("sentiment", "classify", TOKENS, None, MAPS, PREDICTION, Usage(3, 1), SHORT_TIMING),
    AttentionMaps(
        "t", "", (), (AttendedToken(1, "x", 0, 1, False, "target"),), (), Prediction(text=""), Usage(0, 0), SHORT_TIMING
    ),
    AttentionMaps("t", "attention", TOKENS, (), MAPS[:1], Prediction(text="naïve 🎬"), Usage(1, 0), SHORT_TIMING),
]
EXPLAIN_REQUESTS = [
    ExplainRequest(text="good"),
    ExplainRequest(text="", text_pair="", model="sentiment", method="rollout", label=""),
    ExplainRequest(text="naïve 🎬", text_pair="b", method="occlusion", label="POSITIVE"),
]
EXPLANATIONS = [
    Explanation("m", "rollout", "POSITIVE", 0.1 + 0.2, TOKENS, (1e-300, -0.5, 0.0), Usage(3, 1), SHORT_TIMING),
    Explanation("m", "occlusion", "", -1.5, (), (), Usage(0, 0), SHORT_TIMING),
]
# What travels in a message: (examples, to the wire and back). What they contain is covered by them.
CODECS = {
    ClassifyRequest: (REQUESTS, lambda request: classify.parse_request(classify.request_bytes(request))),
    Classification: (
        CLASSIFICATIONS,
        lambda result: classify.parse_classification(classify.classification_bytes(result)),
    ),
    ModelInfo: (MODELS, lambda model: models.parse_models(models.models_bytes([model]))[0]),
    GenerateRequest: (GENERATE_REQUESTS, lambda request: generate.parse_request(generate.request_bytes(request))[0]),
    AttentionRequest: (ATTENTION_REQUESTS, lambda request: attend.parse_request(attend.request_bytes(request))),
    AttentionMaps: (ATTENTIONS, lambda result: attend.parse_maps(list(attend.maps_bytes(result)))),
    ExplainRequest: (
        EXPLAIN_REQUESTS,
        lambda request: attend.parse_explain_request(attend.explain_request_bytes(request)),
    ),
    Explanation: (EXPLANATIONS, lambda result: attend.parse_explanation(attend.explanation_bytes(result))),
    Start: ([Start("chat", 2**32 - 1)], one_event),
    PromptTokens: ([PromptTokens(3, (LOGPROB, *ALTERNATIVES)), PromptTokens(0, ())], one_event),
    Token: ([Token(127, 2**32 - 1, "naïve 🎬", LOGPROB), Token(0, 0, "")], one_event),
    Finish: (
        [
            Finish(0, "length"),
            Finish(127, "stop", " held", "naïve 🎬"),
            Finish(1, "stop", "", 0),
            Finish(1, "stop", stop=""),
            Finish(2, "length", "held", ids=(7, 2**32 - 1)),
            Finish(0, "stop", score=0.0),
            Finish(0, "stop", score=-0.1234567890123456),
        ],
        one_event,
    ),
    End: ([End(GenerateUsage(1, 2**32 - 1, 3), TIMING)], one_event),
}
# The circumstances of a call travel as metadata and grpc-timeout, how far it is stays at home: test_rpc_client.py.
NOT_IN_MESSAGES = {domain.Call, domain.Progress}


def classes_in_domain() -> set[type]:
    return {cls for _, cls in inspect.getmembers(domain, inspect.isclass) if cls.__module__.startswith(domain.__name__)}


def reachable(cls: type) -> set[type]:
    """`cls` and every class of the domain that its fields are made of."""
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
    facts = models.decode_model(models.encode_model(MODELS[0])).facts
    assert repr(facts["limits"]) == "{'max_tokens': 512}"


def test_an_unset_field_is_the_default() -> None:
    message = pb.ClassifyRequest(inputs=[pb.TextInput(text="good")])
    assert classify.parse_request(message.SerializeToString()) == one()


@pytest.mark.parametrize(
    ("message", "param", "words"),
    [
        (pb.ClassifyRequest(), "input", "^input: at least one is needed, got none$"),
        (pb.ClassifyRequest(inputs=[pb.TextInput(text="a")], top_k=0), "top_k", "greater than or equal to 1, got 0"),
        (pb.ClassifyRequest(inputs=[pb.TextInput(text="a")], top_k=2**31), "top_k", "less than or equal to 2147483647"),
        (pb.ClassifyRequest(inputs=[pb.TextInput(text="a")], model="m" * 129), "model", "at most 128"),
        (pb.ClassifyRequest(inputs=[pb.TextInput(text="a")], function_to_apply=9), "function_to_apply", "got 9"),
    ],
)
def test_a_value_out_of_range_names_field_and_value(message: pb.ClassifyRequest, param: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        classify.parse_request(message.SerializeToString())
    assert caught.value.param == param


def test_too_many_inputs_are_counted_before_anything_is_made_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(classify, "TextInput")
    message = pb.ClassifyRequest(inputs=[pb.TextInput()] * (MAX_INPUTS + 1))
    with pytest.raises(TooLarge, match="input: at most 16384 inputs a request, got 16385") as caught:
        classify.parse_request(message.SerializeToString())
    assert caught.value.param == "input"


def test_unset_fields_of_a_generation_are_the_defaults() -> None:
    message = pb.GenerateRequest(prompts=[pb.Prompt(text="good")])
    assert generate.parse_request(message.SerializeToString()) == (GenerateRequest(prompt="good"), True)


@pytest.mark.parametrize("wants_tokens", [True, False])
def test_whether_tokens_are_wanted_goes_with_the_request(wants_tokens: bool) -> None:
    request = GenerateRequest(prompt="good")
    assert generate.parse_request(generate.request_bytes(request, wants_tokens=wants_tokens)) == (request, wants_tokens)


def asking(**fields: typing.Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(prompts=[pb.Prompt(text="a")], **fields)


@pytest.mark.parametrize(
    ("message", "param", "words"),
    [
        (pb.GenerateRequest(), None, "^exactly one of prompts and messages"),
        (asking(messages=[pb.Message(role="user")]), None, "^exactly one of prompts and messages"),
        (pb.GenerateRequest(prompts=[pb.Prompt(text="a"), pb.Prompt()]), "prompt.1", "either text or token_ids"),
        (pb.GenerateRequest(prompts=[pb.Prompt(text="a")] * 129), "prompt", "at most 128 prompts a request, got 129"),
        (
            pb.GenerateRequest(messages=[pb.Message(role="user"), pb.Message(role="bot")]),
            "messages.1.role",
            "messages.1.role: input should be 'system', 'user' or 'assistant', got 'bot'",
        ),
        (pb.GenerateRequest(messages=[pb.Message()] * 1025), "messages", "messages: at most 1024 are taken, not 1025"),
        (asking(temperature=10.5), "temperature", "less than or equal to 10, got 10.5"),
        (asking(temperature=float("nan")), "temperature", "got nan"),
        (asking(top_p=0.0), "top_p", "greater than 0, got 0.0"),
        (asking(min_p=1.5), "min_p", "less than or equal to 1, got 1.5"),
        (asking(n=0), "n", "greater than or equal to 1, got 0"),
        (asking(max_tokens=2**31), "max_tokens", "less than or equal to 2147483647"),
        (asking(logprobs=21), "logprobs", "less than or equal to 20, got 21"),
        (asking(logit_bias={3: 101.0}), "logit_bias.3", "less than or equal to 100, got 101.0"),
        (asking(stop=[""] * 17), "stop", "stop: at most 16 are taken, not 17"),
        (asking(stop_token_ids=[1] * 17), "stop_token_ids", "stop_token_ids: at most 16 are taken, not 17"),
        (asking(logit_bias=dict.fromkeys(range(1025), 101.0)), "logit_bias", "at most 1024 are taken, not 1025"),
        (asking(stop=[""]), "stop.0", "at least 1 character"),
        (asking(num_beams=4, temperature=0.5), "temperature", "must be 0 with num_beams 4, got 0.5"),
        (asking(min_tokens=10, max_tokens=4), "min_tokens", "must not be over max_tokens"),
    ],
)
def test_a_wrong_generation_names_field_and_value(message: pb.GenerateRequest, param: str | None, words: str) -> None:
    with pytest.raises((InvalidRequest, TooLarge), match=words) as caught:
        generate.parse_request(message.SerializeToString())
    assert caught.value.param == param


def test_unset_fields_of_attention_are_the_defaults() -> None:
    message = pb.AttentionRequest(text="good")
    assert attend.parse_request(message.SerializeToString()) == AttentionRequest(text="good")
    explain = pb.ExplainRequest(text="good")
    assert attend.parse_explain_request(explain.SerializeToString()) == ExplainRequest(text="good")


@pytest.mark.parametrize(
    ("message", "param", "words"),
    [
        (pb.AttentionRequest(top_k=0), "top_k", "greater than or equal to 1, got 0"),
        (pb.AttentionRequest(reduce=9), "reduce", "reduce: expected 0 to 4, got 9"),  # type: ignore[arg-type]
        (pb.AttentionRequest(kind=9), "kind", "kind: expected 0 to 3, got 9"),  # type: ignore[arg-type]
        (pb.AttentionRequest(layers=pb.Chosen()), "layers", "expected 'all', 'last' or a list of layer numbers"),
        (
            pb.AttentionRequest(heads=pb.Chosen(last=True)),
            "heads",
            "expected 'all' or a list of head numbers.*got 'last'",
        ),
        (pb.AttentionRequest(heads=pb.Chosen(numbers=pb.Numbers(numbers=[1, 1]))), "heads", "may be there once"),
        (
            pb.AttentionRequest(generate=pb.GenerateOptions(max_tokens=0)),
            "generate.max_tokens",
            "^generate.max_tokens: .* got 0",
        ),
        (pb.AttentionRequest(target="a", generate=pb.GenerateOptions()), None, "do not go together"),
    ],
)
def test_wrong_attention_names_field_and_value(message: pb.AttentionRequest, param: str | None, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        attend.parse_request(message.SerializeToString())
    assert caught.value.param == param


def test_a_wrong_explanation_names_field_and_value() -> None:
    with pytest.raises(InvalidRequest, match="method: expected 0 to 2, got 3"):
        attend.parse_explain_request(pb.ExplainRequest(method=3).SerializeToString())  # type: ignore[arg-type]


def test_each_map_is_a_message_after_the_summary() -> None:
    messages = [pb.AttentionResponse.FromString(data) for data in attend.maps_bytes(ATTENTIONS[0])]
    assert [message.WhichOneof("message") for message in messages] == ["summary", "map", "map", "map"]
    assert messages[1].map.weights == MAPS[0].weights


def test_text_without_encoding_has_no_attention() -> None:
    for encode, request in (
        (attend.request_bytes, AttentionRequest(text="\ud800")),
        (attend.explain_request_bytes, ExplainRequest(text="a", text_pair="\ud800")),
    ):
        with pytest.raises(InvalidRequest, match="surrogates"):
            encode(request)  # type: ignore[operator]


PARSERS = [classify.parse_request, classify.parse_stream_request, generate.parse_request, attend.parse_request]


@pytest.mark.parametrize("data", [b"\xff", b"\x0a\x7fshort", b"\x0a\x04\x0a\x02\xff\xfe"], ids=["tag", "cut", "utf-8"])
@pytest.mark.parametrize("parse", PARSERS)
def test_bytes_that_are_no_message_are_refused(parse: typing.Callable[[bytes], typing.Any], data: bytes) -> None:
    is_framed = parse is classify.parse_stream_request and data != b"\xff"
    with pytest.raises(InvalidRequest, match="not a valid attnd") as caught:
        parse(bytes([0x0A, len(data)]) + data if is_framed else data)
    assert caught.value.code == "invalid_protobuf"


@pytest.mark.parametrize(
    "request_",
    [
        GenerateRequest(prompt="\ud800"),
        GenerateRequest(messages=(Message("user", "\ud800"),)),
    ],
)
def test_a_generation_of_text_that_has_no_encoding_is_refused(request_: GenerateRequest) -> None:
    with pytest.raises(InvalidRequest, match="surrogates"):
        generate.request_bytes(request_)


@pytest.mark.parametrize(
    ("param", "request_"),
    [
        ("prompt", GenerateRequest(prompt=((1, 2), (2**32, 1)))),
        ("stop_token_ids", GenerateRequest(prompt="a", stop_token_ids=(2**32,))),
        ("logit_bias", GenerateRequest(prompt="a", logit_bias={2**40: 1.0})),
    ],
)
def test_a_token_id_that_no_message_can_carry_is_refused(param: str, request_: GenerateRequest) -> None:
    with pytest.raises(InvalidRequest, match="from 0 to 4294967295, got") as caught:
        generate.request_bytes(request_)
    assert caught.value.param == param


def test_events_that_came_together_travel_together_and_in_order() -> None:
    events: list[Event] = [Start("chat", 3), Token(1, 5, "a"), Token(0, 6, "b"), Finish(1, "stop"), Token(0, 7, "c")]
    assert generate.parse_events(generate.events_bytes(events)) == events


def test_text_that_has_no_encoding_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="surrogates"):
        classify.encode_request(one("\ud800"))


def test_a_stream_reply_is_a_result_or_an_error() -> None:
    reply = pb.ClassifyStreamResponse.FromString(classify.stream_result(CLASSIFICATIONS[0]))
    assert classify.decode_classification(reply.response) == CLASSIFICATIONS[0]
    error = Overloaded("the queue is full (8)", retry_after_s=0.25, param="model")
    reply = pb.ClassifyStreamResponse.FromString(classify.stream_error(error))
    assert reply.error == pb.Error(
        status=8, message="the queue is full (8)", code="overloaded", param="model", retry_after_seconds=0.25
    )
