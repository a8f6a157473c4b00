"""The served models, as ListModels tells them."""

from collections.abc import Mapping
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Struct

from service.domain import ModelInfo
from service.rpc.pb.attnd.v1 import inference_pb2 as pb


def encode_model(model: ModelInfo) -> pb.Model:
    """`facts` are JSON values; a number in them travels as a double."""
    facts = Struct()
    facts.update(model.facts)
    return pb.Model(id=model.id, task=model.task, created=model.created, facts=facts)


def decode_model(message: pb.Model) -> ModelInfo:
    facts: Mapping[str, Any] = MessageToDict(message.facts)
    return ModelInfo(message.id, message.task, message.created, {key: _whole(value) for key, value in facts.items()})


def _whole(value: Any) -> Any:
    """JSON does not tell 512 from 512.0, people do."""
    if isinstance(value, dict):
        return {key: _whole(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def models_bytes(models: list[ModelInfo]) -> bytes:
    """The reply of ListModels."""
    return pb.ListModelsResponse(models=[encode_model(model) for model in models]).SerializeToString()


def parse_models(data: bytes) -> list[ModelInfo]:
    """What a worker replied to ListModels."""
    return [decode_model(model) for model in pb.ListModelsResponse.FromString(data).models]
