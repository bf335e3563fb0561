"""The command line: `descent train`, `config`, `chaos`, `ui`, `submit`, `scale`; it parses, calls and prints."""

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

from descent.cli import checkpoint as checkpoint_commands
from descent.cli import data as data_commands
from descent.cli.arguments import OutputDir, run_names
from descent.cli.output import print_groups, print_result, print_trial
from descent.cluster.run.console import lasting_output, print_error
from descent.errors import ConfigError, DescentError

if TYPE_CHECKING:
    from descent.cluster.run.console import Starting
    from descent.config import Composed

_STARTED = time.time()
_is_own_process = False
"""Whether this process is the command `descent`, and not one that calls it."""

app = typer.Typer(
    name="descent",
    help="Distributed training that survives lost workers without losing a step and gives the same bits on any number of workers.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(checkpoint_commands.app, name="checkpoint")
app.add_typer(data_commands.app, name="data")
_VERSIONS = ("descent-service", "torch", "ray", "mlflow")


def _print_version(requested: bool) -> None:
    if requested:
        from importlib.metadata import version

        print("descent", *(f"{name} {version(name)}" for name in _VERSIONS), sep="\n  ")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print versions."),
    ] = False,
) -> None: ...


def _complete(ctx: typer.Context, incomplete: str) -> list[str]:
    from descent.config.completion import complete

    for key in ("resume=", "init_from="):
        if incomplete.startswith(key):
            return [f"{key}{name}" for name in run_names(ctx, incomplete.removeprefix(key))]
    folders = [str(folder) for folder in ctx.params.get("config_dir") or ()]
    return complete(incomplete, ctx.params.get("overrides") or (), folders)


def _complete_run_or_override(ctx: typer.Context, incomplete: str) -> list[str]:
    return [*run_names(ctx, incomplete), *_complete(ctx, incomplete)]


Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Hydra overrides: a group (model=resnet), a key (optimizer.lr=0.1), a new key (+model.width=64).",
        autocompletion=_complete,
        show_default=False,
    ),
]
ConfigDirs = Annotated[
    list[Path] | None,
    typer.Option("--config-dir", "-c", help="A folder with your own groups; may be given more than once."),
]


def _fail(error: DescentError) -> NoReturn:
    print_error(error)
    raise typer.Exit(error.exit_code)


def _composed(
    overrides: list[str] | None, config_dirs: list[Path] | None, starting: "Starting | None" = None
) -> "Composed":
    from descent.cluster.run.train import compose_overrides

    try:
        return compose_overrides(overrides or [], [str(p) for p in config_dirs or []])
    except DescentError as error:
        if starting is not None:
            starting.stop()
        _fail(error)


def _hash_texts_alike(composed: "Composed", starting: "Starting") -> None:
    """Begin this process anew with PYTHONHASHSEED=0 for a run with a data set of the user's class.

    Python orders a set of texts differently in each process, unless the environment says so when the process
    starts. The workers are started with 0; with another order here, the data set would look like another one
    at each resume.
    """
    config = composed.config
    if "PYTHONHASHSEED" in os.environ or not _is_own_process:
        return
    if config.resume is None and config.data.train["_target_"].startswith("descent."):
        return
    starting.stop()
    os.environ["PYTHONHASHSEED"] = "0"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


@app.command()
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
        composed = _composed(overrides, config_dir, starting)
        _hash_texts_alike(composed, starting)
        from descent.cluster.run.run import Run

        run = Run(composed, console, _STARTED, starting)
        result = run.execute()
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
    if result.traceback:
        print(result.traceback.rstrip(), file=sys.stderr)
    if as_json:
        print(json.dumps(result.to_dict()))
    else:
        print_result(console, result)
    raise typer.Exit(result.exit_code)


@app.command()
def chaos(
    run_or_overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="A finished run (its id, name or folder), or overrides as for descent train; overrides may follow a run.",
            autocompletion=_complete_run_or_override,
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
            result = comparison.under_chaos(*comparison.of_overrides(_composed(given, config_dir)))
    except DescentError as error:
        _fail(error)
    except comparison.Ended as ended:
        raise typer.Exit(ended.exit_code) from None
    if as_json:
        print(json.dumps(result.to_dict()))
    else:
        print_trial(console, result)
    raise typer.Exit(0 if result.passed else 1)


@app.command()
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
    composed = _composed(overrides, config_dir)
    from descent.training.config_check import check_config

    try:
        check_config(composed.config)
    except DescentError as error:
        _fail(composed.located(error))
    print(json.dumps(composed.without_secrets()) if as_json else composed.yaml.rstrip())


def _print_groups(config_dirs: list[Path] | None, as_json: bool) -> None:
    from descent.config import groups

    try:
        found = groups([str(p) for p in config_dirs or []])
    except DescentError as error:
        _fail(error)
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
        return
    print_groups(found)


@app.command()
def ui(
    run: Annotated[
        str | None,
        typer.Argument(
            help="A run whose page is shown first: its name, id or folder.",
            autocompletion=run_names,
            show_default=False,
        ),
    ] = None,
    host: Annotated[
        str,
        typer.Option(help="Address to listen on; only addresses of this machine, because there is no password."),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 5000,
    output_dir: OutputDir = Path(".descent"),
    browser: Annotated[bool, typer.Option(help="Open the page in a browser.")] = True,
) -> None:
    """Open MLflow's pages on the runs of this folder: their charts, plots, configurations and models.

    First it delivers what runs that were killed left behind, and marks them as failed.

    Examples:

      descent ui

      descent ui RUN                      (straight to one run's page)

      descent ui --port 0 --no-browser    (a free port; only print the address)

      descent ui --output-dir /data/runs
    """
    from descent.cluster.record import run_log
    from descent.cluster.run.left_over import settle_left_over
    from descent.tracking.ui import serve

    folder = output_dir.expanduser().resolve()
    try:
        run_id = None
        if run is not None:
            run_id = run_log.read_run_file(run_log.find_run(run, folder, key="RUN")).get("run_id")
        if (folder / "mlflow.db").is_file():
            for line in settle_left_over(folder, None, f"sqlite:///{folder / 'mlflow.db'}"):
                print(line, flush=True)
        raise typer.Exit(serve(folder, host, port, browser, run_id))
    except DescentError as error:
        _fail(error)


@app.command()
def submit(
    overrides: Overrides = None,
    address: Annotated[
        str | None,
        typer.Option(
            envvar=["RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"],
            help="Where the cluster's Jobs API listens: http://HEAD:8265.",
        ),
    ] = None,
    working_dir: Annotated[
        Path | None,
        typer.Option(
            help="A folder to upload with the job, for your own modules; nothing is uploaded unless you say so."
        ),
    ] = None,
    no_wait: Annotated[
        bool,
        typer.Option("--no-wait", help="Return after handing over, without following the log."),
    ] = False,
    config_dir: ConfigDirs = None,
) -> None:
    """Hand a training to a Ray cluster and follow its log.

    The overrides are checked here first. Ctrl-C stops following, not the job; nor does a connection that is cut.

    Examples:

      descent submit --address http://HEAD:8265 experiment=digits

      descent submit --working-dir . model=custom model._target_=my_model.Net 'trusted_modules=[my_model]'

      descent submit --no-wait experiment=digits_resnet     (with RAY_API_SERVER_ADDRESS set)

    Exit codes: those of the job's own descent train; 0 with --no-wait or after Ctrl-C; 1 if the connection was cut and the job's end is not known.
    """
    from descent.cluster import jobs

    _composed(overrides, config_dir)
    try:
        code = jobs.submit(
            overrides or [],
            address=address,
            working_dir=working_dir,
            follow=not no_wait,
            console=Console(),
        )
    except DescentError as error:
        _fail(error)
    raise typer.Exit(code)


@app.command()
def scale(
    run: Annotated[str, typer.Argument(help="A run id, a run's name or its folder.", autocompletion=run_names)],
    workers: Annotated[str, typer.Argument(help="workers=3, or 'workers={min: 1, max: 3}'", metavar="workers=N")],
    output_dir: OutputDir = Path(".descent"),
) -> None:
    """Change the number of workers of a run while it trains; nothing is lost and no bit changes.

    Workers join and leave at a step's end. A run can use as many as it has slots: start it
    with slots=8 to be able to go up to 8.

    Examples:

      descent scale 1125-0930-ab12-digits-mlp workers=3
    """
    from descent.cluster.control import control_file
    from descent.cluster.record import run_log
    from descent.config import compose

    try:
        size = compose([workers]).config.workers
        if not workers.startswith("workers=") or size == "auto":
            raise ConfigError(f"{workers}: say how many, such as workers=3 or 'workers={{min: 1, max: 3}}'")
        folder = run_log.find_run(run, output_dir.expanduser().resolve(), key="RUN")
        print(f"{folder.name}: {control_file.ask_to_scale(folder, size, wait_s=30.0)}")
    except DescentError as error:
        _fail(error)


def _check_options(words: list[str]) -> None:
    """Settings are typed without dashes here, unlike in many programs: say so where somebody types `--lr 0.1`."""
    commands: dict[str, Any] = getattr(typer.main.get_command(app), "commands", {})
    command = commands.get(words[0]) if words else None
    if command is None or words[0] not in ("train", "chaos", "config", "submit"):
        return
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    for index, word in enumerate(words[1:], 1):
        name, equals, value = word.partition("=")
        if not name.startswith("--") or name == "--" or name in {*known, "--help"}:
            continue
        if not equals:
            value = words[index + 1] if index + 1 < len(words) and not words[index + 1].startswith("-") else "…"
        key = name.lstrip("-").replace("-", "_")
        print_error(
            ConfigError(
                f"{name}: there is no such option; a setting has no dashes and an equals sign: {key}={value} "
                "(descent config shows all of them, such as optimizer.lr=0.1)"
            )
        )
        raise SystemExit(2)


def main() -> None:
    """The entry point `descent`."""
    if os.environ.get("_DESCENT_COMPLETE") == "complete_bash":
        from descent.config.completion import in_bash

        in_bash(app)
    else:
        if not any(key.endswith("_COMPLETE") and key.startswith("_") for key in os.environ):
            global _is_own_process
            _is_own_process = True
            lasting_output()
            _check_options(sys.argv[1:])
        app()
