"""One run from a composed config to its result: check, start everything side by side, train, record.

Ray's start, the imports and the data don't wait for each other; but no actor starts before
everything that the user could have got wrong has been looked at.
"""

import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console

from descent.checkpoint.manifest import checkpoint_root, rescue_root
from descent.cluster.chaos import injector
from descent.cluster.record import run_log
from descent.cluster.record.run_log import RunLog
from descent.cluster.run.announcement import announce, name_of
from descent.cluster.run.checks import check_place, check_writable
from descent.cluster.run.console import Starting, print_line
from descent.cluster.run.display import Display
from descent.cluster.run.listeners import ListenerGroup
from descent.cluster.run.lock import RunLock
from descent.cluster.run.observers import Observer, Observers, build_observers
from descent.cluster.run.recorder import RunRecorder
from descent.cluster.run.result import RunResult, best_kept, incident_figures, metric_figures, seconds_of_steps
from descent.cluster.run.resume import (
    config_sha256,
    find_weights,
    refuse_other_data,
    resume,
    run_to_resume,
)
from descent.cluster.run.signals import StopSignals
from descent.config import Composed, given
from descent.config.import_path import append_current_folder
from descent.config.secrets import redact
from descent.errors import CheckpointError, ConfigError
from descent.messages import TerminalState, WorkerSpec
from descent.tracking.check import check_tracking

if TYPE_CHECKING:
    from descent.cluster.control.checkpoints import CheckpointCommitter
    from descent.cluster.control.outcome import Outcome
    from descent.cluster.workers.parcel import Parcel
    from descent.cluster.workers.ray_cluster import Cluster
    from descent.training.plan import Plan, Prepared


class Run:
    """One run; the same for the command line and for `descent.train`.

    with Run(composed, console) as run:
        result = run.execute()
    """

    def __init__(
        self,
        composed: Composed,
        console: Console,
        started_at: float | None = None,
        starting: Starting | None = None,
    ) -> None:
        """started_at: Unix time of the command, from which the times of the result count.
        starting: what is shown until the training begins.

        Raises DescentError for what can be refused without data, model or Ray.
        """
        self.console, self.started_at, self._starting = console, started_at or time.time(), starting
        self._connecting: Future[Cluster] | None = None
        self._background = ThreadPoolExecutor(1, "recording")
        self._ray_thread = ThreadPoolExecutor(1, "ray")
        """Starts the private cluster, whose processes the kernel ends together with the thread that started them."""
        self._room = 0
        """How many workers the cluster's GPUs have room for; 0 without GPUs."""
        self._lock: RunLock | None = None
        self._user_observers: tuple[Observer, ...] = ()
        self._umask = os.umask(0o077)  # all files of a run are for its owner only
        try:
            self._check(composed)
        except BaseException:
            self.close()
            raise

    def _check(self, composed: Composed) -> None:
        """Which folder, which checkpoint, which places: everything that a person could have got wrong in them."""
        self.composed, self.resumed = composed, None
        resumed_dir = run_to_resume(composed.config)
        if resumed_dir is not None:
            self._lock = RunLock(resumed_dir, f"resume={composed.config.resume}")
            self.composed, self.resumed = resume(composed, resumed_dir)
        self.config = self.composed.config
        where = f"resume={self.config.resume}" if resumed_dir is not None else "config"
        which = f"resume={resumed_dir.name!r}, " if resumed_dir is not None else ""
        given.require_all(self.config.to_dict(), where, f"descent.train({which}{{}})")
        self.output_dir = Path(self.config.output_dir).expanduser().resolve()
        self.run_dir = resumed_dir or self.output_dir / "runs" / name_of(self.composed)
        if not self.resumed and (self.run_dir / run_log.RUN_FILE).exists():
            name = self.run_dir.name
            raise ConfigError(f"name={name}: there is such a run already; use resume={name} or another name")
        check_writable(self.run_dir.parent, "output_dir")
        if self.config.checkpoint.dir is not None:
            check_place(self.config.checkpoint.dir, "checkpoint.dir")
        self.config_sha256 = self.resumed.config_sha256 if self.resumed else config_sha256(self.config)
        # A checkpoint without the frozen parameters needs the weights that the run began with.
        old = self.resumed
        begins_with = old is None or old.checkpoint is None or bool(old.frozen)
        self.init_from = find_weights(self.config) if begins_with else None
        self.tracking_uri = self.config.tracking.uri or f"sqlite:///{self.output_dir / 'mlflow.db'}"
        check_tracking(
            self.tracking_uri, self.config.tracking.experiment, self.resumed.run_id if self.resumed else None
        )

    # -- the run ----------------------------------------------------------------------

    def execute(self) -> RunResult:
        """Start, train, record. Raises DescentError for whatever the user can mend.

        A resume of a run that has reached its last step trains nothing and touches nothing: the
        result is the run's own, with `already_finished`.
        """
        from descent.cluster.workers import ray_cluster

        if self.resumed is not None and self.resumed.finished is not None and self.resumed.same_length:
            return self.resumed.already_finished()
        private = self.config.ray.address is None and not ray_cluster.is_connected()
        parcel = self._packed_objects()
        size = parcel.size if parcel is not None else 0
        self._connecting = self._ray_thread.submit(ray_cluster.connect, self.config.ray.address, size)
        if private:
            prepared = self._prepare(ray_cluster.local_cores(), _local_gpus())
            cluster = self._connecting.result()
        else:
            cluster = self._connecting.result()
            prepared = self._prepare(cluster.cores, cluster.gpus)
        if self.resumed is not None and self.resumed.finished and self.resumed.step >= prepared.plan.total_steps:
            return self.resumed.already_finished()
        workers, spares = prepared.plan.max_workers, self.config.spares
        ray_cluster.check_fits(
            workers=workers + spares,
            cpus=self.config.resources.cpus,
            gpus=prepared.plan.gpus,
            wanted=f"workers={workers}" + (f" and spares={spares}" if spares else ""),
        )
        injector.check(self.config.chaos, workers, private=ray_cluster.is_private())
        return self._train(prepared, cluster, parcel)

    def _packed_objects(self) -> "Parcel | None":
        """What `descent.train` got as objects, ready to travel to the workers; None without any."""
        wanted = set(given.placeholders(self.config.to_dict()))
        objects = {target: one for target, one in given.all_registered().items() if target in wanted}
        if not objects:
            return None
        from descent.cluster.workers import ray_cluster

        if not ray_cluster.is_connected():
            ray_cluster.set_environment(self.config.ray.address)
        from descent.cluster.workers.parcel import Parcel

        return Parcel(objects)

    def _prepare(self, cores: float, gpus: float) -> "Prepared":
        """Data, model and every derived number. `cores` and `gpus`: what the cluster has in all."""
        from descent.training.plan import prepare

        config = self.config
        self._user_observers = build_observers(config)
        if self.resumed is not None and config.slots == "workers":
            # The slots are part of the run's mathematics: the number of workers may change, they may not.
            config = config.model_copy(update={"slots": self.resumed.slots})
        prepared = prepare(config, cores=cores, gpus=gpus)
        self._room = int(gpus / prepared.plan.gpus + 1e-9) if prepared.plan.gpus else 0
        if self.resumed is not None:
            refuse_other_data(self.resumed, prepared.data_identities)
        if self.resumed is not None and self.resumed.step > prepared.plan.total_steps:
            raise CheckpointError(
                f"resume={self.config.resume}: the run is at step {self.resumed.step} already, "
                f"and this config ends at step {prepared.plan.total_steps}"
            )
        if self.init_from is not None:
            from descent.checkpoint.weights import InitialWeights

            weights = InitialWeights(self.init_from, config.init_strict, config.init_key, config.init_rules)
            said = weights.put_into(prepared.model)
            if said and self.resumed is None:
                print_line(self.console, f"init_from={said}")
        if self.resumed is not None and self.resumed.frozen:
            from descent.checkpoint.frozen import require_same

            require_same(prepared.model, self.resumed.frozen, f"resume={self.config.resume}")
        return prepared

    def _train(self, prepared: "Prepared", cluster: "Cluster", parcel: "Parcel | None") -> RunResult:
        """Start the workers, give them to the controller, and record what comes of it."""
        from descent.cluster.control.controller import Controller
        from descent.cluster.workers.ray_group import RayWorkerGroup
        from descent.training.collectives import Store

        plan, resumed = prepared.plan, self.resumed
        self.run_dir.mkdir(parents=True, exist_ok=True)
        if self._lock is None:
            self._lock = RunLock(self.run_dir, f"name={self.run_dir.name}")
        log = RunLog(self.run_dir)
        first_step = resumed.step if resumed else 0
        title = f"{self.run_dir.name}  {plan.num_parameters:,} parameters"
        display = Display(self.console, title, plan.total_steps, plan.batch_size, first_step, plan.steps_per_epoch)
        recorder = self._recorder(prepared, display)
        config = self.composed.without_secrets(self.config)
        observers = Observers(self._user_observers, config, self.run_dir, recorder.tracker, display.note)
        listeners = ListenerGroup(display, recorder.tracker, observers)
        spec = self._worker_spec(plan, cluster)
        group = RayWorkerGroup(spec, cpus=self.config.resources.cpus, gpus=plan.gpus, parcel=parcel)
        group.start(plan.max_workers + self.config.spares)
        try:
            committer = self._committer()
            controller = Controller(
                self.config,
                plan,
                group,
                Store(cluster.host),
                log,
                committer,
                listeners,
                first_step=first_step,
                check_health=lambda: recorder.check(stepping=listeners.first_step_at is not None),
            )
            observers.finish_early = controller.finish_early
            if self._starting is not None:
                self._starting.stop()
            announce(
                self.console,
                display,
                self.run_dir.name,
                self.config,
                prepared,
                resumed,
                room=self._room,
                private=group.owns_cluster(),
            )
            if resumed is not None and resumed.died:
                controller.note_lost_driver()
            with StopSignals(controller.stop, self.console) as signals:
                with display:
                    outcome = controller.run()
                signals.training = False
                group.release_all()
                committer.close()
                observers.finish(str(outcome.state), outcome.step)
                return self._result(recorder, outcome, listeners, log)
        except BaseException:
            group.release_all()
            observers.abandon()
            recorder.abandon()
            raise
        finally:
            log.close()

    def _recorder(self, prepared: "Prepared", display: Display) -> RunRecorder:
        recorder = RunRecorder(
            self.composed,
            prepared,
            self.output_dir,
            self.run_dir,
            config_sha256=self.config_sha256,
            uri=self.tracking_uri,
            run_id=self.resumed.run_id if self.resumed else None,
            display=display,
            background=self._background,
        )
        try:
            recorder.write_run_file()
        except OSError as error:
            raise ConfigError(f"output_dir={self.output_dir}: can't write there: {error.strerror or error}") from error
        return recorder

    def _committer(self) -> "CheckpointCommitter":
        from descent.cluster.control.checkpoints import CheckpointCommitter

        return CheckpointCommitter(
            checkpoint_root(self.run_dir, self.config.checkpoint.dir),
            self.run_dir.name,
            self.config_sha256,
            self.config.checkpoint,
            self.resumed.checkpoint if self.resumed else None,
            rescue_root(self.run_dir),
        )

    def _worker_spec(self, plan: "Plan", cluster: "Cluster") -> WorkerSpec:
        """What every worker builds its replica from: the config with all of its open values filled in."""
        init_from = str(self.init_from) if self.init_from else None
        return WorkerSpec(
            worker_id="",
            plan=plan.to_dict(),
            config=self.config.model_copy(update={"slots": plan.slots, "init_from": init_from}).to_dict(),
            run_dir=str(self.run_dir),
            import_paths=import_paths(),
            device=plan.device,
            loopback=cluster.loopback,
        )

    def _result(self, recorder: RunRecorder, outcome: "Outcome", listeners: ListenerGroup, log: RunLog) -> RunResult:
        """Record what came of the training, and say it in one value."""
        trained_at = time.time()
        figures = metric_figures(log)
        undelivered = recorder.finish(outcome, figures, log)
        tracking = recorder.tracker.status()
        steps_s = seconds_of_steps(log, self.started_at)
        first_at = listeners.first_step_at or trained_at
        best = best_kept(checkpoint_root(self.run_dir, self.config.checkpoint.dir), self.config.checkpoint.keep_best)
        failure = outcome.failure
        result = RunResult(
            state=str(outcome.state),
            step=outcome.step,
            run_dir=self.run_dir,
            reason=redact(outcome.reason) or self._early(outcome, recorder.total_steps),
            checkpoint=str(outcome.checkpoint) if outcome.checkpoint else None,
            best_checkpoint=best[0] if best else None,
            best_step=best[1] if best else None,
            state_sha256=outcome.state_sha256,
            run_id=recorder.tracker.run_id,
            url=recorder.tracker.url,
            tracking_uri=redact(self.tracking_uri),
            model_uri=recorder.model_uri,
            start_s=first_at - self.started_at,
            training_s=trained_at - first_at,
            finishing_s=time.time() - trained_at,
            wall_s=outcome.wall_s,
            goodput=outcome.goodput,
            samples_per_second=outcome.samples / steps_s if steps_s > 0 else 0.0,
            first_step_s=first_at - self.started_at if listeners.first_step_at else None,
            undelivered=undelivered,
            refused=tracking.refused,
            tracking_error=tracking.last_error if undelivered or tracking.refused else None,
            unsaved_at=str(outcome.unsaved_at) if outcome.unsaved_at else None,
            peak_rss_mb=outcome.peak_rss_mb,
            workers=outcome.workers,
            chaos=outcome.chaos.to_dict() if outcome.chaos else None,
            traceback=redact(failure.traceback) if failure is not None and failure.by_user else "",
            **figures,
            **incident_figures(outcome),
        )
        recorder.record_end(result)
        return result

    def _early(self, outcome: "Outcome", total_steps: int) -> str:
        """Why a finished run has not taken all of its steps."""
        stop = self.config.stop
        if outcome.state is not TerminalState.FINISHED or outcome.step >= total_steps or stop is None:
            return ""
        return f"stopped early: {stop.metric} made no progress in {stop.patience} evaluations"

    # -- the end ------------------------------------------------------------------------

    def close(self) -> None:
        """Leave the cluster, where this run has joined it, and let others have the run's folder."""
        if self._connecting is not None:
            from descent.cluster.workers import ray_cluster

            if self._connecting.exception() is None and self._connecting.result().ours:
                ray_cluster.disconnect()
            self._connecting = None
        if self._lock is not None:
            self._lock.release()
        os.umask(self._umask)
        self._background.shutdown(wait=False)
        self._ray_thread.shutdown(wait=False)

    def end_process_if_ray_is_starting(self, exit_code: int) -> None:
        """After a refusal on the command line: end the process now if the private cluster is still starting.

        Ray can't be stopped while it starts, and waiting for it only to end it again would
        keep the user from trying once more.
        """
        from descent.cluster.workers import ray_cluster

        starting = self._connecting is not None and not self._connecting.done()
        if starting and self.config.ray.address is None:
            ray_cluster.end_with_children(exit_code)

    def __enter__(self) -> "Run":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _local_gpus() -> float:
    import torch

    return float(torch.cuda.device_count())


def import_paths() -> tuple[str, ...]:
    """Where the workers look for the user's own modules: in PYTHONPATH, and last in the current folder."""
    append_current_folder()
    return (*(p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p), str(Path.cwd()))
