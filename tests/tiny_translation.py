"""An encoder-decoder of a few thousand seeded weights."""

import torch

from model.config import ModelConfig
from model.objective import initialise
from model.transformer import EncoderDecoder

CONFIG = ModelConfig(
    kind="encoder-decoder",
    vocab_size=40,
    width=16,
    num_heads=2,
    num_layers=2,
    num_decoder_layers=1,
    feed_forward=32,
    max_length=64,
    norm_order="pre",
    norm_eps=1e-5,
    positions="sinusoidal",
    activation="relu",
    has_embedding_norm=False,
    scale_embeddings=True,
    dropout=0.1,
    attention_dropout=0.1,
)


def tiny_translator(config: ModelConfig = CONFIG, *, seed: int = 1, sharpness: float = 1.0) -> EncoderDecoder:
    """`sharpness` scales the shared embedding, so that some continuations become much more probable than others."""
    torch.manual_seed(seed)
    model = EncoderDecoder(config)
    initialise(model)
    with torch.no_grad():
        model.head.weight *= sharpness
    return model
