"""LocalBackend: the models of this process, and whether it can serve."""

import asyncio
from collections.abc import Callable, Sequence

from service.domain import Call, Classification, ClassifyRequest, ModelInfo, choose_model
from service.errors import Unavailable
from service.worker.classifier import Classifier


class LocalBackend:
    """Serves what `load` returns. It is not ready before `start` has returned nor after `aclose` was called."""

    def __init__(self, load: Callable[[], Sequence[Classifier]], *, drain_timeout_s: float) -> None:
        self._load = load
        self._drain_timeout_s = drain_timeout_s
        self._classifiers: dict[str, Classifier] = {}
        self._refusal: Unavailable | None = Unavailable("the models are being loaded", code="loading")

    async def start(self) -> None:
        """Load every bundle, in a thread, so that probes are answered meanwhile. Raises BundleError."""
        loaded = await asyncio.to_thread(self._load)
        for classifier in loaded:
            classifier.start()
            self._classifiers[classifier.info.id] = classifier
        self._refusal = None

    async def classify(self, request: ClassifyRequest, call: Call) -> Classification:
        chosen = choose_model(await self.models(), "classification", request.model)
        return await self._classifiers[chosen.id].classify(request, call)

    async def models(self) -> list[ModelInfo]:
        if self._refusal is not None:
            raise Unavailable(self._refusal.message, code=self._refusal.code)
        dead = [name for name, classifier in self._classifiers.items() if not classifier.is_alive]
        if dead:
            raise Unavailable(f"the engine of {', '.join(dead)} has failed", code="engine_dead")
        return [classifier.info for classifier in self._classifiers.values()]

    async def aclose(self) -> None:
        """Refuse what comes, finish what was accepted within the drain timeout, end the engine threads."""
        self._refusal = Unavailable("the server is draining", code="draining")
        await asyncio.gather(*(one.aclose(self._drain_timeout_s) for one in self._classifiers.values()))
