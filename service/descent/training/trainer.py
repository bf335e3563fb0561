"""The loop of one replica: receive or restore the state, step, evaluate, checkpoint, leave when told.

The trainer runs on a worker's training thread. Its `Control` is the only thing that
another thread touches: the worker's main thread sets wishes and reads progress there.
"""

import contextlib
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from descent.config import RunConfig
from descent.messages import EvaluationRecord, Membership, Notice, StepRecord
from descent.storage import to_location
from descent.training import collectives, nonfinite, sentinel, slot_balancer
from descent.training.buffers import Buffers
from descent.training.checkpointing import restoring
from descent.training.checkpointing.writing import ReplicaCheckpoints
from descent.training.collectives import Group
from descent.training.control import PAUSE, SAVE, Control, OutOfMemory, TooManyBadSteps
from descent.training.determinism import compiled, only_deterministic, refuse_undeterministic
from descent.training.evaluation import Evaluator
from descent.training.input.feed import Feed
from descent.training.input.sampling import SampleOrder, slot_bounds
from descent.training.metrics import StepMetrics
from descent.training.plan import Plan, build_data
from descent.training.reduction import Reducer, reducer_for
from descent.training.replica import first_model, first_state, in_training, objective_on
from descent.training.sentinel import Diverged, Sentinel
from descent.training.slot_balancer import SlotBalancer
from descent.training.step import StepInput, StepResult, train_step
from descent.training.stopwatch import Stopwatch

__all__ = ["Control", "OutOfMemory", "TooManyBadSteps", "Trainer"]


@dataclass
class _Generation:
    """What holds while the trainer is a member of one generation."""

    membership: Membership
    group: Group
    reducer: Reducer
    dealer: SlotBalancer
    watch: Stopwatch

    mine: list[tuple[int, tuple[int, int]]]
    """(slot, its range within the global batch) for the slots of this rank."""


class Trainer:
    """One replica of the model and everything it needs to take steps in any generation."""

    def __init__(self, config: RunConfig, plan: Plan, run_dir: Path, device: torch.device, control: Control) -> None:
        torch.set_num_threads(plan.threads)
        exact = config.reduction == "exact"
        if exact:
            only_deterministic(device)
        self.config, self.plan, self.device, self.control = config, plan, device, control
        train, held_out = build_data(config)
        model = first_model(config, train, device)
        self.objective = objective_on(config, device)
        self.state = first_state(config, plan, model, device)
        self._forward: Any = compiled(model, exact) if config.compile else model
        self.order = SampleOrder.of(train, plan.batch_size, config.seed)
        self.bounds = slot_bounds(plan.batch_size, plan.slots)
        self.feed = Feed(train, self.order, device, seed=config.seed, on_error=config.data.on_error)
        self.evaluator = Evaluator(config, plan, held_out, self.state, self.objective, device, self._autocast)
        self.checkpoints = ReplicaCheckpoints(config, plan, run_dir, self.state, self.evaluator, control)
        self.metrics = StepMetrics(model, self.feed, batch_size=plan.batch_size, every=config.diagnostics.every)
        self.buffers = Buffers(model, plan.changing_buffers)
        self.sentinel = Sentinel(self.state, plan.changing_buffers, config.sentinel_every)
        self.make_slot_balancer: Callable[..., SlotBalancer] = SlotBalancer
        self._multiplier = float("nan")
        self._parameters = list(model.parameters())
        control.target.parameters = self._parameters
        self._in_training = in_training(self.objective, train)
        self._scale = torch.tensor(1.0 / plan.nominal, device=device)

    # -- one generation ---------------------------------------------------------------

    def run(self, membership: Membership) -> str:
        """Take steps as a member of one generation until it ends.

        Returns "finished" after the last step, "paused" when the members voted so or were
        only to save, "diverged" when the sentinel found replicas that differ (the ranks
        are then in `control.diverged`, and the step was not committed). Raises PeerLost when
        a member is gone: the state is then that of the last committed step; and NotRestored
        when the checkpoint that the generation was to begin with could not be read.
        """
        self.control.diverged = ()
        self.checkpoints.wait_for_copy()
        share = self._read_share(membership)
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
            if share is not None:
                self.control.enter("receive")
                restoring.exchange(group, share, self.state, self.device)
                self._tell_progress()
            elif membership.behind:
                self.control.enter("receive")
                self.state.receive(group, self.device)
                self._tell_progress()
            if membership.save_only:
                if membership.save_to is not None:
                    self.checkpoints.move_to(to_location(membership.save_to))
                self.checkpoints.write_share(group, membership.generation, wait=True)
                return "paused"
            return self._loop(group, membership)
        except BaseException:
            group.abandon()  # others may be waiting for this rank's numbers
            raise
        finally:
            self.feed.forget()
            group.close()

    def _loop(self, group: Group, membership: Membership) -> str:
        self.state.model.train()
        straggler = self.config.straggler
        dealer = self.make_slot_balancer(
            membership.slots, self.plan.slots, straggler.deal, straggler.factor, straggler.after_s
        )
        with reducer_for(
            self._forward,
            group,
            kind=self.config.reduction,
            compress=self.config.compress,
            shares=membership.slots,
            slots=self.plan.slots,
            find_unused=self.plan.unused_parameters,
        ) as reducer:
            watch = Stopwatch(self.device, group.world_size > 1)
            mine = self._slots(membership.slots[group.rank])
            now = _Generation(membership, group, reducer, dealer, watch, mine)
            self._evaluate_if_due(group)
            while self.state.step < self.plan.total_steps:
                try:
                    votes = self._step(now).votes
                except Diverged as diverged:
                    self.control.diverged = diverged.ranks
                    self._notice(sentinel.notice(self.state.step + 1, membership, diverged.ranks))
                    return "diverged"
                self._evaluate_if_due(group)
                if self.state.step == self.plan.total_steps:
                    break
                due = votes[SAVE] or self.checkpoints.is_due()
                if votes[PAUSE] or due:
                    self.checkpoints.write_share(group, membership.generation, wait=bool(votes[PAUSE]))
                if votes[PAUSE]:
                    return "paused"
            self.checkpoints.write_share(group, membership.generation, wait=True)
        return "finished"

    def _slots(self, share: tuple[int, int]) -> list[tuple[int, tuple[int, int]]]:
        return [(slot, self.bounds[slot]) for slot in range(*share)]

    def _step(self, now: _Generation) -> StepResult:
        step, begun = self.state.step + 1, time.perf_counter()
        seconds_per_sample = now.watch.begin()
        self.control.enter("step")
        learning_rate = self._set_learning_rate(step - 1)
        votes = (int(self.control.pause), int(self.control.save), self.feed.replaced())
        self.control.save = False
        given = StepInput(
            step,
            self.config.seed,
            now.mine,
            self.plan.slots,
            now.membership.micro_size,
            self.plan.nominal,
            self._scale,
            votes,
            (step, seconds_per_sample, time.monotonic()),
        )
        self.sentinel.begin(step, now.group.world_size)
        notice = None
        try:
            result = self._attempt(now, given)
            if not result.committed:
                result, notice = self._again(now, given, result)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
                raise OutOfMemory(str(error)) from error
            refuse_undeterministic(error)
            raise
        if notice is not None:
            self._notice(notice)
        if result.committed:
            self.control.useful_s += time.perf_counter() - begun
        metrics = self.metrics.of(step, result, learning_rate)
        if now.group.world_size > 1:
            self._share_load(now, step, result, metrics)
        self._record(step, metrics, result, notice)
        return result

    def _attempt(self, now: _Generation, given: StepInput) -> StepResult:
        self.feed.prepare(given.step, given.slots, given.micro_size)
        return train_step(
            self._parameters,
            self.state.optimizer,
            self._in_training,
            now.reducer,
            now.group,
            self.buffers,
            lambda first, stop: self.feed.fetch(given.step, first, stop),
            given,
            autocast=self._autocast,
            uses_non_torch_rng=self.plan.uses_non_torch_rng,
            clip_norm=self.config.clip.norm,
            clip_value=self.config.clip.value,
            watch=now.watch,
            compare=lambda: self.sentinel.compare(now.group),
            enter=self.control.enter,
        )

    def _again(self, now: _Generation, given: StepInput, first: StepResult) -> tuple[StepResult, Notice]:
        """The same step once more: the same numbers come out unless hardware failed the first time."""
        # Before the second try: once that is committed nothing may fail until it is counted.
        told = nonfinite.exchange(now.group, first.suspects, [])
        now.watch.begin()
        second = self._attempt(now, given)
        if not second.committed:
            self.control.enter("inspect")
            inspector = nonfinite.Inspector(
                self.state.model,
                self.objective,
                self.buffers,
                self._autocast,
                self.plan.uses_non_torch_rng,
            )
            samples = self.order.samples_of(given.step)
            fetch = lambda first, stop: self.feed.take(samples[first:stop])  # noqa: E731
            found = inspector.look(given, fetch, self.feed.numbers(samples))
            told = nonfinite.exchange(now.group, (), found)
        votes = tuple(a | b for a, b in zip(first.votes, second.votes, strict=True))
        notice = nonfinite.notice(
            given.step, now.membership.generation, now.dealer.shares, first, second.committed, told
        )
        return second._replace(votes=votes), notice

    def _share_load(self, now: _Generation, step: int, result: StepResult, metrics: dict[str, float]) -> None:
        """Deal the slots anew where the ranks' speeds ask for it; all ranks know and do the same."""
        dealer, generation = now.dealer, now.membership.generation
        seconds = [said[1] for said in result.by_rank]
        shares = dealer.learn(seconds, now=result.by_rank[0][2])
        if shares is not None:
            now.reducer.deal(shares)
            now.mine = self._slots(shares[now.group.rank])
            self.feed.forget()
            self._notice(slot_balancer.dealt(step, generation, shares))
        if dealer.straggler is not None:
            self._notice(slot_balancer.straggling(step, generation, dealer.straggler, dealer.ratio))
        if dealer.ratio and step % self.config.diagnostics.every == 0:
            metrics["cluster/slowest_rank_ratio"] = dealer.ratio

    def _notice(self, notice: Notice) -> None:
        self.control.notices.append(notice)
        self.control.notify()

    def _set_learning_rate(self, step: int) -> float:
        multiplier = self.state.schedule(step)
        if multiplier != self._multiplier:
            for group in self.state.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * multiplier
            self._multiplier = multiplier
        return float(self.state.optimizer.param_groups[0]["lr"])

    def _record(self, step: int, metrics: dict[str, float], result: StepResult, notice: Notice | None) -> None:
        if result.committed:
            self.state.bad_steps = 0
            if self.state.ema is not None:
                self.state.ema.update(self.state.model, step - 1)
        else:
            self.state.bad_steps += 1
            if self.state.bad_steps >= self.config.regroup.max_bad_steps:
                raise TooManyBadSteps(
                    f"loss or gradient were not finite at step {step} ({notice.detail if notice else ''}), and "
                    f"no step of the last {self.config.regroup.max_bad_steps} could be taken; try a lower "
                    "optimizer.lr or clip.norm=1.0"
                )
        self.state.step = self.control.step = step
        if step % self.config.tracking.every == 0 or step == self.plan.total_steps or len(metrics) > 3:
            self.control.records.append(StepRecord(step, metrics, int(time.time() * 1000)))

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.config.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    # -- evaluation -------------------------------------------------------------------

    def _evaluate_if_due(self, group: Group) -> None:
        if not self.evaluator.is_due():
            return
        self.control.enter("evaluate")
        self.checkpoints.wait_for_copy()  # averaged weights are put into the model for a while
        metrics = self.evaluator.evaluate(group)
        self.control.evaluated = self.state.evaluated
        self.control.records.append(EvaluationRecord(self.state.step, metrics, int(time.time() * 1000)))
        self.control.notify()

    # -- checkpoints ------------------------------------------------------------------

    def _read_share(self, membership: Membership) -> restoring.Share | None:
        """This rank's part of the checkpoint that the generation begins with, if it does with one."""
        if membership.restore_from is None:
            return None
        self.control.enter("restore")
        share = restoring.read_share(membership.restore_from, membership.rank, membership.world_size)
        if share.error:
            self._notice(Notice("restore failed", self.state.step, membership.generation, membership.rank, share.error))
        return share

    def _tell_progress(self) -> None:
        self.control.step, self.control.evaluated = self.state.step, self.state.evaluated

    def finish_saving(self) -> None:
        """Wait until the background write is on disk."""
        self.checkpoints.wait_until_written()

    def sha256(self) -> str:
        """The hash of the whole state."""
        return self.state.sha256()
