"""The one seam: whatever can answer requests.

`LocalBackend` runs models in this process, `RemoteBackend` asks a worker over gRPC, `Observed` counts on the way.
The HTTP gateway and the gRPC service each take one that is observed, and know nothing of what lies behind it.
"""

from collections.abc import AsyncGenerator
from typing import Protocol

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
)


class Backend(Protocol):
    async def classify(self, request: ClassifyRequest, call: Call) -> Classification:
        """Scores for every input. Raises an `AttndError`; cancelling the awaiting task abandons the work."""
        ...

    async def attention(self, request: AttentionRequest, call: Call) -> AttentionMaps:
        """Where the model looked, and what it predicted or wrote. Raises and is cancelled as `classify`."""
        ...

    async def explain(self, request: ExplainRequest, call: Call) -> Explanation:
        """What each token did for a label. A method of its own because it works on tokens, which only a worker has:
        texts with a word cut out would become other tokens. Raises and is cancelled as `classify`.
        """
        ...

    def generate(self, request: GenerateRequest, call: Call) -> AsyncGenerator[Event, None]:
        """Start, then what each output consists of as it comes, then End. Raises an `AttndError`, at any point.

        Closing the generator, or cancelling the task that awaits it, abandons the work.
        """
        ...

    async def models(self) -> list[ModelInfo]:
        """The served models; also the readiness probe: raises `Unavailable` while nothing can be served."""
        ...

    @property
    def failure(self) -> str | None:
        """The liveness probe: which engine of this process has died, which only a new process mends; else None."""
        ...

    async def aclose(self) -> None:
        """Finish what was accepted, refuse what comes, release everything."""
        ...
