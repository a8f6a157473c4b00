"""model.translator_samples: what each layer reads, without padding, from always the same pairs."""

import torch

from model.pairs import Pair
from model.subwords import END_ID, START_ID
from model.translator_samples import NUM_SAMPLES, random_ids, random_samples, sample_pairs, see
from tests.tiny_translator import CONFIG, SENTENCES, seeded_translator, subwords

PAIRS = [Pair(f"{english} {number}", german) for number in range(700) for english, german in [SENTENCES[:2]] * 2]


@torch.no_grad()
def test_a_layer_s_range_is_that_of_all_that_it_reads() -> None:
    model, samples = seeded_translator(), [([5, 6, END_ID], [7, END_ID]), ([8, END_ID], [9, 10, 11, END_ID])]
    seen = see(model, samples)
    memories, heads = [], []
    for source, target in samples:
        memory = model.encode(torch.tensor([source]))
        memories.append(memory[0])
        logits, _ = model.decode(torch.tensor([[START_ID, *target[:-1]]]), memory)
        heads.append(logits[0])
    zero, read = torch.zeros(CONFIG.width), torch.cat(memories)
    cross = seen["decoder.stack.blocks.0.cross.key"]
    torch.testing.assert_close(cross.low, torch.minimum(zero, read.amin(0)))
    torch.testing.assert_close(cross.high, torch.maximum(zero, read.amax(0)))
    again = torch.cat(seen["head"].rows) @ model.head.weight.T  # of each sample every fourth row: the first ones
    torch.testing.assert_close(again, torch.stack([rows[0] for rows in heads]))


def test_the_model_is_watched_no_longer() -> None:
    model = seeded_translator()
    seen = see(model, [([5, END_ID], [6, END_ID])])
    num_rows = len(seen["head"].rows)
    model(torch.tensor([[5, END_ID]]), torch.tensor([[START_ID]]))
    assert len(seen["head"].rows) == num_rows


def test_pairs_are_read_as_in_training() -> None:
    tokenizer = subwords()
    ((source, target),) = sample_pairs(tokenizer, [Pair("A dog.", "Ein Hund.")])
    assert (source, target) == (tokenizer.encode("A dog.").ids, tokenizer.encode("Ein Hund.").ids)
    assert source[-1] == target[-1] == END_ID


def test_of_many_pairs_some_are_drawn_always_the_same() -> None:
    samples = sample_pairs(subwords(), PAIRS)
    assert len(samples) == NUM_SAMPLES
    assert samples == sample_pairs(subwords(), PAIRS)
    assert len({tuple(source) for source, _ in samples}) > 500


def test_random_samples_are_sentences() -> None:
    samples = random_samples(CONFIG)
    assert len(samples) == NUM_SAMPLES
    for ids in (*samples[0], *samples[-1]):
        assert ids[-1] == END_ID
        assert all(END_ID < token < CONFIG.vocab_size for token in ids[:-1])
    assert random_ids(CONFIG, 3, seed=1) == random_ids(CONFIG, 3, seed=1) != random_ids(CONFIG, 3, seed=2)
