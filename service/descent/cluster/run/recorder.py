"""Everything that is recorded of a run: its file, and in tracking its config, data sets, plots, model and end."""

import gc
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from descent.checkpoint.manifest import checkpoint_root, step_of
from descent.cluster.record import run_log
from descent.cluster.record.run_log import RunLog
from descent.cluster.run.left_over import settle_left_over
from descent.cluster.run.note import as_csv, note_of
from descent.cluster.run.objects import call_of
from descent.cluster.run.result import RunResult, best_kept, last_points
from descent.config import Composed, flatten, given
from descent.config.overrides import shown_override
from descent.config.secrets import masked
from descent.messages import TerminalState
from descent.storage import to_location
from descent.tracking import Tracker

if TYPE_CHECKING:
    from descent.cluster.control.outcome import Outcome
    from descent.cluster.run.display import Display
    from descent.training.plan import Prepared

_FAILING_S = 5.0
"""Tracking that has failed for this long is worth a line."""
_DEADLINE_S, _DEADLINE_UNREACHED_S = 60.0, 15.0
"""How long the end of a run waits for the last records to be delivered, and where no server ever answered."""
_PARAMS = ("seed", "precision", "reduction", "workers")
_PARAM_GROUPS = ("model.", "optimizer.", "schedule.", "loss.", "batch.", "clip.", "ema.")
_DEFAULTS: tuple[object, ...] = (None, False, "auto", [], {}, 0.0)
"""Values that say nothing, unless somebody has typed them."""
_PLAN = ("total_steps", "num_samples", "num_parameters", "slots", "device")


class RunRecorder:
    """Writes the run's file, and describes the run in tracking: at its start, and at its end what came of it."""

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
        display: "Display",
        background: ThreadPoolExecutor,
    ) -> None:
        """run_id: of the MLflow run that goes on; a new one is made without.

        Raises TrackingError if the run's spool can't be used.
        """
        self._composed, self._config, self._prepared = composed, composed.config, prepared
        self._output_dir, self._run_dir, self._config_sha256 = output_dir, run_dir, config_sha256
        self._uri, self._display, self._background = uri, display, background
        self._started = self._greeted = self._warned = False
        self._resumed_id = run_id
        self.model_name: str | None = None
        """The exported model's name in MLflow, once it is kept."""
        self.tracker = Tracker.open(
            uri=uri,
            experiment=self._config.tracking.experiment,
            run_name=run_dir.name,
            spool_dir=run_dir / "spool",
            artifact_root=None if self._config.tracking.uri else output_dir / "mlartifacts",
            run_id=run_id,
        )
        from descent.checkpoint.frozen import are_left_out, frozen_parameters
        from descent.checkpoint.weights import free_parameters

        left_out = are_left_out(prepared.model, self._config.checkpoint.save_frozen)
        kept = frozen_parameters(prepared.model) if left_out else ()
        self._allocate_model = free_parameters(prepared.model, kept)  # this process needs its weights only at the end

    def write_run_file(self, result: RunResult | None = None) -> None:
        """Write to the run's folder what a resume needs; with the result, how the run ended."""
        from descent.training.plan import filled_spec

        plan, from_overrides = self._prepared.plan, self._composed.sources is not None
        typed = [shown_override(o) for o in self._composed.overrides if not o.lstrip("+").startswith("resume=")]
        config = self._composed.without_secrets(self._config)
        model = filled_spec(self._config, self._prepared.train)
        ended = (
            {"state": result.state, "state_sha256": result.state_sha256, "result": masked(result.to_json())}
            if result
            else {}
        )
        run_log.write_run_file(
            self._run_dir,
            {
                "name": self._run_dir.name,
                "run_id": self.tracker.run_id,
                "tracking_uri": config["tracking"]["uri"],
                "overrides": typed if from_overrides else None,
                "config_dirs": list(self._composed.config_dirs),
                "config": config,
                "config_sha256": self._config_sha256,
                "model": self._composed.without_secrets_in("model", model),
                "data": self._prepared.data_identities,
                "slots": plan.slots,
                "plan": plan.to_dict(),
                **ended,
            },
        )

    # -- while the run trains -------------------------------------------------------------

    def check(self, *, stepping: bool) -> None:
        """Called in every round of the controller; `stepping`: whether the first step has been committed.

        Delivery begins with the first step: connecting takes seconds of a core (imports, a new
        database's tables), which the workers' own start needs more. Nothing that fails here ends
        the run: the records wait in the spool, and the user reads one line about it.
        """
        if not stepping:
            return
        if not self._started:
            self._started = True
            self._background.submit(self._start)
        if self.tracker.connected and not self._greeted:
            self._greet()
        self._warn()

    def _start(self) -> None:
        with self._best_effort("the run's description"):
            self._describe()
        self.tracker.start(system_metrics=self._config.tracking.system_metrics)
        with self._best_effort("what earlier runs left behind"):
            tracked_at = self._composed.without_secrets(self._config)["tracking"]["uri"]
            for line in settle_left_over(self._output_dir, tracked_at, self._uri, besides=self._run_dir):
                self._display.line(line)

    def _greet(self) -> None:
        self._greeted = True
        if self.tracker.run_id != self._resumed_id:
            with self._best_effort("the MLflow run's id in run.json"):
                self.write_run_file()
        self._display.line(f"charts: {self.tracker.url or f'descent ui {self._run_dir.name}'}")
        # Everything is imported by now. The collector of cycles needn't look through these
        # millions of objects again and again, with all threads waiting for it.
        gc.freeze()

    def _warn(self) -> None:
        status = self.tracker.status()
        if not self._warned and status.failing_s > _FAILING_S and status.last_error:
            self._warned = True
            self._display.note(
                f"tracking is behind: {status.last_error}. The training goes on; its records wait in "
                f"{self._run_dir / 'spool'} and are delivered when that works again"
            )

    def _describe(self) -> None:
        from descent.data.description import describe

        prepared, tracker = self._prepared, self.tracker
        tracker.log_params(self._params())
        tracker.log_text(self._composed.yaml, "config.yaml")
        tracker.log_dataset(describe(prepared.train), "training")
        if prepared.evaluate is not None:
            tracker.log_dataset(describe(prepared.evaluate), "evaluation")
        tracker.set_tags(
            {
                "descent.run_dir": str(self._run_dir),
                "descent.command": self._command(),
                "mlflow.note.content": note_of(self._composed, prepared.plan, self._command()),
            }
        )

    def _command(self) -> str:
        import shlex

        from descent.config.overrides import shown_override

        if self._composed.sources is None:
            return "descent.train(RunConfig(…))"
        if any(given.placeholders(self._config.to_dict())):
            return call_of(self._composed.overrides)
        words = [word for folder in self._composed.config_dirs for word in ("--config-dir", folder)]
        return shlex.join(["descent", "train", *words, *map(shown_override, self._composed.overrides)])

    def _params(self) -> dict[str, object]:
        """What was chosen and what decides the result; the whole configuration is the artifact config.yaml."""
        chosen = {o.lstrip("+~").partition("=")[0] for o in self._composed.overrides} - {"resume"}
        params: dict[str, object] = {**self._composed.choices}
        for key, value in flatten(self._composed.without_secrets(self._config)).items():
            typed = any(key == name or key.startswith(f"{name}.") for name in chosen if name not in params)
            named = key.endswith("_target_") and params.get(key.partition(".")[0]) != "custom"
            set_in_group = key.startswith(_PARAM_GROUPS) and value not in _DEFAULTS and not named
            if typed or set_in_group or key in _PARAMS:
                params[key] = value
        plan = self._prepared.plan.to_dict()
        return {**params, **{key: plan[key] for key in _PLAN if key in plan}}

    # -- the end ------------------------------------------------------------------------

    def finish(self, outcome: "Outcome", figures: dict[str, dict[str, float]], log: RunLog) -> int:
        """Record what came of the run; returns how many records could not be delivered."""
        tracker = self.tracker
        with self._display.finishing("recording plots, model and metrics…"):
            if not self._started:
                self._started = True
                self._start()
            self._background.shutdown(wait=True)  # what follows replaces parts of the first description
            with self._best_effort("the plots"):
                self._log_plots(log)
            if outcome.incidents:
                tracker.log_text(as_csv(outcome.incidents), "incidents.csv")
                with self._best_effort("incidents.jsonl"):
                    tracker.log_file(self._run_dir / run_log.INCIDENTS_FILE)
            self._test(outcome, figures)
            note = note_of(self._composed, self._prepared.plan, self._command(), outcome, figures)
            tags = {"descent.workers": json.dumps(outcome.workers), "mlflow.note.content": note}
            if outcome.incidents:
                tags["descent.goodput"] = f"{outcome.goodput:.4f}"
            if outcome.reason:
                tags["descent.reason"] = outcome.reason
            if outcome.state_sha256:
                tags["descent.state_sha256"] = outcome.state_sha256
            tracker.set_tags(tags)
            self.model_name = self._log_model_of(outcome, log)
            reached = tracker.wait_until_connected(_DEADLINE_UNREACHED_S)
            deadline_s = _DEADLINE_S if reached else 1.0
            undelivered = tracker.finish(str(outcome.state), deadline_s)  # type: ignore[arg-type]
        return undelivered

    def _test(self, outcome: "Outcome", figures: dict[str, dict[str, float]]) -> None:
        """Evaluate the test set with the best weights, and put its figures among the run's."""
        if self._prepared.test is None or outcome.state is not TerminalState.FINISHED or outcome.checkpoint is None:
            return
        from descent.cluster.run.tested import test_figures

        best = best_kept(checkpoint_root(self._run_dir, self._config.checkpoint.dir), self._config.checkpoint.keep_best)
        target, step = (to_location(best[0]), best[1]) if best else (outcome.checkpoint, outcome.step)
        with self._best_effort("the test set's figures"):
            self._allocate_model()
            found = test_figures(self._config, self._prepared, target)
            figures["metrics"].update(found)
            self.tracker.log_metrics(step, found)

    def record_end(self, result: RunResult) -> None:
        """Write to the run's file how the run ended."""
        with self._best_effort("how the run ended, in run.json"):
            self.write_run_file(result)

    @contextmanager
    def _best_effort(self, what: str) -> Iterator[None]:
        """What can't be recorded (the disk is full, say) costs one line: the training and its checkpoints are there."""
        try:
            yield
        except Exception as error:
            line = " ".join(str(error).split())[:200]
            self._display.note(f"could not be recorded: {what}: {type(error).__name__}: {line}")

    @property
    def total_steps(self) -> int:
        """The run's length as planned."""
        return self._prepared.plan.total_steps

    @property
    def model_uri(self) -> str | None:
        """For `mlflow.pyfunc.load_model`; None when no model was kept, or when MLflow doesn't have the run."""
        if self.model_name is None or self.tracker.run_id is None:
            return None
        return f"runs:/{self.tracker.run_id}/{self.model_name}"

    def _log_plots(self, log: RunLog) -> None:
        from descent.tracking.plots import plots

        incidents = [(incident.step, incident.kind) for incident in log.incidents]
        for path in plots(log.history(), self._run_dir / "plots", incidents):
            self.tracker.log_file(path, "plots")

    def _log_model_of(self, outcome: "Outcome", log: RunLog) -> str | None:
        """Keep the trained model, exported, with the run; returns its name in MLflow."""
        if outcome.state is not TerminalState.FINISHED or outcome.checkpoint is None:
            return None
        if step_of(outcome.checkpoint.name) != outcome.step:
            self._display.note(
                "the final state could not be saved, so no model is kept; "
                f"the last checkpoint is {outcome.checkpoint.name}"
            )
            return None
        from descent.cluster.run.kept_model import ModelKeeper

        name = "".join("_" if c in "/:.%\"'" else c for c in self._run_dir.name)
        kept = ModelKeeper(self._prepared, self.tracker, self._run_dir)
        try:
            self._allocate_model()
            line = kept.keep(outcome.checkpoint, name, outcome.step, last_points(log))
            with self._best_effort("the confusion matrix and the worst samples"):
                self._log_class_report(outcome.step)
        except Exception as error:
            # The training is done and its checkpoint is safe: a model that can't be kept must not undo that.
            line = " ".join(str(error).split())[:200]
            self._display.note(f"the model could not be kept in tracking: {type(error).__name__}: {line}")
            self.tracker.set_tags({"descent.export_error": line})
            return None
        if line is None:
            return name
        self._display.note(
            f"{line}. Its weights are kept instead, in the checkpoint and in MLflow as model/model.safetensors; "
            f'descent.load("{self._run_dir.name}") gives the model'
        )
        self.tracker.set_tags({"descent.export_error": line})
        return None

    def _log_class_report(self, step: int) -> None:
        """Keep how a classifier does on each class; the prepared model has the final weights by now."""
        from descent.cluster.run.class_artifacts import FOLDER, write_class_report

        for path in write_class_report(self._config, self._prepared, self._run_dir, step):
            self.tracker.log_file(path, FOLDER)

    def abandon(self) -> None:
        """The run has broken off: say so in tracking, if delivery has begun; otherwise leave no trace there."""
        if not self._started:
            self.tracker.discard()
            return
        self._background.shutdown(wait=True)
        self.tracker.finish("FAILED", deadline_s=5.0)
