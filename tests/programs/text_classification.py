"""Hugging Face's BERT for classification: dict samples of unequal length, padded by a collate function."""

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification

from tests.programs.program import Program, built, plain_loop

Sample = dict[str, list[int] | int]


class Sentences(Dataset[Sample]):
    """96 sentences of 4 to 11 tokens; the class is the first token's."""

    def __len__(self) -> int:
        return 96

    def __getitem__(self, index: int) -> Sample:
        length = 4 + index % 8
        return {"input_ids": [1 + (index * 7 + i * i) % 19 for i in range(length)], "label": (index * 7) % 19 % 3}


def pad(samples: list[Sample]) -> dict[str, Tensor]:
    """As DataCollatorWithPadding does it."""
    rows = [torch.tensor(sample["input_ids"]) for sample in samples]
    return {
        "input_ids": nn.utils.rnn.pad_sequence(rows, batch_first=True),
        "attention_mask": nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        "labels": torch.tensor([sample["label"] for sample in samples]),
    }


def model() -> nn.Module:
    config = BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config)


def by_hand() -> list[float]:
    return plain_loop(built(model), Sentences(), lambda m, batch: m(**batch).loss, collate=pad)


PROGRAM = Program(
    [
        "model=custom",
        "model._target_=tests.programs.text_classification.model",
        "data=custom",
        "data.train._target_=tests.programs.text_classification.Sentences",
        "+data.collate._target_=tests.programs.text_classification.pad",
        "task=auto",
    ],
    by_hand,
)
