"""What the names of metrics say: whether a higher value is better, and which names are the run's own."""

import re
from collections.abc import Iterable
from typing import Literal

METRIC_GROUPS = ("train", "eval", "test", "grad", "data", "perf", "cluster", "workers", "system", "model", "plots")
"""What the names of a run's own metrics and artifacts begin with."""


def better_direction(metric: str) -> Literal["min", "max"] | None:
    """Whether a higher or a lower value of a metric is better, by the words of its name; None where these don't tell.

    >>> better_direction("eval/accuracy"), better_direction("eval/val_loss"), better_direction("eval/zeal")
    ('max', 'min', None)
    """
    words = re.split(r"[^a-z0-9]+", metric.lower().removeprefix("eval/"))

    def speaks_of(known: Iterable[str]) -> bool:
        return any(word == k or (len(k) > 3 and k in word) for word in words for k in known)

    if speaks_of(_LOWER):
        return "min"
    return "max" if speaks_of(_HIGHER) else None


_LOWER = frozenset("loss error mse rmse mae mape perplexity distance penalty nll wer cer ece brier divergence".split())  # noqa: SIM905
_HIGHER = frozenset(
    "accuracy acc f1 fbeta auc auroc precision recall specificity sensitivity bleu rouge r2 iou jaccard dice map ndcg mrr "  # noqa: SIM905
    "kappa corr correlation pearson spearman score top1 top5 hits psnr ssim".split()
)
"""Words in the names of metrics, of which a lower or a higher value is better."""


def check_observer_name(name: str) -> None:
    """Raise ValueError for a name that can't stand before the metrics of a user's observer."""
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
        raise ValueError(f"{name!r} can't be an observer's name: a letter, then letters, digits, '_' and '-'")
    if name in METRIC_GROUPS:
        raise ValueError(f"{name!r} can't be an observer's name: the run's own metrics are {name}/…")
