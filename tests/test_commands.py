"""The commands of model/, where a path that they are given is not there."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from model import export, export_translator, verify, verify_decoder, verify_translator
from model.commands import run
from model.recipes import sentiment, translation


@pytest.mark.parametrize(
    ("main", "arguments", "named"),
    [
        (export.main, "absent --out out --data .", "absent/config.json"),
        (export.main, "{checkpoint} --out out --data absent", "absent/train.tsv"),
        (export_translator.main, "absent --out out", "absent/train.json"),
        (verify.main, "absent {checkpoint} --data absent", "absent/dev.tsv"),
        (verify_translator.main, "absent absent", "absent/config.json"),
        (verify_decoder.main, "absent absent.gguf", "absent.gguf"),
        (sentiment.main, "--data absent --imdb a --minilm b --mpnet c", "absent/train.tsv"),
        (translation.main, "--data absent", "absent/multi30k/train.lc.norm.tok.en"),
        (translation.main, "--data absent --plan everyday", "absent/multi30k/train.en"),
    ],
)
def test_a_path_that_is_not_there_is_named_in_one_line(
    main: Callable[[], int | None],
    arguments: str,
    named: str,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["command", *arguments.format(checkpoint=tiny_checkpoint).split()])
    with pytest.raises(SystemExit) as ended:
        run(main)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line


@pytest.mark.parametrize("status", [0, 1, None])
def test_a_command_ends_with_its_status(status: int | None) -> None:
    with pytest.raises(SystemExit) as ended:
        run(lambda: status)
    assert ended.value.code == status
