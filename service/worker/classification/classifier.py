"""One served classification model: texts to tokens, rows to scores, attention and explanations.

Everything here runs on the asyncio thread, except `_run` (engine threads) and long tokenizations (a worker thread).
"""

import asyncio
import time
from collections.abc import Sequence as Inputs
from functools import partial

from service.domain import (
    AttentionMaps,
    AttentionRequest,
    Call,
    Classification,
    ClassifyRequest,
    ExplainRequest,
    Explanation,
    ModelInfo,
    Prediction,
    TextInput,
    Usage,
)
from service.errors import InvalidRequest, Unsupported
from service.metrics import Metrics
from service.worker.attention.maps import maps_of, shares
from service.worker.attention.views import check_size, rollout_of_all, views_of
from service.worker.bundle import Bundle
from service.worker.classification.engine import GRAPH, ClassificationEngine, Tokens, padded_length
from service.worker.classification.loop import Row
from service.worker.classification.occlusion import falls, hidden_one_by_one
from service.worker.classification.open_jobs import OpenJobs
from service.worker.classification.scores import apply, function_for, ranked
from service.worker.classification.sequence import Job, Sequence
from service.worker.long_texts import LongTexts
from service.worker.tokenizer import LONG_TEXT, Encoded, Tokenizer, num_characters

_Explained = tuple[list[float], str, float, Encoded]  # scores of the tokens, label, the label's score, the tokens


class Classifier:
    """A bundle, ready to classify once `start` has been called on the event loop that will use it."""

    def __init__(
        self,
        bundle: Bundle,
        engine: ClassificationEngine,
        metrics: Metrics,
        *,
        num_threads: int,
        max_batch_tokens: int,
        max_waiting: int,
        max_inputs: int,
        max_attention_bytes: int,
    ) -> None:
        manifest = bundle.manifest
        assert manifest.labels is not None
        assert manifest.problem_type is not None
        self.info = ModelInfo(manifest.id, manifest.task, manifest.created, manifest.facts())
        self._labels = manifest.labels
        self._function = function_for(manifest.problem_type, len(manifest.labels))
        self._pooling = str(manifest.architecture.get("pooling", "first"))
        self._tokenizer = Tokenizer(bundle.tokenizer_path, manifest.limits.max_tokens)
        self._long_texts = LongTexts(manifest.id)
        self._engine = engine
        self._max_attention_bytes = max_attention_bytes
        self._jobs = OpenJobs(
            self._run,
            metrics,
            name=manifest.id,
            num_threads=num_threads,
            max_batch_tokens=max_batch_tokens,
            max_waiting=max_waiting,
            max_inputs=max_inputs,
        )

    async def start(self) -> None:
        self._jobs.start()

    @property
    def is_alive(self) -> bool:
        return self._jobs.is_alive

    async def classify(self, request: ClassifyRequest, call: Call) -> Classification:
        job = Job(len(request.input), call.progress)
        with self._jobs.admitted(job, call) as done:
            encoded = await self._encode(request.input, truncate=request.truncate, unless=done)
            self._jobs.add(job, [_sequence(job, index, one) for index, one in enumerate(encoded)])
            await done
        function = request.function_to_apply or self._function
        results = tuple(ranked(self._labels, apply(function, row), request.top_k) for row in job.rows)
        return Classification(self.info.id, results, _usage(encoded), call.progress.timing(time.monotonic()))

    async def attention(self, request: AttentionRequest, call: Call) -> AttentionMaps:
        self._check_has_attention()
        (view,) = views_of(request, {"encoder": (self._engine.num_layers, self._engine.num_heads)})
        job = Job(1, call.progress, view)
        with self._jobs.admitted(job, call) as done:
            encoded = await self._encode_one(request.text, request.text_pair, done)
            check_size([view], {"encoder": (len(encoded.ids),) * 2}, self._max_attention_bytes)
            self._jobs.add(job, [_sequence(job, 0, encoded)])
            await done
        prediction = Prediction(scores=ranked(self._labels, apply(self._function, job.rows[0]), request.top_k))
        timing = call.progress.timing(time.monotonic())
        return AttentionMaps(self.info.id, GRAPH, encoded.told(), None, job.maps, prediction, _usage([encoded]), timing)

    async def explain(self, request: ExplainRequest, call: Call) -> Explanation:
        if request.label is not None and request.label not in self._labels:
            raise InvalidRequest(
                f"label: the model has {', '.join(self._labels)}, got {request.label!r:.60}", param="label"
            )
        run = self._occlude if request.method == "occlusion" else self._follow
        scores, label, score, encoded = await run(request, call)
        timing = call.progress.timing(time.monotonic())
        return Explanation(
            self.info.id, request.method, label, score, encoded.told(), tuple(scores), _usage([encoded]), timing
        )

    async def _occlude(self, request: ExplainRequest, call: Call) -> _Explained:
        """The whole text and one variant for each token, as inputs of one job."""
        blank_id = self._tokenizer.blank_id
        if blank_id is None:
            raise Unsupported(f"model {self.info.id!r} has no token to hide others with", param="method")
        job = Job(1, call.progress)
        with self._jobs.admitted(job, call) as done:
            encoded = await self._encode_one(request.text, request.text_pair, done)
            variants = hidden_one_by_one(encoded.ids, encoded.is_special, blank_id)
            self._jobs.widen(job, len(variants))
            inputs = [encoded.ids, *variants.values()]
            self._jobs.add(job, [_sequence(job, at, encoded, ids) for at, ids in enumerate(inputs)])
            await done
        scores = [apply(self._function, row) for row in job.rows]
        best = self._best(request.label, scores[0])
        hidden = dict(zip(variants, [one[best] for one in scores[1:]], strict=True))
        found = falls(scores[0][best], hidden, len(encoded.ids))
        return found, self._labels[best], scores[0][best], encoded

    async def _follow(self, request: ExplainRequest, call: Call) -> _Explained:
        """Attention rollout through all layers to the position that the label is read from."""
        self._check_has_attention()
        job = Job(
            1, call.progress, rollout_of_all(num_layers=self._engine.num_layers, num_heads=self._engine.num_heads)
        )
        with self._jobs.admitted(job, call) as done:
            encoded = await self._encode_one(request.text, request.text_pair, done)
            self._jobs.add(job, [_sequence(job, 0, encoded)])
            await done
        scores = apply(self._function, job.rows[0])
        best = self._best(request.label, scores)
        return shares(job.maps[0], self._pooling), self._labels[best], scores[best], encoded

    def _best(self, label: str | None, scores: Inputs[float]) -> int:
        """The place of `label`, or of the one with the highest score."""
        return self._labels.index(label if label is not None else ranked(self._labels, scores, 1)[0].label)

    def _check_has_attention(self) -> None:
        if not self._engine.num_layers:
            message = f"the bundle of model {self.info.id!r} has no attention outputs; export it anew"
            raise Unsupported(message, param="model", code="no_attention")

    async def _encode(
        self, inputs: Inputs[TextInput], *, truncate: bool, unless: asyncio.Future[None]
    ) -> list[Encoded]:
        """Raises what `unless` does, if it does so first."""
        length = sum(map(num_characters, inputs))
        if length < LONG_TEXT:
            return self._tokenizer.encode(inputs, truncate=truncate)
        encode = partial(self._tokenizer.encode, inputs, truncate=truncate)
        return await self._long_texts.read(encode, length, unless=unless)

    async def _encode_one(self, text: str, text_pair: str | None, unless: asyncio.Future[None]) -> Encoded:
        (encoded,) = await self._encode((TextInput(text, text_pair),), truncate=True, unless=unless)
        return encoded

    def _run(self, batch: Inputs[Sequence]) -> Inputs[Row]:
        """In an engine thread. What a job wants to see of its attention is made here too, and nothing for others."""
        inputs = [Tokens(one.ids, one.type_ids) for one in batch]
        views = {at: view for at, one in enumerate(batch) if (view := one.job.view) is not None}
        if views:
            layers = sorted({layer for view in views.values() for layer in view.layers})
            logits, weights = self._engine.attend(inputs, layers, views.keys())
            for at, view in views.items():
                batch[at].job.maps = maps_of(view, weights[at])
        else:
            logits = self._engine.logits(inputs)
        rows: list[list[float]] = logits.tolist()
        return rows

    async def aclose(self, timeout_s: float) -> None:
        """Wait up to `timeout_s` seconds for open requests, fail those that remain, end the engine threads."""
        await self._jobs.aclose(timeout_s)
        self._long_texts.close()


def _sequence(job: Job, index: int, encoded: Encoded, ids: Inputs[int] | None = None) -> Sequence:
    """Input `index` of `job`; `ids` in place of the encoded ones, of which there are as many."""
    return Sequence(job, index, encoded.ids if ids is None else ids, encoded.type_ids, padded_length(len(encoded.ids)))


def _usage(encoded: Inputs[Encoded]) -> Usage:
    return Usage(sum(len(one.ids) for one in encoded), sum(one.is_truncated for one in encoded))
