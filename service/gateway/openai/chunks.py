"""What replies on both routes have in common: the envelope, the usage, and chunks of a stream."""

import time
from dataclasses import dataclass

import orjson

from service.domain import GenerateUsage, Start
from service.gateway.openai.fields import StreamOptions


@dataclass(frozen=True)
class PromptDetails:
    cached_tokens: int


@dataclass(frozen=True)
class UsageObject:
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


def usage_object(usage: GenerateUsage) -> UsageObject:
    num_read, num_written = usage.prompt_tokens, usage.completion_tokens
    return UsageObject(num_read, num_written, num_read + num_written, PromptDetails(usage.cached_tokens))


def now() -> int:
    return int(time.time())


class Chunks:
    """Encodes the chunks of one stream; what is the same in all of them is encoded once."""

    def __init__(self, reply_id: str, kind: str, options: StreamOptions | None) -> None:
        self._id = reply_id
        self._kind = kind
        self._has_usage = options is not None and bool(options.include_usage)
        self._is_continuous = self._has_usage and options is not None and bool(options.continuous_usage_stats)
        self._num_read = 0
        self._num_written = 0
        self._head = b""
        self._tail = b',"usage":null}\n\n' if self._has_usage else b"}\n\n"

    def start(self, event: Start) -> None:
        fields = {"id": self._id, "object": self._kind, "created": now(), "model": event.model}
        self._head = b"data: %b" % orjson.dumps(fields)[:-1]
        self._num_read = event.prompt_tokens
        self._count()

    def count_token(self) -> None:
        """To be called before the chunk that a token makes, if it makes one."""
        if self._is_continuous:
            self._num_written += 1
            self._count()

    def _count(self) -> None:
        if self._is_continuous:
            usage = usage_object(GenerateUsage(self._num_read, self._num_written, 0))
            self._tail = b',"usage":%b}\n\n' % orjson.dumps(usage)

    def choice(self, index: int, content: bytes, logprobs: bytes = b"null", finish_reason: bytes = b"null") -> bytes:
        """A chunk with one choice; `content` is its member that holds the text."""
        return b'%b,"choices":[{"index":%d,%b,"logprobs":%b,"finish_reason":%b}]%b' % (
            self._head, index, content, logprobs, finish_reason, self._tail,
        )  # fmt: skip

    def end(self, usage: GenerateUsage) -> bytes:
        """The chunk without a choice that says the usage, if it was asked for."""
        if not self._has_usage:
            return b""
        return b'%b,"choices":[],"usage":%b}\n\n' % (self._head, orjson.dumps(usage_object(usage)))
