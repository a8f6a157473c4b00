"""A real browser without a window, and the playground in it, for the tests of what people see.

Needs playwright, which the dev extra has, and a Chromium or Chrome on the machine.
"""

import json
import os
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import wire
from fake_maps import fake_attention, fake_explanation
from fakes import FakeBackend
from playwright.async_api import ConsoleMessage, Error, Page, Request, Route, async_playwright, expect

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = os.environ.get("CHROMIUM") or next((path for name in NAMES if (path := shutil.which(name))), None)

SIZE: Any = {"width": 1280, "height": 900}
TIMEOUT_MS = 20_000

FLAGS = (
    "--no-sandbox",  # containers forbid what the sandbox is made of; the page is our own
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@asynccontextmanager
async def launched() -> AsyncIterator[Page]:
    """One page for many tests: a new one costs much of what a test does."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        try:
            page = await browser.new_page(viewport=SIZE, reduced_motion="reduce")
            page.set_default_timeout(TIMEOUT_MS)
            expect.set_options(timeout=TIMEOUT_MS)
            yield page
        finally:
            await browser.close()


class Watch:
    """What a page asked for and complained of."""

    def __init__(self, page: Page) -> None:
        self.requests: list[Request] = []
        self.complaints: list[str] = []
        self._page = page
        page.on("request", self._ask)
        page.on("pageerror", self._fail)
        page.on("console", self._note)

    def end(self) -> None:
        self._page.remove_listener("request", self._ask)
        self._page.remove_listener("pageerror", self._fail)
        self._page.remove_listener("console", self._note)

    def _ask(self, request: Request) -> None:
        self.requests.append(request)

    def _fail(self, error: Error) -> None:
        self.complaints.append(str(error))

    def _note(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def bodies(self, path: str) -> list[Any]:
        """What was sent to `path`, in order."""
        return [request.post_data_json for request in self.requests if request.url.endswith(path)]


async def answer(page: Page, path: str, reply: Callable[[Any], Any]) -> None:
    """Answer the page's own requests to `path` with `reply(body)` as JSON, or its (status, body)."""

    async def fulfill(route: Route) -> None:
        made = reply(json.loads(route.request.post_data or "null"))
        status, body = made if isinstance(made, tuple) else (200, made)
        with suppress(Error):  # the page may have gone on, and waits for it no longer
            await route.fulfill(status=status, json=body)

    await page.route(f"**{path}", fulfill)


@dataclass(frozen=True)
class Opened:
    """A page of the gateway over `backend`."""

    page: Page
    watch: Watch
    backend: FakeBackend
    served: wire.Served

    async def show(self, panel: str = "") -> None:
        """Go to the page anew, and there to `panel`."""
        await self.page.goto("about:blank")
        await self.page.goto(f"http://127.0.0.1:{self.served.port}/#{panel}")
        if panel:
            await expect(self.page.locator(f"#panel-{panel}")).to_be_visible()

    async def serve(self, *paths: str) -> None:
        """Have the server say that it has these endpoints and no others."""
        await answer(self.page, "/openapi.json", lambda _: {"paths": dict.fromkeys(paths)})

    async def serve_maps(self) -> None:
        """Stand in for the endpoints of attention."""
        await self.serve("/v1/attention", "/v1/explain")
        await answer(self.page, "/v1/attention", fake_attention)
        await answer(self.page, "/v1/explain", fake_explanation)

    def text(self, selector: str) -> Any:
        return expect(self.page.locator(selector))

    async def say(self, message: str) -> None:
        await self.page.fill("#chat-text", message)
        await self.page.press("#chat-text", "Enter")


@asynccontextmanager
async def opened(page: Page, backend: FakeBackend, **settings: Any) -> AsyncIterator[Opened]:
    """Afterwards the page must have asked nobody but its own server, and complained of nothing but failed requests."""
    async with wire.serve(backend, **settings) as served:
        watch = Watch(page)
        try:
            yield Opened(page, watch, backend, served)
        finally:
            watch.end()
            await page.goto("about:blank")  # first: what it still waits for must not wait for its route
            await page.unroute_all(behavior="ignoreErrors")
            await page.set_viewport_size(SIZE)
        own = f"http://127.0.0.1:{served.port}/"
        assert [request.url for request in watch.requests if not request.url.startswith(own)] == []
        failed = "Failed to load resource: the server responded with a status of"
        assert [said for said in watch.complaints if not said.startswith(failed)] == []


async def fill_all(at: Opened) -> None:
    """Every panel with something in it, and all that unfolds unfolded."""
    await at.serve_maps()
    await at.show("chat")
    await at.say("one two three")
    await at.text(".turn.assistant .stats").not_to_be_empty()
    await at.page.click("#panels a[href='#translation']")
    await at.page.click("#panel-translation .send")
    await at.text(".alignment").to_be_visible()
    await at.page.click("#panels a[href='#attention']")
    await at.text(".explorer").to_be_visible()
    await at.page.click("#panels a[href='#sentiment']")
    await at.text(".explain").to_be_visible()
    await at.page.evaluate("for (const box of document.querySelectorAll('details:not([hidden])')) box.open = true")
