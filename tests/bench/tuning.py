"""Finds each peer's best settings before it is compared, so that it is shown at its best, and remembers them."""

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .contenders import Tuning, candidates, peer_server
from .loads import run_wrk
from .servers import Server, ServerFailed, running

_CONCURRENCY = 32
_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class Tried:
    """One candidate and its answered requests a second; 0 when it did not come up or failed requests."""

    tuning: Tuning
    rate: float


def best_of(tried: Sequence[Tried]) -> Tried:
    """The fastest. Raises ServerFailed when none worked."""
    best = max(tried, key=lambda one: one.rate)
    if best.rate <= 0:
        raise ServerFailed("no candidate setting worked")
    return best


def tuned(peer: str, bundle: Path, cache: Path, bodies: Path, *, cores: int, again: bool) -> list[Tried]:
    """Every candidate with its rate, from an earlier run on the same bundle and cores unless `again`."""
    remembered = cache / f"tuning-{peer}-{_fingerprint(peer, bundle, cores)}.json"
    if remembered.exists() and not again:
        rows = json.loads(remembered.read_text(encoding="utf-8"))
        return [Tried(tuning=Tuning(**row["tuning"]), rate=row["rate"]) for row in rows]
    tried = [_try(peer_server(peer, bundle, cache, one), one, bodies, cache) for one in candidates(peer, cores)]
    best_of(tried)  # nothing that failed altogether is remembered
    rows = [{"tuning": one.tuning.as_dict(), "rate": one.rate} for one in tried]
    remembered.write_text(json.dumps(rows), encoding="utf-8")
    return tried


def _try(server: Server, tuning: Tuning, bodies: Path, cache: Path) -> Tried:
    try:
        with running(server, cache):
            run_wrk(server.url, bodies, concurrency=_CONCURRENCY, seconds=1)
            sample = run_wrk(server.url, bodies, concurrency=_CONCURRENCY, seconds=_SECONDS)
            rate = 0.0 if sample.errors else sample.rate
    except ServerFailed as error:
        print(f"  {server.name}: {error}", file=sys.stderr)
        rate = 0.0
    print(f"  {server.name}, {tuning}: {rate:.0f}/s", file=sys.stderr, flush=True)
    return Tried(tuning=tuning, rate=rate)


def _fingerprint(peer: str, bundle: Path, cores: int) -> str:
    """Of what a remembered sweep depends on: the bundle's manifest (it has the graph's checksum), cores, candidates."""
    manifest = (bundle / "manifest.json").read_bytes()
    return hashlib.sha256(manifest + repr((cores, candidates(peer, cores))).encode()).hexdigest()[:12]
