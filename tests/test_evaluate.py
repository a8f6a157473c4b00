"""Scores of translations: known values, signatures that say how, and the form in which captions are scored."""

import pytest

from model.evaluate import bleu, chrf, moses_tokens

REFERENCES = ["Der Hund läuft durch den Park.", "Zwei Männer spielen Gitarre."]


def test_a_perfect_translation_has_a_hundred() -> None:
    assert bleu(REFERENCES, REFERENCES).value == pytest.approx(100)
    assert chrf(REFERENCES, REFERENCES).value == pytest.approx(100)


def test_bleu_is_that_of_papineni_et_al() -> None:
    """Precisions 5/6, 3/5, 1/4 and 0/3, the last smoothed to 1/2 of a match; as long as the reference."""
    found = bleu(["a b c x e f"], ["a b c d e f"], tokenize="none")
    assert found.value == pytest.approx(100 * (5 / 6 * 3 / 5 * 1 / 4 * 0.5 / 3) ** 0.25)


def test_case_counts_and_the_signature_says_so() -> None:
    found = bleu([text.lower() for text in REFERENCES], REFERENCES)
    assert found.value < 60
    assert {"case:mixed", "tok:13a"} <= set(found.signature.split("|"))
    assert "tok:none" in bleu(REFERENCES, REFERENCES, tokenize="none").signature


def test_moses_tokens_are_those_that_multi30k_is_scored_in() -> None:
    """The expected lines follow the form of the .lc.norm.tok files."""
    texts = ["Ein Mann spielt „Tyson's Punch-Out“ am PC.", "Zwei junge, weiße Männer"]
    assert moses_tokens(texts, "de") == [
        "ein mann spielt &quot; tyson &apos; s punch-out &quot; am pc .",
        "zwei junge , weiße männer",
    ]
