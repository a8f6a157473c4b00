"""A tiny seeded classifier and chat model, their bundles, and ways to break a bundle whose checksums stay right."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from model import export_decoder
from model.config import ModelConfig
from model.data import Row
from model.export import Options, export
from model.importers.gguf import Checkpoint
from model.train import save_checkpoint
from model.transformer import Classifier, LanguageModel
from service.worker.bundle import MANIFEST, Manifest, file_spec

LABELS = ("NEGATIVE", "POSITIVE")
CONFIG = ModelConfig(
    kind="encoder",
    vocab_size=50,
    width=32,
    num_heads=4,
    num_layers=2,
    feed_forward=64,
    max_length=24,
    num_types=2,
    num_labels=2,
    labels=LABELS,
)
GRAPH_FILE = "classify.onnx"

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())  # a character for each byte
MERGES = [("h", "e"), ("l", "l"), ("Ġ", "w"), ("o", "r"), ("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("Ġ", "a")]
START, END = "<|im_start|>", "<|im_end|>"
VOCABULARY = ["<|endoftext|>", START, END, *LETTERS, *(left + right for left, right in MERGES)]
END_IDS = (0, 2)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHAT_CONFIG = ModelConfig(
    kind="decoder",
    vocab_size=len(VOCABULARY),
    width=64,
    num_heads=4,
    num_kv_heads=2,
    num_layers=2,
    feed_forward=128,
    max_length=256,
    norm="rms",
    norm_order="pre",
    norm_eps=1e-5,
    positions="rotary",
    activation="swiglu",
    has_bias=False,
    has_embedding_norm=False,
)


def seeded_classifier(config: ModelConfig = CONFIG) -> Classifier:
    torch.manual_seed(0)
    return Classifier(config).eval()


def save_tokenizer(path: Path, vocab_size: int = CONFIG.vocab_size) -> None:
    words = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2} | {f"w{index}": index for index in range(3, vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer.save(str(path))


def save_tiny_checkpoint(directory: Path) -> Path:
    directory.mkdir(parents=True)
    save_tokenizer(directory / "source.json")
    save_checkpoint(
        directory,
        CONFIG,
        seeded_classifier(),
        tokenizer=directory / "source.json",
        provenance={"recipe": "tests", "created": 1_700_000_000},
    )
    return directory


def random_ids(num_sequences: int, *, longest: int = CONFIG.max_length, seed: int = 0) -> list[list[int]]:
    """Sequences of 1 to `longest` tokens."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (num_sequences,), generator=draw).tolist()
    return [torch.randint(0, CONFIG.vocab_size, (length,), generator=draw).tolist() for length in lengths]


def confident_rows(num_rows: int, *, seed: int) -> list[Row]:
    """Labelled texts on which the seeded classifier is sure of itself, so that rounding flips no label."""
    inside = [[3 + index % 47 for index in ids] for ids in random_ids(8 * num_rows, longest=20, seed=seed)]
    with torch.no_grad():
        logits = torch.cat([seeded_classifier()(torch.tensor([[1, *ids, 2]])) for ids in inside])
    surest = (logits[:, 1] - logits[:, 0]).abs().argsort(descending=True)
    chosen = surest[:num_rows].tolist()
    return [Row(" ".join(f"w{index}" for index in inside[at]), int(logits[at].argmax())) for at in chosen]


def export_tiny(checkpoint: Path, out: Path, precision: str) -> Path:
    calibration = random_ids(64, seed=1) if precision == "int8" else ()
    export(checkpoint, out, Options(id="tiny", precision=precision, calibration=calibration))
    return out


def without_attention(bundle: Path, copy: Path) -> Path:
    """A copy of a classifier's bundle as they were exported before their graphs told attention."""
    shutil.copytree(bundle, copy)
    change_graph(copy, drop_attention)

    def drop(values: dict[str, Any]) -> None:
        del values["graphs"]["classify"]["outputs"][1:]

    change_manifest(copy, drop)
    return copy


def without_graph(bundle: Path, copy: Path, name: str) -> Path:
    """A copy that lacks the graph `name` and its file, as exported before there was one."""
    shutil.copytree(bundle, copy)

    def drop(values: dict[str, Any]) -> None:
        file = values["graphs"].pop(name)["file"]
        del values["files"][file]
        (copy / file).unlink()

    change_manifest(copy, drop)
    return copy


def multiply_output(graph: onnx.ModelProto, output: str, by: float) -> None:
    """What the graph tells; what its other nodes read of it stays as it was."""
    own = f"{output}.own"
    for node in graph.graph.node:
        node.input[:] = [own if name == output else name for name in node.input]
        node.output[:] = [own if name == output else name for name in node.output]
    graph.graph.initializer.append(numpy_helper.from_array(np.float32(by), f"{output}.by"))
    graph.graph.node.append(helper.make_node("Mul", [own, f"{output}.by"], [output]))


def drop_attention(graph: onnx.ModelProto) -> None:
    del graph.graph.output[1:]


def change_manifest(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads((directory / MANIFEST).read_text())
    change(values)
    (directory / MANIFEST).write_text(json.dumps(values))


def change_graph(directory: Path, change: Callable[[onnx.ModelProto], None], name: str = GRAPH_FILE) -> None:
    """Edits the graph and signs it anew, so that only what the graph computes can give the change away."""
    path = directory / name
    graph = onnx.load(path, load_external_data=False)
    change(graph)
    onnx.save(graph, path)
    sign(directory, name)


def sign(directory: Path, name: str) -> None:
    """Makes the manifest agree with the file `name` as it is now."""
    manifest = Manifest.from_json((directory / MANIFEST).read_text(), MANIFEST)
    files = dict(manifest.files) | {name: file_spec(directory / name)}
    (directory / MANIFEST).write_text(replace(manifest, files=files).to_json())


@torch.no_grad()
def seeded_chat_model(config: ModelConfig = CHAT_CONFIG) -> LanguageModel:
    """Weights large enough that its tokens depend on the whole prompt, and vary."""
    torch.manual_seed(0)
    model = LanguageModel(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.normal_(0, 0.2)
    return model


def chat_tokenizer() -> Tokenizer:
    """Byte-level BPE of a few merges: any text can be encoded, many characters take several tokens."""
    vocabulary = {token: index for index, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.BPE(vocabulary, MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in VOCABULARY[:3]])
    return tokenizer


def chat_text() -> export_decoder.Text:
    return export_decoder.Text(
        tokenizer=chat_tokenizer().to_str(), bos_id=None, end_ids=END_IDS, chat_template=CHAT_TEMPLATE
    )


def chat_checkpoint() -> Checkpoint:
    return Checkpoint(
        config=CHAT_CONFIG, model=seeded_chat_model(), tokenizer=chat_tokenizer(), text=chat_text(), licence=None
    )


def reverse_vocabulary(directory: Path, kept: int = 0) -> None:
    """Every token after the first `kept` gets another's number."""
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    names = sorted(content["model"]["vocab"], key=content["model"]["vocab"].get)
    names[kept:] = names[kept:][::-1]
    content["model"]["vocab"] = {name: number for number, name in enumerate(names)}
    path.write_text(json.dumps(content))
    sign(directory, path.name)


def tiny_generation_bundle(directory: Path, *, precision: str = "int8", id: str = "tiny-chat") -> Path:
    """Writes a whole bundle of a tiny seeded Llama into `directory`, which must not exist, and returns it."""
    options = export_decoder.Options(id=id, created=1_700_000_000, licence="Apache-2.0", precision=precision)
    tensors = export_decoder.tensors_of(seeded_chat_model())
    export_decoder.export_decoder(CHAT_CONFIG, tensors, chat_text(), directory, options)
    return directory
