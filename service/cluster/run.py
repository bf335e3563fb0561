"""One run from a composed config to its outcome: check, start everything side by side, train, keep the results.

Ray's start, the imports, the data and the tracking server don't wait for each other; but
no actor starts before everything that the user could have got wrong has been looked at.
"""

import json
import os
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from rich.console import Console

from service.artifacts import checkpoint
from service.artifacts.place import Place, place, store_at
from service.cluster import chaos, run_log
from service.cluster.display import Display
from service.cluster.listeners import Everyone
from service.cluster.resume import config_sha256, find_weights, with_saved_overrides
from service.cluster.run_log import RunLog
from service.config import Composed, flatten
from service.errors import CheckpointError, ConfigError, DescentError, StoreError, TrackingError
from service.messages import RunState, WorkerSpec

if TYPE_CHECKING:
    from service.artifacts.tracking import Tracker
    from service.cluster.controller import Controller, Outcome
    from service.cluster.ray_cluster import Cluster
    from service.training.plan import Prepared


@dataclass(frozen=True)
class Summary:
    """What `descent train` says at the end."""

    run_dir: Path
    run_id: str | None
    url: str | None
    outcome: "Outcome"
    plan: dict[str, Any]
    figures: dict[str, float]
    samples_per_second: float
    undelivered: int
    tracking_uri: str
    first_step_s: float | None

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        o = self.outcome
        return {
            "state": str(o.state), "reason": o.reason, "step": o.step, "run_id": self.run_id,
            "run_dir": str(self.run_dir), "url": self.url, "tracking_uri": self.tracking_uri,
            "checkpoint": str(o.checkpoint) if o.checkpoint else None,
            "unsaved_at": str(o.unsaved_at) if o.unsaved_at else None,
            "state_sha256": o.state_sha256, "wall_s": o.wall_s, "goodput": o.goodput,
            "incidents": len(o.incidents), "incidents_by_kind": Counter(i.kind for i in o.incidents),
            "steps_lost": sum(i.steps_lost for i in o.incidents),
            "samples_replayed": sum(i.samples_replayed for i in o.incidents),
            "samples_per_second": self.samples_per_second, "first_step_s": self.first_step_s,
            "peak_rss_mb": o.peak_rss_mb, "workers": o.workers, **self.figures,
            **({"chaos": o.chaos.to_dict()} if o.chaos else {}),
        }  # fmt: skip


def name_of(composed: Composed) -> str:
    """The run's name: given, or data, model and the time."""
    if composed.config.name:
        return composed.config.name
    stamp = time.strftime("%Y%m%d-%H%M%S")
    model = composed.choices.get("model", "model")
    return f"{composed.config.data.name}-{model}-{stamp}-{os.urandom(2).hex()}"


def check_writable(folder: Path, key: str) -> None:
    """Create `folder` and write a file in it. Raises ConfigError naming the key."""
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"{key}={folder}: can't write there: {error.strerror}; choose another folder"
        ) from error


def check_place(text: str, key: str) -> None:
    """Write and delete a small file in a folder or on S3. Raises ConfigError naming the key."""
    where = place(text)
    if isinstance(where, Path):
        return check_writable(where, key)
    name = f".probe-{os.urandom(6).hex()}"
    try:
        store = store_at(where)
        store.put(name, b"x")
        store.delete([name])
    except StoreError as error:
        raise ConfigError(f"{key}={text}: {error}") from error


def check_tracking(uri: str | None) -> None:
    """Whether an http tracking server answers at all; the run itself is opened later. Raises TrackingError."""
    if uri is None or not uri.startswith("http"):
        return
    from service.artifacts.provenance import redact

    shown = redact(uri)
    try:
        with urllib.request.urlopen(uri.rstrip("/") + "/health", timeout=5):
            pass
    except urllib.error.HTTPError:
        return  # it answers; whether it lets us in, opening the run will show
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise TrackingError(
            f"tracking.uri={shown}: no answer ({reason}); start it, or use tracking.uri=null for the embedded store"
        ) from error


class Run:
    """Everything between `descent train` and its summary."""

    def __init__(
        self, composed: Composed, console: Console, started_at: float | None = None
    ) -> None:
        self.started_at = started_at or time.time()
        self.composed, self.resumed = with_saved_overrides(composed)
        self.config = self.composed.config
        self.console = console
        self.output_dir = Path(self.config.output_dir).expanduser().resolve()
        name = name_of(self.composed)
        self.run_dir = self.resumed.run_dir if self.resumed else self.output_dir / "runs" / name
        if not self.resumed and (self.run_dir / run_log.RUN_FILE).exists():
            raise ConfigError(
                f"name={name}: there is such a run already; use resume={name} or another name"
            )
        check_writable(self.run_dir.parent, "output_dir")
        if self.config.checkpoint.dir is not None:
            check_place(self.config.checkpoint.dir, "checkpoint.dir")
        self.init_from = None if self.resumed else find_weights(self.config)
        check_tracking(self.config.tracking.uri)
        self.tracking_uri = self.config.tracking.uri or f"sqlite:///{self.output_dir / 'mlflow.db'}"
        self._controller: Controller | None = None
        self._stop_asked = 0
        self._opening: Future[Tracker] | None = None
        self._connecting: Future[Cluster] | None = None
        self._background = ThreadPoolExecutor(2, "start")

    # -- the parts that start side by side ---------------------------------------------

    def _prepare(self, cores: float, gpus: float) -> "Prepared":
        from service.training.plan import prepare

        config = self.config
        if self.resumed is not None and config.slots == "auto":
            # The slots are part of the run's mathematics: the number of workers may change, they may not.
            config = config.model_copy(update={"slots": self.resumed.slots})
        prepared = prepare(config, cores=cores, gpus=gpus)
        if self.resumed is not None and self.resumed.step > prepared.plan.total_steps:
            raise CheckpointError(
                f"resume={self.config.resume}: the run is at step {self.resumed.step} already, this config ends at {prepared.plan.total_steps}"
            )
        if self.init_from is not None:
            from service.artifacts.weights import put_into, read_weights

            told = put_into(
                prepared.model,
                read_weights(self.init_from),
                self.init_from,
                strict=config.init_strict,
            )
            if told:
                self.console.print(f"init_from={told}", highlight=False, markup=False)
        return prepared

    def _open_tracker(self) -> "Tracker":
        from service.artifacts.tracking import Tracker

        self._deliver_left_over()
        root = None if self.config.tracking.uri else self.output_dir / "mlartifacts"
        return Tracker.open(
            uri=self.tracking_uri, experiment=self.config.tracking.experiment, run_name=self.run_dir.name,
            spool_dir=self.run_dir / "spool", artifact_root=root,
            run_id=self.resumed.run_id if self.resumed else None,
            tags={"descent.run_dir": str(self.run_dir)}, system_metrics=self.config.tracking.system_metrics,
        )  # fmt: skip

    def _deliver_left_over(self) -> None:
        """What earlier runs could not deliver to this tracking server before they ended."""
        from service.artifacts.tracking import replay

        for spool in sorted((self.output_dir / "runs").glob("*/spool")):
            if (
                spool.parent != self.run_dir
                and _tracked_at(spool.parent) == self.config.tracking.uri
            ):
                try:
                    count = replay(spool, self.tracking_uri)
                except TrackingError:
                    return  # opening this run's own will say so
                if count:
                    self.console.print(
                        f"delivered {count} records that {spool.parent.name} had left behind",
                        highlight=False,
                    )

    def _write_run_file(
        self, prepared: "Prepared", run_id: str | None, outcome: "Outcome | None" = None
    ) -> None:
        ended = (
            {"state": str(outcome.state), "state_sha256": outcome.state_sha256} if outcome else {}
        )
        run_log.write_run_file(self.run_dir, {
            "name": self.run_dir.name, "run_id": run_id, "tracking_uri": self.config.tracking.uri,
            "overrides": [o for o in self.composed.overrides if not o.lstrip("+").startswith("resume=")],
            "config_dirs": list(self.composed.config_dirs), "config": self.config.to_dict(),
            "config_sha256": config_sha256(self.config), "slots": prepared.plan.slots, "plan": prepared.plan.to_dict(),
            **ended,
        })  # fmt: skip

    def _describe(self, tracker: "Tracker", prepared: "Prepared") -> None:
        from service.data.profile import describe

        tracker.log_params(
            {
                **flatten(self.config.to_dict()),
                **{f"plan.{k}": v for k, v in prepared.plan.to_dict().items()},
            }
        )
        tracker.log_text(_without_secrets(self.composed.yaml), "config.yaml")
        tracker.log_dataset(describe(prepared.train), "training")
        if prepared.evaluate is not None:
            tracker.log_dataset(describe(prepared.evaluate), "evaluation")

    # -- the run ----------------------------------------------------------------------

    def execute(self) -> Summary:
        """Check, start, train, keep. Raises DescentError for whatever the user can mend.

        `close` must follow, after whatever there is to tell the user has been told.
        """
        from service.cluster import ray_cluster

        address = self.config.ray.address
        self._connecting = self._background.submit(ray_cluster.connect, address)
        if address is None:
            prepared = self._prepare(ray_cluster.local_cores(), _local_gpus())
            cluster = self._connecting.result()
        else:
            cluster = self._connecting.result()
            prepared = self._prepare(cluster.cores, cluster.gpus)
        share = 0.0 if prepared.plan.device == "cpu" else 1.0
        per_gpu = (
            share if self.config.resources.gpus == "auto" else float(self.config.resources.gpus)
        )
        ray_cluster.check_fits(
            workers=prepared.plan.max_workers + self.config.spares, cpus=self.config.resources.cpus,
            gpus=per_gpu, wanted=f"workers={prepared.plan.max_workers}"
            + (f" and spares={self.config.spares}" if self.config.spares else ""),
        )  # fmt: skip
        chaos.check(self.config.chaos, prepared.plan.max_workers)
        return self._train(prepared, cluster, per_gpu)

    def close(self) -> None:
        """Leave the cluster."""
        from service.cluster import ray_cluster

        if self._connecting is not None and self._connecting.exception() is None:
            ray_cluster.disconnect()

    def give_up(self, exit_code: int) -> None:
        """After a refusal: end the process now if the private cluster is still starting.

        Ray can't be told to stop starting, and waiting for it only to end it again would
        keep the user from trying once more.
        """
        from service.cluster import ray_cluster

        starting = self._connecting is not None and not self._connecting.done()
        if starting and self.config.ray.address is None:
            ray_cluster.end_with_children(exit_code)

    def _train(self, prepared: "Prepared", cluster: Any, gpus: float) -> Summary:
        from service.cluster.commits import Commits
        from service.cluster.controller import Controller
        from service.cluster.worker_group import WorkerGroup
        from service.training.collectives import Store

        plan = prepared.plan
        self.run_dir.mkdir(parents=True, exist_ok=True)
        log = RunLog(self.run_dir)
        store = Store(cluster.host)
        spec = WorkerSpec(
            worker_id="", plan=plan.to_dict(),
            config=self.config.model_copy(update={
                "slots": plan.slots, "init_from": str(self.init_from) if self.init_from else None,
            }).to_dict(),
            run_dir=str(self.run_dir), import_paths=import_paths(), device=plan.device, loopback=cluster.loopback,
        )  # fmt: skip
        group = WorkerGroup(spec, cpus=self.config.resources.cpus, gpus=gpus)
        first = self.resumed.step if self.resumed else 0
        source = self.resumed.checkpoint if self.resumed else None
        group.start(plan.max_workers + self.config.spares)
        self._write_run_file(prepared, self.resumed.run_id if self.resumed else None)
        display = Display(
            self.console, self._title(prepared), plan.total_steps, plan.batch_size, first
        )
        everyone = Everyone(display)
        commits = Commits(
            checkpoint.folder(self.run_dir, self.config.checkpoint.dir), self.run_dir.name,
            config_sha256(self.config), self.config.checkpoint, source,
            checkpoint.rescue_folder(self.run_dir),
        )  # fmt: skip
        controller = Controller(
            self.config, plan, group, store, log, commits, everyone,
            first_step=first, check_health=lambda: self._attach_when_open(everyone, prepared),
        )  # fmt: skip
        self._controller = controller
        try:
            with self._signals(), display:
                self._announce(prepared, display)
                outcome = controller.run()
            group.release()
            commits.close()
            return self._finish(outcome, prepared, everyone, log)
        except BaseException:
            group.release()
            self._abandon()
            raise
        finally:
            log.close()

    def _tracker_opening(self) -> "Future[Tracker]":
        if self._opening is None:
            self._opening = self._background.submit(self._open_tracker)
        return self._opening

    def _attach_when_open(self, everyone: Everyone, prepared: "Prepared") -> None:
        """Called in every turn of the controller: once tracking is open, hand over what is known.

        Opening takes seconds of a core (imports, a new database's tables), which the workers'
        own start needs more; so it begins with the first step, and what was logged before
        then follows. A store that can't be opened ends the run with its one clear line.
        """
        if everyone.tracker is not None or everyone.first_step_at is None:
            return
        opening = self._tracker_opening()
        if opening.done():
            self._attach(opening.result(), everyone, prepared)

    def _attach(self, tracker: "Tracker", everyone: Everyone, prepared: "Prepared") -> None:
        self._write_run_file(prepared, tracker.run_id)
        self._describe(tracker, prepared)
        everyone.attach(tracker)

    def _finish(
        self, outcome: "Outcome", prepared: "Prepared", everyone: Everyone, log: RunLog
    ) -> Summary:
        with self.console.status("keeping plots, model and metrics…"):
            tracker = self._tracker_opening().result()
            if everyone.tracker is None:
                self._attach(tracker, everyone, prepared)
            self._keep_plots(tracker, log)
            if outcome.incidents:
                tracker.log_file(self.run_dir / run_log.INCIDENTS_FILE)
            tags = {
                "descent.workers": json.dumps(outcome.workers),
                "descent.goodput": f"{outcome.goodput:.4f}",
            }
            if outcome.state_sha256:
                tags["descent.state_sha256"] = outcome.state_sha256
            tracker.set_tags(tags)
            if outcome.state is RunState.FINISHED and outcome.checkpoint is not None:
                if checkpoint.step_of(outcome.checkpoint.name) == outcome.step:
                    self._keep_model(tracker, prepared, outcome.checkpoint)
                else:
                    self.console.print(
                        f"[yellow]![/yellow] the final state could not be saved, so no model is kept; the last checkpoint is {outcome.checkpoint.name}",
                        highlight=False,
                    )
            undelivered = tracker.finish(str(outcome.state), deadline_s=60.0)  # type: ignore[arg-type]
        self._write_run_file(prepared, tracker.run_id, outcome)
        trained_s = self._training_time(log)
        return Summary(
            self.run_dir, tracker.run_id, tracker.url, outcome, prepared.plan.to_dict(), self._figures(log),
            outcome.samples / trained_s if trained_s > 0 else 0.0, undelivered, self.tracking_uri,
            everyone.first_step_at - self.started_at if everyone.first_step_at else None,
        )  # fmt: skip

    def _keep_plots(self, tracker: "Tracker", log: RunLog) -> None:
        from service.artifacts.report import plots

        for path in plots(log.history(), self.run_dir / "plots"):
            tracker.log_file(path, "plots")

    def _keep_model(self, tracker: "Tracker", prepared: "Prepared", target: Place) -> None:
        import torch

        from service.artifacts.export import log_model
        from service.artifacts.weights import put_into, read_weights

        model = prepared.model
        try:
            put_into(model, read_weights(target), target, strict=True)
            model.eval()
            with torch.no_grad():
                predictions = model(prepared.sample)
            log_model(tracker, model, prepared.sample, predictions)
        except Exception as error:
            # The training is done and its checkpoint is safe: an export that fails must not undo that.
            line = " ".join(str(error).split())[:200]
            self.console.print(
                f"[yellow]![/yellow] the model could not be exported: {type(error).__name__}: {line}",
                highlight=False,
            )
            tracker.set_tags({"descent.export_error": line})

    def _figures(self, log: RunLog) -> dict[str, float]:
        history = log.history()
        figures: dict[str, float] = {}
        for name, best in (("eval/loss", min), ("eval/accuracy", max)):
            points = [p for p in history.get(name, []) if p[1] == p[1]]
            if points:
                figures[name] = points[-1][1]
                figures[f"best {name}"] = best(v for _, v in points)
        if history.get("train/loss"):
            figures["train/loss"] = history["train/loss"][-1][1]
        return figures

    def _training_time(self, log: RunLog) -> float:
        """Seconds between the first and the last step of this process's part of the run."""
        times = [
            r.time_ms
            for r in log.records()
            if "train/loss" in r.metrics and r.time_ms >= self.started_at * 1000
        ]
        return (
            (times[-1] - times[0]) / 1000 * len(times) / (len(times) - 1) if len(times) > 1 else 0.0
        )

    def _abandon(self) -> None:
        if self._opening is None:
            return
        try:
            self._opening.result(timeout=30).finish("FAILED", deadline_s=5.0)
        except (DescentError, TimeoutError):
            return

    # -- talking to the user -------------------------------------------------------------

    def _title(self, prepared: "Prepared") -> str:
        return f"{self.run_dir.name}  {prepared.plan.num_parameters:,} parameters"

    def _announce(self, prepared: "Prepared", display: Display) -> None:
        plan = prepared.plan
        workers = f"{plan.max_workers} worker{'s' if plan.max_workers > 1 else ''}"
        accumulation = -(
            -max(b - a for a, b in _bounds(plan.batch_size, plan.slots)) // plan.micro_size
        )
        self.console.print(
            f"[bold]{self.run_dir.name}[/bold]: {plan.num_parameters:,} parameters, {plan.num_samples:,} samples, "
            f"{plan.total_steps:,} steps of {plan.batch_size:,} on {workers} ({plan.device}), "
            f"{plan.slots} slots x {accumulation} micro-batch{'es' if accumulation > 1 else ''}, reduction {self.config.reduction}",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
        if self.config.chaos.faults:
            display.note(
                f"chaos.faults={self.config.chaos.faults} are to come; they don't count towards regroup.max_failures"
            )
        if self.resumed is not None:
            for reason in self.resumed.skipped:
                display.note(f"skipped checkpoint: {reason}")
            self.console.print(
                f"going on from step {self.resumed.step:,} ({self.resumed.checkpoint.name})",
                highlight=False,
            )

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM ask for an end at the step's end; a second Ctrl-C doesn't wait."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, _: FrameType | None) -> None:
            self._stop_asked += 1
            if self._stop_asked > 1 and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.console.print(
                f"{signal.Signals(number).name}: stopping at the end of this step, with a checkpoint (again: at once)",
                highlight=False,
            )
            if self._controller is not None:
                self._controller.stop()

        before: Mapping[int, Any] = {
            n: signal.signal(n, ask) for n in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _tracked_at(run_dir: Path) -> str | None:
    try:
        uri = run_log.read_run_file(run_dir).get("tracking_uri")
    except CheckpointError:
        return ""
    return None if uri is None else str(uri)


def _without_secrets(yaml: str) -> str:
    """The YAML with the values of secret-looking keys, and passwords in addresses, blotted out."""
    from service.artifacts.provenance import is_secret, redact

    lines = []
    for line in yaml.splitlines():
        key, colon, value = line.partition(":")
        hidden = colon and value.strip() not in ("", "null") and is_secret(key.strip("- "))
        lines.append(f"{key}: '***'" if hidden else redact(line))
    return "\n".join(lines) + "\n"


def _local_gpus() -> float:
    import torch

    return float(torch.cuda.device_count())


def _bounds(batch: int, slots: int) -> list[tuple[int, int]]:
    from service.training.sampling import slot_bounds

    return slot_bounds(batch, slots)


def import_paths() -> tuple[str, ...]:
    """Where the workers look for the user's own modules: this process's folder first."""
    own = [str(Path.cwd())]
    extra = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    for path in own:
        if path not in sys.path:
            sys.path.insert(0, path)
    return (*own, *extra)
