"""An actor and a critic on stored episodes: two losses, two optimizers, advantages from the frozen critic."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from tests.programs.program import STEPS, Program, batches, built

Sample = dict[str, Tensor]


class Episodes(Dataset[Sample]):
    def __len__(self) -> int:
        return 96

    def __getitem__(self, index: int) -> Sample:
        state = torch.tensor([index / 96, (index % 5) / 5, (index % 3) / 3])
        return {"state": state, "action": torch.tensor(index % 2), "returns": state.sum() - index % 2}


class ActorCritic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.actor = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
        self.critic = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))


class Reinforce:
    phases: ClassVar = {"critic": "critic", "actor": ["actor"]}

    def critic(self, model: ActorCritic, batch: Sample) -> Tensor:
        return F.mse_loss(model.critic(batch["state"]).squeeze(1), batch["returns"])

    def actor(self, model: ActorCritic, batch: Sample) -> Tensor:
        with torch.no_grad():
            advantage = batch["returns"] - model.critic(batch["state"]).squeeze(1)
        chosen = model.actor(batch["state"]).log_softmax(1).gather(1, batch["action"][:, None]).squeeze(1)
        return -(chosen * advantage).mean()


def by_hand() -> list[float]:
    model, task = built(ActorCritic), Reinforce()
    assert isinstance(model, ActorCritic)
    critic = torch.optim.SGD(model.critic.parameters(), lr=0.1)
    actor = torch.optim.SGD(model.actor.parameters(), lr=0.05)
    losses: list[float] = []
    for batch, _ in zip(batches(Episodes()), range(STEPS // 2), strict=False):
        for optimizer, loss_of in ((critic, task.critic), (actor, task.actor)):
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


PROGRAM = Program(
    [
        "model=custom",
        "model._target_=tests.programs.actor_critic.ActorCritic",
        "data=custom",
        "data.train._target_=tests.programs.actor_critic.Episodes",
        "task=custom",
        "task._target_=tests.programs.actor_critic.Reinforce",
        "+optimizer.phases.critic.lr=0.1",
    ],
    by_hand,
)
