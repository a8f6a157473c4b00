"""What the sentiment recipe's teacher says of texts, in files: logits, a file a chunk, each tied to what it is of."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from model.data import LABELS, Examples
from model.evaluate import predict
from model.tokenization import encode, load_tokenizer
from model.train import load_checkpoint
from service.worker.bundle import file_spec

SIZE = 2000  # texts that are labelled between two saves
FILES = ("config.json", "model.safetensors", "tokenizer.json")


@dataclass(frozen=True)
class Chunk:
    """Some of the texts, and the file of their logits."""

    path: Path
    texts: list[str]
    key: str  # a hash of all that the logits depend on; the file says of which key it is

    def is_taught(self) -> bool:
        try:
            with safe_open(self.path, framework="pt") as file:
                return bool((file.metadata() or {}).get("key") == self.key)
        except (FileNotFoundError, SafetensorError):
            return False


def chunks_of(folder: Path, teacher: Path, texts: list[str], *, max_length: int) -> list[Chunk]:
    files = [file_spec(teacher / name).sha256 for name in FILES]
    chunks = []
    for start in range(0, len(texts), SIZE):
        part = texts[start : start + SIZE]
        key = hashlib.sha256(json.dumps([files, max_length, part]).encode()).hexdigest()
        chunks.append(Chunk(folder / f"{start:06d}.safetensors", part, key))
    return chunks


def teach(chunks: list[Chunk], teacher: Path, *, max_length: int) -> None:
    """Writes the logits of each chunk that has none of these texts by this teacher yet."""
    config, model = load_checkpoint(teacher)
    tokenizer = load_tokenizer(teacher / "tokenizer.json", max_length)
    for chunk in tqdm(chunks, desc="taught", unit="chunk", mininterval=5):
        if not chunk.is_taught():
            ids = encode(tokenizer, chunk.texts)
            asked = Examples(ids, torch.zeros(len(ids), len(LABELS)))
            logits = predict(model, asked, pad_id=config.pad_id, precision=torch.bfloat16)
            chunk.path.parent.mkdir(parents=True, exist_ok=True)
            new = chunk.path.with_suffix(".new")
            save_file({"logits": logits}, new, metadata={"key": chunk.key})
            new.replace(chunk.path)


def read_taught(chunks: list[Chunk]) -> dict[str, Tensor]:
    """Text -> the teacher's logits; raises ValueError unless `teach` has written all of them."""
    views: dict[str, Tensor] = {}
    for chunk in chunks:
        if not chunk.is_taught():
            raise ValueError(f"{chunk.path} is missing, or of other texts or another teacher: run the stage taught")
        views |= zip(chunk.texts, load_file(chunk.path)["logits"], strict=True)
    return views
