"""What the README tells people to type is typed here.

A fenced block after `<!-- run: WHAT -->` runs against a server of its own, with the README's ports replaced by free
ones: `sh` blocks in bash, `python` blocks in this Python.
"""

import asyncio
import os
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from processes import ROOT, environment, serving

README = (ROOT / "README.md").read_text()
TOOLS = ("bash", "curl")

# A curl that is told about an error says so, as the reader would see it; buf and python come from this environment.
PREAMBLE = 'set -euo pipefail; curl() { command curl --fail-with-body --silent --show-error "$@"; }\n'


class Block(NamedTuple):
    line: int
    language: str
    text: str


def marked(readme: str) -> list[Block]:
    """The blocks to run. Fails when a mark has no `sh` or `python` block after it."""
    blocks = []
    for mark in re.finditer(r"^<!-- run: .* -->\n", readme, re.MULTILINE):
        block = re.compile(r"\n*```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL).match(readme, mark.end())
        line = readme.count("\n", 0, mark.start()) + 1
        assert block is not None, f"line {line}: no sh or python block after the mark"
        blocks.append(Block(line, block[1], block[2]))
    return blocks


def at(text: str, http_port: int, grpc_port: int) -> str:
    """`text` with the default ports replaced."""
    text = re.sub(r"\b(localhost|127\.0\.0\.1):8000\b", rf"\1:{http_port}", text)
    return re.sub(r"\b(localhost|127\.0\.0\.1):50051\b", rf"\1:{grpc_port}", text)


async def run(block: Block, text: str, directory: Path) -> str:
    """What went wrong with `block`, or nothing."""
    command = ["bash", "-c", PREAMBLE + text] if block.language == "sh" else [sys.executable, "-c", text]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    process = await asyncio.create_subprocess_exec(
        *command, cwd=directory, env=environment({"PATH": path}),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    output, _ = await process.communicate()
    if process.returncode == 0 and output.strip():
        return ""
    return f"README line {block.line} exits {process.returncode} and prints: {output.decode()[-2000:]!r}"


@pytest.mark.skipif(any(shutil.which(tool) is None for tool in TOOLS), reason=f"needs {' and '.join(TOOLS)}")
async def test_marked_blocks_run_as_they_stand():
    blocks = marked(README)
    assert len(blocks) >= 2
    async with serving() as ports:
        problems = [await run(block, at(block.text, *ports), ROOT) for block in blocks]
    assert [problem for problem in problems if problem] == []


def test_every_verb_it_names_is_in_the_makefile():
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|^ {4}|^)make ([a-z][a-z-]*)", README, re.MULTILINE))
    assert {"serve", "test"} <= named
    assert named <= targets


def test_every_path_it_links_to_is_there():
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", README)
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_setting_it_names_exists():
    from service.config import PREFIX, Settings

    names = set(re.findall(PREFIX + r"[A-Z_]+[A-Z]", README))
    assert names
    assert [name for name in names if not hasattr(Settings, name.removeprefix(PREFIX).lower())] == []


def metric_names(readme: str) -> set[str]:
    """The first column of the table of metrics, without labels; `a_{b,c}_d` is two names."""
    (table,) = re.findall(r"^\| metric .*\n\| --- .*\n((?:\|.*\n)+)", readme, re.MULTILINE)
    names = set()
    for shown in re.findall(r"`([^`]+)`", "".join(row.split("|")[1] for row in table.splitlines())):
        before, among, after = re.fullmatch(r"(\w*)(?:\{([\w,]+)\}(?=\w))?(\w*)(?:\{[\w,]+\})?", shown).groups()
        names |= {f"attnd_{before}{one}{after}" for one in (among or "").split(",")}
    return names


def test_every_metric_is_in_the_table_and_no_other():
    from service.metrics import Metrics

    suffixes = {"counter": "_total", "info": "_info"}
    families = [family for family in Metrics((1.0,), {}).registry.collect() if family.name.startswith("attnd_")]
    assert metric_names(README) == {family.name + suffixes.get(family.type, "") for family in families}


def test_marks_and_ports_are_found():
    text = "a\n<!-- run: http -->\n```sh\ncurl localhost:8000/x localhost:50051 127.0.0.1:8000 x:8000\n```\n"
    (block,) = marked(text)
    assert (block.line, block.language) == (2, "sh")
    assert at(block.text, 1, 2) == "curl localhost:1/x localhost:2 127.0.0.1:1 x:8000\n"
    with pytest.raises(AssertionError, match="line 1: no sh or python block"):
        marked("<!-- run: http -->\nwords\n")
