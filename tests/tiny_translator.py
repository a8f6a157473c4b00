"""A tiny seeded translator of real subwords, and its bundle."""

from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer

from model.export_decoder import Options
from model.export_translator import export_translator
from model.subwords import END_ID, train_subwords
from model.transformer import EncoderDecoder
from model.translator_samples import random_ids
from model.translator_vocabulary import Translator, text_of
from tests.tiny_translation import CONFIG as TRANSLATION
from tests.tiny_translation import tiny_translator

SENTENCES = (
    "A dog runs through the snow.",
    "Ein Hund rennt durch den Schnee.",
    "Two children are playing in the garden, and their father reads a book.",
    "Zwei Kinder spielen im Garten, und ihr Vater liest ein Buch.",
    "Where is the station? I have lost my way.",
    "Wo ist der Bahnhof? Ich habe mich verlaufen.",
)
CONFIG = replace(TRANSLATION, vocab_size=300, width=32, num_heads=4, num_decoder_layers=2, feed_forward=64)
SAMPLES = list(zip(random_ids(CONFIG, 128, seed=1), random_ids(CONFIG, 128, seed=2), strict=True))
# Of model.verify_translator, for the seeded translator in int8: attention so sharp shows the least noise.
LIMITS = {"MAX_MOVED": 0.2, "MIN_AGREEMENT": 0.7, "MAX_ERROR": 0.25}


def subwords() -> Tokenizer:
    """Half of them single bytes, so that any text can be encoded."""
    return train_subwords(SENTENCES, CONFIG.vocab_size)


@torch.no_grad()
def seeded_translator() -> EncoderDecoder:
    """Weights large enough that tokens depend on the whole source, vary, and sometimes end; no bias is zero."""
    model = tiny_translator(CONFIG, seed=5).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter += torch.randn_like(parameter) * 0.2
        elif parameter is not model.head.weight:
            parameter *= 2 if "query" in name or "key" in name else 4
    model.head.weight[END_ID] *= -4  # some sentences end after a few tokens, others go on
    return model


def translator(num_written: int = CONFIG.vocab_size) -> Translator:
    return Translator(CONFIG, seeded_translator(), text_of(subwords().to_str()), num_written)


def tiny_translation_bundle(
    directory: Path, *, precision: str = "int8", id: str = "tiny-translation", num_written: int = CONFIG.vocab_size
) -> Path:
    """Writes a whole bundle of the seeded translator into `directory`, which must not exist, and returns it."""
    options = Options(id=id, created=1_700_000_000, licence="Apache-2.0", precision=precision)
    export_translator(translator(num_written), directory, options, samples=SAMPLES)
    return directory
