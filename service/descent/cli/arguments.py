"""Arguments that several commands have, and their completion in the shell."""

from pathlib import Path
from typing import Annotated

import typer

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
