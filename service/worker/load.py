"""From settings to served models: finds the bundles, checks them, opens their engines, warms them up."""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from service.config import Settings
from service.errors import BundleError, ConfigError
from service.metrics import Metrics
from service.worker.bundle import MANIFEST, Bundle
from service.worker.classification.classifier import Classifier
from service.worker.classification.engine import ClassificationEngine
from service.worker.generation.attend import Attending
from service.worker.generation.attention_graph import GRAPH as ATTENTION_GRAPH
from service.worker.generation.decoder import GRAPH, DecoderEngine, kv_bytes_per_token, vocabulary_of
from service.worker.generation.generator import Generator
from service.worker.generation.kv_budget import KvPlan, divide, kv_budget
from service.worker.generation.lane_messages import Load
from service.worker.generation.lane_processes import LaneProcesses
from service.worker.generation.lanes import Lane
from service.worker.generation.loop import Engine
from service.worker.generation.outputs import Outputs
from service.worker.generation.process_lane import ProcessLane
from service.worker.generation.prompt_tokenizer import PromptTokenizer
from service.worker.generation.prompts import PromptReader
from service.worker.generation.thread_lane import ThreadLane
from service.worker.generation.translator import TranslatorEngine
from service.worker.machine import available_memory, available_threads
from service.worker.pull import default_cache, open_bundle, pull, ready_bundle

_log = logging.getLogger("attnd.load")

SHIPPED = Path(__file__).parents[2] / "model" / "zoo"
CHAT = "chat"  # the shipped model whose graph other weights can be bound to
MAX_LANES = 8  # of a translation: more than one event loop can keep busy, and each has K/V of its own
MAX_BATCH = {"generation": 16, "translation": 32}  # with more a translation's step costs as much a row as with these


def shipped_bundles() -> dict[str, Path]:
    """Directories of the bundles that come with attnd, by id."""
    return {path.parent.name: path.parent for path in sorted(SHIPPED.glob(f"*/{MANIFEST}"))}


def find_bundles(models: Sequence[str]) -> list[Path]:
    """Directories for what `models` names: ids of shipped models or paths; all shipped ones when it names none.

    Raises ConfigError for a name that is neither, and when there is nothing to serve.
    """
    shipped = shipped_bundles()
    found = [shipped.get(name, Path(name)) for name in models] if models else list(shipped.values())
    if not found:
        raise ConfigError("no model to serve: none is shipped with this installation, name bundles", param="models")
    for path in found:
        if not (path / MANIFEST).is_file():
            message = f"no model {str(path)!r}: neither shipped ({', '.join(shipped) or 'none'}) nor a bundle directory"
            raise ConfigError(message, param="models")
    return found


def pull_model(model: str, settings: Settings) -> Path:
    """The whole bundle of a shipped model, or of other weights for the shipped chat model's graph.

    Raises ConfigError and BundleError.
    """
    cache, shipped = cache_of(settings), shipped_bundles()
    return ready_bundle(shipped[model], cache) if model in shipped else pull(model, shipped.get(CHAT), cache)


def cache_of(settings: Settings) -> Path:
    return Path(settings.cache) if settings.cache else default_cache()


def load_bundles(settings: Settings) -> list[Bundle]:
    """The checked bundles; what does not come whole with attnd is made whole in the cache first.

    Raises BundleError for a broken one or two of one id, ConfigError as `find_bundles`.
    """
    cache = cache_of(settings)
    bundles = [open_bundle(path, cache) for path in find_bundles(settings.models)]
    ids = [bundle.manifest.id for bundle in bundles]
    for bundle in bundles:
        if ids.count(bundle.manifest.id) > 1:
            raise BundleError(f"two bundles have the id {bundle.manifest.id!r}; the second is {bundle.directory}")
    return bundles


def load_models(settings: Settings, metrics: Metrics) -> list[Classifier | Generator]:
    """Every model, ready to start. Blocks for as long as hashing and warming up take."""
    return [_open(bundle, settings, metrics) for bundle in load_bundles(settings)]


def _open(bundle: Bundle, settings: Settings, metrics: Metrics) -> Classifier | Generator:
    is_classifier = bundle.manifest.task == "classification"
    return (_open_classifier if is_classifier else _open_generator)(bundle, settings, metrics)


def _open_classifier(bundle: Bundle, settings: Settings, metrics: Metrics) -> Classifier:
    engine = ClassificationEngine(bundle, provider=settings.provider, fallback=settings.provider_fallback)
    engine.warm_up()
    return Classifier(
        bundle,
        engine,
        metrics,
        num_threads=settings.threads or available_threads(),
        max_batch_tokens=settings.max_batch_tokens,
        max_waiting=settings.max_queue,
        max_inputs=settings.max_inputs,
        max_attention_bytes=settings.max_attention_bytes,
    )


def _open_generator(bundle: Bundle, settings: Settings, metrics: Metrics) -> Generator:
    """A chat's steps follow one another, and each computes on all threads. A translation has a lane for each of them
    on Linux, elsewhere one: what has loaded libraries may not fork there.

    Such a step, a chat's twentieth, is over before a second thread has woken, and what it reads is no other's prefix.
    Where a classifier is served beside them its threads compete with the lanes for the same cores, and the system
    shares them out; a classifier's runs are short, so that a step then takes longer by a few of them.
    """
    is_chat = bundle.manifest.task == "generation"
    threads = settings.threads or available_threads()
    num_lanes = 1 if is_chat or sys.platform != "linux" else min(threads, MAX_LANES)
    max_rows = settings.max_batch or MAX_BATCH[bundle.manifest.task]
    plan = divide(
        kv_budget(settings.kv_cache_bytes, available_memory()),
        num_lanes=num_lanes,
        bytes_per_token=kv_bytes_per_token(bundle),
        max_tokens=bundle.manifest.limits.max_tokens,
        max_rows=max_rows,
        has_prefixes=settings.prefix_cache and is_chat,
    )
    if plan.max_rows < max_rows:
        _log.warning("%s: keys and values of %d outputs fit, not of max_batch", bundle.manifest.id, plan.max_rows)
    tokenizer = PromptTokenizer(bundle.tokenizer_path)
    vocab_size = vocabulary_of(bundle.graph(GRAPH))
    outputs = Outputs(bundle, tokenizer, vocab_size=vocab_size)
    return Generator(
        bundle,
        [_chat_lane(bundle, plan, settings, outputs, threads=threads)]
        if is_chat
        else _translation_lanes(bundle, plan, settings, outputs, num_lanes=num_lanes),
        metrics,
        prompts=PromptReader(bundle, tokenizer, vocab_size=vocab_size),
        max_rows=plan.max_rows,
        max_waiting=settings.max_queue_outputs,
        num_blocks=plan.num_blocks,
        attending=_attending(bundle, tokenizer, settings),
    )


def _attending(bundle: Bundle, tokenizer: PromptTokenizer, settings: Settings) -> Attending | None:
    """None for a bundle that was made before there was a graph for it."""
    if ATTENTION_GRAPH not in bundle.manifest.graphs:
        return None
    return Attending(bundle, tokenizer, max_bytes=settings.max_attention_bytes)


def _chat_lane(bundle: Bundle, plan: KvPlan, settings: Settings, outputs: Outputs, *, threads: int) -> Lane:
    """Its steps compute on all `threads`."""
    engine = DecoderEngine(
        bundle,
        num_slots=plan.num_slots,
        num_blocks=plan.num_blocks,
        threads=threads,
        provider=settings.provider,
        fallback=settings.provider_fallback,
        spin=True,  # a chat's step has some 300 nodes, most of them short: two thirds of the time with one row
    )
    engine.warm_up()
    return _thread_lane(bundle, engine, plan, outputs)


def _translation_lanes(
    bundle: Bundle, plan: KvPlan, settings: Settings, outputs: Outputs, *, num_lanes: int
) -> Sequence[Lane]:
    """Each is a process of its own, where there are several."""
    if num_lanes > 1:
        load = Load(
            str(bundle.directory),
            plan.max_rows,
            provider=settings.provider,
            fallback=settings.provider_fallback,
            log_level=settings.log_level,
        )
        processes = LaneProcesses(load, num_lanes)
        return [ProcessLane(processes, place) for place in range(num_lanes)]
    engine = TranslatorEngine(
        bundle,
        num_slots=plan.num_slots,
        threads=1,
        provider=settings.provider,
        fallback=settings.provider_fallback,
    )
    engine.warm_up()
    return [_thread_lane(bundle, engine, plan, outputs)]


def _thread_lane(bundle: Bundle, engine: Engine, plan: KvPlan, outputs: Outputs) -> ThreadLane:
    return ThreadLane(engine, outputs, max_rows=plan.max_rows, num_blocks=plan.num_blocks, name=bundle.manifest.id)
