"""Loaders on small made-up files, splits without leaks, and the real SST-2 where it lies beside the checkout."""

import zipfile
from io import BytesIO
from pathlib import Path

import pytest
import torch

from model import data
from model.data import (
    Examples,
    Row,
    one_hot,
    pad,
    read_imdb,
    read_sst2,
    sentences,
    split_by_sentence,
    treebank,
    whole_sentences,
)

ROWS = [
    Row("a warm , funny film", 1),
    Row("warm , funny", 1),
    Row("funny", 1),
    Row("film", 1),
    Row("a cold film with no end", 0),
    Row("no end", 0),
    Row("cold film", 0),
    Row("an uneven but likeable debut", 1),
    Row("likeable debut", 1),
]


@pytest.fixture
def sst2() -> Path:
    folder = Path(__file__).parents[2] / "shared" / "data" / "sst2"
    if not folder.exists():
        pytest.skip(f"no SST-2 in {folder}; it is not part of the project")
    return folder


@pytest.mark.parametrize(
    "text", ["label\tsentence\n1\tgood film\n0\tbad\n", "sentence\tlabel\ngood film \t1\nbad\t0\n"]
)
def test_sst2_is_read_whatever_the_order_of_its_columns(tmp_path: Path, text: str) -> None:
    path = tmp_path / "train.tsv"
    path.write_text(text)
    assert read_sst2(path) == [Row("good film", 1), Row("bad", 0)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sentence\tstars\nfine\t3\n", "the header must be two columns, one of them 'label'"),
        ("label\tsentence\n1\tgood\n2\todd\n", r"train\.tsv:3: expected a label 0 or 1"),
        ("", r"train\.tsv: the header must be two columns"),
        ("label\tsentence\n", r"train\.tsv: no row follows the header"),
        ("label\tsentence\n1\n", r"train\.tsv:2: expected a label 0 or 1 and a text, found \['1'\]"),
    ],
)
def test_a_malformed_file_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "train.tsv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_sst2(path)


def test_only_a_newline_ends_a_row(tmp_path: Path) -> None:
    path = tmp_path / "train.tsv"
    path.write_text("sentence\tlabel\na\u2028b\x85c\x0bd\t1\r\ne\t0\n", newline="")
    assert read_sst2(path) == [Row("a\u2028b\x85c\x0bd", 1), Row("e", 0)]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was asked for of a stand-in for GLUE."""
    archive, urls = BytesIO(), []
    with zipfile.ZipFile(archive, "w") as file:
        for name in ("train", "dev", "test"):
            file.writestr(f"SST-2/{name}.tsv", "sentence\tlabel\ngood \t1\n")

    def opened(url: str, timeout: float) -> BytesIO:
        urls.append(url)
        return BytesIO(archive.getvalue())

    monkeypatch.setattr(data.urllib.request, "urlopen", opened)
    return urls


def test_download_unpacks_the_public_archive_once(tmp_path: Path, asked: list[str]) -> None:
    for _ in range(2):
        folder = data.download_sst2(tmp_path)
        assert read_sst2(folder / "dev.tsv") == [Row("good", 1)]
    assert asked == [data.SST2_URL]
    assert sorted(path.name for path in folder.iterdir()) == ["dev.tsv", "train.tsv"]


@pytest.mark.parametrize("name", ["train.tsv", "dev.tsv"])
def test_a_download_that_was_interrupted_is_fetched_again(
    tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def write_half(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            if self.name.startswith(name):
                file.write(content[:9])
                raise KeyboardInterrupt
            return file.write(content)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", write_half)
        with pytest.raises(KeyboardInterrupt):
            data.download_sst2(tmp_path)
    folder = data.download_sst2(tmp_path)
    assert read_sst2(folder / "train.tsv") == read_sst2(folder / "dev.tsv") == [Row("good", 1)]
    assert len(asked) == 2


def test_whole_sentences_are_no_part_of_another_row() -> None:
    assert sorted(row.text for row in whole_sentences(ROWS)) == [
        "a cold film with no end",
        "a warm , funny film",
        "an uneven but likeable debut",
    ]


@pytest.mark.parametrize("seed", range(4))
def test_no_phrase_of_a_validation_sentence_is_left_in_training(seed: int) -> None:
    training, validation = split_by_sentence(ROWS, 1, seed=seed)
    assert len(validation) == 1
    assert all(f" {row.text} " not in f" {validation[0].text} " for row in training)
    assert len(training) >= 4


def test_splits_of_the_real_data_do_not_leak(sst2: Path) -> None:
    rows = read_sst2(sst2 / "train.tsv")
    assert len(rows) == 67_349
    assert len(read_sst2(sst2 / "dev.tsv")) == 872
    training, validation = split_by_sentence(rows, 100, seed=1)
    joined = " \n ".join(f" {row.text} " for row in validation)
    assert len(validation) == 100
    assert len(training) > 60_000
    assert not [row for row in training if f" {row.text} " in joined]


def test_only_the_imdb_rows_are_read(tmp_path: Path) -> None:
    path = tmp_path / "reviews.csv"
    path.write_text('text,label,source\n"Fine, really.",1,imdb\n"leak",0,rotten_tomatoes\nBad.,0,imdb\n')
    assert read_imdb(path) == [Row("Fine, really.", 1), Row("Bad.", 0)]


@pytest.mark.parametrize("text", ["", "text,label,source\n", "text,label\nFine.,1\n"])
def test_no_imdb_row_at_all_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "reviews.csv").write_text(text)
    with pytest.raises(ValueError, match=r"reviews\.csv: no row has imdb"):
        read_imdb(tmp_path / "reviews.csv")


def test_sentences_take_the_form_of_sst2() -> None:
    assert treebank("It's good, isn't it?") == "it 's good , is n't it ?"
    review = "What a waste of my time! I didn't laugh once.<br /><br />\"Never again\", I'd say to anyone. No."
    assert sentences(review) == [
        "what a waste of my time !",
        "i did n't laugh once .",
        '" never again " , i \'d say to anyone .',
    ]


def test_padding_is_masked_and_equal_lengths_need_no_mask() -> None:
    ids, mask = pad([[5, 6], [7]], 0)
    assert ids.tolist() == [[5, 6], [7, 0]]
    assert mask is not None
    assert mask.tolist() == [[1, 1], [1, 0]]
    assert pad([[5, 6], [7, 8]], 0)[1] is None


def test_a_batch_holds_what_was_asked_for() -> None:
    examples = Examples([[1], [2, 3], [4]], one_hot([0, 1, 1]))
    batch = examples.batch([2, 0], pad_id=0)
    assert batch.ids.tolist() == [[4], [1]]
    assert torch.equal(batch.targets, torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
