"""What one image needs of pyproject.toml's dependencies, one requirement a line.

    python3 requirements.py gateway < pyproject.toml > requirements.txt

The base install serves everything in one process. A container has one role, and leaves out what another role reads.
"""

import re
import sys
import tomllib

UNNEEDED = {
    "gateway": frozenset({"gguf", "jinja2", "numpy", "onnxruntime", "tokenizers", "tqdm"}),
    "worker": frozenset({"fastapi"}),
}


def requirements(role: str, pyproject: str) -> list[str]:
    """The base dependencies that `role` imports. Raises KeyError for an unknown role or an unneeded name not there."""
    dependencies: list[str] = tomllib.loads(pyproject)["project"]["dependencies"]
    by_name = {re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0]: line for line in dependencies}
    for name in UNNEEDED[role]:
        del by_name[name]
    return list(by_name.values())


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1], sys.stdin.read())))
