"""Who may import whom: the import table of the README's architecture, read off the sources with ast."""

import ast
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]

# Whatever is large, slow to import, or belongs to one role only. What is not named here anyone may import.
HEAVY = frozenset(
    {
        "fastapi", "gguf", "google", "grpc", "grpc_health", "grpc_reflection", "httptools", "jinja2", "matplotlib",
        "msgspec", "numpy", "onnx", "onnxruntime", "prometheus_client", "pydantic", "safetensors", "starlette",
        "tokenizers", "torch", "transformers", "uvicorn", "uvloop",
    }
)  # fmt: skip


class Rule(NamedTuple):
    """Modules that match `module` may import these of the project and these of HEAVY. A trailing .* means all below."""

    module: str
    project: frozenset[str]
    heavy: frozenset[str]


def rule(module: str, project: str = "", heavy: str = "") -> Rule:
    return Rule(module, frozenset(project.split()), frozenset(heavy.split()))


EDGE = (
    "service.address service.config service.domain service.errors service.metrics service.observed service.validation"
)

# The first that matches decides.
RULES = [
    rule("service"),
    rule("service.errors"),
    rule("service.config", "service.domain service.errors", "pydantic"),
    rule("service.address", "service.errors"),
    rule("service.domain", "service.domain.*"),
    rule("service.domain.*", "service.domain.* service.errors", "pydantic"),
    rule("service.validation", "service.errors", "pydantic"),
    rule("service.backend", "service.domain"),
    rule("service.logs"),
    rule("service.vllm_metrics", heavy="prometheus_client"),
    rule("service.histogram", heavy="prometheus_client"),
    rule("service.metrics", "service.domain service.histogram service.vllm_metrics", "prometheus_client"),
    rule("service.tally", "service.domain service.metrics"),
    rule("service.observed", "service.backend service.domain service.errors service.metrics service.tally"),
    rule("service.status", "service.address service.backend service.errors service.metrics"),
    rule("service.gateway.*", f"service.gateway.* {EDGE}", "fastapi starlette httptools pydantic"),
    rule("service.rpc.pb.*", "service.rpc.pb.*", "google grpc"),
    rule("service.rpc.*", f"service.rpc.* {EDGE}", "google grpc grpc_health grpc_reflection pydantic"),
    rule("service.worker.manifest", "service.errors"),
    rule("service.worker.bundle", "service.errors service.worker.manifest"),
    rule("service.worker.weights.packing", "service.worker.weights.checkpoint", "numpy"),
    rule("service.worker.weights.fetch", "service.errors service.worker.bundle service.worker.manifest"),
    rule("service.worker.weights.*", "service.errors service.worker.bundle service.worker.weights.*", "gguf numpy"),
    rule("service.worker.pull", "service.errors service.worker.bundle service.worker.weights.*"),
    rule("service.worker.session", "service.worker.bundle service.worker.machine service.errors", "numpy onnxruntime"),
    rule(
        "service.worker.classification.engine",
        "service.errors service.worker.bundle service.worker.session",
        "numpy",
    ),
    rule("service.worker.byte_level"),
    rule("service.worker.beginnings", "service.worker.byte_level"),
    rule("service.worker.tokenizer", "service.domain service.errors service.worker.beginnings", "tokenizers"),
    rule("service.worker.long_texts", "service.errors service.worker.tokenizer"),
    rule("service.worker.attention.views", "service.domain service.errors"),
    rule("service.worker.attention.maps", "service.domain service.worker.attention.views", "numpy"),
    rule("service.worker.classification.sequence", "service.domain service.errors service.worker.attention.views"),
    rule(
        "service.worker.classification.scheduler",
        "service.domain service.errors service.worker.classification.sequence",
    ),
    rule("service.worker.classification.scores", "service.domain service.errors", "numpy"),
    rule("service.worker.classification.occlusion"),
    rule("service.worker.generation.prefix_cache"),
    rule(
        "service.worker.generation.sequence",
        "service.domain service.worker.generation.prefix_cache "
        "service.worker.generation.beam_search service.worker.generation.output",  # these two for types only
    ),
    rule("service.worker.generation.pieces", "service.worker.generation.prefix_cache"),
    rule(
        "service.worker.generation.scheduler",
        "service.worker.generation.pieces service.worker.generation.prefix_cache "
        "service.worker.generation.sequence service.worker.generation.step",
    ),
    rule("service.worker.generation.step", "service.worker.generation.sequence"),
    rule(
        "service.worker.generation.kv_budget",
        "service.errors service.worker.generation.prefix_cache service.worker.generation.scheduler",
    ),
    rule(
        "service.worker.generation.output",
        "service.domain service.worker.generation.detokenizer service.worker.generation.sampling",
        "numpy",
    ),
    rule(
        "service.worker.generation.likeliest",
        "service.errors service.worker.generation.sampling service.worker.manifest service.worker.session",
        "numpy",
    ),
    rule(
        "service.worker.generation.beam_search",
        "service.domain service.errors service.worker.generation.likeliest service.worker.generation.output "
        "service.worker.generation.sampling",
        "numpy",
    ),
    rule(
        "service.worker.generation.loop",
        "service.domain service.worker.engine_threads service.worker.generation.*",
        "numpy",
    ),
    rule(
        "service.worker.generation.report",
        "service.domain service.worker.generation.loop service.worker.generation.sequence "
        "service.worker.generation.step",
    ),
    rule(
        "service.worker.generation.lanes",
        "service.domain service.errors service.worker.generation.outputs service.worker.generation.report "
        "service.worker.generation.sequence",
    ),
    rule("service.worker.generation.lane_messages", "service.domain service.worker.generation.report", "msgspec"),
    rule(
        "service.worker.generation.process_lane",
        "service.domain service.errors service.worker.generation.lane_messages "
        "service.worker.generation.lane_processes service.worker.generation.lanes "
        "service.worker.generation.outputs service.worker.generation.report service.worker.generation.sequence",
    ),
    rule("service.worker.generation.lane_processes", "service.errors service.worker.generation.lane_messages"),
    rule(
        "service.worker.generation.lane_process",
        "service.domain service.worker.generation.*",
    ),
    rule(
        "service.worker.generation.lane_loader",
        "service.errors service.logs service.worker.bundle service.worker.generation.* service.worker.machine",
    ),
    rule("service.worker.machine"),
    rule("service.worker.engine_threads"),
    rule("service.worker.generation.kv_memory", "service.worker.bundle service.errors", "numpy"),
    rule(
        "service.worker.generation.decoder",
        "service.worker.bundle service.worker.generation.kv_memory service.worker.session service.errors",
        "numpy",
    ),
    rule(
        "service.worker.generation.attention_graph",
        "service.domain service.worker.attention.* service.worker.bundle service.worker.session",
        "numpy",
    ),
    rule(
        "service.worker.generation.attended_text",
        "service.domain service.worker.generation.prompt_tokenizer",
    ),
    rule(
        "service.worker.generation.translator",
        "service.worker.bundle service.worker.generation.decoder service.worker.generation.kv_memory "
        "service.worker.session service.errors",
        "numpy",
    ),
    rule("service.worker.generation.sentences"),
    rule(
        "service.worker.generation.translation",
        "service.domain service.errors service.worker.generation.prompts service.worker.generation.rejoined "
        "service.worker.generation.sentences",
    ),
    rule("service.worker.generation.rejoined", "service.domain service.worker.generation.detokenizer"),
    rule("service.worker.generation.detokenizer", "service.errors service.worker.byte_level"),
    rule("service.worker.generation.chat_template", "service.domain service.errors", "jinja2"),
    rule(
        "service.worker.generation.prompt_tokenizer",
        "service.domain service.errors service.worker.beginnings service.worker.generation.chat_template "
        "service.worker.generation.detokenizer service.worker.tokenizer",
    ),
    rule("service.worker.generation.sampling", "service.domain service.errors", "numpy"),
    rule("service.worker.load", "service.config service.errors service.metrics service.worker.*"),
    rule("service.worker.*", "service.backend service.domain service.errors service.metrics service.worker.*"),
    rule("service.cli"),
    rule("service.cli.flags", "service.domain"),
    rule("service.cli.maps", "service.domain"),
    rule("service.cli.heatmap", "service.cli.maps", "matplotlib"),
    rule("service.cli.client", "service.domain service.errors", "httptools pydantic"),
    rule("service.cli.lines", "service.domain service.errors"),
    rule("service.cli.commands", "service.cli.* service.domain service.errors service.validation", "pydantic"),
    rule("service.cli.local", "service.config service.errors service.metrics service.worker.*"),
    rule("service.roles", "service.*"),
    rule(
        "service.__main__",
        "service.cli.* service.config service.domain service.errors service.logs service.roles service.worker.load",
        "uvloop",
    ),
    rule(
        "model.*",
        "model.* service.worker.* service.domain service.errors",
        "gguf google matplotlib numpy onnx onnxruntime safetensors tokenizers torch transformers",
    ),
]


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_of(path): path for part in ("service", "model") for path in sorted((ROOT / part).rglob("*.py"))}


def matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or pattern == f"{name}.*"


def rule_for(module: str) -> Rule | None:
    return next((candidate for candidate in RULES if matches(module, candidate.module)), None)


def base_of(module: str, node: ast.ImportFrom) -> str:
    """The absolute name that `from X import ...` starts at."""
    if node.level == 0:
        return node.module or ""
    package = module if SOURCES[module].name == "__init__.py" else module.rpartition(".")[0]
    for _ in range(node.level - 1):
        package = package.rpartition(".")[0]
    return ".".join(part for part in (package, node.module) if part)


def imported(module: str) -> set[str]:
    """Absolute names of all modules that `module` imports, at whatever depth in its code."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(SOURCES[module].read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = base_of(module, node)
            below = {f"{base}.{alias.name}" for alias in node.names}
            submodules = below & SOURCES.keys()
            names |= submodules if len(submodules) == len(below) else {base, *submodules}
    return names


def violations(module: str) -> list[str]:
    found = rule_for(module)
    assert found is not None, f"{module} has no rule: say in RULES what it may import"
    allowed = (*found.project, module)
    bad = []
    for name in sorted(imported(module)):
        root = name.partition(".")[0]
        if root in ("service", "model"):
            permitted = any(matches(name, pattern) for pattern in allowed)
        else:
            permitted = root not in HEAVY or root in found.heavy
        if not permitted:
            bad.append(name)
    return bad


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_a_module_imports_what_the_table_allows(module):
    assert violations(module) == []


def test_the_check_sees_what_it_should(monkeypatch, tmp_path):
    path = tmp_path / "scores.py"
    path.write_text(
        "import numpy\ndef f():\n    import onnxruntime.capi\n    from service.gateway import app\n"
        "    from ... import config\n    from .scheduler import Scheduler\n    from model.transformer import Encoder\n"
    )
    monkeypatch.setitem(SOURCES, "service.worker.classification.scores", path)
    assert violations("service.worker.classification.scores") == [
        "model.transformer",
        "onnxruntime.capi",
        "service.config",
        "service.gateway.app" if "service.gateway.app" in SOURCES else "service.gateway",
        "service.worker.classification.scheduler",
    ]


OWNERS = {
    "onnxruntime": "service.worker.session",
    "tokenizers": "service.worker.tokenizer",
    "jinja2": "service.worker.generation.chat_template",
    "matplotlib": "service.cli.heatmap",
}


def test_only_one_file_imports_each_engine():
    for library, owner in OWNERS.items():
        users = [name for name in SOURCES if name.startswith("service") and library in roots(name)]
        assert users == [owner]


def roots(module: str) -> set[str]:
    return {name.partition(".")[0] for name in imported(module)}


# What starts each role, and what must not be needed for it.
ENTRIES = {
    "gateway": "import service.__main__, service.gateway.app, service.gateway.server, service.rpc.client",
    "worker": "import service.__main__, service.rpc.server, service.worker.load, service.worker.local",
}
ABSENT = {
    "gateway": ["onnxruntime", "numpy", "tokenizers", "jinja2", "gguf", "tqdm", "torch", "transformers", "model"],
    "worker": ["torch", "transformers", "fastapi", "starlette", "model"],
}


@pytest.mark.parametrize("role", ENTRIES)
def test_a_role_can_be_imported_without_what_only_another_needs(role):
    """For real, indirect imports included: in a process where these libraries cannot be imported."""
    code = f"import sys; sys.modules.update(dict.fromkeys({ABSENT[role]!r})); {ENTRIES[role]}"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
