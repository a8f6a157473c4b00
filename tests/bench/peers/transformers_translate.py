"""transformers' `generate` in fp32 on our own weights; see `translating` for how it is called.

M2M100 is its model of our shape: MarianMT with the norm before each part, and a norm at the end of both stacks. Only
the table of positions differs, which is no weight there, and is replaced.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import M2M100Config, M2M100ForConditionalGeneration
from translating import MOST_TOKENS, Layout, Translate, main

PAD_ID, START_ID, END_ID = 0, 1, 2
OURS = {
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.out_proj",
    "attention_norm": "self_attn_layer_norm",
    "cross.query": "encoder_attn.q_proj",
    "cross.key": "encoder_attn.k_proj",
    "cross.value": "encoder_attn.v_proj",
    "cross.output": "encoder_attn.out_proj",
    "cross_norm": "encoder_attn_layer_norm",
    "feed_forward.up": "fc1",
    "feed_forward.down": "fc2",
    "feed_forward_norm": "final_layer_norm",
}


def config_of(ours: dict[str, Any]) -> M2M100Config:
    num_layers = ours["num_layers"]
    return M2M100Config(
        vocab_size=ours["vocab_size"],
        d_model=ours["width"],
        encoder_layers=num_layers,
        decoder_layers=ours["num_decoder_layers"] or num_layers,
        encoder_attention_heads=ours["num_heads"],
        decoder_attention_heads=ours["num_heads"],
        encoder_ffn_dim=ours["feed_forward"],
        decoder_ffn_dim=ours["feed_forward"],
        max_position_embeddings=ours["max_length"],
        activation_function="relu",
        scale_embedding=True,
        pad_token_id=PAD_ID,
        bos_token_id=START_ID,
        eos_token_id=END_ID,
        decoder_start_token_id=START_ID,
    )


def theirs(name: str) -> str:
    """The name in M2M100 of one of our tensors."""
    stack, _, rest = name.partition(".stack.")
    if rest.startswith("embedding."):
        return "model.shared.weight"
    if rest.startswith("norm."):
        return f"model.{stack}.layer_norm.{rest.removeprefix('norm.')}"
    _, layer, part = rest.split(".", 2)
    module, _, kind = part.rpartition(".")
    return f"model.{stack}.layers.{layer}.{OURS[module]}.{kind}"


def model_of(folder: Path) -> M2M100ForConditionalGeneration:
    ours = json.loads((folder / "config.json").read_text())
    model = M2M100ForConditionalGeneration(config_of(ours)).eval()
    tensors = load_file(folder / "model.safetensors")
    head = tensors.pop("head.weight")
    tensors = {theirs(name): tensor for name, tensor in tensors.items()}
    found = model.load_state_dict(tensors, strict=False)
    model.tie_weights()
    model.lm_head.weight, model.lm_head.out_features = torch.nn.Parameter(head), len(head)
    tied = ("embed_tokens.weight", "lm_head.weight", "embed_positions.weights")
    lacking = [name for name in found.missing_keys if not name.endswith(tied)]
    if lacking or found.unexpected_keys:
        raise ValueError(f"the weights do not fit: {lacking} are missing, {found.unexpected_keys} too many")
    for stack in (model.model.encoder, model.model.decoder):
        table = stack.embed_positions.weights
        table[PAD_ID + 1 :] = sinusoids(len(table) - PAD_ID - 1, ours["width"])
    return model


def sinusoids(length: int, width: int) -> torch.Tensor:
    """Sine in the even columns, cosine in the odd ones, as the model was trained."""
    rates = torch.exp(torch.arange(0, width, 2) * (-torch.log(torch.tensor(10_000.0)) / width))
    angles = torch.arange(length)[:, None] * rates
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)


def load(folder: Path, layout: Layout) -> Translate:
    torch.set_num_threads(layout.threads)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = model_of(folder)

    @torch.inference_mode()
    def batch(texts: Sequence[str], num_beams: int) -> list[str]:
        sources = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
        width = max(map(len, sources))
        ids = torch.tensor([source + [PAD_ID] * (width - len(source)) for source in sources])
        written = model.generate(
            ids, attention_mask=(ids != PAD_ID).long(), num_beams=num_beams, do_sample=False, max_new_tokens=MOST_TOKENS
        )
        return list(tokenizer.decode_batch(written.tolist()))

    def translate(texts: Sequence[str], num_beams: int) -> list[str]:
        """Texts of like lengths together, so that there is little padding."""
        order = sorted(range(len(texts)), key=lambda at: -len(texts[at]))
        found = {}
        for start in range(0, len(order), layout.rows):
            chosen = order[start : start + layout.rows]
            found.update(zip(chosen, batch([texts[at] for at in chosen], num_beams), strict=True))
        return [found[at] for at in range(len(texts))]

    return translate


if __name__ == "__main__":
    main(load)
