"""The composition root, from inside; test_cli.py starts it as a process."""

import asyncio
import gc
from collections.abc import Iterator

import pytest
from fakes import FakeBackend

from service import roles
from service.config import Settings
from service.observed import Observed


@pytest.fixture
def thawed() -> Iterator[None]:
    """What a test leaves frozen is not, afterwards."""
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("thawed")
async def test_what_is_loaded_is_not_looked_through_for_cycles_again(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[object] = []
    loaded = asyncio.Event()

    async def load() -> None:
        kept.extend([] for _ in range(1000))
        loaded.set()

    monkeypatch.setattr(roles, "_signal", loaded.wait)
    backend = Observed(FakeBackend(), roles.make_metrics(Settings()))
    await roles._run(backend, [], load)
    young = {id(one) for one in gc.get_objects()}
    assert not any(id(one) in young for one in kept)
