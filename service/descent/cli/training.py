"""`descent train`, `chaos` and `config`: they parse, call and print."""

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from descent.cli.arguments import (
    ConfigDirs,
    OutputDir,
    Overrides,
    complete_run_or_override,
    composed_of,
    fail,
)
from descent.cli.output import print_groups, print_result, print_trial
from descent.cluster.run.console import print_error
from descent.errors import DescentError

if TYPE_CHECKING:
    from descent.cluster.run.console import Starting
    from descent.cluster.run.result import RunResult
    from descent.config import Composed

STARTED = time.time()
"""Unix time at which the command began."""
is_own_process = False
"""Whether this process is the command `descent`, and not one that calls it."""


def _hash_texts_alike(composed: "Composed", starting: "Starting") -> None:
    """Begin this process anew with PYTHONHASHSEED=0 for a run with a data set of the user's class.

    Python orders a set of texts differently in each process, unless the environment says so when the process
    starts. The workers are started with 0; with another order here, the data set would look like another one
    at each resume.
    """
    config = composed.config
    if "PYTHONHASHSEED" in os.environ or not is_own_process:
        return
    if config.resume is None and config.data.train["_target_"].startswith("descent."):
        return
    starting.stop()
    os.environ["PYTHONHASHSEED"] = "0"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def train(
    overrides: Overrides = None,
    config_dir: ConfigDirs = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Print the summary as one JSON object on stdout; progress goes to stderr.",
        ),
    ] = False,
) -> None:
    """Train a model: on this machine, or on the Ray cluster at ray.address.

    Examples:

      descent train

      descent train experiment=fashion_mnist optimizer=sgd optimizer.lr=0.1

      descent train model=gpt_tiny data=stdlib epochs=null steps=500 workers=2

      descent train resume=RUN            (a run id, a run's name or its folder)

    Exit codes: 0 finished, 1 failed, 2 refused before it started, 130 stopped by Ctrl-C or SIGTERM.
    """
    from descent.cluster.run.console import Starting, print_line

    console = Console(stderr=as_json)
    starting = Starting(console, in_logs=not as_json)
    run = None
    try:
        composed = composed_of(overrides, config_dir, starting)
        _hash_texts_alike(composed, starting)
        from descent.cluster.run.run import Run

        run = Run(composed, console, STARTED, starting)
        result = run.execute()
        # Before the cluster is left: whatever happens to this process then, the result has been told.
        _tell(console, result, as_json)
    except DescentError as error:
        starting.stop()
        print_error(composed.located(error))
        if run is not None:
            run.end_process_if_ray_is_starting(error.exit_code)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        starting.stop()
        print_line(console, "stopped at once; what was not in a checkpoint is lost")
        raise typer.Exit(130) from None
    finally:
        starting.stop()
        if run is not None:
            run.close()
    raise typer.Exit(result.exit_code)


def _tell(console: Console, result: "RunResult", as_json: bool) -> None:
    if result.traceback:
        print(result.traceback.rstrip(), file=sys.stderr)
    if as_json:
        print(json.dumps(result.to_dict()), flush=True)
    else:
        print_result(console, result)


def chaos(
    run_or_overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="A finished run (its id, name or folder), or overrides as for descent train; overrides may follow a run.",
            autocompletion=complete_run_or_override,
            show_default=False,
        ),
    ] = None,
    output_dir: OutputDir = Path(".descent"),
    config_dir: ConfigDirs = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the verdict as one JSON object on stdout.")] = False,
) -> None:
    """Put a training through faults and say whether anything of it shows in the result.

    Workers are killed, stopped, slowed down and cut off, gradients become NaN, a worker dies in the middle of a checkpoint, Ray's raylet or GCS is killed and with it the cluster, or the run's own process is, at random moments that chaos.seed fixes. The run goes on by itself each time. The verdict: faults survived, steps lost, whether the result has the same bits as without faults, and how long the next step took to come.

    With RUN, a finished run is done once more under chaos, with a new name, and its result is the reference. With overrides, the reference is trained first: one worker, no faults.

    Examples:

      descent chaos 1125-0930-ab12-digits-mlp

      descent chaos RUN chaos.faults=50 chaos.seed=1 spares=1

      descent chaos experiment=digits workers=4 resources.cpus=0.25 chaos.kinds.stop=0

      descent train chaos.faults=20     (faults in a training of its own, without comparing)

    chaos.kinds holds a weight for each kind: kill, stop (no answer any more: found after regroup.heartbeat_s), slow, nan, partition (cut off from the others), kill_in_save, raylet and gcs (in a private cluster, which is started again), driver (the run's own process, which is resumed here; descent train leaves that to you, so its weight is 0 there); 0 leaves one out. Faults of workers cost no step; raylet, gcs and driver cost the steps since the last checkpoint. Injected faults don't count towards regroup.max_failures. The bits can be compared with reduction=exact, which is the default here unless RUN or you say fast.

    Exit codes: 0 survived and equal, 1 otherwise, 2 refused before it started.
    """
    from descent.cluster.chaos import comparison

    given = run_or_overrides or []
    console = Console(stderr=as_json)
    try:
        if given and "=" not in given[0] and not given[0].startswith("~"):
            root = output_dir.expanduser().resolve()
            result = comparison.under_chaos(
                *comparison.of_run(given[0], given[1:], root, [str(p) for p in config_dir or []])
            )
        else:
            result = comparison.under_chaos(*comparison.of_overrides(composed_of(given, config_dir)))
    except DescentError as error:
        fail(error)
    except comparison.Ended as ended:
        raise typer.Exit(ended.exit_code) from None
    if as_json:
        print(json.dumps(result.to_dict()), flush=True)
    else:
        print_trial(console, result)
    raise typer.Exit(0 if result.passed else 1)


def config(
    overrides: Overrides = None,
    config_dir: ConfigDirs = None,
    show_groups: Annotated[
        bool, typer.Option("--groups", help="List every group with its options, one line each.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of YAML.")] = False,
) -> None:
    """Print the composed configuration; passwords and secrets are left out.

    The keys, their types and ranges, and the arguments of all classes are checked; loss, optimizer and schedule are built. Data and model are built by a run only.

    Examples:

      descent config --groups                  (what there is to choose from)

      descent config experiment=digits_resnet optimizer=sgd
    """
    if show_groups:
        _print_groups(config_dir, as_json)
        return
    composed = composed_of(overrides, config_dir)
    from descent.training.config_check import check_config

    try:
        check_config(composed.config)
    except DescentError as error:
        fail(composed.located(error))
    print(json.dumps(composed.without_secrets()) if as_json else composed.yaml.rstrip())


def _print_groups(config_dirs: list[Path] | None, as_json: bool) -> None:
    from descent.config import groups

    try:
        found = groups([str(p) for p in config_dirs or []])
    except DescentError as error:
        fail(error)
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
        return
    print_groups(found)
