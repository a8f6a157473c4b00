"""The commands that ask a model: of a fake, of the same fake behind HTTP, and as real processes."""

import asyncio
import io
import json
import signal
import sys
from contextlib import aclosing
from typing import Any

import pytest
import wire
from fakes import CHAT, until
from processes import EXIT_TIMEOUT_S, ROOT, attnd, environment

from service.__main__ import _parser, main
from service.cli.client import Answers, HttpClient
from service.cli.commands import CHUNK, plan
from service.domain import ModelInfo
from service.errors import (
    CALLERS_FAULT,
    AttndError,
    ConfigError,
    DeadlineExceeded,
    EngineFailed,
    InvalidRequest,
    NotFound,
    Overloaded,
    TooLarge,
    Unauthenticated,
    Unavailable,
    Unsupported,
)

TRANSLATOR = ModelInfo(id="translator", task="translation", created=1_700_000_002, facts={})


def client_of(served: wire.Served, **about: Any) -> HttpClient:
    return HttpClient(f"http://127.0.0.1:{served.port}", **about)


async def ask(backend: Answers, *arguments: str) -> None:
    options = vars(_parser().parse_args(arguments))
    async with aclosing(backend):
        await plan(options.pop("command"), options).run(backend, 60.0)


@pytest.mark.parametrize(
    "arguments",
    [
        ("classify", "a fine film", "a bad one"),
        ("classify", "--top-k=2", "a fine film"),
        ("classify", "--json", "a fine film"),
        ("generate", "one two three", "--max-tokens=2"),
        ("generate", "one two three", "--system=be brief", "--model=chat"),
        ("translate", "ein Hund", " ", "two dogs run", "--num-beams=4"),
        ("attention", "a fine film"),
        ("attention", "a fine film", "--layer=0,2", "--head=all"),
    ],
)
async def test_a_server_answers_as_its_backend_would(backend, served, capsys, arguments):
    backend.served = [TRANSLATOR] if arguments[0] == "translate" else [*backend.served, CHAT]
    await ask(backend, *arguments)
    local = capsys.readouterr().out
    await ask(client_of(served), *arguments)
    assert capsys.readouterr().out == local != ""
    asked = sorted(map(str, backend.requests or backend.generations))  # several come in whatever order
    assert asked[::2] == asked[1::2] != []


async def test_classify_prints_the_best_label_of_each_text(backend, capsys):
    await ask(backend, "classify", "a fine film", "so")
    assert capsys.readouterr().out == "POSITIVE 0.9340  a fine film\nPOSITIVE 0.8500  so\n"


@pytest.mark.parametrize("given", [(), ("-",)])
async def test_without_a_text_each_line_of_standard_input_is_one(backend, capsys, monkeypatch, given):
    lines = [f"text {at}" for at in range(CHUNK + 2)]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    await ask(backend, "classify", *given)
    assert [len(request.input) for request in backend.requests] == [CHUNK, 2]
    assert [line.partition("  ")[2] for line in capsys.readouterr().out.splitlines()] == lines
    first, second = backend.calls
    assert first.deadline < second.deadline  # each request has its time, not all of them together


@pytest.mark.parametrize("is_remote", [False, True])
async def test_a_server_that_takes_fewer_texts_at_once_gets_fewer(backend, served, capsys, monkeypatch, is_remote):
    backend.max_inputs = 20
    lines = [f"text {at}" for at in range(CHUNK + 2)]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    await ask(client_of(served) if is_remote else backend, "classify")
    assert [line.partition("  ")[2] for line in capsys.readouterr().out.splitlines()] == lines
    assert [len(request.input) for request in backend.requests] == [64, 32, 16, 16, 32, 16, 16, 2]


async def test_a_text_that_is_too_large_by_itself_is_named(backend, capsys, monkeypatch):
    classify = backend.classify

    async def picky(request, call):
        if any(one.text == "large" for one in request.input):
            raise TooLarge("too many bytes")
        return await classify(request, call)

    monkeypatch.setattr(backend, "classify", picky)
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\nb\nlarge\nc\n"))
    with pytest.raises(TooLarge, match="line 3: too many bytes"):
        await ask(backend, "classify")
    assert [line.partition("  ")[2] for line in capsys.readouterr().out.splitlines()] == ["a", "b"]


@pytest.mark.parametrize(
    ("errors", "named"), [("surrogateescape", "line 2 is not UTF-8"), ("strict", "standard input is not UTF-8")]
)
@pytest.mark.parametrize("command", ["classify", "translate"])
def test_lines_that_are_no_utf_8_are_refused(monkeypatch, command, errors, named):
    """The first is how Python reads where the locale is C, as in containers."""
    given = io.TextIOWrapper(io.BytesIO(b"fine\nf\xfcr\n"), encoding="utf-8", errors=errors)
    monkeypatch.setattr(sys, "stdin", given)
    with pytest.raises(InvalidRequest, match=named):
        plan(command, vars(_parser().parse_args([command])))


async def test_translations_come_in_order_and_lines_without_a_letter_stay(backend, capsys, monkeypatch):
    backend.served = [CHAT, TRANSLATOR]
    lines = ["one two", "", "* * *", *(f"line {at}" for at in range(CHUNK))]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    await ask(backend, "translate", "--num-beams=2")
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == lines
    assert {(one.model, one.num_beams, one.max_tokens) for one in backend.generations} == {("translator", 2, None)}
    assert len(backend.generations) == len(lines) - 2


def test_a_seed_is_for_what_samples(capsys):
    with pytest.raises(SystemExit):
        _parser().parse_args(["translate", "--seed=3"])
    assert "--seed" in capsys.readouterr().err
    assert _parser().parse_args(["generate", "--seed=3"]).seed == 3


async def test_a_chat_is_asked_for_with_messages(backend):
    backend.served = [CHAT]
    await ask(backend, "generate", "--system=be brief", "why?", "--temperature=0.5", "--stop=a", "--stop=b")
    (request,) = backend.generations
    assert [(one.role, one.content) for one in request.messages] == [("system", "be brief"), ("user", "why?")]
    assert (request.temperature, request.stop, request.max_tokens) == (0.5, ("a", "b"), 256)


async def test_text_is_printed_as_it_is_written(backend, served, capsys):
    """The stream breaks off after two tokens: they have been printed by then."""
    backend.served, backend.error, backend.error_after = [CHAT], NotFound("gone"), 2
    with pytest.raises(AttndError, match="gone"):
        await ask(client_of(served), "generate", "one two three")
    assert capsys.readouterr().out == "one two "


def test_help_tells_what_a_flag_means_here_and_its_default(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "key to send" in text
    assert "callers must send" not in text
    assert "at the most; default 256" in text
    assert "(1: none); default 1" in text


async def test_the_key_is_sent(backend, capsys):
    async with wire.serve(backend, api_key="secret") as served:
        await ask(client_of(served, api_key="secret"), "classify", "a")
        with pytest.raises(AttndError, match="key"):
            await ask(client_of(served), "classify", "a")


async def test_what_a_server_says_is_wrong_is_said(backend, served):
    async with aclosing(client_of(served)) as client:
        with pytest.raises(InvalidRequest, match="other"):
            await client._json("POST", "/v1/classify", {"input": "a", "other": 1})
    backend.error = InvalidRequest("layer 9 is not there")
    with pytest.raises(InvalidRequest, match="layer 9 is not there"):
        await ask(client_of(served), "attention", "a", "--layer=9")
    with pytest.raises(AttndError, match="there is no /elsewhere"):
        await ask(HttpClient(f"http://127.0.0.1:{served.port}/elsewhere"), "classify", "a")


@pytest.mark.parametrize("reply", [b"", b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{", b"hello\r\n\r\n"])
async def test_a_reply_that_breaks_off_is_an_error(reply):
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(reply)
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        with pytest.raises(Unavailable, match="broke off"):
            await ask(HttpClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"), "classify", "a")


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://localhost", "http://", "http://a:b"])
def test_what_is_no_url_is_refused(url):
    with pytest.raises(ConfigError, match="--url"):
        HttpClient(url)


@pytest.mark.parametrize(
    ("arguments", "status", "named"),
    [
        (("classify", "a", "--top-k=0"), 2, "top_k"),
        (("generate", "a", "--temperature=99"), 2, "temperature"),
        (("generate", "a", "--num-beams=4", "--temperature=1"), 2, "num_beams"),
        (("attention", "a", "--layer=x"), 2, "--layer"),
        (("attention", "a", "--layer=last,1"), 2, "--layer"),
        (("classify", "a", "--model=no-such-model"), 2, "no-such-model"),
        (("translate", "a", "--model=sentiment"), 2, "model 'sentiment' is for classification, not translation"),
        (("attention", "a", "--model=chat", "--kind=cross"), 2, "model 'chat' is for generation, not translation"),
        (("classify", "a", "--url=http://127.0.0.1:1"), 1, "http://127.0.0.1:1 cannot be reached"),
        (("classify", "a", "--url=nowhere"), 2, "--url='nowhere'"),
    ],
)
def test_what_goes_wrong_is_one_line_and_a_status(arguments, status, named):
    done = attnd(*arguments)
    assert done.returncode == status, done.stderr
    assert named in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("error_class", "status"),
    [
        *((one, 2) for one in (InvalidRequest, TooLarge, NotFound, Unauthenticated, Unsupported)),
        *((one, 1) for one in (Overloaded, DeadlineExceeded, Unavailable, EngineFailed)),
    ],
)
async def test_the_exit_status_says_whose_fault_it_is(backend, served, error_class, status):
    backend.served, backend.error = [CHAT], error_class("why not")
    process = await process_of(served, "generate", "a")
    async with asyncio.timeout(EXIT_TIMEOUT_S):
        output, errors = await process.communicate()
    assert (process.returncode, output, errors) == (status, b"", b"attnd: why not\n")
    assert issubclass(error_class, CALLERS_FAULT) == (status == 2)


async def test_a_model_that_a_server_does_not_have_is_a_wrong_request(served):
    for arguments in (("classify", "a"), ("generate", "a"), ("translate", "a"), ("attention", "a")):
        process = await process_of(served, *arguments, "--model=other")
        async with asyncio.timeout(EXIT_TIMEOUT_S):
            _, errors = await process.communicate()
        assert (process.returncode, b"no model 'other'" in errors) == (2, True)


def test_a_model_of_this_process_answers():
    done = attnd("classify", "--json", "a gripping, funny film", "two hours of my life gone")
    assert done.returncode == 0, done.stderr
    assert [scores[0]["label"] for scores in json.loads(done.stdout)["results"]] == ["POSITIVE", "NEGATIVE"]
    assert done.stderr == ""


# A shell's background job ignores SIGINT and hands that down: to these tests, if they are one, and to what they start.
HEEDING_CTRL_C = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("service", run_name="__main__")
"""


async def process_of(served: wire.Served, *arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", HEEDING_CTRL_C, *arguments, f"--url=http://127.0.0.1:{served.port}"),
        cwd=ROOT, env=environment(), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip


async def test_ctrl_c_abandons_the_request(backend, served):
    backend.served = [CHAT]
    backend.hold()
    process = await process_of(served, "generate", "one two")
    await until(lambda: backend.num_waiting == 1)
    process.send_signal(signal.SIGINT)
    async with asyncio.timeout(EXIT_TIMEOUT_S):
        output, errors = await process.communicate()
    assert (process.returncode, output, errors) == (130, b"", b"")
    await until(lambda: backend.num_cancelled == 1)
