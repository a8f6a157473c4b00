"""A virtual environment for each peer, made on first use under a cache directory.

Peers get environments of their own because their pins disagree with each other and with attnd's.
"""

import hashlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

# torch is asked for alone and first: with an exact version pip takes a CPU build where the index offers one.
# "pipeline" is transformers', for classification and generation, and ONNX Runtime GenAI's, whose builder needs both.
REQUIREMENTS: Mapping[str, Sequence[Sequence[str]]] = {
    "litserve": (("litserve==0.2.19", "onnxruntime>=1.24,<2", "tokenizers>=0.22,<1"),),
    "bentoml": (("bentoml>=1.4,<2", "onnxruntime>=1.24,<2", "tokenizers>=0.22,<1"),),
    "ctranslate2": (
        ("ctranslate2>=4.6,<5", "safetensors>=0.5,<1", "tokenizers>=0.22,<1"),
        ("fastapi>=0.115,<1", "uvicorn[standard]>=0.34,<1"),
    ),
    "pipeline": (
        ("torch==2.13.0",),
        ("transformers>=5,<6", "accelerate>=1,<2", "gguf>=0.17,<1", "fastapi>=0.115,<1", "uvicorn[standard]>=0.34,<1"),
        ("onnxruntime-genai==0.18.0", "onnx>=1.20,<2", "onnx-ir<1"),
    ),
}


def python_of(peer: str, cache: Path) -> Path:
    """The Python of the peer's environment, made now if it is not there. Raises CalledProcessError when pip fails."""
    home = cache / peer
    python = home / "bin" / "python"
    stamp = home / f"installed-{_fingerprint(peer)}"
    if stamp.exists():
        return python
    print(f"making the environment of {peer} in {home}", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    for step in REQUIREMENTS[peer]:
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *step], check=True, stdout=sys.stderr)
    stamp.touch()
    return python


def _fingerprint(peer: str) -> str:
    return hashlib.sha256(repr(REQUIREMENTS[peer]).encode()).hexdigest()[:12]


def version_of(python: Path, package: str) -> str:
    """The installed version of a package in that environment."""
    code = "import sys; from importlib.metadata import version; print(version(sys.argv[1]))"
    found = subprocess.run([str(python), "-c", code, package], check=True, capture_output=True, text=True)
    return found.stdout.strip()
