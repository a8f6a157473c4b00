"""BentoML over the bundle, with its adaptive batching: served by `bentoml serve bentoml_onnx:Sentiment`.

BENCH_BUNDLE, BENCH_BATCH, BENCH_LATENCY_MS, BENCH_WORKERS and BENCH_THREADS configure it, because BentoML imports
this file in processes of its own.
"""

import os
from pathlib import Path
from typing import Any

import bentoml
from bare import BareModel

_BATCH = int(os.environ["BENCH_BATCH"])


@bentoml.service(
    workers=int(os.environ["BENCH_WORKERS"]), traffic={"timeout": 60}, logging={"access": {"enabled": False}}
)
class Sentiment:
    """POST /classify `{"inputs": [text]}` -> `[{"label", "score"}]`."""

    def __init__(self) -> None:
        self._model = BareModel(Path(os.environ["BENCH_BUNDLE"]), threads=int(os.environ["BENCH_THREADS"]), spin=False)

    @bentoml.api(batchable=True, max_batch_size=_BATCH, max_latency_ms=int(os.environ["BENCH_LATENCY_MS"]))
    def classify(self, inputs: list[str]) -> list[dict[str, Any]]:
        return list(self._model.classify(inputs))
