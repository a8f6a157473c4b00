"""What attention maps cost over HTTP: a plain request, and the same with the mean of the last layer's maps, in turn.

    python -m tests.bench.attention [--data FILE] [--count N]

One request at a time on one connection; the plain one and the other alternate, so that whatever else the machine does
falls on both. Prints the ratio of the median seconds for each shipped model; the last line is JSON.
"""

import argparse
import http.client
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .contenders import serve_command
from .sentences import own_sentences, read_sentences
from .servers import Running, Server, free_port, scratch_folder

LIMIT = 1.5  # times the plain request
WANTED = {"layers": "last", "reduce": "mean", "encoding": "base64"}
NUM_NEW = 16  # tokens that chat writes


def plain_and_told(model: str, text: str) -> tuple[tuple[str, Any], tuple[str, Any]]:
    """The routes and bodies of a plain request and of one for maps that predicts the same."""
    maps = {"model": model, "text": text, **WANTED}
    if model == "sentiment":
        return ("/v1/classify", {"model": model, "input": text}), ("/v1/attention", maps)
    plain = {"model": model, "prompt": text}
    if model == "chat":
        written = {"max_tokens": NUM_NEW}
        return ("/v1/generate", {**plain, **written}), ("/v1/attention", {**maps, "generate": written})
    return ("/v1/generate", plain), ("/v1/attention", {**maps, "kind": "cross"})


def seconds(connection: http.client.HTTPConnection, path: str, body: Any) -> float:
    """Of one request. Raises RuntimeError for a reply that is no 200."""
    content = json.dumps(body)
    begun = time.perf_counter()
    connection.request("POST", path, content, {"Content-Type": "application/json"})
    reply = connection.getresponse()
    text = reply.read()
    took = time.perf_counter() - begun
    if reply.status != 200:
        raise RuntimeError(f"{path}: status {reply.status}: {text[:300]!r}")
    return took


def medians(port: int, model: str, texts: Sequence[str]) -> tuple[float, float]:
    """Seconds of a plain request, and of one for maps; the first of each, which may open a graph, does not count."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    times: list[list[float]] = [[], []]
    for text in texts:
        for kept, (path, body) in zip(times, plain_and_told(model, text), strict=True):
            kept.append(seconds(connection, path, body))
    connection.close()
    plain, told = (statistics.median(kept[1:]) for kept in times)
    return plain, told


def measure(model: str, texts: Sequence[str], scratch: Path) -> Mapping[str, float]:
    port, grpc_port = free_port(), free_port()
    path, body = plain_and_told(model, "")[0]
    server = Server(
        name=model,
        command=serve_command(model, port, grpc_port, ()),
        port=port,
        path=path,
        body_of=lambda text: body | {"input" if model == "sentiment" else "prompt": text},
        label_of=str,
    )
    running = Running(server, scratch / f"{model}.log")
    try:
        running.wait_until_ready()
        plain, told = medians(port, model, texts)
    finally:
        running.end()
    return {"plain_ms": plain * 1e3, "told_ms": told * 1e3, "ratio": told / plain}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.attention", description=__doc__)
    parser.add_argument("--data", type=Path, help="sentences, one a line (default: made-up reviews)")
    parser.add_argument("--count", type=int, default=100, help="requests of each kind a model (default %(default)s)")
    parser.add_argument("--models", nargs="+", default=["sentiment", "chat", "translation"])
    given = parser.parse_args(arguments)
    texts = (read_sentences(given.data) if given.data else own_sentences())[: given.count]
    found: dict[str, Mapping[str, float]] = {}
    with scratch_folder() as scratch:
        for model in given.models:
            found[model] = one = measure(model, texts, scratch)
            verdict = "met" if one["ratio"] <= LIMIT else "MISSED"
            print(f"{model:12} with maps / plain {one['ratio']:.2f}, at most {LIMIT}: {verdict}", flush=True)
    rounded = {model: {name: round(value, 3) for name, value in one.items()} for model, one in found.items()}
    print(json.dumps({"bench": "attention", "requests": len(texts), "models": rounded}))


if __name__ == "__main__":
    main()
