"""A run described for people who find it in MLflow: a note in Markdown, and its incidents as a table."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from descent.cluster.run.console import duration, significant
from descent.config import Composed
from descent.messages import Incident

if TYPE_CHECKING:
    from descent.cluster.control.outcome import Outcome
    from descent.training.plan import Plan

_SHOWN = 10


def note_of(
    composed: Composed,
    plan: "Plan",
    command: str,
    outcome: "Outcome | None" = None,
    figures: Mapping[str, Mapping[str, float]] | None = None,
) -> str:
    """What is trained on which data and with which command; with the outcome, what came of it."""
    config, choices = composed.config, composed.choices
    model = choices.get("model", "custom")
    model = config.model["_target_"] if model == "custom" else model
    data = config.data.train["_target_"] if config.data.name == "custom" else config.data.name
    optimizer = config.optimizer["_target_"].rpartition(".")[2]
    rate = f", lr {config.optimizer['lr']}" if "lr" in config.optimizer else ""
    evaluation = f", {plan.num_evaluation:,} held out" if plan.num_evaluation else ""
    lines = _result_lines(outcome, figures) if outcome is not None and figures is not None else []
    lines += [
        f"- **model** {model}, {plan.num_parameters:,} parameters",
        f"- **data** {data}: {plan.num_samples:,} samples{evaluation}",
        f"- **training** {plan.total_steps:,} steps of {plan.batch_size:,} samples, {optimizer}{rate}, "
        f"seed {config.seed}, {plan.max_workers} worker{'s' if plan.max_workers > 1 else ''} on {plan.device}",
    ]
    note = "\n".join([*lines, "", "```", command, "```"])
    if outcome is not None and outcome.incidents:
        note += "\n\n" + _as_markdown(outcome.incidents)
    return note


def _result_lines(outcome: "Outcome", figures: Mapping[str, Mapping[str, float]]) -> list[str]:
    last, best = figures["metrics"], figures["best"]
    parts = []
    if "eval/accuracy" in last:
        parts.append(f"accuracy {last['eval/accuracy']:.2%} (best {best['eval/accuracy']:.2%})")
    if "eval/loss" in last:
        parts.append(f"evaluation loss {significant(last['eval/loss'])} (best {significant(best['eval/loss'])})")
    if "train/loss" in last:
        parts.append(f"training loss {significant(last['train/loss'])}")
    state = {"FINISHED": "finished", "FAILED": "failed", "KILLED": "stopped"}[str(outcome.state)]
    reason = f" ({outcome.reason})" if outcome.reason else ""
    result = f"- **result** {state} at step {outcome.step:,}{reason}, after {duration(outcome.wall_s)}"
    return [f"{result}: {', '.join(parts)}" if parts else result]


def _as_markdown(incidents: Sequence[Incident]) -> str:
    lines = ["| step | incident | worker | recovered in | steps lost |", "| --- | --- | --- | --- | --- |"]
    for incident in incidents[:_SHOWN]:
        recovered = "" if incident.recovered_in_s is None else duration(incident.recovered_in_s)
        lines.append(
            f"| {incident.step:,} | {incident.kind} | {incident.worker} | {recovered} | {incident.steps_lost} |"
        )
    if len(incidents) > _SHOWN:
        lines.append(f"\n{len(incidents) - _SHOWN} more are in incidents.csv.")
    return "\n".join(lines)


def as_csv(incidents: Sequence[Incident]) -> str:
    """The incidents as a table, which MLflow's pages show as one."""
    out = io.StringIO()
    columns = ("step", "kind", "worker", "detected_in_s", "recovered_in_s", "steps_lost", "samples_replayed", "host")
    table = csv.writer(out, lineterminator="\n")
    table.writerow([*columns, "detail"])
    for incident in incidents:
        values = [getattr(incident, column) for column in columns]
        shown = [f"{value:.3f}" if isinstance(value, float) else value for value in values]
        table.writerow([*("" if value is None else value for value in shown), " ".join(incident.detail.split())])
    return out.getvalue()
