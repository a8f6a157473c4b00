"""The bench of attention maps: what it asks for, and a run at small size against a real server."""

import json

import pytest
from bench.attention import main, plain_and_told


@pytest.mark.parametrize("model", ["chat", "translation"])
def test_both_requests_write_the_same_text(model: str) -> None:
    (path, plain), (_, told) = plain_and_told(model, "a b")
    assert path == "/v1/generate"
    assert plain["prompt"] == told["text"] == "a b"
    assert plain.get("max_tokens") == told.get("generate", {}).get("max_tokens")


def test_a_run_ends_with_the_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--models", "sentiment", "--count", "3"])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    one = last["models"]["sentiment"]
    assert one["ratio"] == pytest.approx(one["told_ms"] / one["plain_ms"], rel=0.01)
    assert last["requests"] == 3
