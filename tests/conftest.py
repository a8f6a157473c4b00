"""Fixtures that several test files use."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import rpc
import uvloop
import wire
from fakes import FakeBackend

ON_BOTH_LOOPS = {"test_http_robust.py", "test_streams.py"}  # the rest run on asyncio's own; the service runs on uvloop


def pytest_asyncio_loop_factories(item: pytest.Item) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The event loops a test runs on."""
    loops: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": asyncio.new_event_loop}
    return loops | {"uvloop": uvloop.new_event_loop} if item.path.name in ON_BOTH_LOOPS else loops


@pytest.fixture
def backend() -> FakeBackend:
    """A backend that answers at once, until told otherwise."""
    return FakeBackend()


@pytest.fixture
async def served(backend: FakeBackend) -> AsyncIterator[wire.Served]:
    """The gateway over `backend`, with default settings."""
    async with wire.serve(backend) as served:
        yield served


@pytest.fixture
async def start(backend: FakeBackend) -> AsyncIterator[rpc.Start]:
    """Starts a gRPC server over `backend` with the given settings."""
    async with rpc.starting(backend) as start:
        yield start


@pytest.fixture
async def running(start: rpc.Start) -> rpc.Running:
    """A gRPC server over `backend`, and a channel to it."""
    return await start()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seeded classifier of two small layers, as training would leave it."""
    tiny = pytest.importorskip("tiny", reason="exporting needs torch", exc_type=ImportError)
    return tiny.save_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="session")
def tiny_bundles(tiny_checkpoint: Path) -> dict[str, Path]:
    """Its bundles by precision. Shared by all tests: copy one before changing it."""
    import tiny

    folder = tiny_checkpoint.parent
    return {name: tiny.export_tiny(tiny_checkpoint, folder / name, name) for name in ("float32", "int8")}
