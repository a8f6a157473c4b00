"""A lane of this process: outputs as plans -> sequences -> the engine loop -> reports."""

import asyncio
from collections.abc import Sequence as Several

from service.domain import GenerateRequest
from service.worker.generation.lanes import Died, Tell
from service.worker.generation.likeliest import Likeliest
from service.worker.generation.loop import Done, Engine, GenerationLoop
from service.worker.generation.outputs import OutputPlan, Outputs
from service.worker.generation.report import Reports
from service.worker.generation.scheduler import Scheduler
from service.worker.generation.sequence import Job


class ThreadLane:
    """See Lane. `tell` is called in the engine thread; or in the caller's, if that does the `step`s itself.

    `engine` takes steps of up to `max_rows` rows; `num_blocks` are its prefix cache's.
    """

    def __init__(self, engine: Engine, outputs: Outputs, *, max_rows: int, num_blocks: int, name: str) -> None:
        self._engine = engine
        self._outputs = outputs
        self._likeliest = Likeliest()
        self._scheduler = Scheduler(max_rows=max_rows, num_blocks=num_blocks)
        self._reports = Reports(has_prefixes=num_blocks > 0)
        self._name = name

    async def start(self, tell: Tell, died: Died) -> None:
        self.open(tell, died)
        self._loop.start()

    async def stop(self) -> None:
        await asyncio.to_thread(self._loop.stop)

    def step(self) -> bool:
        """What the engine thread does, where there is none (`open` in place of `start`). False: nothing is to do."""
        return self._loop.step()

    def open(self, tell: Tell, died: Died) -> None:
        def tell_now(done: Done) -> None:
            tell(self._reports.tell(done))

        def publish(done: Done) -> None:
            if (report := self._reports.add(done)) is not None:
                tell(report)

        self._loop = GenerationLoop(
            self._engine,
            self._scheduler,
            self._likeliest,
            tell=tell_now,
            publish=publish,
            died=died,
            name=self._name,
        )

    def add(self, job: Job, request: GenerateRequest, plans: Several[OutputPlan]) -> None:
        self._loop.add([self._outputs.sequence(job, request, plan) for plan in plans])

    def close(self, job: Job) -> None:
        self._loop.close(job)

    @property
    def num_waiting(self) -> int:
        return self._scheduler.num_waiting

    @property
    def num_running(self) -> int:
        return self._scheduler.num_running

    @property
    def num_rows(self) -> int:
        return self.num_waiting + self.num_running  # a row runs until it has left its slot

    @property
    def num_kept_tokens(self) -> int:
        return self._loop.num_kept_tokens
