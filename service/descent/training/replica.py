"""The parts of a replica: the network with its first weights, the loss, the state around them."""

from dataclasses import replace

import torch
from torch import nn

from descent.checkpoint.weights import InitialWeights
from descent.config import RunConfig
from descent.data.base import Data
from descent.data.generators import own_generators
from descent.optim.ema import Ema
from descent.storage import to_location
from descent.training.loss_scale import LossScale
from descent.training.objective import Objective, Reading
from descent.training.phases import Turn, Turns, build_phased, task_between, task_in
from descent.training.plan import Plan, build_loss, build_model, build_optimizer_for, build_schedule
from descent.training.state import TrainState
from descent.training.task import OwnTask, Supervised, build_task


def first_model(config: RunConfig, data: Data, device: torch.device) -> nn.Module:
    """The network as the run begins: with the weights that `seed`, or `init_from`, decides."""
    model = build_model(config, data)
    if config.init_from is not None:
        source = to_location(config.init_from)
        InitialWeights(source, config.init_strict, config.init_key, config.init_rules).put_into(model)
    return model.to(device)


def task_of(config: RunConfig, plan: Plan) -> Supervised | OwnTask:
    """The config's task, or its loss as the default task, read as the preflight has found out."""
    reading = None if plan.loss_reading is None else Reading(plan.loss_reading)
    own = build_task(config)
    if own is not None:
        return task_between(own, plan.phases) if plan.phases else replace(own, reading=reading, names=plan.logged)
    with own_generators(seed=config.seed):
        loss = build_loss(config)
    return Supervised(Objective.of(loss, reading, plan.classes_last))


def turns_of(task: Supervised | OwnTask, plan: Plan, model: nn.Module, optimizer: torch.optim.Optimizer) -> Turns:
    """The phases of the run, which take turns; a run without phases has one turn, with all parameters."""
    device = next(model.parameters()).device

    def turn(task: Supervised | OwnTask, parameters: list[nn.Parameter], nominal: float) -> Turn:
        return Turn(task, parameters, nominal, torch.tensor(1.0 / nominal, device=device))

    if not plan.phases:
        return Turns(model, optimizer, [turn(task, list(model.parameters()), plan.nominal)], [])
    assert isinstance(task, OwnTask)
    turns = [turn(task_in(task, phase), phase.parameters(model), phase.nominal) for phase in plan.phases]
    return Turns(model, optimizer, turns, [phase.name for phase in plan.phases])


def first_state(config: RunConfig, plan: Plan, model: nn.Module, device: torch.device) -> TrainState:
    """The state of step 0: `model`, its optimizer and schedule, and averaged weights where the config asks for them."""
    optimizer: torch.optim.Optimizer
    if plan.phases:
        optimizer = build_phased(config, plan.phases, model, lambda of: build_optimizer_for(of, model, device))
    else:
        optimizer = build_optimizer_for(config, model, device)
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    ema = Ema(model, config.ema.decay) if config.ema.decay is not None else None
    loss_scale = LossScale() if config.precision == "fp16" else None
    return TrainState(model, optimizer, build_schedule(config, plan.total_steps), ema, loss_scale=loss_scale)
