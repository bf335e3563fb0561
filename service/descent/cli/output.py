"""What the commands print for people: a run's result, how faults were survived, the groups of choices."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from descent.cluster.run.console import (
    duration,
    print_error,
    print_line,
    print_value,
    print_verbatim,
    print_warning,
    significant,
)
from descent.errors import DescentError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from descent.cluster.chaos.comparison import ChaosComparison
    from descent.cluster.run.result import RunResult


@contextmanager
def refusals() -> Iterator[None]:
    """Turn a DescentError into one line on stderr and its exit code."""
    try:
        yield
    except DescentError as error:
        print_error(error)
        raise typer.Exit(error.exit_code) from None


_WORDS = {"FINISHED": "finished", "FAILED": "failed", "KILLED": "stopped"}
_COLORS = {"FINISHED": "green", "FAILED": "red", "KILLED": "yellow"}


_MOST_FIGURES = 10
"""Figures of evaluations that the summary shows."""


def print_result(console: Console, result: "RunResult") -> None:
    """How a run ended, what it reached, where everything lies and what to do next."""
    if result.already_finished:
        print_line(
            console,
            f"{result.name} is finished at step {result.step:,}: there is nothing left to train, and nothing was "
            f"changed. To train further, give a greater length: descent train resume={result.name} steps=…",
        )
        return
    console.print()
    color = _COLORS[result.state]
    reason = f": {escape(result.reason)}" if result.reason and result.state != "KILLED" else ""
    console.print(
        f"[{color}]{_WORDS[result.state]}[/{color}] at step {result.step:,}{reason}",
        highlight=False,
        soft_wrap=not console.is_terminal,
    )
    _print_figures(console, result)
    if result.chaos is not None:
        _print_verdict(console, dict(result.chaos))
    _print_places(console, result)
    _print_warnings(console, result)
    _print_next(console, result)


def _print_figures(console: Console, result: "RunResult") -> None:
    """Name, value and a note for each figure, in columns."""
    rows: list[tuple[str, str, str]] = []
    metrics, best = result.metrics, result.best
    if "eval/accuracy" in metrics:
        rows.append(("eval/accuracy", f"{metrics['eval/accuracy']:.2%}", f"best {best['eval/accuracy']:.2%}"))
    others = [name for name in metrics if name.startswith(("eval/", "test/")) and name != "eval/accuracy"]
    for name in others[:_MOST_FIGURES]:
        at_best = f"best {significant(best[name])}" if name in best else ""
        rows.append((name, significant(metrics[name]), at_best))
    if len(others) > _MOST_FIGURES:
        rows.append(("", f"and {len(others) - _MOST_FIGURES} more figures, in MLflow and with --json", ""))
    if "train/loss" in metrics:
        rows.append(("train/loss", significant(metrics["train/loss"]), ""))
    if result.samples_per_second:
        rows.append(("throughput", f"{result.samples_per_second:,.0f} samples/s", ""))
    phases = (("start", result.start_s), ("training", result.training_s), ("finishing", result.finishing_s))
    parts = ", ".join(f"{name} {duration(seconds)}" for name, seconds in phases)
    rows.append(("time", duration(sum(seconds for _, seconds in phases)), parts))
    if result.incidents:
        kinds = ", ".join(f"{count} {kind}" for kind, count in result.incidents_by_kind.items())
        rows.append(("incidents", str(result.incidents), f"{kinds}; {result.steps_lost} steps lost"))
        if result.recovery_s:
            median, worst = result.recovery_s[len(result.recovery_s) // 2], result.recovery_s[-1]
            rows.append(("recovery", f"{median:.2f} s", f"median; worst {worst:.2f} s"))
        if result.training_s > 0:
            useful = min(1.0, result.goodput * result.wall_s / result.training_s)
            rows.append(("useful", f"{useful:.1%}", "of the training's time went into committed steps"))
    if result.records_replaced:
        rows.append(("bad records", f"{result.records_replaced:,}", "skipped, a good one in the place of each"))
    if result.state_sha256:
        rows.append(("state sha256", result.state_sha256[:16] + "…", ""))
    width = max(len(value) for _, value, _ in rows)
    for name, value, note in rows:
        print_line(console, f"{name:<{max(14, 2 + max(len(row[0]) for row in rows))}}{value:<{width}}  {note}".rstrip())


def _print_places(console: Console, result: "RunResult") -> None:
    print_value(console, "run", result.name)
    print_value(console, "folder", _shortest(str(result.run_dir)))
    if result.checkpoint:
        print_value(console, "checkpoint", _shortest(result.checkpoint))
    if result.best_checkpoint:
        same = result.best_checkpoint == result.checkpoint
        print_value(console, "best", "the same" if same else _shortest(result.best_checkpoint))
    if result.run_id:
        print_value(console, "MLflow run", result.run_id)
    if result.url:
        print_value(console, "charts", result.url)


def _shortest(place: str) -> str:
    """A path below the working directory without the directory's own; anything else as it is."""
    with suppress(ValueError):
        return str(Path(place).relative_to(Path.cwd()))
    return place


def _print_warnings(console: Console, result: "RunResult") -> None:
    if result.unsaved_at:
        print_warning(
            console,
            f"{result.unsaved_at} did not take the last state, so it is in the run's own folder; "
            f"resume={result.name} finds it (with checkpoint.dir=null as long as that place is gone)",
        )
    embedded = result.tracking_uri.startswith("sqlite:")
    if result.undelivered:
        why = f" ({result.tracking_error})" if result.tracking_error else ""
        print_warning(
            console,
            f"{result.undelivered:,} records wait for the tracking server in {result.run_dir / 'spool'}{why}; "
            f"the next descent train{' or descent ui' if embedded else ' with this tracking.uri'} delivers them",
        )
    if result.refused:
        print_warning(
            console,
            f"{result.refused:,} records were refused by the tracking server for good; they and its reasons are in "
            f"{result.run_dir / 'spool' / 'refused.jsonl'}",
        )


def _print_next(console: Console, result: "RunResult") -> None:
    console.print()
    if result.state != "FINISHED":
        print_value(console, "go on", f"descent train resume={result.name}")
    if result.tracking_uri.startswith("sqlite:"):
        print_value(console, "look", f"descent ui {result.name}")
    if result.model_uri:
        print_value(console, "use", "in Python, anywhere:")
        for line in (
            "import mlflow",
            f'mlflow.set_tracking_uri("{result.tracking_uri}")',
            "model = mlflow.pyfunc.load_model(",
            f'  "{result.model_uri}")',
        ):
            print_verbatim(console, f"  {line}")


def _print_verdict(console: Console, verdict: dict[str, Any]) -> None:
    """How the faults were taken, by kind."""

    def row(name: str, v: dict[str, Any]) -> list[str]:
        times = [v["recovery_median_s"], v["recovery_worst_s"]]
        shown = ["" if t is None else f"{t:.2f} s" for t in times]
        return [name, f"{v['survived']} of {v['struck']}", f"{v['steps_lost']:,}", *shown]

    table = Table("fault", "survived", "steps lost", "median recovery", "worst", box=None, padding=(0, 3, 0, 0))
    for name, kind in verdict["kinds"].items():
        table.add_row(*row(name, kind))
    table.add_row(*row("[bold]all[/bold]", verdict))
    console.print()
    console.print(table)
    missed = verdict["faults"] - verdict["struck"]
    if missed:
        print_warning(
            console,
            f"{missed} of {verdict['faults']} faults found no moment to strike: the run was over "
            "first; a longer run (steps=…) or a smaller chaos.every_s takes them all",
        )


def print_trial(console: Console, result: "ChaosComparison") -> None:
    """Whether anything of the faults shows in the result."""
    summary = result.summary
    if "chaos" in summary:
        _print_verdict(console, summary["chaos"])
    bits = {
        True: "[green]yes[/green]",
        False: "[red]no[/red]",
        None: "not promised with reduction=fast",
    }
    console.print(f"bits equal  {bits[result.equal]}", highlight=False)
    console.print(f"reference   {result.reference}", highlight=False, soft_wrap=True)
    console.print(f"disturbed   {summary['run_dir']}", highlight=False, soft_wrap=True)
    if summary["state"] != "FINISHED":
        console.print(f"[red]{summary['state']}[/red]: {escape(summary['reason'])}", soft_wrap=True)


def print_groups(groups: "Mapping[str, Mapping[str, str]]") -> None:
    """Every group with its options and what each is, a line each."""
    console = Console(highlight=False, soft_wrap=True)
    for group, options in groups.items():
        console.print(f"[bold]{group}[/bold]")
        width = max(len(f"{group}={option}") for option in options)
        for option, line in options.items():
            console.print(f"  {f'{group}={option}':<{width}}  {escape(line)}")
