"""Which task a request of this dialect is for, and what the client asks about the server."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

from service.domain import ModelInfo, choose_model
from service.errors import AttndError
from service.gateway.endpoint import ClassifyEndpoint, Entrance
from service.gateway.exchange import Receive, Scope, Send
from service.gateway.generation import Asked, GenerateEndpoint
from service.gateway.huggingface import classification, text_generation, translation
from service.gateway.middleware import HEADERS

# task -> what Hugging Face calls it; the first that a served model does is what is done where no model is named
PIPELINES = {"classification": "text-classification", "translation": "translation", "generation": "text-generation"}

_PARSE: dict[str, Callable[[bytes, str], Asked]] = {
    "translation": translation.parse,
    "generation": text_generation.parse,
}


@dataclass(frozen=True)
class PipelineEndpoint:
    """`route` labels the metrics."""

    route: str
    entrance: Entrance

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises an AttndError, which the middleware answers."""
        try:
            model = await self._model(scope)
        except AttndError as error:  # raised again once the body is read, and counted
            await self.entrance.admit(self.route, partial(_refuse, error), scope, receive)
            raise
        if model.task in _PARSE:
            parse, model_id = _PARSE[model.task], model.id
            await GenerateEndpoint(self.route, self.entrance, lambda body, _: parse(body, model_id))(
                scope, receive, send
            )
        else:
            endpoint = ClassifyEndpoint(self.route, self.entrance, classification.parse, classification.render)
            await endpoint(scope, receive, send)

    async def _model(self, scope: Scope) -> ModelInfo:
        """Of those last told, so that a worker that is slow to tell holds up nothing; else of those that are now.

        Raises what the door does, for only who may come in may ask, what `models` does, and NotFound.
        """
        self.entrance.door.check_open()
        self.entrance.door.check_key(scope[HEADERS])
        backend, wanted = self.entrance.backend, scope.get("path_params", {}).get("model_id")
        return find(backend.known_models, wanted) or choose_model(await backend.models(), tuple(PIPELINES), wanted)


def _refuse(error: AttndError, *_: object) -> NoReturn:
    raise error


def find(models: Sequence[ModelInfo], wanted: str | None) -> ModelInfo | None:
    """The model called `wanted`; when none is named, the first for the first of PIPELINES that there is one for."""
    if wanted is not None:
        return next((model for model in models if model.id == wanted), None)
    able = [model for task in PIPELINES for model in models if model.task == task]
    return able[0] if able else None


def endpoint_info(models: Sequence[ModelInfo], version: str, max_inputs: int) -> dict[str, Any]:
    """What `InferenceClient.get_endpoint_info` asks for, under the names that text-embeddings-inference uses."""
    model = find(models, None)
    return {
        "model_id": None if model is None else model.id,
        "model_pipeline_tag": None if model is None else PIPELINES[model.task],
        "max_client_batch_size": max_inputs,
        "version": version,
    }
