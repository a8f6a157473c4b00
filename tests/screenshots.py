"""Pictures of the playground for the README, taken of a running server: python tests/screenshots.py URL FOLDER."""

import asyncio
import sys
from pathlib import Path
from typing import Any

from browser import launched
from playwright.async_api import Page, expect

SIZE: Any = {"width": 1080, "height": 700}
WAIT_MS = 60_000  # a model may have to write a whole answer


async def take_sentiment(page: Page) -> str:
    """Gives what the picture ends with; so do the others."""
    await page.fill("#sentiment-text", "a gripping, funny film that never talks down to its audience")
    await page.hover(".mark >> nth=1")
    return ".explain .legend"


async def take_chat(page: Page) -> str:
    await page.fill("#chat-text", "What is the capital of France, and what is it known for?")
    await page.press("#chat-text", "Enter")
    await expect(page.locator(".turn.assistant .stats")).to_contain_text("tokens/s")
    return ".chat"


async def take_translation(page: Page) -> str:
    await page.click("#panel-translation .send")
    await page.hover(".alignment .queries .token >> nth=2")
    return ".alignment .legend"


async def take_attention(page: Page) -> str:
    await page.click("#panel-attention [role=gridcell] >> nth=44")
    await page.hover("#panel-attention .queries .token >> nth=8")
    return ".explorer"


TAKES = {
    "sentiment": take_sentiment,
    "chat": take_chat,
    "translation": take_translation,
    "attention": take_attention,
}


async def main(url: str, folder: Path) -> None:
    """A picture of every panel that the server has, in both themes."""
    async with launched() as page:
        page.set_default_timeout(WAIT_MS)
        expect.set_options(timeout=WAIT_MS)
        await page.set_viewport_size(SIZE)
        themes: list[Any] = ["light", "dark"]
        for theme in themes:
            await page.emulate_media(color_scheme=theme)
            for panel in TAKES:
                await page.goto("about:blank")
                await page.goto(f"{url}/#{panel}")
                await page.locator("section:visible").wait_for()
                if await page.locator(f"#panel-{panel}").is_visible():
                    await take(page, panel, folder / f"{panel}-{theme}.png")


async def take(page: Page, panel: str, path: Path) -> None:
    last = await TAKES[panel](page)
    bottom = await page.locator(last).evaluate("node => node.getBoundingClientRect().bottom + scrollY + 12")
    await page.screenshot(path=path, full_page=True, clip={"x": 0, "y": 0, "width": SIZE["width"], "height": bottom})


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2])))
