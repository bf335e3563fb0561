"""The model of a run with its trained weights: `descent.load`."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from descent.checkpoint.manifest import MANIFEST, checkpoint_root, rescue_root, step_of
from descent.checkpoint.reader import list_checkpoints, newest_checkpoint
from descent.cluster.record import run_log
from descent.cluster.run.kept_model import WEIGHTS
from descent.cluster.run.resume import find_weights
from descent.config import RunConfig, given, recompose
from descent.config.environment import with_variables
from descent.config.import_path import append_current_folder
from descent.errors import CheckpointError
from descent.storage import Location

if TYPE_CHECKING:
    from torch import nn

    from descent.cluster.run.result import RunResult

_OF_TRAINING = ("tracking", "optimizer", "schedule", "loss", "resume", "init_from", "name", "output_dir")
"""Groups of the config that the model doesn't depend on: what they read from the environment isn't needed."""


def load(
    run: "str | Path | RunResult",
    *,
    model: "nn.Module | Callable[[], nn.Module] | None" = None,
    step: int | None = None,
    trusted_modules: Sequence[str] = (),
    output_dir: str | Path = ".descent",
) -> "nn.Module":
    """Build the model of a run and put its trained weights into it; in evaluation mode, on the CPU.

    run: what `descent.train` returned, the run's name, its MLflow run id, its folder, the folder of one of its checkpoints, or a copy of the artifact
        folder `model` that MLflow has of a run whose model could not be exported.
    model: the network, or a function that makes one, for a run whose model came from Python as an object; a network is
        copied, and the copy gets the weights.
    step: the checkpoint of this step instead of the newest.
    trusted_modules: your own modules that may be imported for the model's class. A run's folder can
        come from anywhere, so what it trusted itself does not count.
    output_dir: the folder that runs were written to.

    Where the run averaged its weights (ema.decay), the averages are loaded.

    Raises CheckpointError if there is no such run or no checkpoint that verifies, ConfigError if the
    model's class isn't trusted or can't be imported.

        model = descent.load("1125-0930-ab12-digits-mlp")
        model = descent.load(result.run_dir, trusted_modules=["my_model"])
    """
    from torch import nn

    run = getattr(run, "run_dir", run)
    run_dir = run_log.find_run(str(run), Path(output_dir).expanduser(), "run")
    saved = run_log.read_run_file(run_dir)
    append_current_folder()
    tree = {key: with_variables(value, key) for key, value in saved["config"].items() if key not in _OF_TRAINING}
    tree |= {key: value for key, value in saved["config"].items() if key in _OF_TRAINING}
    config = recompose({**tree, "trusted_modules": list(trusted_modules)})
    target = _checkpoint(str(run), run_dir, config, step)
    spec = saved.get("model")
    if model is None:
        given.require_all({"model": config.model}, f"run={run_dir.name}", f"descent.load({run_dir.name!r}, {{}})")
        network = _model(config, None if spec is None else with_variables(spec, "model"))
    else:
        network = copy.deepcopy(model) if isinstance(model, nn.Module) else model()

    from descent.checkpoint.frozen import are_left_out
    from descent.checkpoint.weights import InitialWeights, put_checkpoint_into

    if config.init_from is not None and are_left_out(network, config.checkpoint.save_frozen):
        # The checkpoint may go without the frozen parameters, which came from there.
        begin = find_weights(config)
        assert begin is not None
        InitialWeights(begin, config.init_strict, config.init_key, config.init_rules).put_into(network)
    put_checkpoint_into(network, target)
    return network.eval()


def _checkpoint(run: str, run_dir: Path, config: RunConfig, step: int | None) -> Location:
    if (Path(run).expanduser() / MANIFEST).is_file() and step is None:
        return Path(run).expanduser().resolve()
    if step is None and (run_dir / WEIGHTS).is_file():
        return run_dir / WEIGHTS  # the artifact folder of a run whose model could not be exported
    root, rescue = checkpoint_root(run_dir, config.checkpoint.dir), rescue_root(run_dir)
    if step is None:
        return newest_checkpoint(root, rescue=rescue)[0]
    places: list[Location] = [root, rescue] if rescue != root else [root]
    targets: list[Location] = [target for place in places for target in list_checkpoints(place)]
    for target in targets:
        if step_of(target.name) == step:
            return target
    steps = ", ".join(str(step_of(target.name)) for target in targets[:8])
    raise CheckpointError(f"step={step}: {run_dir.name} has no checkpoint of this step; it has {steps or 'none'}")


def _model(config: RunConfig, complete_spec: dict[str, Any] | None) -> "nn.Module":
    """The network, untrained. complete_spec: the model's arguments with what the data set gave filled in."""
    from torch.nn.parameter import is_lazy

    from descent.config import build
    from descent.training.plan import build_data, build_model

    if complete_spec is not None:
        model = build(complete_spec, config.trusted_modules, "model")
        if not any(is_lazy(parameter) for parameter in model.parameters()):
            return model
    # A run of an earlier version, or a network whose shapes come with its first batch: ask the data set.
    return build_model(config, build_data(config)[0])
