"""What a terminal shows of attention maps: tables, labels, pictures."""

import struct
from pathlib import Path

import pytest

from service.cli.commands import plan
from service.cli.maps import Panel, Picture, picture_of, table_of
from service.domain import (
    AttendedToken,
    AttentionMap,
    AttentionMaps,
    AttentionRequest,
    Kind,
    Prediction,
    Score,
    Timing,
    Usage,
)
from service.errors import ConfigError

ABOUT = (Usage(3, 0), Timing(0, 0, 0, 0))


def token(text: str, start: int, end: int, part: str | None = "text") -> AttendedToken:
    return AttendedToken(1, text, start, end, part is None, part)


def a_map(kind: Kind, *heads: list[list[float]], layer: int | None = 1, told: tuple[int, ...] | None = None):
    flat = [weight for head in heads for row in head for weight in row]
    shape = (len(heads), len(heads[0]), len(heads[0][0]))
    return AttentionMap(kind, layer, told, shape, struct.pack(f"<{len(flat)}f", *flat))


def reply(*maps: AttentionMap, written: tuple[AttendedToken, ...] | None = None, text: str | None = None):
    """Of a model that read "Not ok" as two words behind a special token."""
    read = (token("[CLS]", 0, 0, None), token("not", 0, 3), token("\u0120ok", 3, 6))
    prediction = Prediction((Score("NEGATIVE", 0.75),)) if text is None else Prediction(text=text)
    return AttentionMaps("m", "classify", read, written, maps, prediction, *ABOUT)


MEAN = AttentionRequest(text="Not ok", reduce="mean")
SQUARE = [[1.0, 0.0, 0.0], [0.25, 0.5, 0.25], [0.0, 0.125, 0.875]]


def test_the_table_has_each_token_and_where_it_looks_the_most():
    lines = list(table_of(picture_of(MEAN, reply(a_map("encoder", SQUARE)))))
    assert lines[:2] == ["m: encoder attention; NEGATIVE 0.750", "\nlayer 1, mean of the heads"]
    assert [line.split() for line in lines[2:]] == [
        ["[CLS]", "1.00", "[CLS]", "0.00", "Not", "0.00", "ok"],
        ["Not", "0.50", "Not", "0.25", "[CLS]", "0.25", "ok"],
        ["ok", "0.88", "ok", "0.12", "Not", "0.00", "[CLS]"],
    ]


def test_every_head_of_every_layer_has_its_panel():
    heads = AttentionRequest(text="Not ok", heads=(4, 2))
    maps = [a_map("encoder", SQUARE, SQUARE[::-1], layer=layer, told=(4, 2)) for layer in (0, 3)]
    rows = picture_of(heads, reply(*maps)).rows
    assert [[panel.title for panel in row] for row in rows] == [
        ["layer 0, head 4", "layer 0, head 2"],
        ["layer 3, head 4", "layer 3, head 2"],
    ]
    assert [panel.weights for panel in rows[1]] == [SQUARE, SQUARE[::-1]]


def test_a_translators_cross_attention_goes_from_the_translation_to_the_text():
    written = (token("\u2581Nicht", 0, 5, "target"), token("</s>", 0, 0, None))
    maps = (a_map("encoder", SQUARE), a_map("decoder", [[1.0, 0.0]] * 2), a_map("cross", SQUARE[:2]))
    told = reply(*maps, written=written, text="Nicht gut")
    (((panel,),)) = picture_of(MEAN, told).rows
    assert (panel.queries, panel.keys) == (("Nicht", "</s>"), ("[CLS]", "Not", "ok"))
    decoder = picture_of(MEAN, reply(maps[1], written=written, text="Nicht gut"))
    assert decoder.rows[0][0].keys == ("Nicht", "</s>")
    assert decoder.title == "m: decoder attention; Nicht gut"


def test_a_decoder_looks_at_its_prompt_and_at_what_it_wrote():
    five = [[0.2] * 5] * 5
    written = (token("!", 0, 1, "target"), token("?", 1, 2, "target"))
    panel = picture_of(MEAN, reply(a_map("decoder", five), written=written, text="!?")).rows[0][0]
    assert panel.queries == panel.keys == ("[CLS]", "Not", "ok", "!", "?")


def test_labels_stay_short_and_tables_straight():
    wide = Panel("p", ("你好", "a"), ("x" * 30, "\n"), [[0.5, 0.5], [0.5, 0.5]])
    lines = list(table_of(Picture("t", ((wide,),))))
    assert lines[2].startswith("你好  0.50")
    assert lines[3].startswith("a     0.50")
    long = AttentionRequest(text="x" * 40 + "\n", reduce="mean")
    told = AttentionMaps(
        "m",
        "classify",
        (token("x", 0, 40), token("n", 40, 41)),
        None,
        (a_map("encoder", [[0.5, 0.5]] * 2),),
        Prediction(text=""),
        *ABOUT,
    )
    assert picture_of(long, told).rows[0][0].keys == ("x" * 15 + "…", "n")


def dots(path: Path) -> tuple[int, int]:
    """Width and height, as the header of a PNG file has them."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def drawn(path: Path, keys: int, *weights: float, queries: int = 2) -> Path:
    pytest.importorskip("matplotlib")
    from service.cli.heatmap import save_png

    labels = tuple(("[CLS]", "$x_", "你", "e\u0301")[at % 4] for at in range(keys))
    rows = [[weights[(query + key) % len(weights)] for key in range(keys)] for query in range(queries)]
    save_png(Picture("m: encoder attention", ((Panel("layer 0", labels[:queries], labels, rows),),)), path)
    return path


def test_a_picture_is_as_large_as_it_has_tokens_and_shows_the_weights(tmp_path):
    one = drawn(tmp_path / "one.png", 4, 0.25, 0.75)
    assert dots(one) == (750, 645)
    assert dots(drawn(tmp_path / "more.png", 20, 0.25, 0.75)) == (1290, 645)
    assert dots(drawn(tmp_path / "many.png", 300, 0.25, 0.75)) == (2850, 645)
    assert one.read_bytes() == drawn(tmp_path / "again.png", 4, 0.25, 0.75).read_bytes()
    assert one.read_bytes() != drawn(tmp_path / "other.png", 4, 0.75, 0.25).read_bytes()


async def test_the_command_writes_the_picture(backend, tmp_path, capsys):
    from test_cli_ask import ask

    path = tmp_path / "out.png"
    await ask(backend, "attention", "a fine film", "--layer=all", "--head=all", f"--png={path}")
    assert dots(path) == (1050, 1335)  # three layers, each with two heads
    assert capsys.readouterr().out == ""


def test_without_matplotlib_it_is_said_before_a_model_is_asked(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "service.cli.heatmap", None)
    options = {"text": "a", "png": "out.png"}
    with pytest.raises(ConfigError, match="pip install matplotlib"):
        plan("attention", options)
