"""LocalBackend: the models of this process, and whether it can serve."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence

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
from service.errors import Unavailable, Unsupported
from service.worker.classification.classifier import Classifier
from service.worker.generation.generator import Generator
from service.worker.generation.translation import translate

Served = Classifier | Generator


class LocalBackend:
    """Serves what `load` returns. It is not ready before `start` has returned nor after `aclose` was called."""

    def __init__(self, load: Callable[[], Sequence[Served]], *, drain_timeout_s: float) -> None:
        self._load = load
        self._drain_timeout_s = drain_timeout_s
        self._served: dict[str, Served] = {}
        self._models: list[ModelInfo] = []
        self._refusal: Unavailable | None = Unavailable("the models are being loaded", code="loading")

    async def start(self) -> None:
        """Load every bundle, in a thread, so that probes are answered meanwhile. Raises BundleError, ConfigError."""
        loaded = await asyncio.to_thread(self._load)
        for one in loaded:
            await one.start()
            self._served[one.info.id] = one
        self._models = [one.info for one in self._served.values()]
        self._refusal = None

    async def classify(self, request: ClassifyRequest, call: Call) -> Classification:
        chosen = choose_model(self._open(), ("classification",), request.model)
        classifier = self._served[chosen.id]
        assert isinstance(classifier, Classifier)
        return await classifier.classify(request, call)

    async def attention(self, request: AttentionRequest, call: Call) -> AttentionMaps:
        chosen = choose_model(self._open(), attention_tasks(request), request.model)
        model = self._served[chosen.id]
        if isinstance(model, Classifier):
            return await model.attention(request, call)
        if model.attending is None:
            message = f"the bundle of model {chosen.id!r} has no graph for attention; export it anew"
            raise Unsupported(message, param="model", code="no_attention")
        return await model.attending.attention(request, call, model.generate)

    async def explain(self, request: ExplainRequest, call: Call) -> Explanation:
        chosen = choose_model(self._open(), ("classification",), request.model)
        classifier = self._served[chosen.id]
        assert isinstance(classifier, Classifier)
        return await classifier.explain(request, call)

    def generate(self, request: GenerateRequest, call: Call) -> AsyncGenerator[Event, None]:
        """See Backend. What can be refused at once is raised by this call itself."""
        chosen = choose_model(self._open(), generation_tasks(request), request.model)
        generator = self._served[chosen.id]
        assert isinstance(generator, Generator)
        if chosen.task == "translation":
            return translate(generator, request, call)
        return generator.generate(request, call)

    async def models(self) -> list[ModelInfo]:
        """See Backend. Raises Unavailable once an engine has failed, too."""
        models = self._open()
        if self.failure is not None:
            raise Unavailable(self.failure, code="engine_dead")
        return models

    def _open(self) -> list[ModelInfo]:
        """The served models. Raises Unavailable while loading and while draining."""
        if self._refusal is not None:
            raise Unavailable(self._refusal.message, code=self._refusal.code)
        return self._models

    @property
    def failure(self) -> str | None:
        """See Backend. The other models still serve."""
        dead = [name for name, one in self._served.items() if not one.is_alive]
        return f"the engine of {', '.join(dead)} has failed" if dead else None

    async def aclose(self) -> None:
        """Refuse what comes, finish what was accepted within the drain timeout, end the engine threads."""
        self._refusal = Unavailable("the server is draining", code="draining")
        await asyncio.gather(*(one.aclose(self._drain_timeout_s) for one in self._served.values()))
