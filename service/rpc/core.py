"""The core of gRPC, driven by the event loop: a port that accepts calls, and what can be done with a call.

The loop takes the core's events itself, one after the other, as long as there are any; only when there are none does a
thread wait for the next one, and then it hands over to the loop again. grpc.aio has four tasks and as many hand-overs
a call, for five times the processor time. The binding is the one that grpc.server and grpc.aio are written on; it is
not a public interface, so nothing else here imports it.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any, TypeVar

from grpc import StatusCode
from grpc._cython import cygrpc  # type: ignore[attr-defined]

# Calls that the core may hand over before the loop has asked for more.
NUM_REQUESTED = 16
# A writer waits once this much of what it wrote is not sent: the caller takes less than it is given.
MAX_UNSENT_BYTES = 65_536
_NEVER_S = 1e12  # a deadline further away than this is none
_NO_FLAGS = 0

Metadata = Sequence[tuple[str, str | bytes]]

Told = TypeVar("Told")


class MessageRefused(Exception):
    """The core takes no message of that size; it has ended the call, with a status of its own."""


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
        self._unsent: deque[bytes] = deque()
        self._num_unsent = 0  # bytes
        self._all_sent = asyncio.Event()
        self._all_sent.set()

    def read(self) -> "asyncio.Future[bytes | None]":
        """The next message; None after the last, or when the call is over. Raises MessageRefused."""
        done: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()

        def finished(event: Any) -> None:
            if done.done():
                return
            if event.success:
                done.set_result(event.batch_operations[0].message())
            else:
                done.set_exception(MessageRefused)

        self._call.start_server_batch((cygrpc.ReceiveMessageOperation(_NO_FLAGS),), finished)
        return done

    async def write(self, message: bytes) -> None:
        """Send a message behind those before it; waits while the caller takes none."""
        self._unsent.append(message)
        self._num_unsent += len(message)
        if self._all_sent.is_set():
            self._all_sent.clear()
            self._send()
        if self._num_unsent > MAX_UNSENT_BYTES:
            await self._all_sent.wait()

    async def finish(
        self, status: StatusCode, details: str, metadata: Metadata, *, message: bytes | None = None
    ) -> None:
        """Send the status, behind all messages and a last one if there is one; returns once it is sent."""
        await self._all_sent.wait()
        messages = () if message is None else (cygrpc.SendMessageOperation(message, _NO_FLAGS),)
        end = cygrpc.SendStatusFromServerOperation(tuple(metadata), status.value[0], details.encode(), _NO_FLAGS)
        await self._started((*self._head(), *messages, end), lambda done: None)

    def left(self) -> "asyncio.Future[bool]":
        """Done when the call is over: whether it ended by the caller's leaving, or by its deadline."""
        return self._started((cygrpc.ReceiveCloseOnServerOperation(_NO_FLAGS),), self._over)

    def _over(self, done: Sequence[Any]) -> bool:
        self._unsent.clear()  # nobody reads it, and soon the core may be gone
        return bool(done[0].cancelled())

    def _send(self, event: Any = None) -> None:
        """The next message, as soon as the one before it is sent: of a call's messages the core takes one at a time."""
        if not self._unsent:
            self._num_unsent = 0
            self._all_sent.set()
            return
        operation = cygrpc.SendMessageOperation(self._unsent.popleft(), _NO_FLAGS)
        self._call.start_server_batch((*self._head(), operation), self._send)

    def _head(self) -> tuple[Any, ...]:
        if self._has_begun:
            return ()
        self._has_begun = True
        return (cygrpc.SendInitialMetadataOperation((), _NO_FLAGS),)

    def _started(self, operations: Sequence[Any], told: Callable[[Sequence[Any]], Told]) -> "asyncio.Future[Told]":
        """Start operations; the future gets what `told` makes of them when all are done."""
        done: asyncio.Future[Told] = asyncio.get_running_loop().create_future()

        def finished(event: Any) -> None:
            result = told(event.batch_operations)
            if not done.done():
                done.set_result(result)

        self._call.start_server_batch(operations, finished)
        return done


class Port:
    """Accepts calls on the addresses that it was bound to. `accept` is called with each, on the event loop."""

    def __init__(self, accept: Callable[[Call], None], options: Sequence[tuple[str, int]]) -> None:
        self._accept = accept
        self._loop = asyncio.get_running_loop()
        self._queue = cygrpc.CompletionQueue()
        self._server = cygrpc.Server(tuple(options), False)
        self._server.register_completion_queue(self._queue)
        self._turns: SimpleQueue[None] = SimpleQueue()  # an item: the thread is to wait for events again
        self._is_stopping = False
        self._is_closing = False
        self._stopped = self._loop.create_future()
        self._thread = threading.Thread(target=self._wait, name="grpc", daemon=True)

    def bind(self, address: str) -> int:
        """Listen on HOST:PORT from `start` on; gives the port. Raises OSError; the core logs to stderr what hinders it.

        HOST is better an IP address: of a name's addresses the core is content with one.
        """
        port = int(self._server.add_http2_port(address.encode()))
        if port == 0:  # grpc.server and grpc.aio make their error of this
            raise OSError(f"{address} is taken, or not to be had")
        return port

    def start(self) -> None:
        """Accept calls, after `bind`."""
        self._server.start()
        for _ in range(NUM_REQUESTED):
            self._request()
        self._thread.start()

    async def drain(self, grace_s: float) -> None:
        """Refuse new calls; returns once the open ones have ended, or after `grace_s` seconds."""
        self._is_stopping = True
        self._server.shutdown(self._queue, lambda event: self._stopped.set_result(None))
        await asyncio.wait([self._stopped], timeout=grace_s)

    async def stop(self, grace_s: float) -> None:
        """After `drain`: cancel the calls that remain when `grace_s` seconds more are over."""
        await asyncio.wait([self._stopped], timeout=grace_s)
        if not self._stopped.done():
            self._server.cancel_all_calls()
            await self._stopped

    def close(self) -> None:
        """After `stop`, once nothing uses a call any more: the core would end the process."""
        self._server.destroy()
        self._queue.shutdown()
        self._is_closing = True
        self._turns.put(None)
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
        while (event := self._queue.poll()).tag is not None:  # None: the queue was shut down
            self._loop.call_soon_threadsafe(self._take, event)
            event = None  # the last reference to a call must not be held while waiting
            if not self._is_closing:
                self._turns.get()

    # --- the loop again

    def _take(self, event: Any) -> None:
        """Handle an event and those behind it, and look once more when the loop has come round.

        Much of what is started meanwhile is done by then, and need not wake the thread.
        """
        while event.tag is not None:  # None: there is none now
            event.tag(event)
            event = self._queue.poll(deadline=0)
        self._loop.call_soon(self._take_more)

    def _take_more(self) -> None:
        event = self._queue.poll(deadline=0)
        if event.tag is None:
            self._turns.put(None)
        else:
            self._take(event)
