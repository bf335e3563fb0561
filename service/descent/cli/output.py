"""What the verbs print for people: an error, a run's summary, how faults were taken, the groups of choices."""

from collections import Counter
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from descent.errors import DescentError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from descent.cluster.chaos.comparison import ChaosComparison
    from descent.cluster.run.summary import Summary


def print_error(error: DescentError) -> None:
    """One line on stderr."""
    line = " ".join(str(error).split())
    Console(stderr=True).print(f"[red]error:[/red] {escape(line)}", highlight=False, soft_wrap=True)


def print_summary(console: Console, summary: "Summary") -> None:
    """How a run ended, what it reached, where everything lies and what to do next."""
    outcome, figures = summary.outcome, summary.figures
    color = {"FINISHED": "green", "FAILED": "red"}.get(str(outcome.state), "yellow")
    console.print()
    reason = f": {escape(outcome.reason)}" if outcome.reason else ""
    console.print(
        f"[{color}]{outcome.state}[/{color}] at step {outcome.step:,}{reason}",
        highlight=False,
        soft_wrap=True,
    )
    table = Table.grid(padding=(0, 3))
    for name, unit in (("eval/accuracy", "{:.2%}"), ("eval/loss", "{:.4f}")):
        if name in figures:
            best = unit.format(figures[f"best {name}"])
            table.add_row(name, unit.format(figures[name]), f"best {best}")
    if "train/loss" in figures:
        table.add_row("train/loss", f"{figures['train/loss']:.4f}", "")
    table.add_row(
        "throughput",
        f"{summary.samples_per_second:,.0f} samples/s",
        f"{outcome.wall_s:.1f} s in all",
    )
    table.add_row("goodput", f"{outcome.goodput:.1%}", "of the time in committed steps")
    if outcome.incidents:
        lost = sum(i.steps_lost for i in outcome.incidents)
        kinds = ", ".join(f"{n} {k}" for k, n in Counter(i.kind for i in outcome.incidents).items())
        table.add_row("incidents", str(len(outcome.incidents)), f"{kinds}; {lost} steps lost")
        times = sorted(i.recovered_in_s for i in outcome.incidents if i.recovered_in_s is not None)
        if times:
            median = times[len(times) // 2]
            table.add_row("recovery", f"{median:.2f} s", f"median; worst {times[-1]:.2f} s")
    if outcome.state_sha256:
        table.add_row("state sha256", outcome.state_sha256[:16] + "…", "")
    console.print(table)
    if outcome.chaos is not None:
        _print_verdict(console, outcome.chaos.to_dict())
    console.print(f"run         {summary.run_id}", highlight=False, soft_wrap=True)
    console.print(f"folder      {summary.run_dir}", highlight=False, soft_wrap=True)
    if outcome.checkpoint:
        console.print(f"checkpoint  {outcome.checkpoint}", highlight=False, soft_wrap=True)
    if outcome.unsaved_at:
        console.print(
            f"[yellow]![/yellow] {outcome.unsaved_at} did not take the last state, so it is in the run's own folder; "
            f"resume={summary.run_dir.name} finds it (with checkpoint.dir=null as long as that place is gone)",
            highlight=False,
            soft_wrap=True,
        )
    if summary.undelivered:
        console.print(
            f"[yellow]![/yellow] {summary.undelivered} records wait for the tracking server in {summary.run_dir / 'spool'}; "
            "the next descent train or descent ui delivers them",
            highlight=False,
            soft_wrap=True,
        )
    if str(outcome.state) != "FINISHED":
        console.print(
            f"\nTo go on:   descent train resume={summary.run_dir.name}",
            highlight=False,
            soft_wrap=True,
        )
    console.print(
        f"\nNext:       descent ui{'' if summary.url is None else '   or open ' + summary.url}",
        highlight=False,
        soft_wrap=True,
    )


def _print_verdict(console: Console, verdict: dict[str, Any]) -> None:
    """How the faults were taken, by kind."""

    def row(name: str, v: dict[str, Any]) -> list[str]:
        times = [v["recovery_median_s"], v["recovery_worst_s"]]
        shown = ["" if t is None else f"{t:.2f} s" for t in times]
        return [name, f"{v['survived']} of {v['struck']}", *shown]

    table = Table("fault", "survived", "median recovery", "worst", box=None, padding=(0, 3, 0, 0))
    for name, kind in verdict["kinds"].items():
        table.add_row(*row(name, kind))
    table.add_row(*row("[bold]all[/bold]", verdict))
    console.print()
    console.print(table)
    missed = verdict["faults"] - verdict["struck"]
    if missed:
        console.print(
            f"[yellow]![/yellow] {missed} of {verdict['faults']} faults found no moment to strike: the run was over "
            "first; a longer run (steps=…) or a smaller chaos.every_s takes them all",
            highlight=False,
            soft_wrap=True,
        )
    console.print(f"steps lost  {verdict['steps_lost']}", highlight=False)


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
