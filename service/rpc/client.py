"""RemoteBackend: a Backend whose answers come from workers over gRPC.

Each worker has a channel of its own, so that a request can be sent where its model is, to the worker with the fewest
inputs and outputs open, and again to another when a worker is full or cannot be reached: a classification may run twice
without harm.
"""

import asyncio
import itertools
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing
from typing import TypeVar

from service.config import Settings
from service.domain import (
    AttentionMaps,
    AttentionRequest,
    Call,
    Classification,
    ClassifyRequest,
    Event,
    ExplainRequest,
    Explanation,
    GenerateRequest,
    ModelInfo,
    attention_tasks,
    choose_model,
    generation_tasks,
)
from service.errors import AttndError, ConfigError, DeadlineExceeded, NotFound, Overloaded, Unavailable, Unsupported
from service.rpc.channel import WorkerChannel, time_left
from service.rpc.codec import attend, classify, generate
from service.rpc.errors import retry_after_s

PATIENCE_S = 0.25  # less than any probe waits

Answer = TypeVar("Answer")

_CLASSIFIES = ("classification",)

# Failures after which another worker is asked, the one that says most first: who is full will have room.
_ELSEWHERE = (Overloaded, Unavailable, Unsupported, NotFound)


class RemoteBackend:
    """`addresses` are HOST:PORT of the workers, at least one."""

    def __init__(self, addresses: Sequence[str], settings: Settings) -> None:
        if not addresses:
            raise ConfigError("worker: a gateway needs the address of one at least", param="worker")
        self._workers = [WorkerChannel(address, settings.api_key) for address in addresses]
        self._turns = itertools.count()

    async def classify(self, request: ClassifyRequest, call: Call) -> Classification:
        message = classify.request_bytes(request)
        workers = await self._workers_for(_CLASSIFIES, request.model, call)
        return await _first_answer(workers, lambda worker: worker.classify(message, call, len(request.input)))

    async def attention(self, request: AttentionRequest, call: Call) -> AttentionMaps:
        message = attend.request_bytes(request)
        workers = await self._workers_for(attention_tasks(request), request.model, call)
        return await _first_answer(workers, lambda worker: worker.attention(message, call))

    async def explain(self, request: ExplainRequest, call: Call) -> Explanation:
        message = attend.explain_request_bytes(request)
        workers = await self._workers_for(_CLASSIFIES, request.model, call)
        return await _first_answer(workers, lambda worker: worker.explain(message, call))

    async def generate(self, request: GenerateRequest, call: Call) -> AsyncGenerator[Event, None]:
        """Another worker is tried until one has sent an event, never after: it would begin another text."""
        message = generate.request_bytes(request, wants_tokens=call.wants_tokens)
        failures: list[AttndError] = []
        for worker in _tries(await self._workers_for(generation_tasks(request), request.model, call)):
            has_begun = False
            try:
                async with aclosing(worker.generate(message, call, request.num_outputs)) as events:
                    async for event in events:
                        has_begun = True
                        yield event
                    return
            except _ELSEWHERE as error:
                if has_begun:
                    raise
                failures.append(error)
        raise _saying_most(failures)

    async def models(self) -> list[ModelInfo]:
        """What the workers serve together, those that do not answer as they last said; Unavailable when none answers.

        Once one has answered, nobody waits for the others longer than PATIENCE_S, nor for any that is down.
        """
        looks = {worker: worker.look() for worker in self._workers}
        failures = []
        for look in asyncio.as_completed(looks.values()):
            if (failure := await look) is None:
                break
            failures.append(failure)
        else:
            raise failures[0]
        if late := [look for worker, look in looks.items() if not look.done() and not worker.is_down]:
            await asyncio.wait(late, timeout=PATIENCE_S)
        return self._known()

    def _known(self) -> list[ModelInfo]:
        found = {model.id: model for worker in self._workers for model in worker.models or ()}
        return [found[key] for key in sorted(found)]

    @property
    def failure(self) -> str | None:
        """See Backend. Workers that die are others' to start again."""
        return None

    async def aclose(self) -> None:
        await asyncio.gather(*(worker.aclose() for worker in self._workers))

    async def _workers_for(self, tasks: Sequence[str], wanted: str | None, call: Call) -> list[WorkerChannel]:
        """Those with the model that is asked for, in the order to ask them: those that are down last, the least busy
        first, then in turn. Raises NotFound and Unsupported, of all workers' models, DeadlineExceeded and Unavailable.
        """
        try:
            chosen = choose_model(self._known(), tasks, wanted)
        except (NotFound, Unsupported):
            chosen = await self._sought(tasks, wanted, call)
        fit = [worker for worker in self._workers if worker.serves(chosen.id)]
        first = next(self._turns) % len(fit)
        return sorted(fit[first:] + fit[:first], key=lambda worker: (worker.is_down, worker.num_open))

    async def _sought(self, tasks: Sequence[str], wanted: str | None, call: Call) -> ModelInfo:
        """A model that no worker is known to serve: of those that they serve now."""
        try:
            async with asyncio.timeout(time_left(call)):
                return choose_model(await self.models(), tasks, wanted)
        except TimeoutError:
            raise DeadlineExceeded("the deadline passed before a worker could be asked") from None
        except (NotFound, Unsupported):
            if any(worker.models is None for worker in self._workers):
                raise Unavailable("a worker has not said yet what it serves") from None
            raise


def _tries(workers: Sequence[WorkerChannel]) -> Iterator[WorkerChannel]:
    """Each once, and one that could not be reached again: its name may stand for several addresses."""
    yield from workers
    yield from [worker for worker in workers if worker.is_down][:1]


async def _first_answer(workers: Sequence[WorkerChannel], ask: Callable[[WorkerChannel], Awaitable[Answer]]) -> Answer:
    """Of the first of `workers` that can be reached and has a fit model; otherwise the failure that says most."""
    failures: list[AttndError] = []
    for worker in _tries(workers):
        try:
            return await ask(worker)
        except _ELSEWHERE as error:
            failures.append(error)
    raise _saying_most(failures)


def _saying_most(failures: Sequence[AttndError]) -> AttndError:
    """Of several alike the one after which a retry makes sense soonest."""
    return min(failures, key=lambda error: (_ELSEWHERE.index(type(error)), retry_after_s(error)))
