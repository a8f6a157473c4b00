"""Writes a model of DistilBERT's size with random weights: `make_distilbert.py TOKENIZER_JSON DIRECTORY`.

Speed does not depend on the weights' values, so nothing has to be downloaded. The tokenizer is the bundle's own
(BERT's uncased WordPiece, as DistilBERT's).
"""

import sys

import torch
from transformers import DistilBertConfig, DistilBertForSequenceClassification, PreTrainedTokenizerFast


def main() -> None:
    tokenizer_file, directory = sys.argv[1:]
    torch.manual_seed(0)
    config = DistilBertConfig(num_labels=2, id2label={0: "NEGATIVE", 1: "POSITIVE"})
    DistilBertForSequenceClassification(config).save_pretrained(directory)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=tokenizer_file,
        model_max_length=512,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.save_pretrained(directory)


if __name__ == "__main__":
    main()
