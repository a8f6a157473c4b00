"""The real clients over a real socket: openai, sync and async, LangChain on it, and huggingface_hub's chat."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import openai
import pytest
import wire
from fakes import CHAT, MODEL, FakeBackend, until
from huggingface_hub import InferenceClient
from langchain_openai import ChatOpenAI

from service import errors

USER: Any = [{"role": "user", "content": "a fine film"}]


@pytest.fixture
async def served(backend: FakeBackend) -> AsyncIterator[wire.Served]:
    backend.served = [MODEL, CHAT]
    async with wire.serve(backend, api_key="key") as served:
        yield served


def url(served: wire.Served) -> str:
    return f"http://127.0.0.1:{served.port}/v1"


async def in_thread(served: wire.Served, action: Callable[[openai.OpenAI], Any], **options: Any) -> Any:
    """What `action` gives, in a thread, since the client blocks."""

    def act() -> Any:
        with openai.OpenAI(base_url=url(served), api_key="key", **options) as client:
            return action(client)

    return await asyncio.to_thread(act)


@pytest.fixture
async def client(served: wire.Served) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=url(served), api_key="key", max_retries=0) as client:
        yield client


async def test_sync_chat_and_completion(served: wire.Served) -> None:
    chat = await in_thread(served, lambda client: client.chat.completions.create(model="chat", messages=USER))
    assert (chat.choices[0].message.role, chat.choices[0].message.content) == ("assistant", "a fine film ")
    assert (chat.choices[0].finish_reason, chat.usage.total_tokens) == ("stop", 6)
    assert chat.usage.prompt_tokens_details.cached_tokens == 0
    assert chat.id == f"chatcmpl-{chat._request_id}"
    text = await in_thread(served, lambda client: client.completions.create(model="chat", prompt="a b", max_tokens=1))
    assert (text.choices[0].text, text.choices[0].finish_reason, text.object) == ("a ", "length", "text_completion")


async def test_sync_streams(served: wire.Served) -> None:
    def chat(client: openai.OpenAI) -> list[Any]:
        options: Any = {"include_usage": True}
        return list(client.chat.completions.create(model="chat", messages=USER, stream=True, stream_options=options))

    *chunks, last = await in_thread(served, chat)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "a fine film "
    assert (chunks[0].choices[0].delta.role, chunks[-1].choices[0].finish_reason) == ("assistant", "stop")
    assert (last.choices, last.usage.completion_tokens) == ([], 3)
    pieces = await in_thread(
        served, lambda client: list(client.completions.create(model="chat", prompt=["a b", "c"], stream=True))
    )
    assert "".join(piece.choices[0].text for piece in pieces if piece.choices[0].index == 0) == "a b "


async def test_async_chat_with_everything(client: openai.AsyncOpenAI) -> None:
    chat = await client.chat.completions.create(
        model="chat",
        messages=USER,
        n=2,
        logprobs=True,
        top_logprobs=2,
        seed=4,
        stop=["x"],
        temperature=0.5,
        user="me",
        extra_body={"top_k": 5, "min_p": 0.1},
    )
    assert [choice.message.content for choice in chat.choices] == ["a fine film "] * 2
    logprobs = chat.choices[1].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [one.token for one in logprobs.content] == ["a ", "fine ", "film "]
    assert [one.logprob for one in logprobs.content[0].top_logprobs] == [-0.25, -1.5]


async def test_async_stream_helper(client: openai.AsyncOpenAI) -> None:
    """The client's own accumulation of a stream is the reply in one piece."""
    async with client.chat.completions.stream(model="chat", messages=USER, logprobs=True) as stream:
        async for _ in stream:
            pass
        final = await stream.get_final_completion()
    whole = await client.chat.completions.create(model="chat", messages=USER, logprobs=True)
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert final.choices[0].logprobs is not None
    assert whole.choices[0].logprobs is not None
    assert final.choices[0].logprobs.content == whole.choices[0].logprobs.content


async def test_a_stream_that_is_closed_cancels_the_backend(served: wire.Served, client: openai.AsyncOpenAI) -> None:
    messages: Any = [{"role": "user", "content": "word " * 100_000}]
    stream = await client.chat.completions.create(model="chat", messages=messages, stream=True)
    async for _ in stream:
        break
    await stream.close()
    await until(lambda: served.backend.num_cancelled == 1)


async def test_errors_are_the_clients_own(served: wire.Served, client: openai.AsyncOpenAI) -> None:
    async def ask(**fields: Any) -> Any:
        return await client.chat.completions.create(**({"model": "chat", "messages": USER} | fields))

    with pytest.raises(openai.BadRequestError) as bad:
        await ask(temperature=-1)
    assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.BadRequestError) as bad:
        await ask(tools=[{"type": "function", "function": {"name": "f"}}])
    assert (bad.value.param, bad.value.code) == ("tools", "unsupported_parameter")
    with pytest.raises(openai.NotFoundError, match="gpt-4o"):
        await ask(model="gpt-4o")
    served.backend.error = errors.Overloaded("later")
    with pytest.raises(openai.RateLimitError) as limited:
        await ask(stream=True)
    assert limited.value.code == "slow_down"
    with pytest.raises(openai.AuthenticationError):
        await client.with_options(api_key="other").models.list()


async def test_an_error_in_a_stream_is_raised(served: wire.Served, client: openai.AsyncOpenAI) -> None:
    served.backend.error, served.backend.error_after = errors.EngineFailed("it broke"), 2
    stream = await client.chat.completions.create(model="chat", messages=USER, stream=True)
    texts = []

    async def read() -> None:
        async for chunk in stream:
            texts.append(chunk.choices[0].delta.content)

    with pytest.raises(openai.APIError, match="it broke") as raised:
        await read()
    assert (texts, raised.value.code) == (["", "a ", "fine "], "engine_failed")


async def test_the_client_retries_what_passes_and_nothing_else(served: wire.Served) -> None:
    for error, num_tries in (
        (errors.Overloaded("later", retry_after_s=0.001), 3),
        (errors.Unavailable("loading", retry_after_s=0.001), 3),
        (errors.DeadlineExceeded("late"), 1),
        (errors.TooLarge("long"), 1),
    ):
        served.backend.generations.clear()
        served.backend.error = error
        with pytest.raises(openai.APIStatusError):
            await in_thread(served, lambda client: client.completions.create(model="chat", prompt="a"), max_retries=2)
        assert len(served.backend.generations) == num_tries


async def test_models(served: wire.Served, client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["sentiment", "chat"]
    one = await client.models.retrieve("chat")
    assert (one.id, one.object, one.created, one.owned_by) == ("chat", "model", CHAT.created, "attnd")
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("other/one")


@pytest.fixture
async def langchain(served: wire.Served) -> AsyncIterator[Any]:
    """On HTTP clients that are closed again; LangChain keeps its own for ever."""
    options: Any = {"base_url": url(served), "api_key": "key", "max_tokens": 50, "temperature": 0.3}
    async with openai.DefaultAsyncHttpxClient() as asynchronous:
        with openai.DefaultHttpxClient() as http:
            yield ChatOpenAI(model="chat", http_client=http, http_async_client=asynchronous, **options)


async def test_langchain(served: wire.Served, langchain: Any) -> None:
    chat = langchain
    reply = await asyncio.to_thread(chat.invoke, [("system", "be brief"), ("human", "a fine film")])
    assert (reply.content, reply.usage_metadata["total_tokens"]) == ("a fine film ", 6)
    assert served.backend.generations[0].max_tokens == 50
    chunks = await asyncio.to_thread(lambda: list(chat.stream("one two")))
    assert "".join(chunk.content for chunk in chunks) == "one two "
    assert len([chunk for chunk in chunks if chunk.content]) == 2
    replies = await asyncio.to_thread(chat.batch, ["a", "b c", "d e f"])
    assert [one.content for one in replies] == ["a ", "b c ", "d e f "]
    assert (await chat.ainvoke("x y")).content == "x y "
    assert [chunk.content async for chunk in chat.astream("p q") if chunk.content] == ["p ", "q "]


async def test_huggingfaces_chat(served: wire.Served) -> None:
    def talk() -> tuple[Any, list[Any]]:
        client = InferenceClient(base_url=url(served), api_key="key")
        whole = client.chat_completion(USER, max_tokens=2, model="chat")
        return whole, list(client.chat_completion(USER, max_tokens=2, stream=True, model="chat"))

    whole, chunks = await asyncio.to_thread(talk)
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == ("a fine ", "length")
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "a fine "
