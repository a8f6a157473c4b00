"""LitServe over the bundle, with its own batching: `litserve_onnx.py BUNDLE PORT BATCH TIMEOUT_S WORKERS THREADS`."""

import sys
from pathlib import Path
from typing import Any

import litserve
from bare import BareModel


class Sentiment(litserve.LitAPI):
    """POST /predict `{"input": text}` -> `{"label", "score"}`."""

    def __init__(self, bundle: Path, *, threads: int, batch: int, timeout_s: float) -> None:
        super().__init__(max_batch_size=batch, batch_timeout=timeout_s)
        self._bundle = bundle
        self._threads = threads

    def setup(self, device: str) -> None:
        self._model = BareModel(self._bundle, threads=self._threads, spin=False)

    def decode_request(self, request: dict[str, Any], **_: Any) -> str:
        return request["input"]

    def batch(self, inputs: list[str]) -> list[str]:
        return list(inputs)

    def predict(self, inputs: str | list[str], **_: Any) -> Any:
        # Without batching LitServe hands over one decoded request, not a list of one.
        return self._model.classify([inputs])[0] if isinstance(inputs, str) else self._model.classify(inputs)

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return output

    def encode_response(self, output: dict[str, Any], **_: Any) -> dict[str, Any]:
        return output


def main() -> None:
    bundle, port, batch, timeout_s, workers, threads = sys.argv[1:]
    api = Sentiment(Path(bundle), threads=int(threads), batch=int(batch), timeout_s=float(timeout_s))
    # fast_queue is what LitServe's documentation advises from a hundred requests a second on.
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=int(workers), timeout=60, fast_queue=True)
    server.run(host="127.0.0.1", port=int(port), num_api_servers=1, log_level="warning", generate_client_file=False)


if __name__ == "__main__":
    main()
