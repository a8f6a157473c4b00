"""What clients should not do, over real sockets and on both event loops; after each, a good request still works."""

import asyncio
import logging
import socket
import struct
import time
from collections.abc import AsyncIterator

import orjson
import pytest
import wire
from fakes import FakeBackend, until
from wire import GOOD, classify, connect, request

from service.gateway.limits import Limits
from service.observed import NO_ROUTE

HEAD = b"POST /v1/classify HTTP/1.1\r\nhost: test\r\n"


@pytest.fixture
async def served(backend: FakeBackend) -> AsyncIterator[wire.Served]:
    """A gateway with small limits, which must serve a good request when the test is over."""
    async with wire.serve(backend, limits=Limits(max_body_bytes=10_000, max_head_bytes=4096)) as served:
        yield served
        await _check_alive(served)


@pytest.fixture
async def impatient(backend: FakeBackend) -> AsyncIterator[wire.Served]:
    """A gateway that waits for nobody."""
    limits = Limits(
        max_body_bytes=100_000, receive_seconds=0.2, idle_seconds=0.2, stalled_seconds=0.2, sweep_seconds=0.05
    )
    async with wire.serve(backend, limits=limits) as served:
        yield served


async def _check_alive(served: wire.Served) -> None:
    served.backend.release()
    served.backend.error = None
    reply = await classify(served.port)
    assert reply.status == 200
    assert reply.json["model"] == "sentiment"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"4",
        b'"a"',
        b"\x00\xff\xfe",
        b"input=a",
        b'{"input": "a"} {"input": "b"}',
        b'{"input": "a",}',
        b'{"input": NaN}',
        b"{'input': 'a'}",
        b'{"input": "\xff\xfe"}',
        b'{"input": "caf\xe9"}',
        b'{"input": "\\ud800"}',
        b'{"input": "\\udc00\\ud800"}',
        b'{"input": "\xed\xa0\x80"}',
        '{"input": "a"}'.encode("utf-16"),
        b'{"input": "a\nb"}',
        b"[" * 5000,
        b'{"input":' * 500,
        b'{"input": ' + b"9" * 5000 + b"}",
    ],
)
async def test_garbage_bodies(served: wire.Served, body: bytes) -> None:
    reply = await classify(served.port, body)
    assert reply.status == 422
    assert set(reply.json["error"]) == {"message", "type", "param", "code"}
    assert len(reply.body) < 1000
    assert served.backend.requests == []
    assert served.count("invalid") == 1


async def test_a_surrogate_pair_is_a_character(served: wire.Served) -> None:
    assert (await classify(served.port, b'{"input": "\\ud83d\\ude00"}')).status == 200
    assert served.backend.requests[0].input[0].text == "😀"


async def test_a_body_at_the_limit_and_over_it(served: wire.Served) -> None:
    def body(size: int) -> bytes:
        return orjson.dumps({"input": "x" * (size - len('{"input":""}'))})

    assert (await classify(served.port, body(10_000))).status == 200
    reply = await classify(served.port, body(10_001))
    assert (reply.status, reply.json["error"]["code"]) == (413, "body_too_large")
    assert "10000" in reply.json["error"]["message"]
    assert reply.headers["x-request-id"]
    assert served.count("invalid") == 1


async def test_a_huge_length_is_refused_before_the_body(served: wire.Served) -> None:
    async with connect(served.port) as client:
        await client.send(HEAD + b"content-length: 99999999999\r\n\r\n")
        assert (await client.read()).status == 413
        assert await client.is_closed()


async def test_a_huge_chunked_body_is_refused_while_it_comes(served: wire.Served) -> None:
    async with connect(served.port) as client:
        await client.send(HEAD + b"transfer-encoding: chunked\r\n\r\n")
        for _ in range(11):
            await client.send(b"3e8\r\n" + b" " * 1000 + b"\r\n")
        assert (await client.read()).status == 413
        assert await client.is_closed()
    assert served.backend.requests == []


async def test_a_refused_sender_can_read_why_after_sending_all(served: wire.Served) -> None:
    reply = await classify(served.port, b" " * 3_000_000)
    assert reply.status == 413


async def test_a_huge_body_is_refused_in_the_dialect(served: wire.Served) -> None:
    reply = await wire.ask(served.port, "POST", "/", b" " * 20_000)
    assert (reply.status, reply.json["error_type"]) == (413, "body_too_large")


async def test_chunking_overhead_is_bounded(served: wire.Served) -> None:
    async with connect(served.port) as client:
        await client.send(HEAD + b"transfer-encoding: chunked\r\n\r\n")
        await client.send(b"1;" + b"x" * 200_000)
        assert (await client.read()).status in (400, 431)


async def test_a_chunked_body_in_pieces_is_read(served: wire.Served) -> None:
    async with connect(served.port) as client:
        for piece in (HEAD, b"transfer-encoding: chunked\r\n", b"\r\n", b"5\r\n" + GOOD[:5], b"\r\n", b"13\r"):
            await client.send(piece)
            await asyncio.sleep(0.005)
        await client.send(b"\n" + GOOD[5:] + b"\r\n0\r\nx-trailer: 1\r\n\r\n")
        assert (await client.read()).status == 200


async def test_the_time_of_a_request_begins_before_its_body_is_there(served: wire.Served) -> None:
    async with connect(served.port) as client:
        await client.send(HEAD + b"content-length: %d\r\nexpect: 100-continue\r\n\r\n" % len(GOOD))
        await client.read(has_body=False)
        head_seen = time.monotonic()
        await client.send(GOOD)
        assert (await client.read()).status == 200
        (first,) = served.backend.calls
        assert first.progress.begun <= head_seen
        await client.ask("POST", "/v1/classify", GOOD)
    assert served.backend.calls[1].progress.begun > head_seen  # and not with the connection's


async def test_the_time_of_a_pipelined_request_begins_with_its_own_first_byte(served: wire.Served) -> None:
    served.backend.hold()
    async with connect(served.port) as client:
        await client.send(request("POST", "/v1/classify", GOOD) * 2)
        await until(lambda: served.backend.num_waiting == 1)
        seen = time.monotonic()
        served.backend.release()
        for _ in range(2):
            await client.read()
    assert all(call.progress.begun <= seen for call in served.backend.calls)


async def test_a_request_byte_by_byte(served: wire.Served) -> None:
    async with connect(served.port) as client:
        for byte in request("POST", "/v1/classify", GOOD):
            await client.send(bytes([byte]))
        assert (await client.read()).status == 200


async def test_ten_thousand_inputs_are_refused_by_the_backend(backend: FakeBackend) -> None:
    async with wire.serve(backend) as served:
        reply = await classify(served.port, orjson.dumps({"input": ["a"] * 10_000}))
        assert (reply.status, reply.json["error"]["param"]) == (413, "input")
        assert "1024" in reply.json["error"]["message"]
        assert (await classify(served.port)).status == 200


async def test_so_many_inputs_are_not_even_validated(backend: FakeBackend) -> None:
    async with wire.serve(backend) as served:
        reply = await classify(served.port, b'{"input": [' + b",".join([b"1"] * 200_000) + b"]}")
        assert (reply.status, reply.json["error"]["param"]) == (413, "input")
        assert "200000" in reply.json["error"]["message"]
        await _check_alive(served)


@pytest.mark.parametrize("item", [b"1", b"{}", b"[]", b"null"])
async def test_only_the_first_of_many_bad_inputs_is_looked_at(backend: FakeBackend, item: bytes) -> None:
    async with wire.serve(backend) as served:
        reply = await classify(served.port, b'{"input": [' + b",".join([item] * 16_000) + b"]}")
        assert reply.status == 422
        assert reply.json["error"]["param"].startswith("input.0")
        assert "more problem" not in reply.json["error"]["message"]
        await _check_alive(served)


@pytest.mark.parametrize(
    ("fields", "param", "most", "number"),
    [
        ({"messages": [{}] * 600_000}, "messages", 1024, 600_000),
        ({"prompt": "a", "stop": [0] * 900_000}, "stop", 16, 900_000),
        ({"prompt": "a", "stop_token_ids": ["a"] * 400_000}, "stop_token_ids", 16, 400_000),
        ({"prompt": "a", "logit_bias": dict.fromkeys(map(str, range(150_000)), "a")}, "logit_bias", 1024, 150_000),
    ],
)
async def test_a_list_that_is_too_long_is_counted_before_it_is_read(
    backend: FakeBackend, fields: dict[str, object], param: str, most: int, number: int
) -> None:
    async with wire.serve(backend) as served:
        begun = time.process_time()
        reply = await wire.ask(served.port, "POST", "/v1/generate", orjson.dumps(fields))
        assert (reply.status, reply.json["error"]["param"]) == (422, param)
        assert reply.json["error"]["message"].startswith(f"{param}: at most {most} are taken, not {number}, got ")
        assert "more problem" not in reply.json["error"]["message"]
        assert time.process_time() - begun < 1.5  # seconds; where each item is read, up to 7
        await _check_alive(served)


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"hello\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nbad header\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nhost: a\x00b\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        HEAD + b"content-length: abc\r\n\r\n",
        HEAD + b"content-length: -1\r\n\r\n",
        HEAD + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}",
        HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n",
    ],
)
async def test_what_is_not_http_is_told_so_and_hung_up_on(served: wire.Served, garbage: bytes) -> None:
    async with connect(served.port) as client:
        await client.send(garbage)
        reply = await client.read()
        assert reply.status == 400
        assert reply.json["error"]["code"] == "malformed_http"
        assert len(reply.headers["x-request-id"]) == 32
        assert await client.is_closed()
    assert served.backend.requests == []
    assert served.count("invalid", NO_ROUTE) == 1


async def test_a_huge_head_is_refused(served: wire.Served) -> None:
    async with connect(served.port) as client:
        await client.send(b"GET /healthz HTTP/1.1\r\nx-request-id: mine\r\nx-long: ")
        for _ in range(40):
            await client.send(b"a" * 10_000)
        reply = await client.read()
        assert (reply.status, reply.json["error"]["code"]) == (431, "head_too_large")
        assert reply.headers["x-request-id"] == "mine"
        assert await client.is_closed()
    assert served.count("invalid", NO_ROUTE) == 1


@pytest.mark.parametrize(
    ("path", "headers", "is_fit"),
    [
        (b"/healthz", [b"a" * 3900], True),
        (b"/healthz", [b"a" * 4100], False),
        (b"/healthz", [b"a" * 900] * 5, False),
        (b"/healthz?" + b"a" * 4100, [], False),
    ],
)
async def test_a_head_has_the_same_limit_when_it_comes_at_once(
    served: wire.Served, path: bytes, headers: list[bytes], is_fit: bool
) -> None:
    lines = b"".join(b"x-long: %b\r\n" % value for value in headers)
    async with connect(served.port) as client:
        await client.send(b"GET %b HTTP/1.1\r\nhost: test\r\n%b\r\n" % (path, lines) + request("GET", "/healthz"))
        assert [(await client.read()).status for _ in range(1 + is_fit)] == ([200, 200] if is_fit else [431])
        if not is_fit:
            assert await client.is_closed()
    assert served.count("invalid", NO_ROUTE) == (0 if is_fit else 1)


@pytest.mark.parametrize("part", [b"", b"POST /v1/cla", HEAD, HEAD + b"content-length: 24\r\n\r\n{", HEAD + b"x: y"])
async def test_a_client_that_stops_halfway_is_hung_up_on(impatient: wire.Served, part: bytes) -> None:
    async with connect(impatient.port) as client:
        await client.send(part)
        assert await client.is_closed()
    assert impatient.backend.requests == []
    await until(lambda: impatient.count("cancelled", NO_ROUTE) == bool(part))


async def test_a_drip_does_not_keep_a_request_alive(impatient: wire.Served) -> None:
    async with connect(impatient.port) as client:

        async def drip() -> None:
            await client.send(b"GET /healthz HTTP/1.1\r\n")
            while True:
                await client.send(b"x: y\r\n")
                await asyncio.sleep(0.02)

        dripping = asyncio.ensure_future(drip())
        assert await client.is_closed()
        dripping.cancel()


async def test_a_client_that_resets_at_once_is_let_go_without_a_word(
    served: wire.Served, caplog: pytest.LogCaptureFixture
) -> None:
    sockets = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(20)]
    for one in sockets:  # all are gone before the event loop can accept one
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        one.close()
    with caplog.at_level(logging.DEBUG):
        await _check_alive(served)
        await until(lambda: served.server.num_connections == 0)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("part", [b"POST /v1/cla", HEAD + b"content-length: 24\r\n\r\n{"])
@pytest.mark.parametrize("before", [b"", request("POST", "/v1/classify", GOOD)])
async def test_a_client_that_leaves_halfway_is_counted(served: wire.Served, before: bytes, part: bytes) -> None:
    served.backend.hold()
    async with connect(served.port) as client:
        await client.send(before + part)
        await until(lambda: served.backend.num_waiting == bool(before))
    await until(lambda: served.count("cancelled", NO_ROUTE) == 1)
    await until(lambda: served.count("cancelled") == bool(before))


async def test_a_client_that_leaves_cancels_its_request(served: wire.Served) -> None:
    served.backend.hold()
    async with connect(served.port) as client:
        await client.send(request("POST", "/v1/classify", GOOD))
        await until(lambda: served.backend.num_waiting == 1)
    await until(lambda: served.backend.num_cancelled == 1)
    assert served.backend.num_waiting == 0
    assert served.count("cancelled") + served.count("cancelled", model="sentiment") == 1


async def test_many_clients_that_leave_at_once(served: wire.Served) -> None:
    served.backend.hold()
    clients = [wire.Wire(*await asyncio.open_connection("127.0.0.1", served.port)) for _ in range(50)]
    for client in clients:
        await client.send(request("POST", "/v1/classify", GOOD))
    await until(lambda: served.backend.num_waiting == 50)
    for client in clients:
        client.writer.transport.abort()
    await until(lambda: served.backend.num_cancelled == 50)


async def test_a_client_that_leaves_does_not_disturb_another(served: wire.Served) -> None:
    served.backend.hold()
    other = asyncio.ensure_future(classify(served.port))
    async with connect(served.port) as client:
        await client.send(request("POST", "/v1/classify", GOOD))
        await until(lambda: served.backend.num_waiting == 2)
    await until(lambda: served.backend.num_cancelled == 1)
    served.backend.release()
    assert (await other).status == 200


async def test_pipelined_requests_are_answered_in_order(served: wire.Served) -> None:
    texts = [f"text {number}" for number in range(20)]
    async with connect(served.port) as client:
        await client.send(b"".join(request("POST", "/v1/classify", orjson.dumps({"input": text})) for text in texts))
        replies = [await client.read() for _ in texts]
    assert [asked.input[0].text for asked in served.backend.requests] == texts
    assert [reply.status for reply in replies] == [200] * 20
    assert len({reply.headers["x-request-id"] for reply in replies}) == 20


async def test_pipelined_requests_run_one_at_a_time_and_leave_together(served: wire.Served) -> None:
    served.backend.hold()
    async with connect(served.port) as client:
        await client.send(request("POST", "/v1/classify", GOOD) * 3)
        await until(lambda: served.backend.num_waiting == 1)
    await until(lambda: served.backend.num_cancelled == 1)
    assert len(served.backend.requests) == 1
    assert (served.count("cancelled"), served.count("cancelled", NO_ROUTE)) == (1, 2)


async def test_a_good_request_before_garbage_is_answered(served: wire.Served) -> None:
    async with connect(served.port) as client:
        await client.send(request("POST", "/v1/classify", GOOD) + b"\x00garbage\r\n\r\n")
        assert (await client.read()).status == 200
        assert await client.is_closed()
    assert served.count("invalid", NO_ROUTE) == 1


async def test_a_reader_that_does_not_read_is_dropped(impatient: wire.Served) -> None:
    body = orjson.dumps({"input": ["x"] * 1000})
    reader, writer = await asyncio.open_connection("127.0.0.1", impatient.port, limit=1024)
    writer.write(request("POST", "/v1/classify", body) * 400)  # replies of 80 kB each: more than sockets hold
    await until(lambda: impatient.server.num_connections == 1)
    await until(lambda: impatient.server.num_connections == 0)
    assert len(impatient.backend.requests) < 400
    await wire.Wire(reader, writer).close()


async def test_a_connection_is_kept_alive(served: wire.Served) -> None:
    async with connect(served.port) as client:
        for body in (GOOD, b"{", b'{"input": 4}', GOOD):
            reply = await client.ask("POST", "/v1/classify", body)
            assert "connection" not in reply.headers
        assert reply.status == 200


async def test_a_client_may_ask_to_close(served: wire.Served) -> None:
    async with connect(served.port) as client:
        reply = await client.ask("POST", "/v1/classify", GOOD, "connection: close\r\n")
        assert (reply.status, reply.headers["connection"]) == (200, "close")
        assert await client.is_closed()


async def test_http_1_0(served: wire.Served) -> None:
    for header, kept in (("", "close"), ("connection: keep-alive\r\n", "keep-alive")):
        async with connect(served.port) as client:
            await client.send(request("POST", "/v1/classify", GOOD, header).replace(b"HTTP/1.1", b"HTTP/1.0"))
            reply = await client.read()
            assert (reply.status, reply.headers["connection"]) == (200, kept)


async def test_expect_100_continue(served: wire.Served) -> None:
    async with connect(served.port) as client:
        await client.send(HEAD + b"content-length: %d\r\nexpect: 100-continue\r\n\r\n" % len(GOOD))
        assert (await client.read(has_body=False)).status == 100
        await client.send(GOOD)
        assert (await client.read()).status == 200


async def test_nobody_is_asked_for_a_body_that_is_too_large(served: wire.Served) -> None:
    headers = [b"content-length: 10001\r\n", b"expect: 100-continue\r\n"]
    for order in (headers, headers[::-1]):
        async with connect(served.port) as client:
            await client.send(HEAD + b"".join(order) + b"\r\n")
            assert (await client.read()).status == 413


async def test_an_upgrade_is_not_taken_and_does_no_harm(served: wire.Served) -> None:
    upgrade = "connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n"
    async with connect(served.port) as client:
        for _ in range(2):
            assert (await client.ask("POST", "/v1/classify", GOOD, upgrade)).status == 200
        await client.send(request("GET", "/healthz", headers=upgrade) + request("POST", "/v1/classify", GOOD))
        assert [(await client.read()).status for _ in range(2)] == [200, 200]


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("GET http://test/healthz HTTP/1.1", 200),
        ("GET /healthz?a=b&c HTTP/1.1", 200),
        ("GET /health%7A HTTP/1.1", 200),
        ("GET //healthz HTTP/1.1", 404),
        ("GET /../healthz HTTP/1.1", 404),
        ("GET /%00%ff%0d%0a HTTP/1.1", 404),
        ("OPTIONS * HTTP/1.1", 404),
        ("TRACE /healthz HTTP/1.1", 405),
        ("HEAD /v1/classify HTTP/1.1", 405),
    ],
)
async def test_odd_targets(served: wire.Served, line: str, status: int) -> None:
    async with connect(served.port) as client:
        await client.send(f"{line}\r\nhost: test\r\n\r\n".encode())
        reply = await client.read(has_body=not line.startswith("HEAD"))
        assert reply.status == status
        assert reply.headers["x-request-id"]


async def test_this_is_no_proxy(served: wire.Served) -> None:
    async with connect(served.port) as client:
        await client.send(b"CONNECT test:80 HTTP/1.1\r\nhost: test\r\nx-request-id: mine\r\n\r\n")
        reply = await client.read()
        assert (reply.status, reply.headers["x-request-id"]) == (405, "mine")
        assert await client.is_closed()
    assert served.count("invalid", NO_ROUTE) == 1


async def test_many_clients_at_once_get_their_own_answers(served: wire.Served) -> None:
    async def one(number: int) -> bool:
        text = f"text {number}"
        reply = await classify(served.port, orjson.dumps({"input": text}), f"x-request-id: {number}\r\n")
        served_text = next(c for c in served.backend.calls if c.request_id == str(number))
        return reply.headers["x-request-id"] == str(number) and served_text is not None and reply.status == 200

    assert all(await asyncio.gather(*(one(number) for number in range(200))))
