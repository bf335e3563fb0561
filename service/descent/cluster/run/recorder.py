"""What is kept of a run, in its own file and in tracking: config, plan, data sets, plots, model, how it ended."""

import gc
import json
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from descent.checkpoint.manifest import step_of
from descent.cluster.record import run_log
from descent.cluster.record.run_log import RunLog
from descent.cluster.run.listeners import ListenerGroup
from descent.cluster.run.result import RunResult
from descent.config import Composed, flatten
from descent.errors import CheckpointError, DescentError, TrackingError
from descent.messages import TerminalState
from descent.storage import Location

if TYPE_CHECKING:
    from descent.cluster.control.ending import Outcome
    from descent.tracking import Tracker
    from descent.training.plan import Prepared


class RunRecorder:
    """Opens the run in tracking beside the training, hands over what is known, and at the end what came of it."""

    def __init__(
        self,
        composed: Composed,
        prepared: "Prepared",
        output_dir: Path,
        run_dir: Path,
        *,
        config_sha256: str,
        uri: str,
        run_id: str | None,
        console: Console,
        background: ThreadPoolExecutor,
    ) -> None:
        """run_id: of the run that is resumed; a new one is made without."""
        self._composed, self._config, self._prepared = composed, composed.config, prepared
        self._output_dir, self._run_dir, self._config_sha256 = output_dir, run_dir, config_sha256
        self._uri, self._run_id, self._console = uri, run_id, console
        self._background = background
        self._opening: Future[Tracker] | None = None

    def write_run_file(self, result: RunResult | None = None) -> None:
        """Write to the run's folder what a resume needs; with the result, how the run ended."""
        from descent.training.plan import filled_spec

        plan, from_overrides = self._prepared.plan, self._composed.sources is not None
        kept = [o for o in self._composed.overrides if not o.lstrip("+").startswith("resume=")]
        ended = (
            {"state": result.state, "state_sha256": result.state_sha256, "result": result.to_json()} if result else {}
        )
        run_log.write_run_file(
            self._run_dir,
            {
                "name": self._run_dir.name,
                "run_id": self._run_id,
                "tracking_uri": self._config.tracking.uri,
                "overrides": kept if from_overrides else None,
                "config_dirs": list(self._composed.config_dirs),
                "config": self._config.to_dict(),
                "config_sha256": self._config_sha256,
                "model": filled_spec(self._config.model, self._prepared.train, "model"),
                "slots": plan.slots,
                "plan": plan.to_dict(),
                **ended,
            },
        )

    # -- opening ------------------------------------------------------------------------

    def attach_when_open(self, listeners: ListenerGroup) -> None:
        """Called in every turn of the controller: once tracking is open, hand over what is known.

        Opening takes seconds of a core (imports, a new database's tables), which the workers'
        own start needs more; so it begins with the first step, and what was logged before
        then follows. A store that can't be opened ends the run with its one clear line.
        """
        if listeners.tracker is not None or listeners.first_step_at is None:
            return
        opening = self._tracker_opening()
        if opening.done():
            self._attach(opening.result(), listeners)
            # All is imported: what millions of objects these are, the collector of cycles
            # needn't look through again and again, with all threads waiting for it.
            gc.freeze()

    def _tracker_opening(self) -> "Future[Tracker]":
        if self._opening is None:
            self._opening = self._background.submit(self._open)
        return self._opening

    def _open(self) -> "Tracker":
        from descent.tracking import Tracker

        self._deliver_left_over()
        root = None if self._config.tracking.uri else self._output_dir / "mlartifacts"
        return Tracker.open(
            uri=self._uri,
            experiment=self._config.tracking.experiment,
            run_name=self._run_dir.name,
            spool_dir=self._run_dir / "spool",
            artifact_root=root,
            run_id=self._run_id,
            tags={"descent.run_dir": str(self._run_dir)},
            system_metrics=self._config.tracking.system_metrics,
        )

    def _deliver_left_over(self) -> None:
        """What earlier runs could not deliver to this tracking server before they ended."""
        from descent.tracking import replay

        for spool in sorted((self._output_dir / "runs").glob("*/spool")):
            if spool.parent != self._run_dir and _tracked_at(spool.parent) == self._config.tracking.uri:
                try:
                    count = replay(spool, self._uri)
                except TrackingError:
                    return  # opening this run's own will say so
                if count:
                    self._console.print(
                        f"delivered {count} records that {spool.parent.name} had left behind",
                        highlight=False,
                    )

    def _attach(self, tracker: "Tracker", listeners: ListenerGroup) -> None:
        self._run_id = tracker.run_id
        self.write_run_file()
        self._describe(tracker)
        listeners.attach(tracker)

    def _describe(self, tracker: "Tracker") -> None:
        from descent.data.description import describe

        prepared = self._prepared
        tracker.log_params(
            {
                **flatten(self._config.to_dict()),
                **{f"plan.{k}": v for k, v in prepared.plan.to_dict().items()},
            }
        )
        tracker.log_text(_without_secrets(self._composed.yaml), "config.yaml")
        tracker.log_dataset(describe(prepared.train), "training")
        if prepared.evaluate is not None:
            tracker.log_dataset(describe(prepared.evaluate), "evaluation")

    # -- the end ------------------------------------------------------------------------

    def finish(self, outcome: "Outcome", listeners: ListenerGroup, log: RunLog) -> "tuple[Tracker, int]":
        """Keep what came of the run. The tracker, and how many records it could not deliver."""
        with self._console.status("keeping plots, model and metrics…"):
            tracker = self._tracker_opening().result()
            if listeners.tracker is None:
                self._attach(tracker, listeners)
            self._keep_plots(tracker, log)
            if outcome.incidents:
                tracker.log_file(self._run_dir / run_log.INCIDENTS_FILE)
            tags = {
                "descent.workers": json.dumps(outcome.workers),
                "descent.goodput": f"{outcome.goodput:.4f}",
            }
            if outcome.state_sha256:
                tags["descent.state_sha256"] = outcome.state_sha256
            tracker.set_tags(tags)
            if outcome.state is TerminalState.FINISHED and outcome.checkpoint is not None:
                if step_of(outcome.checkpoint.name) == outcome.step:
                    self._keep_model(tracker, outcome.checkpoint)
                else:
                    self._console.print(
                        f"[yellow]![/yellow] the final state could not be saved, so no model is kept; the last checkpoint is {outcome.checkpoint.name}",
                        highlight=False,
                    )
            undelivered = tracker.finish(str(outcome.state), deadline_s=60.0)  # type: ignore[arg-type]
        return tracker, undelivered

    def _keep_plots(self, tracker: "Tracker", log: RunLog) -> None:
        from descent.tracking.plots import plots

        for path in plots(log.history(), self._run_dir / "plots"):
            tracker.log_file(path, "plots")

    def _keep_model(self, tracker: "Tracker", target: Location) -> None:
        import torch

        from descent.checkpoint.weights import put_into, read_weights
        from descent.tracking.export import log_model

        model, sample = self._prepared.model, self._prepared.sample
        try:
            put_into(model, read_weights(target), target, strict=True)
            model.eval()
            with torch.no_grad():
                predictions = model(sample)
            log_model(tracker, model, sample, predictions)
        except Exception as error:
            # The training is done and its checkpoint is safe: an export that fails must not undo that.
            line = " ".join(str(error).split())[:200]
            self._console.print(
                f"[yellow]![/yellow] the model could not be exported: {type(error).__name__}: {line}",
                highlight=False,
            )
            tracker.set_tags({"descent.export_error": line})

    def abandon(self) -> None:
        """The run has broken off: say so in tracking, where it was opened."""
        if self._opening is None:
            return
        try:
            self._opening.result(timeout=30).finish("FAILED", deadline_s=5.0)
        except (DescentError, TimeoutError):
            return


def _tracked_at(run_dir: Path) -> str | None:
    try:
        uri = run_log.read_run_file(run_dir).get("tracking_uri")
    except CheckpointError:
        return ""
    return None if uri is None else str(uri)


def _without_secrets(yaml: str) -> str:
    """The YAML with the values of secret-looking keys, and passwords in addresses, blotted out."""
    from descent.tracking.provenance import is_secret, redact

    lines = []
    for line in yaml.splitlines():
        key, colon, value = line.partition(":")
        hidden = colon and value.strip() not in ("", "null") and is_secret(key.strip("- "))
        lines.append(f"{key}: '***'" if hidden else redact(line))
    return "\n".join(lines) + "\n"
