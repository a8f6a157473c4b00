"""Which task a request of this dialect is for, and what the client asks about the server."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

from service.domain import ModelInfo
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
        """Raises what the door does, for only who may come in may ask, and what `model_for` does."""
        self.entrance.door.check_open()
        self.entrance.door.check_key(scope[HEADERS])
        return await self.entrance.model_for(tuple(PIPELINES), scope.get("path_params", {}).get("model_id"))


def _refuse(error: AttndError, *_: object) -> NoReturn:
    raise error


@dataclass(frozen=True)
class EndpointInfo:
    """What `InferenceClient.get_endpoint_info` asks for, under the names that text-embeddings-inference uses."""

    model_id: str | None
    model_pipeline_tag: str | None
    max_client_batch_size: int
    version: str


def endpoint_info(models: Sequence[ModelInfo], version: str, max_inputs: int) -> EndpointInfo:
    model = next((model for task in PIPELINES for model in models if model.task == task), None)
    if model is None:
        return EndpointInfo(None, None, max_inputs, version)
    return EndpointInfo(model.id, PIPELINES[model.task], max_inputs, version)
