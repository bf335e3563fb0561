"""Arguments that several commands have, and their completion in the shell."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from descent.cluster.run.console import print_error
from descent.errors import DescentError

if TYPE_CHECKING:
    from descent.cluster.run.console import Starting
    from descent.config import Composed

OutputDir = Annotated[Path, typer.Option(help="The folder that runs are written to.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def run_names(ctx: typer.Context, incomplete: str) -> list[str]:
    """The names of the runs that begin with `incomplete`, the newest first; for the shell's completion."""
    folder = Path(ctx.params.get("output_dir") or ".descent").expanduser() / "runs"
    try:
        found = [path for path in folder.iterdir() if (path / "run.json").is_file()]
        found.sort(key=lambda path: (path / "run.json").stat().st_mtime, reverse=True)
    except OSError:
        return []
    return [path.name for path in found if path.name.startswith(incomplete)]


def complete_override(ctx: typer.Context, incomplete: str) -> list[str]:
    """What may follow in the shell: overrides, and names of runs after `resume=` and `init_from=`."""
    from descent.config.completion import complete

    for key in ("resume=", "init_from="):
        if incomplete.startswith(key):
            return [f"{key}{name}" for name in run_names(ctx, incomplete.removeprefix(key))]
    folders = [str(folder) for folder in ctx.params.get("config_dir") or ()]
    return complete(incomplete, ctx.params.get("overrides") or (), folders)


def complete_run_or_override(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of runs, and overrides."""
    return [*run_names(ctx, incomplete), *complete_override(ctx, incomplete)]


Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Hydra overrides: a group (model=resnet), a key (optimizer.lr=0.1), a new key (+model.width=64).",
        autocompletion=complete_override,
        show_default=False,
    ),
]
ConfigDirs = Annotated[
    list[Path] | None,
    typer.Option("--config-dir", "-c", help="A folder with your own groups; may be given more than once."),
]


def fail(error: DescentError) -> NoReturn:
    """Print a refusal as one line, and end the command with its exit code."""
    print_error(error)
    raise typer.Exit(error.exit_code)


def composed_of(
    overrides: list[str] | None, config_dirs: list[Path] | None, starting: "Starting | None" = None
) -> "Composed":
    """Compose what was typed; a refusal ends the command. starting: what is shown until then."""
    from descent.cluster.run.train import compose_overrides

    try:
        return compose_overrides(overrides or [], [str(p) for p in config_dirs or []])
    except DescentError as error:
        if starting is not None:
            starting.stop()
        fail(error)
