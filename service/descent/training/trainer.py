"""One replica's training: join a generation, restore the state, step, evaluate, checkpoint, leave.

The trainer runs on a worker's training thread. Its `Control` is the only object that another thread
touches: the worker's main thread sets wishes and reads progress there.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from descent.config import RunConfig
from descent.data.identity import require_digest
from descent.messages import EvaluationRecord, Membership, Notice, StepRecord
from descent.storage import to_location
from descent.training import collectives, nonfinite, sentinel, slot_balancer
from descent.training.buffers import Buffers
from descent.training.checkpointing import restoring
from descent.training.checkpointing.writing import ReplicaCheckpoints
from descent.training.collectives import Group
from descent.training.control import PAUSE, SAVE, Control, OutOfMemory, TooManyBadSteps
from descent.training.coupling import Coupling
from descent.training.determinism import compiled, only_deterministic, refuse_undeterministic
from descent.training.evaluation import Evaluator, stopped_early
from descent.training.freezing import Freezing
from descent.training.input.building import build_sets, epoch_order_of, keep_precision
from descent.training.input.feed import Feed
from descent.training.input.sampling import SampleOrder, slot_bounds
from descent.training.loss_parameters import attach
from descent.training.metric_states import MetricSet
from descent.training.metrics import StepMetrics
from descent.training.plan import AUTOCAST, Plan
from descent.training.reduction import UnusedParameters, reducer_for
from descent.training.reduction.losses import LossOf
from descent.training.replica import first_model, first_state, task_of, turns_of
from descent.training.sentinel import Diverged, Sentinel
from descent.training.slot_balancer import Shares, SlotBalancer
from descent.training.step import MicroBatch, SlotRange, StepContext, StepInput, StepResult, micro_batches, train_step
from descent.training.stopwatch import Stopwatch
from descent.training.task import OwnTask

__all__ = ["Control", "OutOfMemory", "TooManyBadSteps", "Trainer"]


@dataclass
class Generation:
    """What the trainer works with while it is a member of one generation."""

    membership: Membership
    contexts: tuple[StepContext, ...]
    """One for each phase of a round; most trainings have one phase."""
    balancer: SlotBalancer
    slots: list[SlotRange]
    """The slots of this rank; the balancer may change them between two steps."""
    micro_batches: tuple[MicroBatch, ...]
    """The slots cut into micro-batches."""

    @property
    def context(self) -> StepContext:
        """A context, for what is the same in all phases."""
        return self.contexts[0]

    @property
    def group(self) -> Group:
        return self.context.group


class Trainer:
    """One replica of the model and everything it needs to take steps in any generation."""

    def __init__(self, config: RunConfig, plan: Plan, run_dir: Path, device: torch.device, control: Control) -> None:
        torch.set_num_threads(plan.threads)
        exact = config.reduction == "exact"
        if exact:
            only_deterministic(device)
        self.config, self.plan, self.device, self.control = config, plan, device, control
        own = task_of(config, plan)
        sets = build_sets(config, own.collate)
        train, held_out = sets.train, sets.evaluate
        require_digest(train, plan.data_digest, "data.train")
        model = first_model(config, train, device)
        keep_precision(model, train, held_out, *sets.others.values())
        self.task = own.to(device, self._autocast)
        attach(model, own)
        self.state = first_state(config, plan, model, device)
        self._forward = compiled(model, exact) if config.compile else model
        self.order = SampleOrder.of(train, plan.batch_size, config.seed, epoch_order_of(config, train, plan.batch_size))
        self.bounds = slot_bounds(plan.batch_size, plan.slots)
        self.feed = Feed(train, self.order, device, seed=config.seed, on_error=config.data.on_error)
        metrics = MetricSet.of(config, train.num_outputs).to(device)
        self.evaluator = Evaluator(config, plan, held_out, sets.others, self.state, self.task, metrics, device)
        self.checkpoints = ReplicaCheckpoints(config, plan, run_dir, self.state, self.evaluator, control)
        self.metrics = StepMetrics(
            model, self.state.optimizer, self.feed, batch_size=plan.batch_size, every=config.diagnostics.every
        )
        self.buffers = Buffers(model, plan.changing_buffers, plan.buffer_rules or None)
        self.freezing = Freezing(model, self.state.optimizer)
        self.sentinel = Sentinel(self.state, plan.changing_buffers, config.sentinel_every)
        self.make_slot_balancer: Callable[..., SlotBalancer] = SlotBalancer
        self._find_unused = plan.unused_parameters
        self._multiplier = float("nan")
        self._parameters = list(model.parameters())
        control.target.parameters = self._parameters
        self._turns = turns_of(self.task, plan, model, self.state.optimizer)
        self._coupling = None
        self._loss: LossOf = partial(self.task.within(train).loss, self._forward)
        if len(self._turns.all) > 1:
            self._loss = lambda batch, samples: self._turns.now.task.loss(self._forward, batch, samples)
        if isinstance(self.task, OwnTask) and self.task.couples:
            self._coupling = Coupling(self.task, self._forward, self.feed, plan.batch_size)
            self._loss = self._coupling.loss

    # -- one generation: join, restore, loop, leave -------------------------------------

    def run(self, membership: Membership) -> str:
        """Take steps as a member of one generation until it ends.

        Returns "finished" after the last step, "paused" when the members voted so or were only to
        save, "diverged" when the sentinel found replicas that differ (the ranks are then in
        `control.diverged`, and the step was not committed). Raises PeerLost when a member is gone:
        the state is then that of the last committed step; and NotRestored when the checkpoint
        that the generation was to begin with could not be read.
        """
        # A thread that never sets its number of threads lets MKL use every core, which adds in another order.
        torch.set_num_threads(self.plan.threads)
        self.control.diverged = ()
        self.checkpoints.wait_for_copy()
        share = self._read_share(membership)
        with self._joined(membership) as group:
            self._restore(group, membership, share)
            if membership.save_only:
                if membership.save_to is not None:
                    self.checkpoints.move_to(to_location(membership.save_to))
                self.checkpoints.write_share(group, membership.generation, wait=True)
                return "paused"
            return self._loop(group, membership)

    @contextlib.contextmanager
    def _joined(self, membership: Membership) -> Iterator[Group]:
        """The group of this generation; left at the end of the block, and given up for all members by an exception."""
        self.control.enter("join")
        collectives.leave()
        group = collectives.join(
            generation=membership.generation,
            rank=membership.rank,
            world_size=membership.world_size,
            host=membership.store_host,
            port=membership.store_port,
            device=self.device,
            backend=self.plan.backend,
            abort=self.control.abort,
        )
        self.control.target.group = group
        self.control.target.generation = membership.generation
        try:
            yield group
        except BaseException as error:
            self._find_unused |= isinstance(error, UnusedParameters)
            group.abandon()  # others may be waiting for this rank's numbers
            raise
        finally:
            self.feed.forget()
            group.close()

    def _read_share(self, membership: Membership) -> restoring.Share | None:
        """This rank's part of the checkpoint that the generation begins with, if it begins with one."""
        if membership.restore_from is None:
            return None
        self.control.enter("restore")
        share = restoring.read_share(membership.restore_from, membership.rank, membership.world_size, self.state)
        if share.error and share.fits:
            self._notify(Notice("restore failed", self.state.step, membership.generation, membership.rank, share.error))
        return share

    def _restore(self, group: Group, membership: Membership, share: restoring.Share | None) -> None:
        """The state that the generation begins with: a checkpoint's, or rank 0's where a member is behind."""
        if share is None and not membership.behind:
            return
        self.control.enter("receive")
        if share is not None:
            self._exchange(group, membership, share)
        else:
            self.state.receive(group, self.device)
        self.control.step, self.control.evaluated = self.state.step, self.state.evaluated

    def _exchange(self, group: Group, membership: Membership, share: restoring.Share) -> None:
        try:
            restoring.exchange(group, share, self.state, self.device)
        except restoring.DoesNotFit as error:
            at = (self.state.step, membership.generation, membership.rank)
            self._notify(Notice("checkpoint unusable", *at, str(error)))
            raise

    def _loop(self, group: Group, membership: Membership) -> str:
        with self._generation(group, membership) as generation:
            self._evaluate_if_due(group)
            while self.state.step < self.plan.total_steps and not self.evaluator.stops():
                try:
                    votes = self._step(generation).votes
                except Diverged as diverged:
                    self.control.diverged = diverged.ranks
                    self._notify(sentinel.notice(self.state.step + 1, membership, diverged.ranks))
                    return "diverged"
                self._evaluate_if_due(group)
                if self.evaluator.stops():
                    self._notify(stopped_early(self.config, self.state, membership.generation))
                if self.state.step == self.plan.total_steps or self.evaluator.stops():
                    break
                if votes[PAUSE] or votes[SAVE] or self.checkpoints.is_due():
                    self.checkpoints.write_share(group, membership.generation, wait=bool(votes[PAUSE]))
                if votes[PAUSE]:
                    return "paused"
            self.checkpoints.write_share(group, membership.generation, wait=True)
        return "finished"

    @contextlib.contextmanager
    def _generation(self, group: Group, membership: Membership) -> Iterator[Generation]:
        """What the steps of this generation need; the reducer's hooks are gone at the end of the block."""
        self.state.model.train()
        stopwatch = Stopwatch(self.device, group.world_size > 1)
        with reducer_for(
            self._forward,
            self._loss,
            group,
            kind=self.config.reduction,
            compress=self.config.compress,
            shares=membership.slots,
            slots=self.plan.slots,
            find_unused=self._find_unused or self.state.step < self.freezing.last - 1,
            stopwatch=stopwatch,
        ) as reducer:
            first = self._turns.all[0]
            context = StepContext(
                parameters=first.parameters,
                optimizer=self.state.optimizer,
                feed=self.feed if self._coupling is None else self._coupling,
                coupling=self._coupling,
                reducer=reducer,
                group=group,
                buffers=self.buffers,
                freezing=self.freezing,
                sentinel=self.sentinel,
                stopwatch=stopwatch,
                enter_phase=self.control.enter,
                seed=self.config.seed,
                num_slots=self.plan.slots,
                nominal_count=first.nominal,
                scale=first.scale,
                logged=first.task.logged,
                uses_non_torch_rng=self.plan.uses_non_torch_rng,
                clip_norm=self.config.clip.norm,
                clip_value=self.config.clip.value,
                forwards_per_slot=tuple(-(-(hi - lo) // membership.micro_size) for lo, hi in self.bounds),
            )
            straggler = self.config.straggler
            balancer = self.make_slot_balancer(
                membership.slots, self.plan.slots, straggler.balance, straggler.factor, straggler.after_s
            )
            others = [
                replace(context, parameters=t.parameters, nominal_count=t.nominal, scale=t.scale, logged=t.task.logged)
                for t in self._turns.all[1:]
            ]
            generation = Generation(membership, (context, *others), balancer, [], ())
            self._take_slots(generation, membership.slots)
            yield generation

    def _take_slots(self, generation: Generation, shares: Shares) -> None:
        """From the next step on this rank computes its share of `shares`."""
        own = shares[generation.group.rank]
        generation.slots = [(slot, self.bounds[slot]) for slot in range(*own)]
        generation.micro_batches = micro_batches(generation.slots, generation.membership.micro_size)

    # -- one step -----------------------------------------------------------------------

    def _step(self, generation: Generation) -> StepResult:
        """Take one step, twice where the first try isn't finite, and record the outcome."""
        step, begun = self.state.step + 1, time.perf_counter()
        seconds_per_sample = generation.context.stopwatch.begin_step()
        self.control.enter("step")
        learning_rate = self._set_learning_rate(step - 1)
        votes = (int(self.control.pause), int(self.control.save), self.feed.replaced())
        self.control.save = False
        report = (step, seconds_per_sample, time.monotonic())
        loss_scale = 1.0 if self.state.loss_scale is None else self.state.loss_scale.scale
        given = StepInput(step, generation.micro_batches, self._turns.batch_number(step), votes, report, loss_scale)
        self.metrics.begin(step)
        self.sentinel.begin(step, generation.group.world_size)
        notice = None
        try:
            result = self._attempt(generation, given)
            if not result.committed:
                result, notice = self._repeat(generation, given, result)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
                raise OutOfMemory(str(error)) from error
            refuse_undeterministic(error)
            raise
        if notice is not None:
            self._notify(notice)
        if result.committed:
            self.control.useful_s += time.perf_counter() - begun
        metrics = self.metrics.of(step, result, learning_rate)
        if generation.group.world_size > 1:
            self._balance(generation, step, result, metrics)
        self._record(step, metrics, result, notice)
        return result

    def _attempt(self, generation: Generation, given: StepInput) -> StepResult:
        self.feed.prepare(given.batch_number, generation.slots, generation.membership.micro_size)
        with self.freezing.taken(given.step), self._turns.taken(given.step):
            return train_step(generation.contexts[self._turns.index(given.step)], given)

    def _repeat(self, generation: Generation, given: StepInput, first: StepResult) -> tuple[StepResult, Notice | None]:
        """Take the same step once more: the same numbers come out unless hardware failed the first time.

        No notice where the gradient of a scaled loss overflows in both tries: that is how float16 finds its scale.
        """
        # Before the second try: once that is committed nothing may fail until it is counted.
        answers = nonfinite.exchange(generation.group, first.suspects, [])
        generation.context.stopwatch.begin_step()
        second = self._attempt(generation, given)
        votes = tuple(a | b for a, b in zip(first.votes, second.votes, strict=True))
        if second.overflowed:
            return second._replace(votes=votes), None
        if not second.committed:
            self.control.enter("inspect")
            inspector = nonfinite.Inspector(
                self.state.model,
                self._turns.now.task,
                self.buffers,
                self.config.seed,
                self._turns.now.scale,
                self.plan.uses_non_torch_rng,
            )
            samples = self.order.samples_of(given.batch_number)
            fetch = lambda first, stop: self.feed.take(samples[first:stop])  # noqa: E731
            findings = inspector.inspect(given, fetch, self.feed.numbers(samples))
            answers = nonfinite.exchange(generation.group, (), findings)
        notice = nonfinite.notice(
            given.step, generation.membership.generation, generation.balancer.shares, first, second.committed, answers
        )
        return second._replace(votes=votes), notice

    def _balance(self, generation: Generation, step: int, result: StepResult, metrics: dict[str, float]) -> None:
        """Assign the slots anew where the ranks' speeds ask for it; all ranks know and do the same."""
        balancer, number = generation.balancer, generation.membership.generation
        seconds = [report[1] for report in result.reports]
        shares = balancer.observe(seconds, now=result.reports[0][2])
        if shares is not None:
            generation.context.reducer.assign_slots(shares)
            self._take_slots(generation, shares)
            self.feed.forget()
            self._notify(slot_balancer.rebalanced(step, number, shares))
        if balancer.straggler is not None:
            self._notify(slot_balancer.straggling(step, number, balancer.straggler, balancer.ratio))
        if balancer.ratio and step % self.config.diagnostics.every == 0:
            metrics["cluster/slowest_rank_ratio"] = balancer.ratio

    def _set_learning_rate(self, updates: int) -> float:
        """Set every group's learning rate for the update after `updates` others; returns the first group's."""
        multiplier = self.state.schedule(updates)
        if multiplier != self._multiplier:
            for group in self.state.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * multiplier
            self._multiplier = multiplier
        return float(self.state.optimizer.param_groups[0]["lr"])

    def _record(self, step: int, metrics: dict[str, float], result: StepResult, notice: Notice | None) -> None:
        """Count the step, committed or skipped. Raises TooManyBadSteps after too many skipped ones in a row."""
        scale = self.state.loss_scale
        if result.overflowed:
            assert scale is not None
            scale.overflowed()
            metrics["train/loss_scale"] = scale.scale
            metrics["train/overflows"] = float(scale.overflows)
        elif result.committed:
            self.state.bad_steps = 0
            self.state.average(step - 1)
            if scale is not None:
                scale.good()
        else:
            self.state.bad_steps += 1
            if self.state.bad_steps >= self.config.regroup.max_bad_steps:
                raise TooManyBadSteps(
                    f"loss or gradient were not finite at step {step} ({notice.detail if notice else ''}), and "
                    f"no step of the last {self.config.regroup.max_bad_steps} could be taken; try a lower "
                    "optimizer.lr or clip.norm=1.0"
                )
        self.state.step = self.control.step = step
        if (
            step % self.config.tracking.every == 0
            or step == self.plan.total_steps
            or len(metrics) > 3 + len(result.logged)
        ):
            self.control.records.append(StepRecord(step, metrics, int(time.time() * 1000)))

    def _autocast(self) -> AbstractContextManager[object]:
        if self.config.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, AUTOCAST[self.config.precision])

    def _notify(self, notice: Notice) -> None:
        self.control.notices.append(notice)
        self.control.notify()

    # -- evaluation and checkpoints -----------------------------------------------------

    def _evaluate_if_due(self, group: Group) -> None:
        if not self.evaluator.is_due():
            return
        self.control.enter("evaluate")
        self.checkpoints.wait_for_copy()  # averaged weights are put into the model for a while
        metrics = self.evaluator.evaluate(group)
        self.control.evaluated = self.state.evaluated
        self.control.records.append(EvaluationRecord(self.state.step, metrics, int(time.time() * 1000)))
        self.control.notify()

    def finish_saving(self) -> None:
        """Wait until the background write is on disk."""
        self.checkpoints.wait_until_written()

    def sha256(self) -> str:
        """The hash of the whole state."""
        return self.state.sha256()
