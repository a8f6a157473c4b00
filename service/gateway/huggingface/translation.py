"""Translation. One object a text, in order, in one piece; the client takes the first."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import orjson
from pydantic import BeforeValidator, Field

from service.domain import Event
from service.errors import InvalidRequest
from service.gateway.bodies import body_model, generate_request, given, read
from service.gateway.generation import Asked, Transcript
from service.gateway.huggingface.fields import (
    COMMON,
    SAMPLING,
    TAKEN,
    common_values,
    names_under,
    refuse,
    renamed,
)
from service.gateway.names import names_of_items

# What callers call the languages, without a script or a country ("eng_Latn", "de-AT"); it is English to German here.
_LANGUAGES: Mapping[str, frozenset[str]] = {
    "src_lang": frozenset({"en", "eng", "english"}),
    "tgt_lang": frozenset({"de", "deu", "ger", "german", "deutsch"}),
}
_SEARCH = ("num_beams", "length_penalty")
_REFUSED: dict[str, tuple[Any, ...]] = {"truncation": ("do_not_truncate",)}  # a text is never cut
_RENAMED = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}
_NAMES = names_under("parameters.generate_parameters", (*TAKEN, *_SEARCH), **_RENAMED)
_NAMES |= {"prompts": "inputs"}


def _texts(value: Any) -> Any:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list):
        return tuple(value)
    raise ValueError("expected a text or a list of texts")


Texts = Annotated[
    tuple[str, ...],
    Field(min_length=1, fail_fast=True),
    BeforeValidator(_texts, json_schema_input_type=str | Annotated[list[str], Field(min_length=1)]),
]

GenerateParameters = body_model(
    "GenerateParameters",
    "What transformers' generate calls them.",
    (*TAKEN, *_SEARCH),
    nullable=True,
    **COMMON,
    **renamed(min_new_tokens="min_tokens"),
)
TranslationParameters = body_model(
    "TranslationParameters",
    "The languages may be given, and are English and German. There are never tokenization spaces to clean up.",
    (),
    nullable=True,
    src_lang=(str | None, None),
    tgt_lang=(str | None, None),
    clean_up_tokenization_spaces=(bool | None, None),
    generate_parameters=(GenerateParameters | None, None),
    truncation=(str | None, None),
)
TranslationBody = body_model(
    "TranslationBody",
    "A text or several; `options` are taken and mean nothing here.",
    (),
    nullable=True,
    inputs=(Texts, ...),
    parameters=(TranslationParameters | None, None),
    options=(dict[str, Any] | None, None),
)


@dataclass(frozen=True)
class Translation:
    translation_text: str


def parse(body: bytes, model: str) -> Asked:
    """Raises InvalidRequest, and Unsupported for what cannot be honoured."""
    sent: Any = read(TranslationBody, body)
    parameters: Any = sent.parameters or TranslationParameters()
    refuse(parameters, _REFUSED)
    for name in _LANGUAGES:
        _check_language(name, getattr(parameters, name))
    asked: Any = parameters.generate_parameters or GenerateParameters()
    values = common_values(asked) | given(asked, _SEARCH)
    values.setdefault("max_tokens", None)  # a translation is as long as it is
    _check_search(asked, values["temperature"])
    if asked.min_new_tokens is not None:
        values["min_tokens"] = asked.min_new_tokens
    names = _NAMES | names_of_items("prompt", len(sent.inputs), "inputs")
    request = generate_request(values | {"prompt": sent.inputs, "model": model}, names)
    return Asked(request, False, lambda _: TranslationAnswer(), names)


def _check_language(param: str, language: str | None) -> None:
    if language is not None and language.lower().replace("_", "-").split("-")[0] not in _LANGUAGES[param]:
        message = f"parameters.{param} is {language[:60]!r}, this server translates English (en) to German (de)"
        raise InvalidRequest(message, param=f"parameters.{param}", code="unsupported_language")


def _check_search(asked: Any, temperature: float) -> None:
    if (asked.num_beams or 1) > 1 and temperature:
        name = next(name for name in ("do_sample", *SAMPLING) if getattr(asked, name) is not None)
        param = f"parameters.generate_parameters.{name}"
        raise InvalidRequest(f"{param} goes with num_beams 1 only: a search does not sample", param=param)


class TranslationAnswer:
    """Never a stream: the client knows none for this task."""

    def whole(self, transcript: Transcript) -> bytes:
        return orjson.dumps([Translation(output.text) for output in transcript.outputs])

    def piece(self, event: Event) -> bytes:
        raise NotImplementedError
