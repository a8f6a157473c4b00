"""The joint vocabulary: lossless on odd text, special names as text, segmentations that vary and are kept in files."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from model.pairs import Pair
from model.subwords import (
    END,
    END_ID,
    PAD,
    PAD_ID,
    START,
    START_ID,
    encode_pairs,
    load_encoded,
    load_subwords,
    save_encoded,
    train_subwords,
)

PAIRS = [
    Pair("A man plays the guitar.", "Ein Mann spielt Gitarre."),
    Pair("Two men are playing in the park.", "Zwei Männer spielen im Park."),
    Pair("The children are playing with a ball.", "Die Kinder spielen mit einem Ball."),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("subwords") / "tokenizer.json"
    train_subwords((text for pair in PAIRS for text in pair), 320).save(str(path))
    return load_subwords(path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "Zwei Männer, größer als früher: »ÄÖÜß«",
        "two  spaces,   three",
        "  at the start and at the end  ",
        "tab\tand\nline",
        "👩‍🚀 and 🇩🇪, e\u0301 and \u00e9",  # not normalised: composed and decomposed stay what they are
        "don't re-do 3.14 & 1,000 €",
        "</s> <pad> <s>",
        "日本語とعربي",
    ],
)
def test_text_comes_back_as_it_went_in(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text).ids
    assert ids[-1] == END_ID
    assert not {PAD_ID, START_ID, END_ID} & set(ids[:-1])
    assert tokenizer.decode(ids) == text


def test_special_tokens_have_their_ids(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_to_id(token) for token in (PAD, START, END)] == [PAD_ID, START_ID, END_ID]


def test_a_first_word_is_the_same_subword_as_any_other(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("playing playing").ids[:-1] == 2 * tokenizer.encode("playing").ids[:-1]


def test_the_vocabulary_is_that_of_both_languages(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == 320
    assert {"Ġplaying", "Ġspielen"} <= tokenizer.get_vocab().keys()


def test_dropout_varies_the_segmentation_and_not_the_text(tokenizer: Tokenizer) -> None:
    plain, first, second = (encode_pairs(tokenizer, PAIRS * 5, dropout=rate) for rate in (0.0, 0.5, 0.5))
    assert list(plain.targets)[:3] == [tokenizer.encode(pair.target).ids for pair in PAIRS]
    assert len({tuple(map(tuple, corpus.sources)) for corpus in (plain, first, second)}) == 3
    assert tokenizer.decode_batch(list(second.sources)) == [pair.source for pair in PAIRS * 5]
    assert list(encode_pairs(tokenizer, PAIRS).sources) == list(plain.sources)[:3]  # dropout is off again


def test_encoded_pairs_are_read_as_they_were_saved(tokenizer: Tokenizer, tmp_path: Path) -> None:
    corpus = encode_pairs(tokenizer, PAIRS, dropout=0.3)
    save_encoded(corpus, tmp_path / "00.safetensors")
    read = load_encoded(tmp_path / "00.safetensors")
    assert list(read.sources) == list(corpus.sources)
    assert list(read.targets) == list(corpus.targets)
    assert [path.name for path in tmp_path.iterdir()] == ["00.safetensors"]
