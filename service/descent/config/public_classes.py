"""The classes that a `_target_` may name without `trusted_modules`, by kind.

The list holds public classes of `torch.nn`, `torch.optim` and `torch.utils.data`, and the classes
of Descent that are meant for a config. A class is found by looking its name up in the list:
nothing is imported by a name from a config, and no attribute is read by one.

No whole module is trusted. `torch.utils.data`, for example, also exports the data pipes, which
can be led from an object to `os.system` while they are built.
"""

import functools
import importlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

Kind = Literal["module", "optimizer", "schedule", "data set", "task", "sampler", "metric", "observer"]

KINDS_BY_GROUP: Mapping[str, tuple[Kind, ...]] = {
    "model": ("module",),
    "loss": ("module",),
    "optimizer": ("optimizer",),
    "schedule": ("schedule",),
    "data": ("data set", "sampler"),
    "metrics": ("metric",),
    "task": ("task",),
    "observers": ("observer",),
}
"""Group of the config -> kinds of classes that a `_target_` in it may name."""

DESCENT_CLASSES: Mapping[Kind, tuple[str, ...]] = {
    "module": (
        "descent.models.gates.GumbelSoftmax",
        "descent.models.gates.Round",
        "descent.models.gates.Sign",
        "descent.models.gpt.GPT",
        "descent.models.mlp.MLP",
        "descent.models.resnet.ResNet",
    ),
    "optimizer": (
        "descent.optim.muon.MuonWithAdamW",
        "descent.optim.optimizers.MuonWithAdamW",
    ),
    "schedule": (
        "descent.optim.schedules.Constant",
        "descent.optim.schedules.Cosine",
        "descent.optim.schedules.CosineRestarts",
        "descent.optim.schedules.Exponential",
        "descent.optim.schedules.InverseSquareRoot",
        "descent.optim.schedules.MultiStep",
        "descent.optim.schedules.OneCycle",
        "descent.optim.schedules.Plateau",
        "descent.optim.schedules.Polynomial",
        "descent.optim.schedules.Step",
        "descent.optim.schedules.WarmupStableDecay",
    ),
    "data set": (
        "descent.data.arrays.Arrays",
        "descent.data.breast_cancer.BreastCancer",
        "descent.data.csv_file.Csv",
        "descent.data.digits.Digits",
        "descent.data.hugging_face.HuggingFace",
        "descent.data.hugging_face.HuggingFaceRows",
        "descent.data.idx.IdxFolder",
        "descent.data.images.Images",
        "descent.data.mnist5k.Mnist5k",
        "descent.data.parquet.Parquet",
        "descent.data.stdlib_bytes.StdlibBytes",
        "descent.data.text.Text",
        "descent.data.tokens.Tokens",
    ),
    "task": ("descent.training.model_loss.ModelLoss",),
    "sampler": (
        "descent.training.input.samplers.ByLength",
        "descent.training.input.samplers.ClassBalanced",
        "descent.training.input.samplers.Sequential",
        "descent.training.input.samplers.Weighted",
    ),
}
"""Descent's own classes. A class that is meant for a config must be added here."""


@dataclass(frozen=True)
class PublicClass:
    """A class of the list."""

    kind: Kind
    cls: type


def public_class(path: str) -> PublicClass | None:
    """The class that the list has under the dotted name `path`, or None."""
    for kind, names in DESCENT_CLASSES.items():
        if path in names:
            module, _, name = path.rpartition(".")
            cls = getattr(importlib.import_module(module), name)
            assert inspect.isclass(cls), path
            return PublicClass(kind, cls)
    if path.startswith("torchmetrics."):
        return torchmetrics_classes().get(path)
    return torch_classes().get(path)


def is_public(found: object) -> bool:
    """Whether `found` itself, by identity, is one of torch's classes in the list."""
    return any(found is listed.cls for listed in torch_classes().values())


def public_names(group: str | None = None) -> list[str]:
    """The names in the list; with `group` only those that a `_target_` in this group may name."""
    kinds = KINDS_BY_GROUP.get(group or "")
    own = [(kind, name) for kind, names in DESCENT_CLASSES.items() for name in names]
    torchs = [(listed.kind, name) for name, listed in torch_classes().items()]
    if group == "metrics":
        torchs += [(listed.kind, name) for name, listed in torchmetrics_classes().items()]
    return sorted(name for kind, name in [*own, *torchs] if kinds is None or kind in kinds)


@functools.cache
def torch_classes() -> Mapping[str, PublicClass]:
    """Dotted name -> class of torch. Each has its public name and that of the module that defines it."""
    import torch.nn
    import torch.optim
    import torch.utils.data

    data = torch.utils.data
    found: dict[str, PublicClass] = {}
    for kind, package, bases, homes in (
        ("module", torch.nn, (torch.nn.Module,), ("torch.nn.modules.",)),
        ("optimizer", torch.optim, (torch.optim.Optimizer,), ("torch.optim",)),
        (
            "data set",
            data,
            (data.Dataset, data.Sampler),
            ("torch.utils.data.dataset", "torch.utils.data.sampler", "torch.utils.data.distributed"),
        ),
    ):
        for cls in _exported(package, bases, homes):
            listed = PublicClass(kind, cls)  # type: ignore[arg-type]
            found[f"{package.__name__}.{cls.__name__}"] = listed
            found[f"{cls.__module__}.{cls.__qualname__}"] = listed
    return found


_METRICS = ("classification", "regression", "retrieval", "nominal", "clustering", "segmentation")
_TEXT_METRICS = (
    "BLEUScore CHRFScore CharErrorRate EditDistance ExtendedEditDistance MatchErrorRate Perplexity SQuAD SacreBLEUScore "
    "TranslationEditRate WordErrorRate WordInfoLost WordInfoPreserved"
)
"""Of torchmetrics.text; the others load pretrained models or fetch files by the names that they are given."""


@functools.cache
def torchmetrics_classes() -> Mapping[str, PublicClass]:
    """Dotted name -> metric of torchmetrics that computes from its arguments alone: torchmetrics.[package.]Class."""
    import torchmetrics

    found: dict[str, PublicClass] = {}
    for name in (*_METRICS, "text"):
        package = importlib.import_module(f"torchmetrics.{name}")
        for short in _TEXT_METRICS.split() if name == "text" else dir(package):
            cls = getattr(package, short, None)
            if inspect.isclass(cls) and issubclass(cls, torchmetrics.Metric) and not short.startswith("_"):
                listed = PublicClass("metric", cls)
                found[f"torchmetrics.{name}.{short}"] = listed
                if getattr(torchmetrics, short, None) is cls:
                    found[f"torchmetrics.{short}"] = listed
    return found


def _exported(package: ModuleType, bases: tuple[Any, ...], homes: tuple[str, ...]) -> Iterator[type]:
    """The public subclasses of `bases` in the namespace of `package` whose defining module starts with one of `homes`."""
    for name, value in vars(package).items():
        if (
            not name.startswith("_")
            and inspect.isclass(value)
            and issubclass(value, bases)
            and value.__name__ == name
            and value.__module__.startswith(homes)
        ):
            yield value
