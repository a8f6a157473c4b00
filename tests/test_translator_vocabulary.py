"""model.translator_vocabulary: what is written is numbered first, and nothing but numbers changes."""

import torch
from tokenizers import Tokenizer

from model.pairs import Pair
from model.subwords import END_ID, PAD_ID, START_ID
from model.translator_vocabulary import number_written_first, written_ids
from tests.tiny_translator import CONFIG, SENTENCES, seeded_translator, subwords

PAIRS = [Pair(source, target) for source, target in zip(SENTENCES[::2], SENTENCES[1::2], strict=True)]


def test_what_targets_hold_and_all_bytes_are_written() -> None:
    tokenizer = subwords()
    written = set(written_ids(tokenizer, PAIRS))
    held = {token for pair in PAIRS for token in tokenizer.encode(pair.target).ids}
    assert held | {PAD_ID, START_ID, END_ID} <= written
    assert {len(tokenizer.id_to_token(token)) for token in written - held - {PAD_ID, START_ID, END_ID}} == {1}
    assert set(tokenizer.encode("Привет, 世界!").ids) <= written


def test_a_text_is_made_of_the_same_subwords_under_new_numbers() -> None:
    old = subwords()
    content, num_written = number_written_first(seeded_translator(), old.to_str(), PAIRS)
    new = Tokenizer.from_str(content)
    assert num_written < new.get_vocab_size() == CONFIG.vocab_size
    for text in (*SENTENCES, "Привет, 世界!", "  </s>"):
        assert new.encode(text).tokens == old.encode(text).tokens
        assert new.decode(new.encode(text).ids) == old.decode(old.encode(text).ids)
    assert [new.token_to_id(name) for name in ("<pad>", "<s>", "</s>")] == [PAD_ID, START_ID, END_ID]
    for pair in PAIRS:
        assert max(new.encode(pair.target).ids) < num_written


@torch.no_grad()
def test_the_model_says_the_same_under_new_numbers() -> None:
    old, model, content = seeded_translator(), seeded_translator(), subwords().to_str()
    numbered, _ = number_written_first(model, content, PAIRS)
    names = [Tokenizer.from_str(one).get_vocab() for one in (content, numbered)]
    order = [old for _, old in sorted((names[1][name], old) for name, old in names[0].items())]
    source, target = (torch.tensor([Tokenizer.from_str(numbered).encode(text).ids]) for text in PAIRS[0])
    as_before = (torch.tensor(order)[ids] for ids in (source, target))
    torch.testing.assert_close(model(source, target), old(*as_before)[..., order])


def test_without_pairs_all_may_be_written() -> None:
    content = subwords().to_str()
    model = seeded_translator()
    assert number_written_first(model, content, []) == (content, CONFIG.vocab_size)
    assert torch.equal(model.head.weight, seeded_translator().head.weight)
