"""What tracking records of a data set: its identity, shape, class balance and the inputs' statistics."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from descent.data.base import Data, Indices
from descent.data.records import read_good
from descent.data.splits import numbers_in, root_of
from descent.errors import DescentError

_LOOKED_AT = 1024  # samples that the statistics are of, spread evenly
_ALL_LABELS = 1 << 22
_MOST_CLASSES = 1000


def describe(data: Data) -> dict[str, Any]:
    """Plain values only.

    `classes` counts each class's samples: all of them where the labels are in memory, else of
    `looked_at` samples spread evenly. `inputs` has mean, deviation, least and largest of
    those samples' inputs; for tokens, how many different ones there are.
    """
    told: dict[str, Any] = {
        "name": data.name,
        "source": data.source,
        "digest": data.digest,
        "num_samples": len(data),
        "input_shape": list(data.input_shape),
        "num_outputs": data.num_outputs,
    }
    layout = getattr(data, "layout", None)
    if layout is not None:
        told["num_shards"] = len(layout.starts) - 1
        told["window"] = layout.window
    # each reads one sample at a time where a shard or a decoder stands behind
    most = _LOOKED_AT if getattr(root_of(data), "in_memory", False) else 64
    indices = np.linspace(0, len(data) - 1, min(len(data), most)).astype(np.int64)
    if layout is not None:
        indices = np.arange(len(indices), dtype=np.int64)  # the first shard's: no others to fetch
    try:
        (inputs, targets), _ = read_good(data.gather, indices, len(data), "skip")
    except DescentError:
        return told  # the preflight says why, in better words
    told["looked_at"] = len(indices)
    told["inputs"] = _statistics(inputs)
    if targets.is_floating_point():
        told["targets"] = _statistics(targets)
    elif targets.dim() == 1:
        labels = _labels(data)
        told["classes"] = _balance(targets if labels is None else labels)
    return told


def _statistics(values: Tensor) -> dict[str, float | int]:
    if not values.is_floating_point():
        return {"distinct": len(values.unique()), "max": int(values.max())}
    deviation, mean = torch.std_mean(values.double(), correction=0)
    return {
        "mean": round(float(mean), 6),
        "std": round(float(deviation), 6),
        "min": float(values.min()),
        "max": float(values.max()),
    }


def _labels(data: Data) -> Tensor | None:
    """Every label, where they are at hand."""
    stored = getattr(root_of(data), "targets", None)
    if not isinstance(stored, Tensor) or stored.dim() != 1 or len(data) > _ALL_LABELS:
        return None
    everything: Indices = np.arange(len(data), dtype=np.int64)
    return stored.index_select(0, torch.from_numpy(numbers_in(data, everything)))


def _balance(labels: Tensor) -> dict[str, int]:
    counts = torch.bincount(labels.long().clamp(min=0)).tolist()
    if len(counts) > _MOST_CLASSES:
        return {"distinct": sum(count > 0 for count in counts), "largest": max(counts)}
    return {str(label): count for label, count in enumerate(counts)}
