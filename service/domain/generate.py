"""Prompts to continue, and the events that a generation is made of."""

from collections.abc import Sequence
from dataclasses import dataclass as plain
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, StringConstraints
from pydantic.dataclasses import dataclass

from service.domain.call import GenerateTiming
from service.domain.models import ModelId
from service.errors import InvalidRequest, TooLarge

MAX_OUTPUTS = 128  # prompts times n
MAX_STOPS = 16  # stop strings, and stop ids
MAX_STOP_CHARACTERS = 256
MAX_MESSAGES = 1024
MAX_BIASES = 1024
MAX_LOGPROBS = 20

TokenId = Annotated[int, Field(ge=0, strict=False)]  # JSON's keys are strings
Bias = Annotated[float, Field(ge=-100, le=100, strict=False)]
FinishReason = Literal["stop", "length"]

_STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True, slots=True, config=_STRICT)
class Message:
    """One turn of a chat; the model's chat template makes a prompt of them."""

    role: Literal["system", "user", "assistant"]
    content: str


Prompt = str | tuple[int, ...]  # a text, or the token ids themselves


def _prompts(value: Any) -> Any:
    """A text, token ids, or a list of either -> a tuple of prompts."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, (list, tuple)):
        if value and _are_ids(value):
            return (tuple(value),)
        if len(value) > MAX_OUTPUTS:
            raise TooLarge(f"prompt: at most {MAX_OUTPUTS} prompts a request, got {len(value)}", param="prompt")
        return tuple(_prompt(item, f"prompt.{at}") for at, item in enumerate(value))
    return value


def _prompt(value: Any, where: str) -> Prompt:
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)) and _are_ids(value):
        return tuple(value)
    raise InvalidRequest(f"{where}: expected a text or a list of token ids", param=where)


def _are_ids(value: Sequence[Any]) -> bool:
    return all(type(item) is int and item >= 0 for item in value)


def _at_most(limit: int) -> BeforeValidator:
    """Counts before anything is looked at: a body of a million items must not cost a million error records."""

    def check(value: Any) -> Any:
        if isinstance(value, (list, tuple, dict)) and len(value) > limit:
            raise ValueError(f"at most {limit} are taken, not {len(value)}")
        return value

    return BeforeValidator(check)


def _texts(value: Any) -> Any:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


Prompts = Annotated[
    tuple[Prompt, ...],
    Field(min_length=1, strict=False, fail_fast=True),
    BeforeValidator(_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
]
Stops = Annotated[
    tuple[Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARACTERS)], ...],
    Field(max_length=MAX_STOPS, strict=False),
    BeforeValidator(_texts, json_schema_input_type=str | list[str]),
    _at_most(MAX_STOPS),
]
TokenIds = Annotated[
    tuple[Annotated[int, Field(ge=0)], ...], Field(max_length=MAX_STOPS, strict=False), _at_most(MAX_STOPS)
]
Messages = Annotated[
    tuple[Message, ...], Field(min_length=1, max_length=MAX_MESSAGES, strict=False), _at_most(MAX_MESSAGES)
]
Biases = Annotated[dict[TokenId, Bias], Field(max_length=MAX_BIASES, strict=False), _at_most(MAX_BIASES)]


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class GenerateRequest:
    """Prompts to continue, a chat to answer, or texts to translate.

    Exactly one of `prompt` and `messages`. There are `n` outputs a prompt; output `i` belongs to prompt `i // n`.
    `max_tokens` None: as many as the model's limit leaves room for; more than that is cut to it. `temperature` None:
    what the model's manifest says (0 is greedy). `seed` None: another one for every output. `logprobs`: for every
    token its log-probability and those of the k likeliest alternatives; None: none. `echo`: the prompt's tokens with
    their log-probabilities, too. `num_beams` over 1: beam search, whose `n` best outputs are told when it is
    over, ranked by `score`, log p / tokens^length_penalty.
    The order in which sampling applies them: logit_bias, penalties, min_tokens, temperature, top_k, top_p, min_p.
    """

    prompt: Prompts | None = None
    messages: Messages | None = None
    model: ModelId | None = None
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = 256
    min_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    temperature: Annotated[float, Field(ge=0, le=10, strict=False)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0  # 0: all
    top_p: Annotated[float, Field(gt=0, le=1, strict=False)] = 1.0
    min_p: Annotated[float, Field(ge=0, le=1, strict=False)] = 0.0  # of the likeliest token's probability
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10, strict=False)] = 1.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2, strict=False)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2, strict=False)] = 0.0
    logit_bias: Biases = field(default_factory=dict)
    stop: Stops = ()
    stop_token_ids: TokenIds = ()
    ignore_eos: bool = False
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_OUTPUTS)] = 1
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool = False
    num_beams: Annotated[int, Field(ge=1, le=16)] = 1
    length_penalty: Annotated[float, Field(ge=-10, le=10, strict=False)] = 1.0

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("exactly one of prompt and messages must be given")
        if self.num_outputs > MAX_OUTPUTS:
            message = f"prompts times n must be at most {MAX_OUTPUTS}, got {self.num_outputs}"
            raise InvalidRequest(message, param="n")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            message = f"min_tokens ({self.min_tokens}) must not be over max_tokens ({self.max_tokens})"
            raise InvalidRequest(message, param="min_tokens")
        if self.num_beams > 1 and self.temperature:
            message = f"temperature must be 0 with num_beams {self.num_beams}, got {self.temperature}"
            raise InvalidRequest(f"{message}: a search does not sample", param="temperature")

    @property
    def num_outputs(self) -> int:
        return self.n * (1 if self.prompt is None else len(self.prompt))


def generation_tasks(request: GenerateRequest) -> tuple[str, ...]:
    """The tasks of models that can answer `request`; a chat needs a model that chats."""
    return ("generation",) if request.messages is not None else ("generation", "translation")


@plain(frozen=True, slots=True)
class TokenLogprob:
    """A token and its log-probability under the model's own distribution, among the tokens that it can write (before
    temperature, penalties and bias).

    `text` is the token decoded alone, with U+FFFD for bytes that are no whole character; `bytes` are exact.
    """

    id: int
    text: str
    bytes: bytes
    logprob: float
    top: tuple["TokenLogprob", ...] = ()  # the likeliest tokens at this place, the likeliest first


@plain(frozen=True, slots=True)
class Start:
    """The first event of a generation. It comes with the first token: what fails before that is still a plain error."""

    model: str
    prompt_tokens: int


@plain(frozen=True, slots=True)
class PromptTokens:
    """What `echo` asks for: a prompt's tokens; the very first has no log-probability, and says 0."""

    prompt: int  # its place in the request
    tokens: tuple[TokenLogprob, ...]


@plain(frozen=True, slots=True)
class Token:
    """One more token of output `index`.

    `text` is what can be shown now: empty while a character is incomplete or a stop string may be under way.
    """

    index: int
    id: int
    text: str
    logprob: TokenLogprob | None = None


@plain(frozen=True, slots=True)
class Finish:
    """Output `index` is complete. `text` is what had been held back, `stop` what ended it, if a stop string or id.

    `ids`: the tokens of `text` that no Token told of, since nobody wanted them (see Call). `score`: what a search ranks
    it by, log p / tokens^length_penalty, the end token included; of several sentences, the sum of theirs.
    """

    index: int
    finish_reason: FinishReason
    text: str = ""
    stop: str | int | None = None
    ids: tuple[int, ...] = ()
    score: float | None = None


@plain(frozen=True)
class GenerateUsage:
    """Tokens read (each prompt once, however many outputs it has), written, and read from the prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@plain(frozen=True, slots=True)
class End:
    """The last event: every output is finished."""

    usage: GenerateUsage
    timing: GenerateTiming


Event = Start | PromptTokens | Token | Finish | End
