"""Who is compared: how attnd and each peer is started on a bundle, and what a request to each looks like."""

import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .environments import python_of
from .servers import Server, free_port

PEERS = Path(__file__).with_name("peers")
ROOT = PEERS.parents[2]
PEER_NAMES = ("pipeline", "litserve", "bentoml")


@dataclass(frozen=True, slots=True)
class Tuning:
    """A peer's own knobs. `wait_s` is LitServe's batch_timeout or BentoML's max_latency; a batch of 1: no batching."""

    batch: int
    wait_s: float
    workers: int
    threads: int

    def __str__(self) -> str:
        return (
            f"batch {self.batch}, wait {self.wait_s * 1000:g} ms, {self.workers} worker(s) x {self.threads} thread(s)"
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def candidates(peer: str, cores: int) -> tuple[Tuning, ...]:
    """The settings that are tried for a peer before it is measured: one process on all cores, and one for each."""
    layouts = sorted({(1, cores), (cores, 1)})
    if peer == "pipeline":
        return tuple(Tuning(batch=1, wait_s=0.0, workers=workers, threads=threads) for workers, threads in layouts)
    if peer == "litserve":
        knobs = [(1, 0.0), (4, 0.001), (8, 0.001), (8, 0.005), (16, 0.005)]
    else:
        # Under a tight max_latency BentoML refuses requests (503) instead of being late.
        knobs = [(4, 1.0), (8, 1.0), (16, 1.0), (32, 1.0)]
    return tuple(
        Tuning(batch=batch, wait_s=wait_s, workers=workers, threads=threads)
        for batch, wait_s in knobs
        for workers, threads in layouts
    )


def peer_server(peer: str, bundle: Path, cache: Path, tuning: Tuning) -> Server:
    """The named peer on free ports."""
    makers = {"pipeline": pipeline, "litserve": litserve, "bentoml": bentoml}
    return makers[peer](bundle, cache, tuning)


def text_body(text: str) -> Any:
    return {"input": text}


def attnd(bundle: Path, arguments: tuple[str, ...] = ()) -> Server:
    """The service as shipped: one process, HTTP and gRPC, its own defaults unless `arguments` say otherwise."""
    port, grpc_port = free_port(), free_port()
    return Server(
        name="attnd",
        command=serve_command(str(bundle), port, grpc_port, arguments),
        port=port,
        grpc_port=grpc_port,
        path="/v1/classify",
        body_of=text_body,
        label_of=lambda reply: str(reply["results"][0][0]["label"]),
        directory=ROOT,
    )


def serve_command(model: str, port: int, grpc_port: int, arguments: tuple[str, ...]) -> tuple[str, ...]:
    """`attnd serve`, from the checkout's ROOT. `model` is a bundle directory or the id of a shipped model."""
    ports = (f"--http-port={port}", f"--grpc-port={grpc_port}")
    return (sys.executable, "-m", "service", "serve", *ports, f"--models={model}", *arguments)


def litserve(bundle: Path, cache: Path, tuning: Tuning) -> Server:
    port = free_port()
    knobs = (tuning.batch, tuning.wait_s, tuning.workers, tuning.threads)
    script = str(PEERS / "litserve_onnx.py")
    return Server(
        name="litserve",
        command=(str(python_of("litserve", cache)), script, str(bundle), str(port), *map(str, knobs)),
        port=port,
        path="/predict",
        body_of=text_body,
        label_of=lambda reply: str(reply["label"]),
    )


def bentoml(bundle: Path, cache: Path, tuning: Tuning) -> Server:
    port = free_port()
    python = python_of("bentoml", cache)
    serve = ("serve", "bentoml_onnx:Sentiment", "--host", "127.0.0.1", "--port", str(port))
    return Server(
        name="bentoml",
        command=(str(python), "-m", "bentoml", *serve),
        port=port,
        path="/classify",
        body_of=lambda text: {"inputs": [text]},
        label_of=lambda reply: str(reply[0]["label"]),
        directory=PEERS,
        environment={
            "BENCH_BUNDLE": str(bundle),
            "BENCH_BATCH": str(tuning.batch),
            "BENCH_LATENCY_MS": str(round(tuning.wait_s * 1000)),
            "BENCH_WORKERS": str(tuning.workers),
            "BENCH_THREADS": str(tuning.threads),
            "BENTOML_DO_NOT_TRACK": "True",
        },
    )


def pipeline(bundle: Path, cache: Path, tuning: Tuning) -> Server:
    """transformers' pipeline with a model of DistilBERT's size; the bundle gives only its tokenizer."""
    port = free_port()
    python = python_of("pipeline", cache)
    model = cache / "distilbert-random"
    knobs = (tuning.workers, tuning.threads)
    if not (model / "tokenizer.json").exists():
        make = (str(python), str(PEERS / "make_distilbert.py"), str(bundle / "tokenizer.json"), str(model))
        subprocess.run(make, check=True, capture_output=True)
    return Server(
        name="pipeline",
        command=(str(python), str(PEERS / "transformers_fastapi.py"), str(model), str(port), *map(str, knobs)),
        port=port,
        path="/classify",
        body_of=text_body,
        label_of=lambda reply: str(reply["label"]),
        environment={"TOKENIZERS_PARALLELISM": "false"},
    )
