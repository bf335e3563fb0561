"""The loop of one replica: receive or restore the state, step, evaluate, checkpoint, leave when told.

The trainer runs on a worker's training thread. Its `Control` is the only thing that
another thread touches: the worker's main thread sets wishes and reads progress there.
"""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from service.artifacts import checkpoint
from service.config import RunConfig, build
from service.errors import TrainingError
from service.messages import Fault, Membership, Notice, PartWritten, StepRecord
from service.training import collectives
from service.training.collectives import Group
from service.training.ema import Ema
from service.training.faults import Target, strike
from service.training.feed import Feed
from service.training.objective import Objective
from service.training.plan import Plan, build_data, build_model, build_optimizer_for, build_schedule
from service.training.plateau import Plateau
from service.training.reduction import Reducer, reducer_for
from service.training.sampling import SampleOrder, slot_bounds
from service.training.state import TrainState
from service.training.step import Buffers, StepInput, StepResult, layer_norms, train_step

PAUSE, SAVE = 0, 1
"""Places of the votes in the step's side vector."""


class TooManyBadSteps(TrainingError):
    """Several steps in a row without finite gradients."""


class OutOfMemory(Exception):
    """A micro-batch didn't fit; the next generation runs smaller ones."""


@dataclass
class Control:
    """Wishes from outside and progress to the outside; every field is replaced, never mutated in parts."""

    abort: threading.Event = field(default_factory=threading.Event)
    pause: bool = False
    save: bool = False
    step: int = 0
    evaluated: int = -1
    phase: str = "starting"
    phase_since: float = field(default_factory=time.monotonic)
    records: deque[StepRecord] = field(default_factory=deque)
    parts: deque[PartWritten] = field(default_factory=deque)
    notices: deque[Notice] = field(default_factory=deque)
    useful_s: float = 0.0
    """Seconds spent in steps that were committed."""
    diverged: tuple[int, ...] = ()
    """Ranks whose bits differ from the majority's (all, where there is none): why the generation ended."""
    notify: Callable[[], None] = lambda: None
    faults: list[Fault] = field(default_factory=list)
    """To be injected, in tests and by `descent chaos`; otherwise empty."""
    target: Target = field(default_factory=Target)

    def enter(self, phase: str) -> None:
        self.phase_since = time.monotonic()
        self.phase = phase
        if self.faults:
            strike(self.faults, phase, self.step, self.target)


class Trainer:
    """One replica of the model and everything it needs to take steps in any generation."""

    def __init__(
        self, config: RunConfig, plan: Plan, run_dir: Path, device: torch.device, control: Control
    ) -> None:
        torch.set_num_threads(plan.threads)
        self.config, self.plan, self.device, self.control = config, plan, device, control
        train, self.evaluation = build_data(config)
        model = build_model(config, train).to(device)
        self.objective = Objective.of(_build_loss(config, device))
        optimizer = build_optimizer_for(config, model, device)
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        ema = Ema(model, config.ema.decay) if config.ema.decay is not None else None
        self.state = TrainState(model, optimizer, build_schedule(config, plan.total_steps), ema)
        self._forward: Any = torch.compile(model) if config.compile else model
        self.order = SampleOrder(plan.num_samples, plan.batch_size, config.seed)
        self.bounds = slot_bounds(plan.batch_size, plan.slots)
        self.feed = Feed(train, self.order, device)
        self.evaluation_feed = (
            None if self.evaluation is None else Feed(self.evaluation, None, device)
        )
        self.buffers = Buffers(model, plan.changing_buffers)
        self.saver = checkpoint.Saver(
            checkpoint.folder(run_dir, config.checkpoint.dir), self._saved
        )
        self._multiplier = float("nan")
        self._parameters = list(model.parameters())
        control.target.parameters = self._parameters
        self._scale = torch.tensor(1.0 / plan.nominal, device=device)
        self._window = (time.perf_counter(), 0)

    # -- one generation ---------------------------------------------------------------

    def run(self, membership: Membership) -> str:
        """Take steps as a member of one generation until it ends.

        Returns "finished" after the last step, "paused" when the members voted so.
        Raises PeerLost when a member is gone: the state is then that of the last
        committed step.
        """
        self.control.enter("join")
        collectives.leave()
        group = collectives.join(
            generation=membership.generation, rank=membership.rank, world_size=membership.world_size,
            host=membership.store_host, port=membership.store_port, device=self.device,
            abort=self.control.abort,
        )  # fmt: skip
        self.control.target.group = group
        try:
            if membership.behind:
                self.control.enter("receive")
                self.state.receive(group, self.device)
                self._tell_progress()
            return self._loop(group, membership)
        except BaseException:
            group.abandon()  # others may be waiting for this rank's numbers
            raise
        finally:
            self.feed.forget()
            group.close()

    def _loop(self, group: Group, membership: Membership) -> str:
        self.state.model.train()
        lo, hi = membership.slots[group.rank]
        mine = [(slot, self.bounds[slot]) for slot in range(lo, hi)]
        with reducer_for(
            self._forward, group, kind=self.config.reduction, shares=membership.slots,
            slots=self.plan.slots, find_unused=self.plan.unused_parameters,
        ) as reducer:  # fmt: skip
            self._evaluate_if_due(group)
            while self.state.step < self.plan.total_steps:
                votes = self._step(group, reducer, mine, membership.micro_size).votes
                self._evaluate_if_due(group)
                if self.state.step == self.plan.total_steps:
                    break
                if votes[PAUSE] or votes[SAVE] or self._due(self.config.checkpoint.every):
                    self._save(group, membership.generation)
                if votes[PAUSE]:
                    return "paused"
            self._save(group, membership.generation)
        return "finished"

    def _due(self, every: int | str | None) -> bool:
        if every == "epoch":
            # The step with which an epoch's last sample was spent.
            batch, n, step = self.plan.batch_size, self.plan.num_samples, self.state.step
            return step * batch // n > (step - 1) * batch // n
        return isinstance(every, int) and self.state.step % every == 0

    def _step(
        self, group: Group, reducer: Reducer, mine: list[tuple[int, tuple[int, int]]], micro: int
    ) -> StepResult:
        step = self.state.step + 1
        self.control.enter("step")
        learning_rate = self._set_learning_rate(step - 1)
        self.feed.prepare(step, mine, micro)
        votes = (int(self.control.pause), int(self.control.save))
        self.control.save = False
        given = StepInput(
            step, self.config.seed, mine, self.plan.slots, micro, self.plan.nominal, self._scale
        )
        try:
            result = train_step(
                self._parameters, self.state.optimizer, self.objective, reducer, group, self.buffers,
                lambda first, stop: self.feed.fetch(step, first, stop), given,
                autocast=self._autocast, random=self.plan.random, votes=votes,
                clip_norm=self.config.clip.norm, clip_value=self.config.clip.value,
                enter=self.control.enter,
            )  # fmt: skip
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
                raise OutOfMemory(str(error)) from error
            raise
        self._record(step, result, learning_rate)
        return result

    def _set_learning_rate(self, step: int) -> float:
        multiplier = self.state.schedule(step)
        if multiplier != self._multiplier:
            for group in self.state.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * multiplier
            self._multiplier = multiplier
        return float(self.state.optimizer.param_groups[0]["lr"])

    def _record(self, step: int, result: StepResult, learning_rate: float) -> None:
        metrics = {
            "train/loss": result.loss,
            "train/learning_rate": learning_rate,
            "grad/norm": result.gradient_norm,
        }
        if not result.committed:
            self.state.bad_steps += 1
            metrics["train/skipped"] = 1.0
            if self.state.bad_steps >= self.config.regroup.max_bad_steps:
                raise TooManyBadSteps(self._why_bad(step, result))
        else:
            self.state.bad_steps = 0
            if self.state.ema is not None:
                self.state.ema.update(self.state.model, step - 1)
        if step % self.config.diagnostics.every == 0 or step == 1:
            for layer, norm in layer_norms(self.state.model).items():
                metrics[f"grad/norm/{layer}"] = norm
            now = time.perf_counter()
            then, at = self._window
            if step > at > 0:
                metrics["perf/samples_per_second"] = (
                    (step - at) * self.plan.batch_size / (now - then)
                )
            self._window = (now, step)
        self.state.step = self.control.step = step
        if (
            step % self.config.tracking.every == 0
            or step == self.plan.total_steps
            or len(metrics) > 3
        ):
            self.control.records.append(StepRecord(step, metrics, int(time.time() * 1000)))

    def _why_bad(self, step: int, result: StepResult) -> str:
        slots = [str(s) for s, loss in enumerate(result.slot_losses) if loss - loss != 0.0]
        where = f"the loss of slot {', '.join(slots)}" if slots else "the gradient"
        return (
            f"{where} is not finite at step {step}, and no step of the last "
            f"{self.config.regroup.max_bad_steps} could be taken; try a lower optimizer.lr or clip.norm=1.0"
        )

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.config.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    # -- evaluation -------------------------------------------------------------------

    def _evaluate_if_due(self, group: Group) -> None:
        """Evaluate after this step unless that is done: a fault may have come in between."""
        step = self.state.step
        due = self._due(self.config.evaluate.every) or step in (0, self.plan.total_steps)
        if due and self.state.evaluated < step:
            self._evaluate(group)

    def _evaluate(self, group: Group) -> None:
        """Loss and accuracy on the held-out set, shared by all ranks.

        The set is cut into chunks that don't depend on the number of ranks; each chunk's
        sums have one owner, so the result's bits are the same for any world size.
        """
        if self.evaluation is None or self.evaluation_feed is None:
            return
        self.control.enter("evaluate")
        size = self.config.evaluate.batch_size
        total = len(self.evaluation)
        starts = range(0, total, size)
        sums = torch.zeros(len(starts), 3, dtype=torch.float64, device=self.device)
        self.state.model.eval()
        with self.state.averaged(), torch.no_grad(), self._autocast():
            for chunk in range(group.rank, len(starts), group.world_size):
                indices = np.arange(starts[chunk], min(starts[chunk] + size, total), dtype=np.int64)
                inputs, targets = self.evaluation_feed.take(indices)
                output = self.state.model(inputs)
                sums[chunk, 0] = self.objective(output, targets)
                sums[chunk, 1] = self.objective.count(targets)
                if self.objective.by_class and not targets.is_floating_point():
                    sums[chunk, 2] = self.objective.num_correct(output, targets)
        self.state.model.train()
        rows = group.sum_(sums).tolist()
        count = sum(row[1] for row in rows)
        metrics = {"eval/loss": sum(row[0] for row in rows) / count}
        if self.objective.by_class:
            metrics["eval/accuracy"] = sum(row[2] for row in rows) / count
        if isinstance(self.state.schedule, Plateau) and self.state.step > 0:
            self.state.schedule.observe(metrics["eval/loss"])
        self.state.evaluated = self.control.evaluated = self.state.step
        self.control.records.append(StepRecord(self.state.step, metrics, int(time.time() * 1000)))
        self.control.notify()

    # -- checkpoints ------------------------------------------------------------------

    def restore(self, folder: Path) -> None:
        """Load a committed checkpoint. Raises CheckpointError."""
        self.control.enter("restore")
        tensors, manifest = checkpoint.load(folder)
        self.state.load(tensors, manifest.step, manifest.scalars)
        self._tell_progress()

    def _tell_progress(self) -> None:
        self.control.step, self.control.evaluated = self.state.step, self.state.evaluated

    def _save(self, group: Group, generation: int) -> None:
        self.control.enter("save")
        self.saver.save(
            self.state.tensors(), step=self.state.step, rank=group.rank,
            world_size=group.world_size, generation=generation, scalars=self.state.scalars(),
        )  # fmt: skip

    def _saved(self, part: PartWritten) -> None:
        self.control.parts.append(part)
        self.control.notify()

    def finish_saving(self) -> None:
        """Wait until the background write is on disk."""
        self.saver.wait()

    def sha256(self) -> str:
        """The hash of the whole state."""
        return self.state.sha256()


def _build_loss(config: RunConfig, device: torch.device) -> Any:
    loss = build(config.loss, config.trusted_modules, "loss")
    return loss.to(device) if isinstance(loss, torch.nn.Module) else loss
