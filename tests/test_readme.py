"""What the README tells people to type is typed here.

A fenced block after `<!-- run: WHAT -->` runs against a server of its own, with the README's ports replaced by free
ones: `sh` blocks in bash, `python` blocks in this Python. A `json` block right behind one is what it prints, or a part
of that: what is shown must be there, numbers to 1e-3.
"""

import asyncio
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from processes import ROOT, environment, serving

README = (ROOT / "README.md").read_text()
TOOLS = ("bash", "curl")
CHANGING = ("id", "timing")  # of a reply: another each time

BLOCK = re.compile(r"\n*```(sh|python)\n(.*?)^```$(?:\n*```json\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)

# A curl that is told about an error says so, as the reader would see it; buf and python come from this environment.
PREAMBLE = 'set -euo pipefail; curl() { command curl --fail-with-body --silent --show-error "$@"; }\n'


class Block(NamedTuple):
    line: int
    language: str
    text: str
    reply: str | None  # as shown


def marked(readme: str) -> list[Block]:
    """The blocks to run. Fails when a mark has no `sh` or `python` block after it."""
    blocks = []
    for mark in re.finditer(r"^<!-- run: .* -->\n", readme, re.MULTILINE):
        block = BLOCK.match(readme, mark.end())
        line = readme.count("\n", 0, mark.start()) + 1
        assert block is not None, f"line {line}: no sh or python block after the mark"
        blocks.append(Block(line, *block.groups()))
    return blocks


def at(text: str, http_port: int, grpc_port: int) -> str:
    """`text` with the default ports replaced."""
    text = re.sub(r"\b(localhost|127\.0\.0\.1):8000\b", rf"\1:{http_port}", text)
    return re.sub(r"\b(localhost|127\.0\.0\.1):50051\b", rf"\1:{grpc_port}", text)


def is_shown(shown: Any, told: Any) -> bool:
    """Whether `told` has everything that is `shown`, apart from what changes."""
    if isinstance(shown, dict):
        return isinstance(told, dict) and all(
            key in told and (key in CHANGING or is_shown(value, told[key])) for key, value in shown.items()
        )
    if isinstance(shown, list):
        return isinstance(told, list) and len(shown) == len(told) and all(map(is_shown, shown, told))
    if isinstance(shown, float):
        return isinstance(told, float) and math.isclose(shown, told, abs_tol=1e-3)
    return shown == told


async def run(block: Block, ports: tuple[int, int]) -> str:
    """What went wrong with `block`, or nothing."""
    text = at(block.text, *ports)
    command = ["bash", "-c", PREAMBLE + text] if block.language == "sh" else [sys.executable, "-c", text]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    process = await asyncio.create_subprocess_exec(
        *command, cwd=ROOT, env=environment({"PATH": path}),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    output, _ = await process.communicate()
    if process.returncode != 0 or not output.strip():
        return f"README line {block.line} exits {process.returncode} and prints: {output.decode()[-2000:]!r}"
    if block.reply is not None and not is_shown(json.loads(block.reply), json.loads(output)):
        return f"README line {block.line} shows {block.reply}, but the server says {output.decode()}"
    return ""


@pytest.mark.skipif(any(shutil.which(tool) is None for tool in TOOLS), reason=f"needs {' and '.join(TOOLS)}")
async def test_marked_blocks_run_as_they_stand():
    blocks = marked(README)
    assert len(blocks) >= 2
    async with serving() as ports:
        problems = [await run(block, ports) for block in blocks]
    assert [problem for problem in problems if problem] == []
    assert sum(block.reply is not None for block in blocks) == 3


def test_it_says_what_to_install_before_it_is_used():
    """These tests have all of it, and its commands on their path; whoever has typed `make serve` does not."""
    before = README[: README.index("<!-- run:")]
    (installed,) = re.findall(r"^ {4}pip install ([^#\n]+)", before, re.MULTILINE)
    imported = {name for block in marked(README) for name in re.findall(r"^from (\w+)", block.text, re.MULTILINE)}
    assert imported | {"buf-bin"} == set(installed.split())
    assert before.index("    . .venv/bin/activate") < before.index("    pip install")


def test_every_verb_it_names_is_in_the_makefile():
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|^ {4}|^)make ([a-z][a-z-]*)", README, re.MULTILINE))
    assert {"serve", "test"} <= named
    assert named <= targets


def test_every_path_it_links_to_is_there():
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", README)
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_section_it_links_to_is_there():
    headings = re.findall(r"^#+ (.+)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= anchors


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
    assert (block.line, block.language, block.reply) == (2, "sh", None)
    (block,) = marked(text + '\n```json\n{"a": 1}\n```\n')
    assert json.loads(block.reply or "") == {"a": 1}
    assert at(block.text, 1, 2) == "curl localhost:1/x localhost:2 127.0.0.1:1 x:8000\n"
    with pytest.raises(AssertionError, match="line 1: no sh or python block"):
        marked("<!-- run: http -->\nwords\n")


def test_a_reply_is_as_shown():
    told = {"id": "b", "scores": [{"score": 0.98749}], "usage": {"tokens": 2}, "more": 1}
    assert is_shown({"id": "a", "scores": [{"score": 0.987}]}, told)
    for wrong in ({"scores": [{"score": 0.985}]}, {"usage": {"tokens": 3}}, {"scores": []}, {"other": None}):
        assert not is_shown(wrong, told)
