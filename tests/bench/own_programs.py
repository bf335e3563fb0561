"""Two trainings of a user's own for the benchmarks: batches that are dicts, and a model of Hugging Face's.

Both data sets read whole batches from memory (`gather`), as the loops by hand do.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.bench.subjects import digits

Batch = dict[str, Tensor]


class Whole:
    """A data set of tensors in memory by name, with the members of Descent's protocol."""

    source, input_shape, num_outputs, digest, in_memory = "made", (), None, "0", True
    thread_safe = True

    def __init__(self, name: str, columns: Batch) -> None:
        self.name, self.columns = name, columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> Batch:
        return {name: column[index] for name, column in self.columns.items()}

    def gather(self, indices: Any) -> Batch:
        """The samples as one dict."""
        at = torch.from_numpy(np.ascontiguousarray(indices, dtype=np.int64))
        return {name: column.index_select(0, at) for name, column in self.columns.items()}


def pictures() -> Whole:
    """Digits as {"image": …, "label": …}."""
    inputs, targets = digits()
    return Whole("pictures", {"image": inputs, "label": targets})


def sentences() -> Whole:
    """2,048 sentences of 32 tokens, with three classes."""
    ids = torch.randint(1, 1000, (2048, 32), generator=torch.Generator().manual_seed(0))
    return Whole("sentences", {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 3})


def network() -> nn.Module:
    """The network of the subject `10ms`, as somebody would write it."""
    layers: list[nn.Module] = [nn.Flatten()]
    for width in (64, 512, 512):
        layers += [nn.Linear(width, 512), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(512, 10))


def bert() -> nn.Module:
    """A BERT whose step of 8 sentences takes about 10 ms on one core."""
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
    return BertForSequenceClassification(BertConfig(vocab_size=1000, max_position_embeddings=32, num_labels=3, **sizes))


def loss_of_pictures(model: nn.Module, batch: Batch) -> Tensor:
    """The mean over the samples."""
    return F.cross_entropy(model(batch["image"]), batch["label"])


def loss_of_sentences(model: nn.Module, batch: Batch) -> Tensor:
    """The model's own loss."""
    found: Tensor = model(**batch).loss
    return found
