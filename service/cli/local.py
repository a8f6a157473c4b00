"""A model in this process, with no socket: the smallest part of the installation that answers a command."""

from collections.abc import Sequence
from dataclasses import replace

from service.config import Settings
from service.errors import NotFound, Unsupported
from service.metrics import Metrics
from service.worker.bundle import read_manifest
from service.worker.load import find_bundles, load_models
from service.worker.local import LocalBackend


async def open_local(settings: Settings, model: str | None, tasks: Sequence[str]) -> LocalBackend:
    """The model, which is a shipped one's id or a bundle directory, or the first for the first of `tasks`, started.

    Raises ConfigError, BundleError, Unsupported for a named model of another task, and NotFound when there is none for
    any of the tasks.
    """
    paths = find_bundles((model,) if model else settings.models)
    able = {str(path): read_manifest(path).task for path in paths}
    wanted = [path for task in tasks for path, own in able.items() if own == task]
    if not wanted and model:
        raise Unsupported(
            f"model {model!r} is for {able[str(paths[0])]}, not {tasks[0]}", param="model", code="wrong_task"
        )
    if not wanted:
        found = ", ".join(f"{path.name} ({able[str(path)]})" for path in paths)
        raise NotFound(f"no model for {tasks[0]} is there, only {found}")
    one, metrics = replace(settings, models=(wanted[0],)), Metrics(settings.latency_buckets, {})
    backend = LocalBackend(lambda: load_models(one, metrics), drain_timeout_s=settings.drain_timeout)
    await backend.start()
    return backend
