"""What goes into each linear layer of an encoder-decoder when it reads sample pairs: the ground of its integers.

Owns which pairs these are and how they are run; what is made of what was seen is `quantize`'s.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn

from model.config import ModelConfig
from model.pairs import Pair
from model.quantize import Activations
from model.subwords import END_ID, START_ID
from model.transformer import EncoderDecoder

NUM_SAMPLES = 1024
MAX_RANDOM = 40  # tokens

Ids = Sequence[int]
Samples = Sequence[tuple[Ids, Ids]]  # a source and its translation, both with the end token
Seen = Mapping[str, Activations]  # by the layer's name


def samples_for(config: ModelConfig, tokenizer: Tokenizer, pairs: Sequence[Pair]) -> Samples:
    """Of the `pairs` that a checkpoint was trained on; random ones where there are none."""
    return sample_pairs(tokenizer, pairs) if pairs else random_samples(config)


def sample_pairs(tokenizer: Tokenizer, pairs: Sequence[Pair]) -> Samples:
    """Some of them, always the same ones."""
    chosen = random.Random(1).sample(pairs, min(NUM_SAMPLES, len(pairs)))
    sources, targets = (tokenizer.encode_batch_fast(list(texts)) for texts in zip(*chosen, strict=True))
    return [(source.ids, target.ids) for source, target in zip(sources, targets, strict=True)]


def random_samples(config: ModelConfig) -> Samples:
    ids = random_ids(config, 2 * NUM_SAMPLES, seed=1)
    return list(zip(ids[::2], ids[1::2], strict=True))


def random_ids(config: ModelConfig, num: int, *, seed: int) -> list[list[int]]:
    """Sentences of one token or more, and the end token."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, min(MAX_RANDOM, config.max_length), num)
    return [[*draw.integers(END_ID + 1, config.vocab_size, length).tolist(), END_ID] for length in lengths]


@torch.no_grad()
def see(model: EncoderDecoder, samples: Samples) -> Seen:
    """Runs the samples one at a time, so that nothing is padded."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    seen = {name: Activations(layer.in_features) for name, layer in layers.items()}
    hooks = [layer.register_forward_pre_hook(watching(seen[name])) for name, layer in layers.items()]
    for source, target in samples:
        model.eval()(torch.tensor([source]), torch.tensor([[START_ID, *target[:-1]]]))
    for hook in hooks:
        hook.remove()
    return seen


def watching(seen: Activations) -> Callable[[nn.Module, Any], None]:
    return lambda _, inputs: seen.see(inputs[0].flatten(0, -2))
