"""The bundle, run with ONNX Runtime and tokenizers and nothing else: text in, labels and scores out.

It is the ceiling's inner loop and what the peers serve, so it runs in environments that do not have attnd.
"""

import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from tokenizers import Tokenizer


class BareModel:
    """One ONNX Runtime session over the bundle's graph, on `threads` threads. Several Python threads may use it."""

    def __init__(self, bundle: Path, *, threads: int, spin: bool) -> None:
        manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
        self.labels: tuple[str, ...] = tuple(manifest["labels"])
        self._tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(manifest["limits"]["max_tokens"])
        graph = manifest["graphs"]["classify"]
        self._inputs = [tensor["name"] for tensor in graph["inputs"]]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spin else "0")
        # The same choices as in the service: the order frees what nobody asks for sooner, and on the CPU the fused
        # operator is slower than what it replaces.
        options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
        self._session = onnxruntime.InferenceSession(
            str(bundle / graph["file"]),
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=["SkipLayerNormFusion"],
        )

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids with special tokens, cut to the model's limit."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts))]

    def logits(self, batch: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """(len(batch), labels). The rectangle is as long as the batch's longest sequence."""
        feeds = pack(batch)
        found: NDArray[np.float32] = self._session.run(["logits"], {name: feeds[name] for name in self._inputs})[0]
        return found

    def classify(self, texts: Sequence[str]) -> list[dict[str, str | float]]:
        """The best label of each text and its probability."""
        logits = self.logits(self.encode(texts))
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        scores = odds / odds.sum(axis=1, keepdims=True)
        best = scores.argmax(axis=1)
        return [
            {"label": self.labels[index], "score": float(row[index])} for row, index in zip(scores, best, strict=True)
        ]


def pack(batch: Sequence[Sequence[int]]) -> dict[str, NDArray[np.int64]]:
    """What the graph takes: all tokens in one row, and where each stands in the (batch, length) rectangle.

    (tokens,): input_ids, token_type_ids, position_ids and sequence_ids. slots: (batch, length), a position's place in
    the row, -1 for padding.
    """
    lengths = np.array([len(tokens) for tokens in batch])
    is_real = np.arange(lengths.max()) < lengths[:, None]
    sequence_ids, position_ids = np.nonzero(is_real)
    ids = np.fromiter(chain.from_iterable(batch), np.int64, int(lengths.sum()))
    slots = np.full(is_real.shape, -1, np.int64)
    slots[is_real] = np.arange(ids.size)
    return {
        "input_ids": ids,
        "token_type_ids": np.zeros_like(ids),
        "position_ids": position_ids,
        "watched": np.empty(0, np.int64),  # nobody's attention is asked for
        "sequence_ids": sequence_ids,
        "slots": slots,
    }
