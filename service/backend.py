"""The one seam: whatever can answer requests.

`LocalBackend` runs models in this process, `RemoteBackend` asks a worker over gRPC, `Observed` counts on the way.
The HTTP gateway and the gRPC service each take a Backend and know nothing else of what lies behind it.
"""

from typing import Protocol

from service.domain import Call, Classification, ClassifyRequest, ModelInfo


class Backend(Protocol):
    async def classify(self, request: ClassifyRequest, call: Call) -> Classification:
        """Scores for every input. Raises an `AttndError`; cancelling the awaiting task abandons the work."""
        ...

    async def models(self) -> list[ModelInfo]:
        """The served models; also the readiness probe: raises `Unavailable` while nothing can be served."""
        ...

    async def aclose(self) -> None:
        """Finish what was accepted, refuse what comes, release everything."""
        ...
