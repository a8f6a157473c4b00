"""A GGUF file of the tiny chat model, written with the gguf package, and a bundle shipped without its weights."""

import json
import shutil
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from model import export_decoder
from model.importers.gguf import load_gguf
from model.smoothing import calibrate
from service.worker.bundle import MANIFEST, TOKENIZER, file_spec
from service.worker.weights.fetch import PackageFile
from tests.tiny import CHAT_CONFIG, CHAT_TEMPLATE, LETTERS, MERGES, VOCABULARY, seeded_chat_model

PACKAGE = "attnd_tiny_weights"  # that nobody has installed
NAMES = {
    "attention_norm": "attn_norm",
    "attention.query": "attn_q",
    "attention.key": "attn_k",
    "attention.value": "attn_v",
    "attention.output": "attn_output",
    "feed_forward_norm": "ffn_norm",
    "feed_forward.gate": "ffn_gate",
    "feed_forward.up": "ffn_up",
    "feed_forward.down": "ffn_down",
}


def gguf_name(name: str) -> str:
    """Our name of a weight -> GGUF's."""
    if name.startswith("decoder.stack.blocks."):
        layer, _, rest = name.removeprefix("decoder.stack.blocks.").partition(".")
        return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"
    return {
        "decoder.stack.embedding.token.weight": "token_embd.weight",
        "decoder.stack.norm.weight": "output_norm.weight",
    }[name]


def neighbours(rows: Tensor, num_heads: int) -> Tensor:
    """Rows with rotary pairs D/2 apart -> GGUF's order, pairs side by side."""
    left, right = rows.view(num_heads, 2, -1, rows.size(1)).unbind(1)
    return torch.stack((left, right), dim=2).reshape(rows.shape)


def write_sizes(writer: gguf.GGUFWriter, *, num_layers: int) -> None:
    writer.add_context_length(CHAT_CONFIG.max_length)
    writer.add_embedding_length(CHAT_CONFIG.width)
    writer.add_block_count(num_layers)
    writer.add_feed_forward_length(CHAT_CONFIG.feed_forward)
    writer.add_head_count(CHAT_CONFIG.num_heads)
    writer.add_head_count_kv(CHAT_CONFIG.kv_heads)
    writer.add_layer_norm_rms_eps(CHAT_CONFIG.norm_eps)
    writer.add_rope_freq_base(CHAT_CONFIG.rope_theta)


def write_vocabulary(writer: gguf.GGUFWriter) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([3] * 3 + [1] * (len(LETTERS) + len(MERGES)))
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


@torch.no_grad()
def write_gguf(path: Path, *, num_layers: int = CHAT_CONFIG.num_layers) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    write_sizes(writer, num_layers=num_layers)
    write_vocabulary(writer)
    heads = {"attn_q": CHAT_CONFIG.num_heads, "attn_k": CHAT_CONFIG.kv_heads}
    for name, weight in seeded_chat_model(replace(CHAT_CONFIG, num_layers=num_layers)).state_dict().items():
        if name == "head.weight":  # tied
            continue
        theirs = gguf_name(name)
        if weight.ndim == 1:
            writer.add_tensor(theirs, weight.numpy())
            continue
        num_heads = heads.get(theirs.split(".")[-2])
        rows = weight if num_heads is None else neighbours(weight, num_heads)
        writer.add_tensor(theirs, gguf.quantize(rows.numpy(), Kind.Q8_0), raw_dtype=Kind.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_wheel(path: Path, file: Path) -> Path:
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.write(file, f"{PACKAGE}/{file.name}")
    return path


def package_file(file: Path) -> PackageFile:
    spec = file_spec(file)
    return PackageFile(
        package=PACKAGE.replace("_", "-"),
        version="1.0",
        wheel_sha256="0" * 64,
        path=f"{PACKAGE}/{file.name}",
        sha256=spec.sha256,
        bytes=spec.bytes,
    )


def ship_tiny(file: Path, whole: Path, shipped: Path) -> None:
    """Exports the GGUF file, smoothed, to `whole`, and copies all but weights and tokenizer to `shipped`."""
    checkpoint = load_gguf(file)
    sample = np.random.default_rng(0).integers(3, CHAT_CONFIG.vocab_size, (4, 40)).tolist()
    options = export_decoder.Options(
        id="chat",
        created=1_700_000_000,
        licence="Apache-2.0",
        smoothing=calibrate(checkpoint.model, sample),
        weights=asdict(package_file(file)),
    )
    tensors = export_decoder.tensors_of(checkpoint.model)
    export_decoder.export_decoder(checkpoint.config, tensors, checkpoint.text, whole, options)
    shutil.copytree(whole, shipped, ignore=shutil.ignore_patterns(export_decoder.WEIGHTS_FILE, TOKENIZER))
    assert json.loads((shipped / MANIFEST).read_text())["weights"]
