"""The .proto file, the committed stubs, and a client that never saw our code."""

import asyncio
import base64
import json
import shutil
import struct
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from fakes import CHAT, MODEL, FakeBackend, fake_scores

from service.config import Settings
from service.domain import TextInput
from service.metrics import Metrics
from service.observed import Observed
from service.rpc.server import RpcServer

ROOT = Path(__file__).resolve().parent.parent
PROTO = "attnd/v1/inference.proto"
BUF = shutil.which("buf") or shutil.which("buf", path=str(Path(sys.executable).parent))

needs_buf = pytest.mark.skipif(BUF is None, reason="buf (from buf-bin) is not installed")


@pytest.fixture
async def address() -> AsyncIterator[str]:
    settings = Settings(grpc_port=0, drain_timeout=0.1)
    backend = FakeBackend()
    backend.served = [MODEL, CHAT]
    server = RpcServer(Observed(backend, Metrics(settings.latency_buckets, {})), settings)
    yield f"http://127.0.0.1:{await server.start()}"
    await server.stop()


async def buf_curl(url: str, data: str, *flags: str) -> list[dict[str, object]]:
    """What `buf curl` prints for a call: one JSON object a reply. It learns the types by reflection."""
    process = await asyncio.create_subprocess_exec(
        str(BUF), "curl", "--http2-prior-knowledge", "--protocol", "grpc", "--data", data, *flags, url,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    async with asyncio.timeout(60):
        out, err = await process.communicate()
    decoder, text, replies = json.JSONDecoder(), (out or err).decode().strip(), []
    while text:
        reply, end = decoder.raw_decode(text)
        replies.append(reply)
        text = text[end:].strip()
    return replies


def test_the_committed_stubs_are_those_of_the_proto_file(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools")
    subprocess.run(
        [
            sys.executable, "-m", "grpc_tools.protoc", f"--proto_path={ROOT / 'proto'}",
            f"--python_out={tmp_path}", f"--pyi_out={tmp_path}", PROTO,
        ],
        check=True,
    )  # fmt: skip
    fresh = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*.py*") if path.is_file()}
    committed = ROOT / "service" / "rpc" / "pb"
    assert fresh
    assert fresh == {path: (committed / path).read_text() for path in fresh}


@needs_buf
def test_buf_lint_finds_nothing() -> None:
    done = subprocess.run([str(BUF), "lint"], cwd=ROOT / "proto", capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@needs_buf
async def test_a_foreign_client_lists_methods(address: str) -> None:
    process = await asyncio.create_subprocess_exec(
        str(BUF), "curl", "--http2-prior-knowledge", "--protocol", "grpc", "--list-methods", address,
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, _ = await process.communicate()
    ours = {
        f"attnd.v1.Inference/{name}"
        for name in ("Classify", "ClassifyStream", "Attention", "Explain", "Generate", "ListModels")
    }
    assert ours | {"grpc.health.v1.Health/Check"} <= set(out.decode().split())


@needs_buf
async def test_a_foreign_client_classifies(address: str) -> None:
    (reply,) = await buf_curl(f"{address}/attnd.v1.Inference/Classify", '{"inputs": [{"text": "a fine film"}]}')
    best = fake_scores(TextInput("a fine film"))[0]
    assert reply["model"] == "sentiment"
    assert reply["results"][0]["scores"][0] == {"label": best.label, "score": best.score}  # type: ignore[index]


@needs_buf
async def test_a_foreign_client_streams(address: str) -> None:
    texts = ["one", "", "three"]
    data = "".join(json.dumps({"request": {"inputs": [{"text": text}]}}) for text in texts)
    replies = await buf_curl(f"{address}/attnd.v1.Inference/ClassifyStream", data)
    labels = [reply["response"]["results"][0]["scores"][0]["label"] for reply in replies]  # type: ignore[index]
    assert labels == [fake_scores(TextInput(text))[0].label for text in texts]


@needs_buf
async def test_a_foreign_client_generates(address: str) -> None:
    data = '{"messages": [{"role": "user", "content": "say this"}], "maxTokens": 8, "logprobs": 0}'
    replies = await buf_curl(f"{address}/attnd.v1.Inference/Generate", data)
    start, *tokens, finish, end = [event for reply in replies for event in reply["events"]]  # type: ignore[attr-defined]
    assert start == {"start": {"model": "chat", "promptTokens": 2}}
    assert [event["token"]["text"] for event in tokens] == ["say ", "this "]
    assert tokens[0]["token"]["logprob"]["logprob"] == -0.25
    assert finish["finish"]["finishReason"] == "FINISH_REASON_STOP"
    assert end["end"]["usage"] == {"promptTokens": 2, "completionTokens": 2}


@needs_buf
async def test_a_foreign_client_gets_attention(address: str) -> None:
    data = '{"text": "a film", "layers": {"all": true}, "heads": {"numbers": {"numbers": [1]}}}'
    summary, *maps = await buf_curl(f"{address}/attnd.v1.Inference/Attention", data)
    assert [token["text"] for token in summary["summary"]["tokens"]] == ["[CLS]", "a", "film"]  # type: ignore[index]
    assert [reply["map"]["shape"] for reply in maps] == [[1, 3, 3]] * 3  # type: ignore[index]
    weights = struct.unpack("<9f", base64.b64decode(maps[2]["map"]["weights"]))  # type: ignore[index]
    assert weights == (2100, 2101, 2102, 2110, 2111, 2112, 2120, 2121, 2122)


@needs_buf
async def test_a_foreign_client_gets_an_explanation(address: str) -> None:
    (reply,) = await buf_curl(f"{address}/attnd.v1.Inference/Explain", '{"text": "a film", "label": "NEGATIVE"}')
    assert (reply["label"], reply["scores"]) == ("NEGATIVE", [0, 0.01, 0.04])


@needs_buf
async def test_a_foreign_client_checks_health(address: str) -> None:
    (reply,) = await buf_curl(f"{address}/grpc.health.v1.Health/Check", '{"service": "attnd.v1.Inference"}')
    assert reply == {"status": "SERVING"}


@needs_buf
async def test_a_foreign_client_reads_an_error(address: str) -> None:
    (reply,) = await buf_curl(f"{address}/attnd.v1.Inference/Classify", "{}")
    assert reply["code"] == "invalid_argument"
    assert "at least one" in str(reply["message"])
