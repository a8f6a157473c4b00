"""The playground's explorer of attention maps, and that all panels can be used by everyone."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from fake_maps import fake_attention, tokens_of, weights_of
from fakes import CHAT, MODEL, NUM_HEADS, NUM_LAYERS, FakeBackend, fake_scores, until

pytest.importorskip("playwright", reason="the page's tests need playwright (the dev extra)")

from browser import CHROMIUM, Opened, answer, fill_all, launched, opened
from playwright.async_api import Page
from reached import array_of, call, serving

from service.domain import AttentionMaps, AttentionRequest, GenerateOptions, ModelInfo, TextInput

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome is installed (or named by CHROMIUM)"),
]

TRANSLATION = ModelInfo(
    id="translation", task="translation", created=1_700_000_002, facts={"limits": {"max_tokens": 128}}
)
PANELS = ("sentiment", "chat", "translation", "attention")
TEXT = "a fine film"


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def page() -> AsyncIterator[Page]:
    async with launched() as page:
        yield page


@pytest_asyncio.fixture(loop_scope="module")
async def at(page: Page, backend: FakeBackend) -> AsyncIterator[Opened]:
    backend.served = [MODEL, CHAT, TRANSLATION]
    async with opened(page, backend) as at:
        await at.serve()
        yield at


async def test_the_servers_own_maps_are_shown(at: Opened) -> None:
    """Not stood in for: as the gateway writes them."""
    await at.serve("/v1/attention")
    await at.show("attention")
    await at.text("[role=gridcell]").to_have_count(NUM_LAYERS * NUM_HEADS)
    await at.page.fill("#attention-text", TEXT)
    await at.page.click("text=Show attention")
    await until(lambda: len(at.backend.requests) == 2)
    sent = at.backend.requests[-1]
    assert sent == AttentionRequest(text=TEXT, model="sentiment", layers="all", reduce="none")
    best = fake_scores(TextInput(TEXT))[0]
    await at.text(".prediction").to_have_text(f"Predicted: {best.label} {best.score:.4f}")
    await at.page.click("[role=gridcell] >> nth=5")  # layer 2, head 1
    await at.page.hover("#panel-attention .queries .token >> nth=2")
    weights = [f"{2000 + 100 + 20 + key:.2f}" for key in range(4)]
    for key, weight in enumerate(weights):
        await at.text(f"#panel-attention .keys .token >> nth={key}").to_have_attribute("data-weight", weight)


async def test_every_map_can_be_reached_by_keyboard(at: Opened) -> None:
    await at.serve_maps()
    await at.show("attention")
    await at.text("[role=gridcell]").to_have_count(6 * 8)
    await at.text(".prediction").to_have_text("Predicted: POSITIVE 0.9876")
    await at.text(".enlarged").to_have_text("Layer 5, head 0")
    assert await at.page.locator("[role=gridcell][tabindex='0']").count() == 1
    await at.page.focus("[role=gridcell][aria-selected=true]")
    for key in ("ArrowUp", "ArrowRight", "ArrowRight", "ArrowDown", "ArrowDown", "Enter"):
        await at.page.keyboard.press(key)
    await at.text(".enlarged").to_have_text("Layer 5, head 2")
    await at.page.keyboard.press("Home")
    await at.page.keyboard.press(" ")
    await at.text(".enlarged").to_have_text("Layer 5, head 0")
    await at.text("[aria-selected=true]").to_have_count(1)
    await at.page.click("[role=gridcell] >> nth=11")
    await at.text(".enlarged").to_have_text("Layer 1, head 3")


async def test_a_token_shows_where_it_looks_and_who_looks_at_it(at: Opened) -> None:
    await at.serve_maps()
    await at.show("attention")
    await at.page.click("[role=gridcell] >> nth=10")  # layer 1, head 2
    text = await at.page.input_value("#attention-text")
    tokens = tokens_of(text)
    said = [text[token["start"] : token["end"]] for token in tokens]
    weights = weights_of(1, 2, len(tokens), len(tokens))
    await at.page.hover("#panel-attention .queries .token >> nth=4")
    shown = at.text("#panel-attention .keys .token:not([data-weight=''])")
    await shown.to_have_count(sum(weight >= 0.005 for weight in weights[4]))
    best = max(range(len(tokens)), key=lambda key: weights[4][key])
    words = f"“{said[4]}” looks at “{said[best]}” {weights[4][best]:.3f}"
    await at.text("#panel-attention .readout").to_contain_text(words)
    assert await at.page.locator("#panel-attention .lines path").count() > 0
    await at.page.evaluate("document.querySelector('#panel-attention .matrix').style.width = '300px'")
    await shown.to_have_count(sum(weight >= 0.005 for weight in weights[4]))  # still, though all was drawn anew
    await at.page.mouse.move(0, 0)  # or what comes to lie under it would be looked at again
    await at.page.focus("#panel-attention .keys .token >> nth=2")
    await at.text("#panel-attention .readout").to_contain_text("“gripping” is looked at by")
    await at.page.keyboard.press("ArrowDown")
    await at.text("#panel-attention .readout").to_contain_text("“,” is looked at by")
    await at.page.check("#panel-attention [type=checkbox]")
    await at.text("#panel-attention .queries .token").to_have_count(len(tokens) - 2)
    await at.page.uncheck("#panel-attention [type=checkbox]")
    await at.text("#panel-attention .queries .token").to_have_count(len(tokens))


async def test_the_explorer_asks_for_what_is_chosen(at: Opened) -> None:
    await at.serve_maps()
    await at.show("attention")
    await at.page.select_option("#panel-attention .reduce", "rollout")
    await at.text(".enlarged").to_have_text("All layers, rollout")
    await at.text(".grid").to_be_hidden()
    assert "layers" not in at.watch.bodies("/v1/attention")[-1]
    await at.page.select_option("#panel-attention .reduce", "mean")
    await at.text("[role=gridcell]").to_have_count(6)
    await at.page.select_option("#panel-attention .ask .model select", "translation")
    await at.text(".kinds button").to_have_text(["encoder", "decoder", "decoder to source"])
    await at.page.click(".kinds button >> nth=2")
    await at.text("#panel-attention .queries .token").to_have_text(["<s>", "ein", "kleiner", "Hund"])
    await at.page.click("text=A translation of your own")
    await at.page.fill(".second textarea", "ein Film")
    await at.page.click("text=Show attention")
    await at.text("#panel-attention .queries .token").to_have_text(["<s>", "ein", "Film"])
    await at.page.select_option("#panel-attention .ask .model select", "chat")
    await at.text("#panel-attention .queries .token").to_contain_text(["a", "gripping", "Hund"])
    body = at.watch.bodies("/v1/attention")[-1]
    assert (body["generate"], body.get("target")) == ({"max_tokens": 16}, None)
    await at.text(".prediction").to_have_text("Written: ein kleiner Hund")
    assert at.watch.complaints == []


async def test_models_are_offered_in_the_order_of_their_tasks(at: Opened, backend: FakeBackend) -> None:
    """However they are served: one that classifies answers at once, one that writes has to write first."""
    backend.served = [TRANSLATION, CHAT, MODEL]
    await at.serve_maps()
    await at.show("attention")
    await at.text("#panel-attention .ask .model option").to_have_text(["sentiment", "chat", "translation"])
    await at.text(".prediction").to_have_text("Predicted: POSITIVE 0.9876")


async def test_maps_over_the_limit_are_refused_in_words(at: Opened) -> None:
    await at.serve_maps()
    await at.show("attention")
    message = "layers: 18874368 weights were asked for, at most 4194304 are served at once"
    await answer(at.page, "/v1/attention", lambda _: (413, {"error": {"message": message}}))
    await at.page.click("text=Show attention")
    await at.text("#panel-attention .error").to_have_text(f"Too much at once: {message}.")
    await at.text(".explorer").to_be_hidden()


async def test_maps_read_alike_as_numbers_and_as_bytes(at: Opened) -> None:
    await at.show("sentiment")
    body = {"text": TEXT, "model": "sentiment", "layers": "all"}
    numbers, packed = fake_attention(body)["maps"][3], fake_attention(body | {"encoding": "base64"})["maps"][3]
    unpacked = """async maps => {
        const {unpack, headOf} = await import("/playground/maps.js");
        return maps.map(map => [...headOf(unpack(map), 5)]);
    }"""
    from_numbers, from_bytes = await at.page.evaluate(unpacked, [numbers, packed])
    assert from_numbers == from_bytes
    assert from_numbers == pytest.approx([weight for row in weights_of(3, 5, 5, 5) for weight in row], abs=1e-7)


async def test_maps_are_labelled_by_the_tokens_of_their_kind(at: Opened) -> None:
    await at.show("sentiment")
    axes = """async ([map, reply]) => {
        const {axes} = await import("/playground/maps.js");
        const {queries, keys} = axes(map, reply);
        return [queries, keys].map(side => side.map(token => token.text).join(""));
    }"""
    reply = {"tokens": [{"text": "a"}, {"text": "b"}], "target_tokens": [{"text": letter} for letter in "cde"]}
    for kind, rows, columns, labels in (
        ("decoder", 5, 5, ["abcde", "abcde"]),
        ("decoder", 3, 3, ["cde", "cde"]),
        ("cross", 3, 2, ["cde", "ab"]),
        ("encoder", 2, 2, ["ab", "ab"]),
    ):
        assert await at.page.evaluate(axes, [{"kind": kind, "rows": rows, "columns": columns}, reply]) == labels


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def models(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Any]:
    """A tiny chat model and a tiny translator, with the ids of the shipped ones."""
    tiny = pytest.importorskip("tiny", reason="exporting needs torch", exc_type=ImportError)
    tiny_translator = pytest.importorskip("tiny_translator")
    folder = tmp_path_factory.mktemp("models")
    bundles = (
        tiny.tiny_generation_bundle(folder / "chat", precision="int8", id="chat"),
        tiny_translator.tiny_translation_bundle(folder / "translation", precision="int8", id="translation"),
    )
    async with serving(*bundles, threads=1) as running:
        yield running.local


async def test_a_decoder_s_own_maps_are_shown(page: Page, models: Any) -> None:
    async with opened(page, models) as at:
        await at.show("attention")
        await at.page.fill("#attention-text", TEXT)
        await at.page.fill("#panel-attention .written input", "5")
        await at.page.click("text=Show attention")
        asked = AttentionRequest(text=TEXT, layers="all", generate=GenerateOptions(max_tokens=5), model="chat")
        truth = await models.attention(asked, call())
        await at.text(".prediction").to_have_text(f"Written: {truth.prediction.text}")
        num_tokens = len(truth.tokens) + len(truth.target_tokens)
        await at.text("[role=gridcell]").to_have_count(sum(one.shape[0] for one in truth.maps))
        for side in ("queries", "keys"):
            await at.text(f"#panel-attention .{side} .token").to_have_count(num_tokens)
        written = "#panel-attention .queries .token.written"
        await at.text(written).to_have_count(len(truth.target_tokens))
        await at.text("#panel-attention .readout").to_contain_text("In italics: what the model wrote.")
        last = array_of(truth.maps[-1])[0][num_tokens - 1]  # what the last token written looks at, in the open map
        await at.page.hover(f"#panel-attention .queries .token >> nth={num_tokens - 1}")
        for key, weight in enumerate(last):
            shown = f"{weight:.2f}" if weight >= 0.005 else ""
            await at.text(f"#panel-attention .keys .token >> nth={key}").to_have_attribute("data-weight", shown)


def labelled(truth: AttentionMaps, target: str) -> str:
    """How the page writes the first token of a translation."""
    first = truth.target_tokens[1]
    return target[first.start : first.end].strip() or first.text


async def test_a_translation_and_its_own_alignment_are_shown(page: Page, models: Any) -> None:
    async with opened(page, models) as at:
        await at.show("translation")
        await at.page.fill("#panel-translation textarea", "I read.")
        await at.page.click("#panel-translation .send")
        await at.text("#panel-translation .alignment").to_be_visible()
        (asked,) = at.watch.bodies("/v1/attention")
        truth = await models.attention(
            AttentionRequest(text=asked["text"], kind="cross", layers="all", reduce="mean"), call()
        )
        written = truth.prediction.text
        assert written == await at.page.locator("#panel-translation .output").inner_text()
        await at.text("#panel-translation .queries .token").to_have_count(len(truth.target_tokens))
        await at.text("#panel-translation .keys .token").to_have_count(len(truth.tokens))
        if len(truth.target_tokens) > 1:  # a row is shown beside the token that it chose
            await at.text("#panel-translation .queries .token >> nth=0").to_have_text(labelled(truth, written))
        await at.text("#panel-translation .queries .token >> nth=-1").to_have_text("(end)")
        weights = array_of(truth.maps[-1])[0][1]
        await at.page.hover("#panel-translation .queries .token >> nth=1")
        best = int(weights.argmax())
        await at.text(f"#panel-translation .keys .token >> nth={best}").to_have_attribute(
            "data-weight", f"{weights[best]:.2f}"
        )


async def test_several_sentences_have_no_alignment_and_the_page_says_so(page: Page, models: Any) -> None:
    async with opened(page, models) as at:
        await at.show("translation")
        for text, is_shown in (("I read. I write.", False), ("I read.", True), ("I read.\nI write.", False)):
            await at.page.fill("#panel-translation textarea", text)
            await at.page.click("#panel-translation .send")
            error = at.text("#panel-translation .alignment .error")
            if is_shown:
                await error.to_be_hidden()
            else:
                await error.to_contain_text(": text has 2 sentences, at most 1 can be attended to")
            for part in (".map", "select"):
                await at.text(f"#panel-translation .alignment {part} >> nth=0").to_be_visible(visible=is_shown)


async def test_a_translator_s_three_kinds_are_shown(page: Page, models: Any) -> None:
    async with opened(page, models) as at:
        await at.show("attention")
        await at.page.select_option("#panel-attention .ask .model select", "translation")
        await at.page.fill("#attention-text", "A dog.")
        await at.page.click("text=Show attention")
        await at.text(".kinds button").to_have_text(["encoder", "decoder", "decoder to source"])
        for at_kind, (queries, keys) in enumerate((("A", "A"), ("<s>", "<s>"), ("<s>", "A"))):
            await at.page.click(f".kinds button >> nth={at_kind}")
            await at.text("#panel-attention .queries .token >> nth=0").to_have_text(queries)
            await at.text("#panel-attention .keys .token >> nth=0").to_have_text(keys)


async def test_what_is_invisible_in_a_token_is_shown(at: Opened) -> None:
    await at.show("sentiment")
    label = "async text => (await import('/playground/maps.js')).labelOf({text})"
    texts = {" a ": "a", " ": "␣", " \t": "␣␣", "\n\n": "↵↵", "a\nb": "a↵b", "": "␣", "x" * 17: "x" * 15 + "…"}
    assert [await at.page.evaluate(label, text) for text in texts] == list(texts.values())


async def test_the_colour_scales_are_even(at: Opened) -> None:
    await at.show("sentiment")
    scales = await at.page.evaluate("async () => (await import('/playground/colors.js')).SCALES")
    for theme, sign in (("light", -1), ("dark", 1)):
        lights = [lightness(color) for color in scales[theme]]
        steps = [sign * (after - before) for before, after in zip(lights, lights[16:], strict=False)]
        assert len(lights) == 256
        assert min(steps) > 0.8 * sum(steps) / len(steps), theme
        assert max(steps) < 1.2 * sum(steps) / len(steps), theme


def lightness(color: list[int]) -> float:
    """L of Oklab for an sRGB colour of three bytes."""
    red, green, blue = (
        part / 255 / 12.92 if part <= 10 else ((part / 255 + 0.055) / 1.055) ** 2.4 for part in color
    )  # fmt: skip
    long = 0.4122214708 * red + 0.5363325363 * green + 0.0514459929 * blue
    medium = 0.2119034982 * red + 0.6806995451 * green + 0.1073969566 * blue
    short = 0.0883024619 * red + 0.2817188376 * green + 0.6299787005 * blue
    return 0.2104542553 * long ** (1 / 3) + 0.793617785 * medium ** (1 / 3) - 0.0040720468 * short ** (1 / 3)


async def test_every_control_has_a_name(at: Opened) -> None:
    await fill_all(at)
    session = await at.page.context.new_cdp_session(at.page)
    controls = {"button", "textbox", "combobox", "link", "checkbox", "spinbutton", "gridcell"}
    wanted = controls | {"columnheader", "rowheader", "grid", "image", "canvas", "log", "region"}
    for panel in PANELS:
        await at.page.click(f"#panels a[href='#{panel}']")
        tree = (await session.send("Accessibility.getFullAXTree"))["nodes"]
        found = [node for node in tree if not node["ignored"] and node["role"]["value"] in wanted]
        assert len(found) > 8
        assert [node for node in found if not node.get("name", {}).get("value", "").strip()] == []
        roles = {node["role"]["value"] for node in tree}
        assert {"banner", "navigation", "main", "contentinfo", "heading", "region"} <= roles


async def test_a_narrow_screen_needs_no_sideways_scrolling(at: Opened) -> None:
    await fill_all(at)
    await at.page.set_viewport_size({"width": 360, "height": 740})
    for panel in PANELS:
        await at.page.click(f"#panels a[href='#{panel}']")
        assert await at.page.evaluate("document.documentElement.scrollWidth") <= 360, panel


async def test_long_texts_are_cut_between_lines_and_keep_their_labels(at: Opened) -> None:
    await at.serve_maps()
    await at.show("attention")
    await at.page.set_viewport_size({"width": 375, "height": 740})
    await at.page.fill("#attention-text", " ".join(["word"] * 40))
    await at.page.click("text=Show attention")
    await at.text("#panel-attention .queries .token").to_have_count(42)
    boxes = """() => {
        const lines = document.querySelector("#panel-attention .lines"), end = lines.getBoundingClientRect().bottom;
        const tops = [...lines.querySelectorAll(".token")].map(token => token.getBoundingClientRect().top);
        const matrix = document.querySelector("#panel-attention .matrix");
        return [lines.scrollHeight > lines.clientHeight, Math.min(...tops.map(top => Math.abs(top - end))),
            matrix.scrollWidth / matrix.clientWidth];
    }"""
    is_cut, between, width = await at.page.evaluate(boxes)
    assert is_cut
    assert between < 1
    assert width > 1.5  # with room for labels the map is wider than the screen
    assert await at.page.evaluate("document.documentElement.scrollWidth") <= 375


CONTRASTS = """() => {
    const paint = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
    const over = colors => {
        for (const color of colors) { paint.fillStyle = color; paint.fillRect(0, 0, 1, 1); }
        return [...paint.getImageData(0, 0, 1, 1).data.slice(0, 3)];
    };
    const light = color => {
        const [r, g, b] = color.map(part => part / 255)
            .map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const found = [];
    for (const node of document.querySelectorAll("body *")) {
        const isText = [...node.childNodes].some(child => child.nodeType === 3 && child.data.trim());
        if (!isText || !node.checkVisibility() || node.matches(":disabled, .unseen, option")) continue;
        const grounds = [];
        for (let at = node; at; at = at.parentElement) grounds.unshift(getComputedStyle(at).backgroundColor);
        const ground = over(grounds), ink = over([...grounds, getComputedStyle(node).color]);
        const [dark, bright] = [light(ground), light(ink)].sort((one, other) => one - other);
        found.push([(bright + 0.05) / (dark + 0.05), node.className + ": " + node.textContent.trim().slice(0, 40)]);
    }
    return found;
}"""


async def test_texts_stand_out_from_what_is_behind_them(at: Opened) -> None:
    await fill_all(at)
    themes: list[Any] = ["dark", "light"]
    for panel in PANELS:
        await at.page.click(f"#panels a[href='#{panel}']")
        for theme in themes:
            await at.page.emulate_media(color_scheme=theme)
            if panel == "attention":
                await at.page.focus("#panel-attention .queries .token >> nth=3")
                await at.text("#panel-attention .token.active").to_have_count(1)
            found = await at.page.evaluate(CONTRASTS)
            assert len(found) > 10
            assert [pair for pair in found if pair[0] < 4.5] == [], theme
