"""One run from a composed config to its outcome: check, start everything side by side, train, keep the results.

Ray's start, the imports, the data and the tracking server don't wait for each other; but
no actor starts before everything that the user could have got wrong has been looked at.
"""

import os
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from descent.checkpoint import manifest as checkpoint
from descent.cluster.chaos import injector
from descent.cluster.record import run_log
from descent.cluster.record.run_log import RunLog
from descent.cluster.run.checks import check_place, check_tracking, check_writable
from descent.cluster.run.display import Display
from descent.cluster.run.listeners import ListenerGroup
from descent.cluster.run.recorder import RunRecorder
from descent.cluster.run.resume import config_sha256, find_weights, with_saved_overrides
from descent.cluster.run.signals import stopping
from descent.cluster.run.summary import Summary, figures_of, training_s
from descent.config import Composed
from descent.errors import CheckpointError, ConfigError
from descent.messages import WorkerSpec

if TYPE_CHECKING:
    from descent.cluster.control.ending import Outcome
    from descent.cluster.workers.ray_cluster import Cluster
    from descent.training.plan import Prepared


def name_of(composed: Composed) -> str:
    """The run's name: given, or data, model and the time."""
    if composed.config.name:
        return composed.config.name
    stamp = time.strftime("%Y%m%d-%H%M%S")
    model = composed.choices.get("model", "model")
    return f"{composed.config.data.name}-{model}-{stamp}-{os.urandom(2).hex()}"


class Run:
    """Everything between `descent train` and its summary."""

    def __init__(self, composed: Composed, console: Console, started_at: float | None = None) -> None:
        self.started_at = started_at or time.time()
        self.composed, self.resumed = with_saved_overrides(composed)
        self.config = self.composed.config
        self.console = console
        self.output_dir = Path(self.config.output_dir).expanduser().resolve()
        name = name_of(self.composed)
        self.run_dir = self.resumed.run_dir if self.resumed else self.output_dir / "runs" / name
        if not self.resumed and (self.run_dir / run_log.RUN_FILE).exists():
            raise ConfigError(f"name={name}: there is such a run already; use resume={name} or another name")
        check_writable(self.run_dir.parent, "output_dir")
        if self.config.checkpoint.dir is not None:
            check_place(self.config.checkpoint.dir, "checkpoint.dir")
        self.config_sha256 = self.resumed.config_sha256 if self.resumed else config_sha256(self.config)
        self.init_from = None if self.resumed else find_weights(self.config)
        check_tracking(self.config.tracking.uri)
        self.tracking_uri = self.config.tracking.uri or f"sqlite:///{self.output_dir / 'mlflow.db'}"
        self._connecting: Future[Cluster] | None = None
        self._background = ThreadPoolExecutor(2, "start")

    # -- the parts that start side by side ---------------------------------------------

    def _prepare(self, cores: float, gpus: float) -> "Prepared":
        from descent.training.plan import prepare

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
            from descent.checkpoint.weights import put_into, read_weights

            told = put_into(
                prepared.model,
                read_weights(self.init_from),
                self.init_from,
                strict=config.init_strict,
            )
            if told:
                self.console.print(f"init_from={told}", highlight=False, markup=False)
        return prepared

    # -- the run ----------------------------------------------------------------------

    def execute(self) -> Summary:
        """Check, start, train, keep. Raises DescentError for whatever the user can mend.

        `close` must follow, after whatever there is to tell the user has been told.
        """
        from descent.cluster.workers import ray_cluster

        address = self.config.ray.address
        self._connecting = self._background.submit(ray_cluster.connect, address)
        if address is None:
            prepared = self._prepare(ray_cluster.local_cores(), _local_gpus())
            cluster = self._connecting.result()
        else:
            cluster = self._connecting.result()
            prepared = self._prepare(cluster.cores, cluster.gpus)
        ray_cluster.check_fits(
            workers=prepared.plan.max_workers + self.config.spares,
            cpus=self.config.resources.cpus,
            gpus=prepared.plan.gpus,
            wanted=f"workers={prepared.plan.max_workers}"
            + (f" and spares={self.config.spares}" if self.config.spares else ""),
        )
        injector.check(self.config.chaos, prepared.plan.max_workers)
        return self._train(prepared, cluster)

    def close(self) -> None:
        """Leave the cluster."""
        from descent.cluster.workers import ray_cluster

        if self._connecting is not None and self._connecting.exception() is None:
            ray_cluster.disconnect()

    def give_up(self, exit_code: int) -> None:
        """After a refusal: end the process now if the private cluster is still starting.

        Ray can't be told to stop starting, and waiting for it only to end it again would
        keep the user from trying once more.
        """
        from descent.cluster.workers import ray_cluster

        starting = self._connecting is not None and not self._connecting.done()
        if starting and self.config.ray.address is None:
            ray_cluster.end_with_children(exit_code)

    def _train(self, prepared: "Prepared", cluster: Any) -> Summary:
        from descent.cluster.control.checkpoints import CheckpointCommitter
        from descent.cluster.control.controller import Controller
        from descent.cluster.workers.group import WorkerGroup
        from descent.training.collectives import Store

        plan = prepared.plan
        self.run_dir.mkdir(parents=True, exist_ok=True)
        log = RunLog(self.run_dir)
        store = Store(cluster.host)
        spec = WorkerSpec(
            worker_id="",
            plan=plan.to_dict(),
            config=self.config.model_copy(
                update={
                    "slots": plan.slots,
                    "init_from": str(self.init_from) if self.init_from else None,
                }
            ).to_dict(),
            run_dir=str(self.run_dir),
            import_paths=import_paths(),
            device=plan.device,
            loopback=cluster.loopback,
        )
        group = WorkerGroup(spec, cpus=self.config.resources.cpus, gpus=plan.gpus)
        first = self.resumed.step if self.resumed else 0
        source = self.resumed.checkpoint if self.resumed else None
        run_id = self.resumed.run_id if self.resumed else None
        group.start(plan.max_workers + self.config.spares)
        keeper = RunRecorder(
            self.composed,
            prepared,
            self.output_dir,
            self.run_dir,
            config_sha256=self.config_sha256,
            uri=self.tracking_uri,
            run_id=run_id,
            console=self.console,
            background=self._background,
        )
        keeper.write_run_file(run_id)
        display = Display(self.console, self._title(prepared), plan.total_steps, plan.batch_size, first)
        everyone = ListenerGroup(display)
        commits = CheckpointCommitter(
            checkpoint.folder(self.run_dir, self.config.checkpoint.dir),
            self.run_dir.name,
            self.config_sha256,
            self.config.checkpoint,
            source,
            checkpoint.rescue_folder(self.run_dir),
        )
        controller = Controller(
            self.config,
            plan,
            group,
            store,
            log,
            commits,
            everyone,
            first_step=first,
            check_health=lambda: keeper.attach_when_open(everyone),
        )
        try:
            with stopping(controller.stop, self.console), display:
                self._announce(prepared, display)
                outcome = controller.run()
            group.release()
            commits.close()
            return self._finish(keeper, outcome, prepared, everyone, log)
        except BaseException:
            group.release()
            keeper.abandon()
            raise
        finally:
            log.close()

    def _finish(
        self, keeper: RunRecorder, outcome: "Outcome", prepared: "Prepared", everyone: ListenerGroup, log: RunLog
    ) -> Summary:
        tracker, undelivered = keeper.finish(outcome, everyone, log)
        trained_s = training_s(log, self.started_at)
        return Summary(
            self.run_dir,
            tracker.run_id,
            tracker.url,
            outcome,
            prepared.plan.to_dict(),
            figures_of(log),
            outcome.samples / trained_s if trained_s > 0 else 0.0,
            undelivered,
            self.tracking_uri,
            everyone.first_step_at - self.started_at if everyone.first_step_at else None,
        )

    # -- talking to the user -------------------------------------------------------------

    def _title(self, prepared: "Prepared") -> str:
        return f"{self.run_dir.name}  {prepared.plan.num_parameters:,} parameters"

    def _announce(self, prepared: "Prepared", display: Display) -> None:
        plan = prepared.plan
        workers = f"{plan.max_workers} worker{'s' if plan.max_workers > 1 else ''}"
        accumulation = -(-max(b - a for a, b in _bounds(plan.batch_size, plan.slots)) // plan.micro_size)
        self.console.print(
            f"[bold]{self.run_dir.name}[/bold]: {plan.num_parameters:,} parameters, {plan.num_samples:,} samples, "
            f"{plan.total_steps:,} steps of {plan.batch_size:,} on {workers} ({plan.device}), "
            f"{plan.slots} slots x {accumulation} micro-batch{'es' if accumulation > 1 else ''}, reduction {self.config.reduction}",
            highlight=False,
            soft_wrap=True,
        )
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


def _local_gpus() -> float:
    import torch

    return float(torch.cuda.device_count())


def _bounds(batch: int, slots: int) -> list[tuple[int, int]]:
    from descent.training.input.sampling import slot_bounds

    return slot_bounds(batch, slots)


def import_paths() -> tuple[str, ...]:
    """Where the workers look for the user's own modules: this process's folder first."""
    own = [str(Path.cwd())]
    extra = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    for path in own:
        if path not in sys.path:
            sys.path.insert(0, path)
    return (*own, *extra)
