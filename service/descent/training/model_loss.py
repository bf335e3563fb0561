"""`task=auto`: models that return their own loss, as those of Hugging Face and many language models do."""

import inspect
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from descent.data.batch import Batch, describe
from descent.errors import TrainingError
from descent.training.results import Mean, Predictions, Sum

IGNORED = -100
"""The label that torch's cross-entropy, and so most models, leave out of the mean."""
_LABELS = ("labels", "label", "targets", "target")


class ModelLoss:
    """The model is called with the batch and returns its loss: `.loss`, {"loss": …}, (logits, loss), or the loss alone.

    A dict goes in as keyword arguments (of those that the forward takes; `label` as `labels`), a tuple as
    positional ones, anything else as the only argument. Several losses in a dict (a detection model's) are added up.
    """

    def loss(self, model: nn.Module, batch: Batch) -> Any:
        """The model's loss: what the number is the mean of is found out before the run."""
        output = self._call(model, batch)
        return self._loss_of(output)

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, Any]:
        """The loss; with logits [n, classes] and labels [n] the share of right answers; of a language model the tokens."""
        output = self._call(model, batch)
        results = {"loss": self._loss_of(output)}
        logits, labels = logits_of(output), labels_of(batch)
        if logits is None or labels is None or labels.is_floating_point():
            return results
        counted = labels != IGNORED
        if logits.dim() == 2 and labels.shape == logits.shape[:1]:
            results["accuracy"] = Mean(((logits.argmax(-1) == labels) & counted).sum(), counted.sum())
            results["predictions"] = Predictions(logits, labels)
        elif logits.dim() == 3 and labels.shape == logits.shape[:2]:
            results["tokens"] = Sum(counted.sum())
        return results

    def compute(self, reduced: dict[str, Any]) -> dict[str, float]:
        """The perplexity of a language model."""
        if "tokens" not in reduced:
            return {}
        return {"perplexity": math.exp(min(reduced["loss"], 700.0))}

    def export_args(self, batch: Batch) -> dict[str, Any] | tuple[Any, ...]:
        """What the model takes where nobody knows the answer: the batch without its labels."""
        if isinstance(batch, Mapping):
            return {key: value for key, value in batch.items() if key not in _LABELS}
        return (batch[0],) if isinstance(batch, tuple | list) else (batch,)

    @staticmethod
    def _call(model: nn.Module, batch: Batch) -> Any:
        parameters = inspect.signature(getattr(model, "_orig_mod", model).forward).parameters
        if isinstance(batch, Mapping):
            named = {str(key): value for key, value in batch.items()}
            if "labels" in parameters and "labels" not in named and "label" in named:
                named["labels"] = named.pop("label")
            if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
                named = {key: value for key, value in named.items() if key in parameters}
            return model(**named)
        if isinstance(batch, tuple | list):
            places = [p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
            open_ended = any(p.kind is p.VAR_POSITIONAL for p in parameters.values())
            return model(*(batch if open_ended or len(places) >= len(batch) else batch[: len(places)]))
        return model(batch)

    @staticmethod
    def _loss_of(output: Any) -> Any:
        if isinstance(output, Tensor):
            return output
        loss = getattr(output, "loss", None)
        if isinstance(loss, Tensor):
            return loss
        if isinstance(output, Mapping):
            if isinstance(output.get("loss"), Tensor):
                return output["loss"]
            losses = {name: v for name, v in output.items() if isinstance(v, Tensor) and v.dim() == 0}
            if losses and len(losses) == len(output):
                return {"loss": sum(losses.values()), **losses}
        if isinstance(output, tuple | list):
            single = [v for v in output if isinstance(v, Tensor) and v.dim() == 0 and v.is_floating_point()]
            if len(single) == 1:
                return single[0]
        raise TrainingError(
            f"task=auto: the model gives {describe(output)}, in which no loss can be found: it needs an attribute or a "
            "key 'loss', or one 0-d tensor in a tuple; give the model its labels, or write the loss as a function "
            "loss(model, batch): task=custom task._target_=my_module.loss"
        )


def logits_of(output: Any) -> Tensor | None:
    """The model's scores for the classes, where the output has them."""
    found = getattr(output, "logits", None)
    if found is None and isinstance(output, Mapping):
        found = output.get("logits")
    if found is None and isinstance(output, tuple | list):
        found = next((v for v in output if isinstance(v, Tensor) and v.dim() >= 2 and v.is_floating_point()), None)
    return found if isinstance(found, Tensor) else None


def labels_of(batch: Batch) -> Tensor | None:
    """The labels of a batch: under labels, label, targets or target of a dict, or the second of a pair."""
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in _LABELS if key in batch), None)
    elif isinstance(batch, tuple | list) and len(batch) == 2:
        found = batch[1]
    else:
        found = None
    return found if isinstance(found, Tensor) else None


def with_labels(batch: Batch, labels: Tensor) -> Batch:
    """The same batch with other labels in the place where `labels_of` found them."""
    if isinstance(batch, Mapping):
        place = next(key for key in _LABELS if key in batch)
        return {key: labels if key == place else value for key, value in batch.items()}
    return (batch[0], labels)
