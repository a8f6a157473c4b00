"""The flags of the commands that ask a model.

A flag's destination is the field of the request that it sets, and a flag that is not given sets nothing: defaults and
bounds are the request's own.
"""

import argparse
from dataclasses import fields
from typing import Any

from service.domain import GenerateRequest

HELP = {
    "classify": "label texts",
    "generate": "continue a prompt, or answer it with --chat; the text is printed as it is written",
    "translate": "translate texts",
    "attention": "show where a model looked, as a table or a picture",
}
SETTINGS = {
    "api_key": "key to send as a bearer token to the server at --url",
    "request_timeout": "seconds that each request may take",
}
_MAX_TOKENS = "tokens to write, at the most; default "
_DECODING = {
    "--num-beams": (int, "beams of a beam search (1: none)"),
    "--length-penalty": (float, "what a beam search divides a score by: the length to this power"),
}
_SAMPLING = {
    "--seed": (int, "the same seed gives the same text; default: another each time"),
    "--temperature": (float, "0 always takes the likeliest token; default: the model's own (0 of those shipped)"),
    "--top-k": (int, "sample from so many of the likeliest tokens (0: all)"),
    "--top-p": (float, "sample from the likeliest tokens that have this probability together"),
}
_DEFAULTS = {one.name: one.default for one in fields(GenerateRequest)}


def add_ask_flags(parser: argparse.ArgumentParser, command: str) -> None:
    """Add what `command`, one of HELP, takes."""
    parser.add_argument("--url", help="ask this server, http://127.0.0.1:8000 for one; default: this process")
    _add(parser, "--model", help="a served model's id; without --url a shipped one's, or a bundle directory")
    {"classify": _classify, "generate": _generate, "translate": _translate, "attention": _attention}[command](parser)


def _add(parser: argparse.ArgumentParser, *names: str, **about: Any) -> None:
    parser.add_argument(*names, default=argparse.SUPPRESS, **about)


def _add_all(parser: argparse.ArgumentParser, flags: dict[str, tuple[type, str]]) -> None:
    for name, (kind, about) in flags.items():
        default = _DEFAULTS[name.removeprefix("--").replace("-", "_")]
        _add(parser, name, type=kind, help=about if default is None else f"{about}; default {default}")


def _classify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="none, or -: each line of standard input")
    _add(parser, "--top-k", type=int, help="show the k best labels of each text; default 1")
    parser.add_argument("--json", action="store_true", help="print the API's replies, with every label")


def _generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", nargs="?", metavar="PROMPT", help="none, or -: all of standard input")
    parser.add_argument("--chat", action="store_true", help="the prompt is a message for the model to answer")
    parser.add_argument("--system", metavar="TEXT", help="instructions that stand before the message; means --chat")
    _add(parser, "--max-tokens", type=int, help=f"{_MAX_TOKENS}{_DEFAULTS['max_tokens']}")
    _add_all(parser, _DECODING | _SAMPLING)
    _add(parser, "--stop", action="append", help="end before this text; may be given more than once")


def _translate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="none, or -: each line of standard input")
    _add(parser, "--max-tokens", type=int, help=f"{_MAX_TOKENS}as many as a translation takes")
    _add_all(parser, _DECODING)


def _attention(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", nargs="?", metavar="TEXT", help="none, or -: all of standard input")
    parser.add_argument("--png", metavar="FILE", help="draw a heat map into this file instead of printing a table")
    _add(parser, "--text-pair", metavar="TEXT", help="a second text, for models that read two")
    _add(parser, "--target", metavar="TEXT", help="the translation to force; default: the model's own")
    _add(parser, "--kind", choices=("encoder", "decoder", "cross"), help="default: cross if the model has it")
    _add(parser, "--layer", type=chosen, dest="layers", help="numbers from 0, with commas, or all; default: the last")
    _add(parser, "--head", type=chosen, dest="heads", help="numbers from 0, with commas, or all; default: their mean")
    how = "how heads, or layers, become one map; default: mean, or none with --head"
    _add(parser, "--reduce", choices=("none", "mean", "max", "rollout"), help=how)


def chosen(text: str) -> Any:
    """'all' and 'last' are words of the API; anything else is numbers."""
    return text if text in ("all", "last") else tuple(int(part) for part in text.split(","))
