"""service.worker.generation.prompts: which token ids a source may hold, and which a request may name."""

import pytest

from service.domain import GenerateRequest, Message
from service.errors import InvalidRequest
from service.worker.bundle import load_bundle
from service.worker.generation.prompt_tokenizer import PromptTokenizer
from service.worker.generation.prompts import PromptReader, num_characters
from service.worker.tokenizer import LONG_TEXT

tiny = pytest.importorskip("tests.tiny_translator", reason="exporting needs torch", exc_type=ImportError)

NUM_WRITTEN = 270


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> PromptReader:
    directory = tiny.tiny_translation_bundle(tmp_path_factory.mktemp("prompts") / "bundle", num_written=NUM_WRITTEN)
    bundle = load_bundle(directory)
    return PromptReader(bundle, PromptTokenizer(bundle.tokenizer_path), vocab_size=NUM_WRITTEN)


def test_a_source_may_hold_tokens_that_are_never_written(reader: PromptReader) -> None:
    ids = (NUM_WRITTEN, tiny.CONFIG.vocab_size - 1, 2)
    (prompt,) = reader.read(GenerateRequest(prompt=(ids,)))
    assert prompt.ids == ids


def test_a_source_holds_no_tokens_that_the_model_does_not_know(reader: PromptReader) -> None:
    with pytest.raises(InvalidRequest, match=r"prompt.0: token ids are below 300, got 300"):
        reader.read(GenerateRequest(prompt=((tiny.CONFIG.vocab_size,),)))


def test_what_is_never_written_cannot_be_made_likelier(reader: PromptReader) -> None:
    with pytest.raises(InvalidRequest, match=r"logit_bias: token ids are below 270, got 270"):
        reader.check(GenerateRequest(prompt=("x",), logit_bias={NUM_WRITTEN: 1.0}))


def test_many_turns_are_a_long_text_even_where_they_say_nothing() -> None:
    assert num_characters(GenerateRequest(messages=(Message("user", ""),) * 1000)) > LONG_TEXT
