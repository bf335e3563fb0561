"""Programs that are refused before the run, by name and with what to do instead."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset

from descent import Mean
from tests.programs.pictures import Pictures

Pair = tuple[Tensor, Tensor]


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, 10))


class Hidden(nn.Module):
    """A language model that carries its hidden state over from batch to batch."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head, self.hidden = nn.RNN(8, 8, batch_first=True), nn.Linear(8, 10), None

    def forward(self, x: Tensor) -> Tensor:
        x, hidden = self.rnn(x.flatten(0, 1), self.hidden)
        self.hidden = hidden.detach()
        return self.head(x[:, -1])


class Cell(nn.Module):
    """An LSTM with a memory of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.state = nn.LSTM(8, 8, batch_first=True), None

    def forward(self, x: Tensor) -> Tensor:
        x, state = self.lstm(x, self.state)
        self.state = tuple(part.detach() for part in state)
        return x


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = Cell()

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)


class Deep(nn.Module):
    """Its memory lies some modules deep."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Sequential(Wrapped()), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x.flatten(0, 1))[:, -1])


class HiddenBuffer(nn.Module):
    """Makes its hidden state a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.RNN(8, 8, batch_first=True), nn.Linear(8, 10)
        self.register_buffer("hidden", torch.zeros(1, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.hidden.expand(1, len(x), 8) if self.hidden.shape[1] == 1 else self.hidden
        x, hidden = self.rnn(x.flatten(0, 1), hidden.contiguous())
        self.hidden = hidden.detach()
        return self.head(x[:, -1])


class Stream(IterableDataset[Pair]):
    def __iter__(self) -> Any:
        yield from Pictures()


def loader() -> DataLoader[Pair]:
    return DataLoader(Pictures(), batch_size=4)


class Ragged(Dataset[Pair]):
    def __len__(self) -> int:
        return 96

    def __getitem__(self, index: int) -> Pair:
        return torch.ones(3 + index % 2), torch.tensor(0)


def contrastive(model: nn.Module, batch: Pair) -> Tensor:
    """Compares the samples with each other, without saying so."""
    z = F.normalize(model(batch[0]), dim=1)
    return F.cross_entropy(z @ z.T, torch.arange(len(z)))


def pixels(model: nn.Module, batch: Pair) -> Tensor:
    """A mean over something that differs from batch to batch: the pixels that are not 0."""
    ink = batch[0].flatten(1) > 0
    return (model(batch[0])[:, :1] * ink).square().sum() / ink.sum()


def words(model: nn.Module, batch: Pair) -> str:  # noqa: ARG001
    return "a loss"


def table(model: nn.Module, batch: Pair) -> Tensor:
    return model(batch[0])


def without_loss(model: nn.Module, batch: Pair) -> dict[str, Tensor]:
    return {"cross_entropy": F.cross_entropy(model(batch[0]), batch[1])}


def detached(model: nn.Module, batch: Pair) -> Tensor:
    return F.cross_entropy(model(batch[0]).detach(), batch[1])


def nothing(model: nn.Module, batch: Pair) -> Mean:
    return Mean(model(batch[0]).sum() * 0.0, 0)


def negative(model: nn.Module, batch: Pair) -> Mean:
    return Mean(model(batch[0]).square().sum(), -len(batch[0]))


def one_argument(model: nn.Module) -> Tensor:
    return next(model.parameters()).sum()


def entropy(model: nn.Module, batch: Pair) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


class Remembers:
    """Compares each batch with the one before."""

    def __init__(self) -> None:
        self.last: Tensor | None = None

    def loss(self, model: nn.Module, batch: Pair) -> Tensor:
        output = model(batch[0])
        before = output.detach() * 0 if self.last is None else self.last
        self.last = output.detach()
        return (output - before).square().mean()


class Moving:
    """Keeps a running mean of its loss."""

    def __init__(self) -> None:
        self.mean = 0.0

    def loss(self, model: nn.Module, batch: Pair) -> Tensor:
        loss = F.cross_entropy(model(batch[0]), batch[1])
        self.mean = 0.9 * self.mean + 0.1 * float(loss)
        return loss / (1 + self.mean)


class Projected:
    """Holds a layer that is trained nowhere."""

    def __init__(self) -> None:
        self.head = nn.Linear(10, 10)

    def loss(self, model: nn.Module, batch: Pair) -> Tensor:
        return F.cross_entropy(self.head(model(batch[0])), batch[1])


class ProjectedModule(nn.Module):
    """The same, as a module."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(10, 10)

    def loss(self, model: nn.Module, batch: Pair) -> Tensor:
        return F.cross_entropy(self.head(model(batch[0])), batch[1])


class Temperature:
    """Trains its own parameter and nothing else."""

    def __init__(self) -> None:
        self.log_scale = nn.Parameter(torch.zeros(()))

    def loss(self, model: nn.Module, batch: Pair) -> Tensor:
        return F.cross_entropy(model(batch[0]).detach() * self.log_scale.exp(), batch[1])


class NoMethod:
    def training_step(self, batch: Pair) -> None: ...


class NoFeatures:
    def couple(self, features: Tensor) -> Tensor:
        return features.sum()


class Mixed:
    """Its features are already those of the whole batch."""

    def features(self, model: nn.Module, batch: Pair) -> Tensor:
        z = model(batch[0])
        return z - z.mean(0)

    def couple(self, features: Tensor) -> Tensor:
        return features.square().mean()


class Half:
    """Trains one module in two phases, and another one in none."""

    def __init__(self, phases: dict[str, str]) -> None:
        self.phases = phases

    def one(self, model: nn.Module, batch: Pair) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    two = one
