"""`descent checkpoint …`: look at, verify, export and delete what a run has saved."""

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from descent.cli.arguments import Json, OutputDir, run_names
from descent.cli.output import refusals
from descent.cluster.run.console import print_line
from descent.errors import CheckpointError, DescentError

if TYPE_CHECKING:
    from descent.storage import Location

app = typer.Typer(
    help="What a run has saved: list it, verify it, show it, export its weights, delete what isn't needed.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
Run = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        help="A run's name, id or folder; or a folder of checkpoints, also s3://…",
        autocompletion=run_names,
        show_default=False,
    ),
]
Step = Annotated[int | None, typer.Option(help="The checkpoint of this step; the newest otherwise.")]
_RUNS = Path(".descent")


def _root(run: str, output_dir: Path) -> "Location":
    """Where a run's checkpoints lie. Raises CheckpointError."""
    from descent.checkpoint.manifest import checkpoint_root, step_of
    from descent.cluster.record import run_log
    from descent.storage import S3Path, to_location

    where = to_location(run)
    if isinstance(where, S3Path):
        return where
    if where.is_dir() and any(step_of(p.name) is not None for p in where.iterdir()):
        return where
    run_dir = run_log.find_run(run, output_dir.expanduser(), "RUN")
    settings = run_log.read_run_file(run_dir)["config"]["checkpoint"]
    return checkpoint_root(run_dir, settings["dir"])


def _chosen(run: str, step: int | None, output_dir: Path) -> "Location":
    """A run's checkpoint of one step, or its newest. Raises CheckpointError."""
    from descent.checkpoint.manifest import step_of
    from descent.checkpoint.reader import list_checkpoints, newest_checkpoint

    root = _root(run, output_dir)
    if step is None:
        newest, skipped = newest_checkpoint(root)
        for line in skipped:
            print(f"passed over: {line}", file=sys.stderr)
        return newest
    found = list_checkpoints(root)
    if not found:
        raise CheckpointError(f"{root}: no complete checkpoint")
    for target in found:
        if step_of(target.name) == step:
            return target
    there = ", ".join(str(step_of(t.name)) for t in found[:8])
    raise CheckpointError(f"--step {step}: {root} has no complete checkpoint of it; it has {there}")


@app.command("ls")
def list_(run: Run, output_dir: OutputDir = _RUNS, as_json: Json = False) -> None:
    """List a run's checkpoints, the newest first.

    Examples:

      descent checkpoint ls RUN

      descent checkpoint ls s3://bucket/runs/RUN --json
    """
    from descent.checkpoint.manifest import read_manifest, step_of
    from descent.checkpoint.reader import list_checkpoints

    rows = []
    with refusals():
        root = _root(run, output_dir)
        for target in list_checkpoints(root):
            row: dict[str, Any] = {"step": step_of(target.name), "place": str(target)}
            try:
                found = read_manifest(target)
                scores = {k: v for k, v in found.scalars.items() if k.startswith("eval/")}
                row |= {"bytes": found.size, "time_ms": found.time_ms, **scores}
            except DescentError as error:  # named in its row; the others are listed all the same
                row["error"] = str(error)
            rows.append(row)
    if as_json:
        print(json.dumps(rows))
        return
    if not rows:
        print(f"{root}: no complete checkpoint")
        return
    table = Table("step", "size", "written", "eval/loss", "eval/accuracy", "")
    for row in rows:
        written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row.get("time_ms", 0) / 1000))
        table.add_row(
            f"{row['step']:,}",
            _size(row.get("bytes")),
            written if "time_ms" in row else "",
            *(f"{row[m]:.4f}" if m in row else "" for m in ("eval/loss", "eval/accuracy")),
            escape(row.get("error", "")),
        )
    console = Console()
    console.print(table)
    print_line(console, f"in {root}")


@app.command()
def verify(run: Run, step: Step = None, output_dir: OutputDir = _RUNS) -> None:
    """Read checkpoints whole and compare sizes and hashes: all, or the one of --step; exit code 1 if any is bad.

    Examples:

      descent checkpoint verify RUN

      descent checkpoint verify RUN --step 500
    """
    from descent.checkpoint.reader import list_checkpoints, verify_checkpoint

    bad = 0
    with refusals():
        one = None if step is None else _chosen(run, step, output_dir)
        targets = [one] if one is not None else list_checkpoints(_root(run, output_dir))
        if not targets:
            raise CheckpointError(f"{_root(run, output_dir)}: no complete checkpoint")
        for target in targets:
            try:
                found = verify_checkpoint(target, thorough=True)
                print(f"{target.name}  good  {len(found.files)} files, {_size(found.size)}")
            except DescentError as error:
                bad += 1
                print(f"{target.name}  BAD   {error}")
    raise typer.Exit(1 if bad else 0)


@app.command()
def show(run: Run, step: Step = None, output_dir: OutputDir = _RUNS, as_json: Json = False) -> None:
    """Show what is in a checkpoint: its manifest and its tensors.

    Examples:

      descent checkpoint show RUN

      descent checkpoint show RUN --step 500 --json
    """
    from descent.checkpoint.reader import read_checkpoint

    with refusals():
        target = _chosen(run, step, output_dir)
        tensors, manifest = read_checkpoint(target)
    content = {
        "place": str(target),
        "step": manifest.step,
        "run": manifest.run,
        "bytes": manifest.size,
        "config_sha256": manifest.config_sha256,
        "versions": manifest.versions,
        "scalars": manifest.scalars,
        "files": {n: e["size"] for n, e in manifest.files.items()},
        "tensors": {n: [str(t.dtype).removeprefix("torch."), list(t.shape)] for n, t in sorted(tensors.items())},
    }
    if as_json:
        print(json.dumps(content))
        return
    for key in ("place", "step", "run", "versions", "scalars"):
        print(f"{key:10} {content[key]}")
    print(f"{'files':10} " + ", ".join(f"{n} ({_size(e['size'])})" for n, e in manifest.files.items()))
    for name, tensor in sorted(tensors.items()):
        print(f"  {name:60} {str(tensor.dtype).removeprefix('torch.'):9} {tuple(tensor.shape)}")


@app.command()
def export(
    run: Run,
    target: Annotated[Path, typer.Argument(metavar="FILE", help="The .safetensors file to write.")],
    step: Step = None,
    averaged: Annotated[bool, typer.Option(help="The averaged weights, where the run has them (ema.decay).")] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE if it is there already.")] = False,
    output_dir: OutputDir = _RUNS,
) -> None:
    """Write a checkpoint's weights as one safetensors file under the module's own names.

    Examples:

      descent checkpoint export RUN model.safetensors

      descent checkpoint export RUN best.safetensors --step 500 --no-averaged --force
    """
    from descent.checkpoint.reader import read_checkpoint
    from descent.checkpoint.weights import model_weights, write_weights

    with refusals():
        if target.suffix != ".safetensors":
            raise CheckpointError(f"{target}: the file's name must end in .safetensors")
        if target.expanduser().exists() and not force:
            raise CheckpointError(f"{target}: is there already; --force replaces it")
        source = _chosen(run, step, output_dir)
        tensors, manifest = read_checkpoint(source)
        kept = {n: t for n, t in tensors.items() if averaged or not n.startswith("ema/")}
        about = {"format": "pt", "step": str(manifest.step), "run": manifest.run}
        weights = model_weights(kept)
        write_weights(weights, target.expanduser().absolute(), about, overwrite=force)
    rest = ", what was trained; the frozen parameters are those of the base model" if manifest.frozen else ""
    print(f"{target}: {len(weights)} tensors of {source.name}{rest}")


@app.command("prune")
def prune_(
    run: Run,
    keep_last: Annotated[int, typer.Option(min=1, help="How many of the newest stay.")] = 2,
    keep_every: Annotated[
        int | None, typer.Option(min=1, help="In addition, one checkpoint for each so many steps stays.")
    ] = None,
    keep_best: Annotated[
        str | None, typer.Option(help="In addition, the best by this metric stays, such as eval/loss or eval/accuracy.")
    ] = None,
    output_dir: OutputDir = _RUNS,
) -> None:
    """Delete a run's checkpoints except those to keep, and files that were never finished. Not while the run trains.

    Examples:

      descent checkpoint prune RUN --keep-last 1

      descent checkpoint prune RUN --keep-every 1000 --keep-best eval/accuracy
    """
    from descent.checkpoint.retention import Retention, prune
    from descent.config.metric_names import better_direction
    from descent.storage import open_store

    with refusals():
        mode = "min" if keep_best is None else better_direction(keep_best)
        if mode is None or not (keep_best or "eval/").startswith("eval/"):
            raise CheckpointError(
                f"--keep-best {keep_best}: is the name of an evaluation's figure whose better direction it tells, such as "
                "eval/loss, eval/accuracy or eval/f1"
            )
        root = _root(run, output_dir)
        deleted, skipped = prune(root, Retention(keep_last, keep_every, keep_best, mode))
        half = open_store(root).tidy(older_than_s=3600.0)
    print(f"deleted: {', '.join(deleted) or 'nothing'}" + (f", {half} unfinished files" if half else ""))
    for line in skipped:
        print(f"passed over: {line}")


def _size(count: int | None) -> str:
    if count is None:
        return ""
    amount = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.4g} {unit}"
        amount /= 1000
    return f"{amount:.4g} TB"
