"""The core of gRPC, driven by the event loop: a port that accepts calls, and what can be done with a call.

One thread waits for the core's events and hands them to the loop, as many at once as there are by then. grpc.aio does
it with four tasks and as many hand-overs a call, for four times the processor time. The binding is the one that
grpc.server and grpc.aio are written on; it is not a public interface, so nothing else here imports it.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from grpc import StatusCode
from grpc._cython import cygrpc  # type: ignore[attr-defined]

# Calls that the core may hand over before the loop has asked for more.
NUM_REQUESTED = 16
_NEVER_S = 1e12  # a deadline further away than this is none
_NO_FLAGS = 0

Metadata = Sequence[tuple[str, str | bytes]]


class Call:
    """One call, used on the event loop only. `deadline` is a `time.monotonic()` instant in seconds, None if not set."""

    def __init__(self, event: Any) -> None:
        self._call = event.call
        self.path: str = event.call_details.method.decode(errors="replace")
        self.metadata: dict[str, Any] = dict(event.invocation_metadata)
        self.begun = time.monotonic()
        left = event.call_details.deadline - time.time()
        self.deadline = None if left > _NEVER_S else self.begun + left
        self._has_begun = False  # to be answered

    async def read(self) -> bytes | None:
        """The next message, None after the last."""
        (received,) = await self._done(cygrpc.ReceiveMessageOperation(_NO_FLAGS))
        message: bytes | None = received.message()
        return message

    async def write(self, message: bytes) -> None:
        """Send a message; waits while the caller takes none."""
        await self._done(*self._head(), cygrpc.SendMessageOperation(message, _NO_FLAGS))

    def finish(
        self, status: StatusCode, details: str, metadata: Metadata, *, message: bytes | None = None
    ) -> "asyncio.Future[Any]":
        """Send the status, after a last message if there is one. The future is done once it is sent."""
        messages = () if message is None else (cygrpc.SendMessageOperation(message, _NO_FLAGS),)
        end = cygrpc.SendStatusFromServerOperation(tuple(metadata), status.value[0], details.encode(), _NO_FLAGS)
        return self._done(*self._head(), *messages, end)

    async def left(self) -> bool:
        """Waits until the call is over; whether it ended by the caller's leaving, or by its deadline."""
        (closed,) = await self._done(cygrpc.ReceiveCloseOnServerOperation(_NO_FLAGS))
        return bool(closed.cancelled())

    def _head(self) -> tuple[Any, ...]:
        if self._has_begun:
            return ()
        self._has_begun = True
        return (cygrpc.SendInitialMetadataOperation((), _NO_FLAGS),)

    def _done(self, *operations: Any) -> "asyncio.Future[Any]":
        """Start operations; the future gets them back when all are done."""
        done = asyncio.get_running_loop().create_future()

        def finished(event: Any) -> None:
            if not done.done():
                done.set_result(event.batch_operations)

        self._call.start_server_batch(operations, finished)
        return done


class Port:
    """Accepts calls on one address. `accept` is called with each, on the event loop."""

    def __init__(self, accept: Callable[[Call], None], options: Sequence[tuple[str, int]]) -> None:
        self._accept = accept
        self._loop = asyncio.get_running_loop()
        self._queue = cygrpc.CompletionQueue()
        self._server = cygrpc.Server(tuple(options), False)
        self._server.register_completion_queue(self._queue)
        self._events: deque[Any] = deque()
        self._is_told = False  # the loop knows that there are events
        self._is_stopping = False
        self._stopped = self._loop.create_future()
        self._thread = threading.Thread(target=self._wait, name="grpc", daemon=True)

    def listen(self, address: str) -> int:
        """The bound port. Raises RuntimeError when the address is taken."""
        port = int(self._server.add_http2_port(address.encode()))
        self._server.start()
        for _ in range(NUM_REQUESTED):
            self._request()
        self._thread.start()
        return port

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, let the open ones end for `grace_s` seconds, cancel those that remain."""
        self._is_stopping = True
        self._server.shutdown(self._queue, lambda event: self._stopped.set_result(None))
        await asyncio.wait([self._stopped], timeout=grace_s)
        if not self._stopped.done():
            self._server.cancel_all_calls()
            await self._stopped

    def close(self) -> None:
        """After `stop`, once nothing uses a call any more: the core would end the process."""
        self._server.destroy()
        self._queue.shutdown()
        self._thread.join()  # at once: no event is to come any more

    def _request(self) -> None:
        self._server.request_call(self._queue, self._queue, self._accepted)

    def _accepted(self, event: Any) -> None:
        if event.success:  # not when the server stops
            if not self._is_stopping:
                self._request()
            self._accept(Call(event))

    # --- the thread

    def _wait(self) -> None:
        while True:
            event = self._queue.poll()
            if event.tag is None:  # the queue was shut down
                return
            self._events.append(event)
            event = None  # the last reference to a call must not be held while waiting
            if not self._is_told:
                self._is_told = True
                self._loop.call_soon_threadsafe(self._take)

    # --- the loop again

    def _take(self) -> None:
        self._is_told = False
        while self._events:
            event = self._events.popleft()
            event.tag(event)
