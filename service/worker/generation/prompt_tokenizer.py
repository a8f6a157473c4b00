"""A generation bundle's tokenizer: prompts and chats to token ids, and what each token stands for.

In a prompt, the text of a special token is that token: whoever sends a prompt writes all of it. In a chat, only the
template writes special tokens: in what a turn says they are plain text, or a user's "<|im_end|>" could end the turn and
begin another in anyone's name. In a text to translate they are plain text, too.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from service.domain import AttendedToken, Message
from service.errors import BundleError
from service.worker.beginnings import Beginnings
from service.worker.generation.chat_template import ChatTemplate
from service.worker.generation.detokenizer import BYTE_TOKEN, Detokenizer, bytes_of, make_stages
from service.worker.tokenizer import encode, ids_of, load_tokenizer, told

SEAM = "\udfff"  # stands inside what is plain text; half a surrogate pair, which no text from outside can hold


class PromptTokenizer:
    """Thread-safe; encoding long texts releases the GIL. Lengths are not limited here."""

    def __init__(self, path: Path) -> None:
        """Raises BundleError for a file that is no tokenizer, or whose decoder is not known."""
        self._tokenizer, self._plain = load_tokenizer(path), load_tokenizer(path)
        self._plain.encode_special_tokens = True  # that is, as the text that they are
        self._beginnings = Beginnings(path)
        self._decoder = read_decoder(path)
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = {token: one.content for token, one in added.items() if one.special}
        self._ids = {name: token for token, name in self._special.items()}
        texts = sorted(self._ids, key=len, reverse=True)
        self._names_special = re.compile("|".join(map(re.escape, texts)) or r"(?!)")

    def encode(self, text: str) -> list[int]:
        """A prompt, with what the tokenizer puts before or after every text (Llama: the begin token)."""
        return ids_of(self._tokenizer, text)

    def encode_plain(self, text: str) -> list[int]:
        """As `encode`, but the names of special tokens in `text` are text."""
        return ids_of(self._plain, text)

    def showing_more(self, text: str, num_tokens: int, encode: Callable[[str], Sequence[int]]) -> str:
        """See Beginnings.showing_more. `encode`: whichever of ours is meant for the text."""
        find = self._beginnings.of if SEAM in text else self._beginnings.showing_more  # a seam has no token
        return find(text, num_tokens, lambda part: len(encode(part)))

    def attended(self, text: str, *, is_plain: bool) -> tuple[AttendedToken, ...]:
        """As `encode` or `encode_plain`, with the place of each token in the text."""
        return told(encode(self._plain if is_plain else self._tokenizer, text))

    def rendered(self, template: ChatTemplate, messages: Sequence[Message]) -> str:
        """A chat as `encode_rendered` takes it. Raises as `render` does."""
        return template.render(messages, quote=self._quoted)

    def encode_rendered(self, text: str) -> list[int]:
        """A chat up to where the model is to speak; special tokens are the template's only."""
        if SEAM not in text:
            return ids_of(self._tokenizer, text, add_special_tokens=False)
        return [token for part in self._parts(text) for token in part]

    def detokenizer(self) -> Detokenizer:
        """For one output; special tokens are not shown."""
        return Detokenizer(self._decoder, self._shown)

    def decode(self, tokens: Sequence[int]) -> str:
        """A whole text: what a `detokenizer` makes of the same tokens."""
        text: str = self._tokenizer.decode(tokens)
        return text

    def token_name(self, token: int) -> str:
        """As the vocabulary has it; empty for an id that it has not."""
        name: str | None = self._tokenizer.id_to_token(token)
        return name or ""

    def token_text(self, token: int) -> str:
        """A token alone, as inside of a text; U+FFFD for bytes that are no whole character."""
        return self.token_bytes(token).decode(errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """The very bytes a token stands for, as inside of a text; for a special one its name; none if there is none."""
        name: str | None = self._tokenizer.id_to_token(token)
        if name is None or token in self._special:
            return (name or "").encode()
        kinds = kinds_of(self._decoder)
        if "ByteLevel" in kinds:
            return bytes_of(name)
        if "ByteFallback" in kinds and (found := BYTE_TOKEN.fullmatch(name)):
            return bytes([int(found[1], 16)])
        inside = Detokenizer(self._decoder, {0: "x", 1: name}.get)
        inside.add(0)
        return (inside.add(1) + inside.flush()).encode()

    def _shown(self, token: int) -> str | None:
        name: str | None = None if token in self._special else self._tokenizer.id_to_token(token)
        return name

    def _quoted(self, text: str) -> str:
        """The names of special tokens with a seam in them, so that they are no names."""
        return self._names_special.sub(lambda found: found[0][:1] + SEAM + found[0][1:], text)

    def _parts(self, text: str) -> list[list[int]]:
        """The ids of what stands between special tokens, and of these, in order."""
        parts: list[list[int]] = []
        end = 0
        for found in self._names_special.finditer(text):
            parts += [self._encode_said(text[end : found.start()]), [self._ids[found[0]]]]
            end = found.end()
        return [*parts, self._encode_said(text[end:])]

    def _encode_said(self, text: str) -> list[int]:
        return ids_of(self._plain, text.replace(SEAM, ""), add_special_tokens=False)


def read_decoder(path: Path) -> dict[str, Any] | None:
    """The decoder of a tokenizer.json. Raises BundleError for one that is not known."""
    decoder: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")).get("decoder")
    try:
        make_stages(decoder)
    except (KeyError, TypeError) as error:
        raise BundleError(f"{path}: the decoder {decoder} is not what this release reads") from error
    return decoder


def kinds_of(decoder: dict[str, Any] | None) -> list[str]:
    """The types of a decoder's stages."""
    if decoder is None:
        return []
    return [spec["type"] for spec in (decoder["decoders"] if decoder["type"] == "Sequence" else [decoder])]
