"""A request's prompts as token ids that the model can take, or an error that says what it cannot."""

from collections.abc import Callable, Sequence

from service.domain import GenerateRequest
from service.errors import InvalidRequest, TooLarge, Unsupported
from service.worker.bundle import Bundle
from service.worker.generation.chat_template import ChatTemplate
from service.worker.generation.prompt_tokenizer import PromptTokenizer
from service.worker.generation.sampling import check_ids, check_token_ids
from service.worker.generation.sequence import Prompt
from service.worker.tokenizer import HUGE_TEXT

CHARACTERS_A_TURN = 32  # that a template writes around what is said


def num_characters(request: GenerateRequest) -> int:
    """Of text to tokenize."""
    if request.messages is not None:
        return sum([CHARACTERS_A_TURN + len(message.content) for message in request.messages])
    return sum([len(prompt) for prompt in request.prompt or () if isinstance(prompt, str)])


class PromptReader:
    """Thread-safe."""

    def __init__(self, bundle: Bundle, tokenizer: PromptTokenizer, *, vocab_size: int) -> None:
        """`vocab_size`: the tokens that can be written; a source may hold more.

        Raises BundleError for a chat template that is none.
        """
        generation = bundle.manifest.generation
        assert generation is not None
        self._id = bundle.manifest.id
        self._bos_id = generation.bos_id
        self._max_tokens = bundle.manifest.limits.max_tokens
        self._are_sources = bundle.manifest.task == "translation"
        self._vocab_size = vocab_size
        self._num_readable: int = bundle.manifest.architecture["vocab_size"]
        self._tokenizer = tokenizer
        self._template = _chat_template(bundle, tokenizer)

    def check(self, request: GenerateRequest) -> None:
        """What can be told without tokenizing. Raises Unsupported and InvalidRequest."""
        if request.messages is not None and self._template is None:
            message = f"model {self._id!r} has no chat template; send prompt instead of messages"
            raise Unsupported(message, param="messages", code="no_chat_template")
        check_token_ids(request, self._vocab_size)

    def read(self, request: GenerateRequest) -> list[Prompt]:
        """Raises InvalidRequest, also for ids that the model does not have, and TooLarge for a prompt without room."""
        if request.messages is not None:
            assert self._template is not None
            text = self._tokenizer.rendered(self._template, request.messages)
            return [self._read(0, text, self._tokenizer.encode_rendered, "messages")]
        return [self._prompt(index, prompt) for index, prompt in enumerate(request.prompt or ())]

    @property
    def max_length(self) -> int:
        """Tokens of a prompt and what is written behind it. A source and its translation have a limit each."""
        return 2 * self._max_tokens if self._are_sources else self._max_tokens

    def room(self, request: GenerateRequest, prompt: Prompt) -> int:
        """How many tokens may be written behind `prompt`: what is asked for, cut to what fits. Raises TooLarge."""
        room = min(self._max_tokens, self.max_length - len(prompt.ids))
        if request.min_tokens > room:
            read = "prompt" if request.messages is None else "messages"
            message = (
                f"min_tokens is {request.min_tokens}, the {len(prompt.ids)} tokens of {read} leave room for {room}"
            )
            raise TooLarge(message, param="min_tokens", code="context_length_exceeded")
        return room if request.max_tokens is None else min(room, request.max_tokens)

    def _prompt(self, index: int, prompt: str | tuple[int, ...]) -> Prompt:
        param = f"prompt.{index}"
        if isinstance(prompt, str):
            encode = self._tokenizer.encode_plain if self._are_sources else self._tokenizer.encode
            return self._read(index, prompt, encode, param)
        check_ids(prompt, self._num_readable, param)
        return self._fitting(index, prompt, param)

    def _read(self, index: int, text: str, encode: Callable[[str], list[int]], param: str) -> Prompt:
        """Of a huge text no more is read than is needed to know that it has no room."""
        is_huge = len(text) >= HUGE_TEXT
        part = self._tokenizer.showing_more(text, self._max_tokens, encode) if is_huge else text
        return self._fitting(index, encode(part), param, is_all=len(part) == len(text))

    def _fitting(self, index: int, ids: Sequence[int], param: str, *, is_all: bool = True) -> Prompt:
        """`is_all` False: more tokens follow."""
        if not ids:
            if self._bos_id is None or self._are_sources:
                raise InvalidRequest(f"{param} has no tokens, at least one is needed", param=param)
            ids = (self._bos_id,)
        if len(ids) + (not self._are_sources) > self._max_tokens:
            beside = "" if self._are_sources else "; with at least one to write"
            num_tokens = f"{len(ids)}" if is_all else f"more than {self._max_tokens}"
            message = f"{param} has {num_tokens} tokens{beside}, the limit is {self._max_tokens}"
            raise TooLarge(message, param=param, code="context_length_exceeded")
        return Prompt(index, ids, is_whole=self._are_sources)


def _chat_template(bundle: Bundle, tokenizer: PromptTokenizer) -> ChatTemplate | None:
    path, generation = bundle.chat_template_path, bundle.manifest.generation
    if path is None or generation is None:
        return None
    begin = "" if generation.bos_id is None else tokenizer.token_text(generation.bos_id)
    end = tokenizer.token_text(generation.end_ids[0]) if generation.end_ids else ""
    return ChatTemplate(path.read_text(encoding="utf-8"), bos_token=begin, eos_token=end)
