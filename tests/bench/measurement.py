"""What is measured in a round, and how one point of it is measured.

A `Point` is a contender, a wire and a load; `Bench` holds what all points share. Knows the native API's messages (for
gRPC) and nothing of how results are shown.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from service.rpc.pb.attnd.v1 import inference_pb2 as pb

from .figures import Sample
from .generator import Load, Wire
from .loads import run_generator, run_wrk
from .servers import Running, Server, ServerFailed, ask

# Poisson arrivals come at this share of what the same server answered at the highest concurrency.
POISSON_SHARE = 0.7
_PATHS: Mapping[Wire, str] = {
    "grpc": "/attnd.v1.Inference/Classify",
    "stream": "/attnd.v1.Inference/ClassifyStream",
}
# Room for arrivals that find earlier ones unanswered. HTTP/1.1 needs a connection for each.
_POISSON_IN_FLIGHT = 128
_WARM_UP_S = 0.5
_CHECKED = 24


@dataclass(frozen=True, slots=True)
class Point:
    """One cell of the table. `concurrency` None: Poisson arrivals."""

    contender: str
    wire: Wire
    concurrency: int | None

    @property
    def name(self) -> str:
        load = "poisson" if self.concurrency is None else f"c{self.concurrency}"
        return f"{self.contender} {'rest' if self.wire == 'http' else self.wire} {load}"


def points_of(server: Server, concurrencies: Sequence[int]) -> list[Point]:
    """In measuring order: a wire's Poisson point follows its closed loops, whose best gives the capacity."""
    wires: tuple[Wire, ...] = ("http", "grpc", "stream") if server.grpc_port else ("http",)
    loads: tuple[int | None, ...] = (*concurrencies, None)
    return [Point(server.name, wire, load) for wire in wires for load in loads]


@dataclass(frozen=True)
class Bench:
    """The texts, the labels that are right, how long a point takes, and how many connections gRPC calls share."""

    sentences: tuple[str, ...]
    labels: tuple[str, ...]
    scratch: Path
    seconds: float
    concurrencies: tuple[int, ...]
    grpc_connections: int


def bodies_file(bench: Bench, server: Server, serialise: Callable[[object], str]) -> Path:
    """One request body a line, for wrk."""
    path = bench.scratch / f"{server.name}.bodies"
    path.write_text("".join(serialise(server.body_of(text)) + "\n" for text in bench.sentences), encoding="utf-8")
    return path


def requests_of(sentences: Sequence[str], wire: Wire) -> tuple[str, ...]:
    """Serialised protobuf requests, as latin-1 text so that they travel in JSON."""
    plain = [_request(text) for text in sentences]
    messages = plain if wire == "grpc" else [pb.ClassifyStreamRequest(request=one) for one in plain]
    return tuple(message.SerializeToString().decode("latin-1") for message in messages)


def measure(bench: Bench, point: Point, server: Server, bodies: Path, capacity: float, turn: int) -> Sample:
    """Load a resumed server as the point says. `capacity` (requests a second) sets the Poisson rate."""
    if point.wire == "http" and point.concurrency is not None:
        run_wrk(server.url, bodies, concurrency=point.concurrency, seconds=1)
        start = turn * len(bench.sentences) // 7
        return run_wrk(server.url, bodies, concurrency=point.concurrency, seconds=bench.seconds, start=start)
    if point.wire == "http":
        lines = bodies.read_bytes().decode("latin-1").splitlines()
        return run_generator(_load(bench, point, server.port, server.path, tuple(lines), capacity, turn))
    requests = requests_of(bench.sentences, point.wire)
    return run_generator(_load(bench, point, server.grpc_port, _PATHS[point.wire], requests, capacity, turn))


def _load(
    bench: Bench, point: Point, port: int, path: str, bodies: tuple[str, ...], capacity: float, turn: int
) -> Load:
    in_flight = point.concurrency or _POISSON_IN_FLIGHT
    connections = in_flight if point.wire == "http" else 1 if point.wire == "stream" else bench.grpc_connections
    return Load(
        wire=point.wire,
        host="127.0.0.1",
        port=port,
        path=path,
        bodies=bodies,
        concurrency=in_flight,
        connections=min(connections, in_flight),
        seconds=bench.seconds,
        warm_up_s=_WARM_UP_S,
        rate=None if point.concurrency is not None else max(1.0, capacity * POISSON_SHARE),
        seed=turn,
    )


def wrong_replies(bench: Bench, process: Running, turn: int) -> int:
    """How many of a sample of sentences got another label than the bare loop gave, over every wire of the server.

    The sample moves with `turn`. The pipeline's model is random, so of its replies only the label's kind is checked.
    """
    server = process.server
    first = turn * _CHECKED % len(bench.sentences)
    texts = bench.sentences[first : first + _CHECKED]
    right = list(bench.labels[first : first + _CHECKED])
    got = [ask(server, text) for text in texts]
    if server.name == "pipeline":
        return sum(label not in ("NEGATIVE", "POSITIVE") for label in got)
    wrong = _differing(got, right)
    if server.grpc_port:
        wrong += _differing(_ask_unary(server, texts), right) + _differing(_ask_stream(server, texts), right)
    return wrong


def _differing(got: Sequence[str], right: Sequence[str]) -> int:
    return sum(one != other for one, other in zip(got, right, strict=True))


def _ask_unary(server: Server, texts: Sequence[str]) -> list[str]:
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        classify = channel.unary_unary(
            _PATHS["grpc"], pb.ClassifyRequest.SerializeToString, pb.ClassifyResponse.FromString
        )
        replies = [classify(_request(text), timeout=30) for text in texts]
    return [_best(reply) for reply in replies]


def _ask_stream(server: Server, texts: Sequence[str]) -> list[str]:
    requests = [pb.ClassifyStreamRequest(request=_request(text)) for text in texts]
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        classify = channel.stream_stream(
            _PATHS["stream"], pb.ClassifyStreamRequest.SerializeToString, pb.ClassifyStreamResponse.FromString
        )
        replies = list(classify(iter(requests), timeout=60))
    failed = [reply.error.message for reply in replies if reply.HasField("error")]
    if failed:
        raise ServerFailed(f"{server.name}: ClassifyStream: {failed[0]}")
    return [_best(reply.response) for reply in replies]


def _request(text: str) -> pb.ClassifyRequest:
    return pb.ClassifyRequest(inputs=[pb.TextInput(text=text)])


def _best(reply: pb.ClassifyResponse) -> str:
    return str(reply.results[0].scores[0].label)
