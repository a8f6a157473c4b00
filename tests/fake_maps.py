"""Replies of /v1/attention and /v1/explain with made-up weights, which depend on layer and head."""

import base64
import math
import re
import struct
from typing import Any

SPECIAL = {  # what models put before and behind a text
    "sentiment": (["[CLS]"], ["[SEP]"]),
    "chat": ([], []),
    "translation": ([], ["</s>"]),
    "target": (["<s>"], []),
}


def tokens_of(text: str, part: str = "text", *, of: str = "sentiment") -> list[dict[str, Any]]:
    """Words and punctuation with offsets into `text`, between the special tokens of a model, or of a translation."""
    words = [
        {
            "id": 100 + at,
            "text": f"\u2581{at}",
            "start": found.start(),
            "end": found.end(),
            "special": False,
            "part": part,
        }
        for at, found in enumerate(re.finditer(r"\w+|[^\w\s]", text))
    ]
    before, behind = (
        [{"id": at, "text": name, "start": 0, "end": 0, "special": True, "part": None} for at, name in enumerate(names)]
        for names in SPECIAL[of]
    )
    return [*before, *words, *behind]


def weights_of(layer: int, head: int, rows: int, columns: int, *, is_causal: bool = False) -> list[list[float]]:
    """A made-up head: it looks to a place that depends on layer and head, and somewhat to the first token."""
    shift, width = (head % 5) - 2, 0.4 + 0.35 * layer
    table = []
    for row in range(rows):
        at = row * columns / rows + shift
        raw = [math.exp(-((column - at) ** 2) / (2 * width**2)) + 0.02 for column in range(columns)]
        raw[0] += 0.12 * ((head + layer) % 3)
        raw = [weight if not is_causal or column <= row else 0.0 for column, weight in enumerate(raw)]
        table.append([weight / sum(raw) for weight in raw])
    return table


def fake_attention(body: dict[str, Any], *, num_layers: int = 6, num_heads: int = 8) -> dict[str, Any]:
    """A reply of /v1/attention for `body`, from made-up maps."""
    model = body["model"]
    tokens, written = tokens_of(body["text"], of=model), body.get("target") or "ein kleiner Hund"
    target = [] if model == "sentiment" else tokens_of(written, "target", of="chat" if model == "chat" else "target")
    sizes = {"encoder": (len(tokens), len(tokens))}
    if model == "chat":
        sizes = {"decoder": (len(tokens) + len(target),) * 2}
    elif model == "translation":
        sizes |= {"decoder": (len(target), len(target)), "cross": (len(target), len(tokens))}
        if body.get("reduce") == "rollout":
            del sizes["cross"]
    wanted = {kind: size for kind, size in sizes.items() if body.get("kind") in (None, kind)}
    maps = [one for kind, size in wanted.items() for one in _maps(body, kind, *size, num_layers, num_heads)]
    timing = {"queue_seconds": 0.0, "tokenize_seconds": 0.0001, "compute_seconds": 0.006, "total_seconds": 0.0071}
    graph = "classify" if model == "sentiment" else "attention"
    reply = {"model": model, "graph": graph, "tokens": tokens, "maps": maps, "timing": timing}
    reply["usage"] = {"prompt_tokens": len(tokens), "truncated": 0}
    scores = [{"label": "POSITIVE", "score": 0.9876}, {"label": "NEGATIVE", "score": 0.0124}]
    reply["prediction"] = {"text": written} if target else {"scores": scores}
    return reply | {"target_tokens": target} if target else reply


def _maps(
    body: dict[str, Any], kind: str, rows: int, columns: int, num_layers: int, num_heads: int
) -> list[dict[str, Any]]:  # fmt: skip
    reduce, is_causal = body.get("reduce", "none"), kind == "decoder"
    layers: list[int | None] = list(range(num_layers)) if body.get("layers") == "all" else [num_layers - 1]
    if reduce == "rollout":
        layers = [None]
    made = []
    for layer in layers:
        heads = list(range(num_heads)) if reduce == "none" else None
        weights = [
            weights_of(layer or 0, head, rows, columns, is_causal=is_causal) for head in (heads or [layer or 2])
        ]  # fmt: skip
        shape = [len(weights), rows, columns]
        sent = _base64(weights) if body.get("encoding") == "base64" else weights
        made.append({"kind": kind, "layer": layer, "heads": heads, "shape": shape, "weights": sent})
    return made


def _base64(weights: list[list[list[float]]]) -> str:
    flat = [weight for head in weights for row in head for weight in row]
    return base64.b64encode(struct.pack(f"<{len(flat)}f", *flat)).decode()


def fake_explanation(body: dict[str, Any]) -> dict[str, Any]:
    """A reply of /v1/explain for `body`: longer words count for more, every third against."""
    tokens = tokens_of(body["text"])
    against = -0.6 if body["method"] == "occlusion" else 1
    scores = [
        0.0 if token["special"] else (token["end"] - token["start"]) / 40 * (against if at % 3 == 0 else 1)
        for at, token in enumerate(tokens)
    ]
    about = {"model": body["model"], "method": body["method"], "label": "POSITIVE", "score": 0.9876}
    usage = {"prompt_tokens": len(tokens) * len(tokens), "truncated": 0}
    return about | {"tokens": tokens, "scores": scores, "usage": usage, "timing": {"total_seconds": 0.02}}
