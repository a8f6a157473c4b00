"""The teacher's labels in files: of the texts and the teacher that are asked for, or not taken at all."""

from collections.abc import Iterable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from model.recipes import sentiment_taught
from model.recipes.sentiment_taught import Chunk, chunks_of, read_taught, teach
from tests.tiny import save_tiny_checkpoint

TEXTS = [f"w{3 + at} w{3 + 7 * at % 40} w{5 + at}" for at in range(34)]


@pytest.fixture
def teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sentiment_taught, "SIZE", 10)
    return save_tiny_checkpoint(tmp_path / "teacher")


def taught(teacher: Path, texts: list[str], folder: str = "taught") -> list[Chunk]:
    chunks = chunks_of(teacher.parent / folder, teacher, texts, max_length=8)
    teach(chunks, teacher, max_length=8)
    return chunks


def views(chunks: Iterable[Chunk]) -> dict[str, list[float]]:
    return {text: logits.tolist() for text, logits in read_taught(list(chunks)).items()}


def test_more_texts_have_their_own_labels(teacher: Path) -> None:
    taught(teacher, TEXTS[:15])  # which ends within the second chunk
    found = views(taught(teacher, TEXTS))
    assert list(found) == TEXTS
    assert found == views(taught(teacher, TEXTS, "afresh"))
    assert len(set(map(tuple, found.values()))) > 30


def test_other_texts_and_another_teacher_are_taught_anew(teacher: Path) -> None:
    taught(teacher, TEXTS)
    swapped = [*TEXTS[:10], *TEXTS[20:], *TEXTS[10:20]]
    assert views(taught(teacher, swapped)) == views(taught(teacher, swapped, "afresh"))
    weights = load_file(teacher / "model.safetensors")
    save_file(weights | {"head.bias": weights["head.bias"] + 1}, teacher / "model.safetensors")
    assert views(taught(teacher, TEXTS)) == views(taught(teacher, TEXTS, "other"))


def test_labels_of_other_texts_are_refused(teacher: Path) -> None:
    taught(teacher, TEXTS[:15])
    asked = chunks_of(teacher.parent / "taught", teacher, TEXTS, max_length=8)
    with pytest.raises(ValueError, match=r"000010\.safetensors is missing, or of other texts or another teacher"):
        read_taught(asked)
    with pytest.raises(ValueError, match=r"000000\.safetensors is missing"):
        read_taught(chunks_of(teacher.parent / "taught", teacher, TEXTS, max_length=2))


def test_a_chunk_that_is_cut_or_gone_is_taught_again_and_no_other(teacher: Path) -> None:
    chunks = taught(teacher, TEXTS)
    found, (first, cut, gone, last) = views(chunks), (chunk.path for chunk in chunks)
    written = [path.stat().st_mtime_ns for path in (first, last)]
    cut.write_bytes(cut.read_bytes()[:-8])
    gone.unlink()
    assert views(taught(teacher, TEXTS)) == found
    assert [path.stat().st_mtime_ns for path in (first, last)] == written


def test_a_chunk_is_whole_or_not_there(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save_half(_: object, path: Path, **__: object) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(sentiment_taught, "save_file", save_half)
    with pytest.raises(KeyboardInterrupt):
        taught(teacher, TEXTS)
    assert not list((teacher.parent / "taught").glob("*.safetensors"))
