"""From settings to served models: finds the bundles, checks them, opens their engines, warms them up."""

from collections.abc import Sequence
from pathlib import Path

from service.config import Settings
from service.errors import BundleError, ConfigError
from service.metrics import Metrics
from service.worker.bundle import Bundle, load_bundle
from service.worker.classifier import Classifier
from service.worker.engine import ClassificationEngine
from service.worker.session import available_threads

SHIPPED = Path(__file__).parents[2] / "model" / "zoo"
MANIFEST = "manifest.json"


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


def load_bundles(models: Sequence[str]) -> list[Bundle]:
    """The checked bundles. Raises BundleError for a broken one or two of one id, ConfigError as `find_bundles`."""
    bundles = [load_bundle(path) for path in find_bundles(models)]
    ids = [bundle.manifest.id for bundle in bundles]
    for bundle in bundles:
        if ids.count(bundle.manifest.id) > 1:
            raise BundleError(f"two bundles have the id {bundle.manifest.id!r}; the second is {bundle.directory}")
    return bundles


def load_classifiers(settings: Settings, metrics: Metrics) -> list[Classifier]:
    """Every model, ready to start. Blocks for as long as hashing and warming up take."""
    return [_open(bundle, settings, metrics) for bundle in load_bundles(settings.models)]


def _open(bundle: Bundle, settings: Settings, metrics: Metrics) -> Classifier:
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
    )
