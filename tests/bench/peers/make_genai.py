"""Turns a GGUF into a model folder for ONNX Runtime GenAI, without a network: `make_genai.py GGUF DIRECTORY`.

The weights go through transformers, then through GenAI's own builder: int4 in blocks of 32 with integer arithmetic
(accuracy level 4), which is its fastest on CPUs.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM


def save(gguf: Path, directory: Path) -> None:
    """The GGUF's model in fp32, as a plain checkpoint."""
    read = LlamaForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    # As read it counts as quantised, and cannot be saved.
    config = {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
    plain = LlamaForCausalLM(LlamaConfig(**config))
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(directory)
    AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(directory)


def main() -> None:
    gguf, target = map(Path, sys.argv[1:])
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        plain, built = Path(scratch, "plain"), Path(scratch, "built")
        save(gguf, plain)
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", gguf.stem, "-i", str(plain)]
        command += ["-o", str(built), "-p", "int4", "-e", "cpu", "-c", str(Path(scratch, "cache"))]
        subprocess.run([*command, "--extra_options", "int4_block_size=32", "int4_accuracy_level=4"], check=True)
        built.rename(target)


if __name__ == "__main__":
    main()
