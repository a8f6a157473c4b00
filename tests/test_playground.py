"""The playground in a real browser, against the real gateway: scores, chat, translation, errors, the key."""

import asyncio
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest
import pytest_asyncio
from fake_maps import fake_attention, fake_explanation, weights_of
from fakes import CHAT, MODEL, FakeBackend, fake_scores, until

pytest.importorskip("playwright", reason="the page's tests need playwright (the dev extra)")

from browser import CHROMIUM, Opened, answer, launched, opened
from playwright.async_api import Page

from service.domain import Call, ClassifyRequest, Event, ExplainRequest, GenerateRequest, ModelInfo, TextInput
from service.errors import EngineFailed, InvalidRequest, Overloaded, Unavailable

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome is installed (or named by CHROMIUM)"),
]

TRANSLATION = ModelInfo(
    id="translation", task="translation", created=1_700_000_002, facts={"limits": {"max_tokens": 128}}
)
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


async def asked(backend: FakeBackend) -> str:
    """The text that was last to be classified."""
    await until(lambda: bool(backend.requests))
    return texts(backend)[-1]


def texts(backend: FakeBackend) -> list[str]:
    return [request.input[0].text for request in backend.requests if isinstance(request, ClassifyRequest)]


async def test_scores_follow_the_typing(at: Opened) -> None:
    await at.show("sentiment")
    await at.page.fill("#sentiment-text", "")
    await at.page.type("#sentiment-text", TEXT)
    scores = {one.label: one.score for one in fake_scores(TextInput(TEXT))}
    await at.text(".bars .number").to_have_text([f"{scores['NEGATIVE']:.4f}", f"{scores['POSITIVE']:.4f}"])
    await at.text(".verdict").to_have_text(max(scores, key=lambda label: scores[label]))
    await at.text("#panel-sentiment .timing >> nth=0").to_contain_text("5.1 ms on the server")
    await at.text("#panel-sentiment .timing >> nth=0").to_contain_text("5 tokens read")
    assert await asked(at.backend) == TEXT
    assert len(at.backend.requests) <= 2 + len(TEXT)
    assert at.watch.complaints == []


async def test_an_older_reply_never_overwrites_a_newer_one(at: Opened) -> None:
    await at.show("sentiment")
    await at.text(".bars li").to_have_count(2)
    at.backend.hold()
    await at.page.fill("#sentiment-text", "older")
    await until(lambda: at.backend.num_waiting == 1)
    await at.page.fill("#sentiment-text", "newer")
    await until(lambda: at.backend.num_cancelled == 1)  # the older one is given up
    await until(lambda: at.backend.num_waiting == 1)
    at.backend.release()
    best = fake_scores(TextInput("newer"))[0]
    await at.text(".bars .best .number").to_have_text(f"{best.score:.4f}")


async def test_tokens_are_explained_where_they_stand(at: Opened) -> None:
    await at.serve_maps()
    await at.show("sentiment")
    await at.page.fill("#sentiment-text", "a 😀 gripping film")  # the emoji is two of a browser's characters
    await at.text(".attribution").to_have_text("a 😀 gripping film")
    await at.text(".mark >> nth=2").to_have_text("gripping")
    explained = fake_explanation({"text": "a 😀 gripping film", "model": "sentiment", "method": "occlusion"})
    await at.page.hover(".attribution .mark >> nth=2")
    await at.text(".explain .readout").to_contain_text(f"{abs(explained['scores'][3]):.4f}, against POSITIVE")
    await at.page.focus(".attribution .mark >> nth=0")
    await at.page.keyboard.press("ArrowRight")
    await at.text(".explain .readout").to_contain_text("“😀”: +")
    await at.page.select_option(".explain select", "rollout")
    await at.text(".attribution").to_be_visible()
    await at.text(".explain pre >> nth=0").to_contain_text('"method":"rollout"')
    await at.text(".explain .legend").to_contain_text("of what was looked at")


async def test_the_servers_own_explanation_is_shown(at: Opened) -> None:
    await at.serve("/v1/explain")
    await at.show("sentiment")
    await at.page.fill("#sentiment-text", TEXT)
    await at.text(".attribution").to_have_text(TEXT)
    await at.text(".explain .mark").not_to_have_count(0)
    await at.text(".explain .timing").to_contain_text("on the server")
    assert isinstance(at.backend.requests[-1], ExplainRequest)
    assert at.backend.requests[-1].text == TEXT


async def test_no_explanation_where_there_is_none(at: Opened) -> None:
    await at.serve("/v1/explain")
    await answer(at.page, "/v1/explain", lambda _: (404, {"error": {"message": "there is no /v1/explain"}}))
    await at.show("sentiment")
    async with at.page.expect_response("**/v1/explain"):
        await at.page.fill("#sentiment-text", TEXT)
    await at.text(".explain").to_be_hidden()


async def test_a_chat_streams_and_remembers(at: Opened) -> None:
    await at.show("chat")
    await at.page.click(".settings summary")
    for name, value in (("temperature", "0.5"), ("top_p", "0.9"), ("max_tokens", "20"), ("seed", "7")):
        await at.page.fill(f"[name={name}]", value)
    await at.page.fill("[name=system]", "Be brief.")
    await at.say("one two")
    await at.text(".turn.assistant .said").to_have_text("one two ")
    await at.text(".turn.assistant .stats").to_contain_text("first token after")
    await at.text(".turn.assistant .stats").to_contain_text("10.0 tokens/s · 2 tokens")
    await at.say("three")
    await at.text(".turn.assistant .said").to_have_text(["one two ", "three "])
    first, second = at.watch.bodies("/v1/generate")
    settings = {"temperature": 0.5, "top_p": 0.9, "max_tokens": 20, "seed": 7, "stream": True}
    system, said = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "one two"}
    assert first == {"messages": [system, said], **settings}
    answered = {"role": "assistant", "content": "one two "}
    assert second["messages"] == [system, said, answered, {"role": "user", "content": "three"}]
    await at.page.click(".clear")
    await at.text(".turn").to_have_count(0)
    await at.say("four")
    await at.text(".turn.assistant .said").to_have_text("four ")
    assert len(at.watch.bodies("/v1/generate")[-1]["messages"]) == 2
    assert at.watch.complaints == []


async def test_stop_cancels_what_has_not_begun(at: Opened) -> None:
    await at.show("chat")
    at.backend.hold()
    await at.say("one two")
    await until(lambda: at.backend.num_waiting == 1)
    await at.page.click(".chat .stop")
    await until(lambda: at.backend.num_cancelled == 1)
    await at.text(".turn.assistant .stats").to_have_text("Stopped")
    await at.text(".chat .send").to_be_enabled()


async def test_stop_keeps_what_was_said(at: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(at.backend, "generate", pausing(at.backend, after=3))
    await at.show("chat")
    await at.say("one two three four")
    await at.text(".turn.assistant .said").to_have_text("one two ")
    await at.text(".log").to_have_attribute("aria-busy", "true")
    await at.page.click(".chat .stop")
    await until(lambda: at.backend.num_cancelled == 1)
    await at.text(".turn.assistant .stats >> nth=0").to_contain_text("Stopped")
    await at.text(".log").to_have_attribute("aria-busy", "false")
    await at.text("#chat-text").to_be_focused()
    await at.say("five")
    assert at.watch.bodies("/v1/generate")[-1]["messages"][1] == {"role": "assistant", "content": "one two "}


def pausing(backend: FakeBackend, *, after: int) -> Any:
    """`backend.generate` that stays still after so many events."""
    whole = backend.generate

    async def generate(request: GenerateRequest, call: Call) -> AsyncGenerator[Event, None]:
        async with aclosing(whole(request, call)) as events:
            num = 0
            async for event in events:
                yield event
                num += 1
                if num == after:
                    await asyncio.get_running_loop().create_future()

    return generate


async def test_an_error_in_the_stream_is_said_and_can_be_retried(at: Opened) -> None:
    await at.show("chat")
    at.backend.error, at.backend.error_after = EngineFailed("the engine stopped"), 2
    await at.say("one two three")
    await at.text(".turn .error").to_contain_text("The server failed: the engine stopped.")
    await at.text(".turn.assistant .said").to_have_text("one two ")
    at.backend.error = None
    await at.page.click(".turn .error button")
    await at.text(".turn.assistant .said").to_have_text("one two three ")
    assert at.watch.bodies("/v1/generate")[1] == at.watch.bodies("/v1/generate")[0]


async def test_errors_are_said_in_words(at: Opened) -> None:
    await at.show("sentiment")
    for error, words in (
        (Overloaded("the queue is full (7)", retry_after_s=1.5), "busy: the queue is full (7). Try again in 2 s."),
        (InvalidRequest("input: too odd"), "The request was refused: input: too odd."),
        (ZeroDivisionError(), "The server failed: internal error"),
    ):
        at.backend.error = error
        await at.page.fill("#sentiment-text", words)
        await at.text("#panel-sentiment .error").to_contain_text(words)
        await at.text(".bars li").to_have_count(0)
    at.backend.error = None
    await at.page.fill("#sentiment-text", TEXT)
    await at.text("#panel-sentiment .error").to_be_hidden()


async def test_a_server_that_is_gone_is_said(at: Opened) -> None:
    await at.show("sentiment")
    await at.text(".bars li").to_have_count(2)
    await at.page.route("**/v1/classify", lambda route: route.abort("connectionrefused"))
    await at.page.fill("#sentiment-text", TEXT)
    await at.text("#panel-sentiment .error").to_contain_text("cannot be reached")
    at.watch.complaints.clear()


async def test_a_translation_streams_and_is_aligned(at: Opened) -> None:
    await at.serve_maps()
    source = "one two three four five six"
    await answer(at.page, "/v1/attention", lambda body: fake_attention(body | {"target": source}))
    await at.show("translation")
    await at.page.fill("#translation-text", source)
    await at.page.click("#panel-translation .send")
    await at.text(".output").to_have_text("one two three four five six ")
    await at.text("#panel-translation > .halves .stats").to_contain_text("6 tokens")
    assert at.watch.bodies("/v1/generate") == [{"model": "translation", "prompt": source, "stream": True}]
    await at.page.hover(".alignment .queries .token >> nth=2")
    weight = weights_of(5, 5, 7, 7)[2][3]
    await at.text(".alignment .keys .token >> nth=3").to_have_attribute("data-weight", f"{weight:.2f}")
    await at.text(".alignment .readout").to_contain_text("“three” looks at")  # what was chosen while "two" was read
    await at.page.select_option(".alignment select", "1")
    await at.page.hover(".alignment .queries .token >> nth=4")
    weight = weights_of(1, 1, 7, 7)[4][5]
    await at.text(".alignment .keys .token >> nth=5").to_have_attribute("data-weight", f"{weight:.2f}")
    wanted = {"kind": "cross", "layers": "all", "reduce": "mean", "encoding": "base64"}
    assert at.watch.bodies("/v1/attention") == [{"text": source, "model": "translation"} | wanted]


async def run_python(code: str) -> str:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    assert process.returncode == 0
    return output.decode()


async def run_shell(command: str) -> str:
    process = await asyncio.create_subprocess_exec("bash", "-c", command, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    assert process.returncode == 0
    return output.decode()


async def test_the_shown_requests_work(at: Opened) -> None:
    tricky = "it's \"so\" 'good'\n\\n $HOME `x` é 😀"
    await at.show("sentiment")
    await at.page.fill("#sentiment-text", tricky)
    await until(lambda: tricky in texts(at.backend))
    curl, python = await at.page.locator("#panel-sentiment > .request pre").all_text_contents()
    for run, code in ((run_shell, curl), (run_python, python)):
        at.backend.requests.clear()
        assert "POSITIVE" in await run(code)
        assert await asked(at.backend) == tricky
    await at.show("chat")
    await at.say(tricky)
    await at.text(".turn.assistant .stats").to_contain_text("tokens")
    curl, python = await at.page.locator("#panel-chat > .request pre").all_text_contents()
    for run, code in ((run_shell, curl), (run_python, python)):
        assert (await run(code)).rstrip().endswith("data: [DONE]")
        assert at.backend.generations[-1] == at.backend.generations[0]


async def test_a_key_is_asked_for_and_kept_in_memory(page: Page, backend: FakeBackend) -> None:
    async with opened(page, backend, api_key="a-secret") as at:
        await at.show()
        await at.text("#key-form").to_contain_text("asks for an API key")
        await at.page.fill("#key", "wrong")
        await at.page.press("#key", "Enter")
        await at.text("#key-form").to_contain_text("does not take this API key")
        await at.page.fill("#key", "a-secret")
        await at.page.press("#key", "Enter")
        await at.text("#key-form").to_be_hidden()
        await at.text(".bars li").to_have_count(2)
        await at.text("#notice").to_be_empty()
        await at.text("pre >> nth=0").to_contain_text("Bearer $ATTND_API_KEY")
        assert "a-secret" not in await at.page.content()
        kept = "JSON.stringify([localStorage, sessionStorage, document.cookie])"
        assert await at.page.evaluate(kept) == '[{},{},""]'


async def test_what_is_not_served_is_said(page: Page, backend: FakeBackend) -> None:
    async with opened(page, backend) as at:
        await at.serve()
        await at.page.goto(f"http://127.0.0.1:{at.served.port}/#chat")  # which there is not
        await at.text("#panels a").to_have_text(["Sentiment"])
        await at.text("#panel-sentiment").to_be_visible()
        await at.text("#absent").to_contain_text("Chat (no model for generation)")
        await at.text("#absent").to_contain_text("Attention (the server has no /v1/attention)")
        assert at.watch.complaints == []


async def test_a_server_that_is_loading_can_be_asked_again(page: Page, backend: FakeBackend) -> None:
    backend.unready = Unavailable("sentiment is loading")
    async with opened(page, backend) as at:
        await at.show()
        await at.text("#notice").to_contain_text("The server is not ready: sentiment is loading.")
        backend.unready = None
        await at.page.click("#notice button")
        await at.text("#panel-sentiment").to_be_visible()
        await at.text("#notice").to_be_empty()


async def test_texts_never_become_markup(at: Opened) -> None:
    await at.serve_maps()
    await at.show("chat")
    markup = "<img/src=x/onerror=alert(1)><b>bold</b>"
    await at.say(markup)
    await at.text(".turn.assistant .said").to_have_text(markup + " ")
    assert await at.page.locator(".log :is(img, b)").count() == 0
    with pytest.raises(Exception, match="TrustedHTML"):
        await at.page.evaluate("document.body.innerHTML = 'x'")
    at.watch.complaints.clear()
