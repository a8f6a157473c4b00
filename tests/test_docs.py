"""/docs in a real browser: that what its forms send as they are delivered is answered."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from fakes import CHAT, MODEL, FakeBackend

pytest.importorskip("playwright", reason="the page's tests need playwright (the dev extra)")

from browser import CHROMIUM, Opened, launched, opened
from playwright.async_api import Page

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome is installed (or named by CHROMIUM)"),
]

ROUTES = "main section > details"
MODEL_ROUTE = f"{ROUTES}:has(code:text-is('/v1/models/{{model_id}}'))"


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def page() -> AsyncIterator[Page]:
    async with launched() as page:
        yield page


async def open_all(at: Opened) -> None:
    await at.page.goto(f"http://127.0.0.1:{at.served.port}/docs")
    await at.text(ROUTES).not_to_have_count(0)
    await at.page.evaluate("for (const box of document.querySelectorAll('main details')) box.open = true")


async def test_every_route_answers_what_its_form_sends(page: Page, backend: FakeBackend) -> None:
    backend.served = [CHAT, MODEL]
    async with opened(page, backend) as at:
        await open_all(at)
        await at.text(f"{MODEL_ROUTE} >> .route").to_have_value("/v1/models/sentiment")
        assert await page.locator("h2").all_inner_texts() == ["Status", "Native", "OpenAI", "Hugging Face"]
        for index in range(await page.locator(ROUTES).count()):
            route = f"{ROUTES} >> nth={index}"
            await page.click(f"{route} >> button")
            await at.text(f"{route} >> div > pre").to_contain_text("200 OK")
        assert at.watch.complaints == []


async def test_a_model_is_named_once_there_is_a_key(page: Page, backend: FakeBackend) -> None:
    async with opened(page, backend, api_key="secret") as at:
        await open_all(at)
        await page.click(f"{MODEL_ROUTE} >> button")
        await at.text(f"{MODEL_ROUTE} >> div > pre").to_contain_text("401 Unauthorized")
        await page.fill("#key", "secret")
        await page.press("#key", "Tab")
        await at.text(f"{MODEL_ROUTE} >> .route").to_have_value("/v1/models/sentiment")
        await page.click(f"{MODEL_ROUTE} >> button")
        await at.text(f"{MODEL_ROUTE} >> div > pre").to_contain_text("200 OK")


async def test_a_server_that_is_gone_is_said(page: Page, backend: FakeBackend) -> None:
    async with opened(page, backend) as at:
        await open_all(at)
        await page.route("**/healthz", lambda route: route.abort("connectionrefused"))
        await page.click(f"{ROUTES} >> nth=0 >> button")
        await at.text(f"{ROUTES} >> nth=0 >> div > pre").to_have_text("The server cannot be reached.")
        at.watch.complaints.clear()
