"""A description of a data set for tracking: identity, shape, class balance and statistics of the inputs."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from descent.data.bad_records import read_good
from descent.data.base import Data, Indices, indices_in_root, root_of
from descent.data.batch import describe as describe_batch
from descent.errors import DescentError

_SAMPLED = 1024  # samples, spread evenly, whose statistics are recorded
_SAMPLED_FROM_DISK = 64
_ALL_LABELS = 1 << 22
_MOST_CLASSES = 1000


def describe(data: Data) -> dict[str, Any]:
    """The description, of plain values only.

    `classes` counts the samples of each class: of all samples where the labels are at hand, else of
    `looked_at` samples spread evenly. `inputs` has mean, standard deviation, least and largest value of
    those samples' inputs; for tokens, the number of different ones.
    """
    described: dict[str, Any] = {
        "name": data.name,
        "source": data.source,
        "digest": data.digest,
        "num_samples": len(data),
        "input_shape": None if data.input_shape is None else list(data.input_shape),
        "num_outputs": data.num_outputs,
    }
    if data.class_names is not None:
        described["class_names"] = list(data.class_names[:_MOST_CLASSES])
    if data.layout is not None:
        described["num_shards"] = len(data.layout.starts) - 1
        described["window"] = data.layout.window
    # A sample that isn't in memory may have to be decoded, or its shard fetched.
    most = _SAMPLED if data.in_memory else _SAMPLED_FROM_DISK
    indices = np.linspace(0, len(data) - 1, min(len(data), most)).astype(np.int64)
    if data.layout is not None:
        indices = np.arange(len(indices), dtype=np.int64)  # of the first shards, so that no others are fetched
    try:
        batch, _ = read_good(data.gather, indices, len(data), "skip")
    except DescentError:
        return described  # the check before the run has said why, or will
    described["looked_at"] = len(indices)
    if data.input_shape is None:  # no pairs (input, target)
        described["batch"] = describe_batch(batch)
        return described
    inputs, targets = batch
    described["inputs"] = _statistics(inputs)
    if targets.is_floating_point():
        described["targets"] = _statistics(targets)
    elif targets.dim() == 1:
        labels = _labels(data)
        described["classes"] = _balance(targets if labels is None else labels)
    return described


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
    """Every label of the data set, where all are at hand and not too many."""
    labels = root_of(data).labels
    if labels is None or labels.dim() != 1 or len(data) > _ALL_LABELS:
        return None
    everything: Indices = np.arange(len(data), dtype=np.int64)
    return labels.index_select(0, torch.from_numpy(indices_in_root(data, everything)))


def _balance(labels: Tensor) -> dict[str, int]:
    counts = torch.bincount(labels.long().clamp(min=0)).tolist()
    if len(counts) > _MOST_CLASSES:
        return {"distinct": sum(count > 0 for count in counts), "largest": max(counts)}
    return {str(label): count for label, count in enumerate(counts)}
