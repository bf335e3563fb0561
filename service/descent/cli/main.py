"""The command line: `descent train`, `config`, `chaos`, `ui`, `submit`, `scale`; it parses, calls and prints."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from descent.cli import checkpoint as checkpoint_commands
from descent.cli import data as data_commands
from descent.cli import training
from descent.cli.arguments import ConfigDirs, OutputDir, Overrides, composed_of, fail, run_names
from descent.cluster.run.console import lasting_output, print_error
from descent.errors import ConfigError, DescentError

app = typer.Typer(
    name="descent",
    help="Distributed training that survives lost workers without losing a step and gives the same bits on any number of workers.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (training.train, training.chaos, training.config):
    app.command()(command)
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
        fail(error)


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

    composed_of(overrides, config_dir)
    try:
        code = jobs.submit(
            overrides or [],
            address=address,
            working_dir=working_dir,
            follow=not no_wait,
            console=Console(),
        )
    except DescentError as error:
        fail(error)
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
        fail(error)


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
            training.is_own_process = True
            lasting_output()
            _check_options(sys.argv[1:])
        app()
