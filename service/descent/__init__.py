"""Distributed training that goes on when workers fail, with the same bits for any number of workers.

The Python surface. Everything else is an implementation detail that may change.

    import descent

    result = descent.train(["experiment=digits", "epochs=5"])
    result.metrics["eval/accuracy"]
    model = descent.load(result.run_dir)

`import descent` imports nothing heavy; torch, Ray and MLflow are imported when a function needs them.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from descent.cluster.run.result import RunResult
    from descent.cluster.run.saved_model import load
    from descent.cluster.run.train import train
    from descent.config.schema import RunConfig
    from descent.errors import DescentError
    from descent.training.results import Mean, Predictions, Rows, Sum

    __version__: str

__all__ = [
    "DescentError",
    "Mean",
    "Predictions",
    "Rows",
    "RunConfig",
    "RunResult",
    "Sum",
    "__version__",
    "load",
    "train",
]

_PLACES = {
    "DescentError": "descent.errors",
    "RunConfig": "descent.config.schema",
    "Mean": "descent.training.results",
    "Predictions": "descent.training.results",
    "Rows": "descent.training.results",
    "RunResult": "descent.cluster.run.result",
    "Sum": "descent.training.results",
    "load": "descent.cluster.run.saved_model",
    "train": "descent.cluster.run.train",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name == "__version__":
        from importlib import metadata

        value: Any = metadata.version("descent-service")
    elif name in _PLACES:
        import importlib

        value = getattr(importlib.import_module(_PLACES[name]), name)
    else:
        raise AttributeError(f"module 'descent' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
