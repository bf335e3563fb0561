"""Graph classification: a batch is one large graph of several small ones, as PyTorch Geometric makes it."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from tests.programs.program import Program, built, plain_loop


@dataclass
class Graph:
    x: Tensor
    """[nodes, features]."""
    edges: Tensor
    """[2, edges]: from, to."""
    graph: Tensor
    """[nodes]: which graph of the batch a node belongs to."""
    y: Tensor
    """[graphs]: the class of each graph."""


class Rings(Dataset[Graph]):
    """96 rings of 3 to 7 nodes; the class is whether the number of nodes is odd."""

    def __len__(self) -> int:
        return 96

    def __getitem__(self, index: int) -> Graph:
        n = 3 + index % 5
        nodes = torch.arange(n)
        x = torch.stack([(nodes + index) % 4 / 4, torch.full((n,), n / 7)], 1)
        return Graph(x, torch.stack([nodes, (nodes + 1) % n]), torch.zeros(n, dtype=torch.long), torch.tensor([n % 2]))


def merge(graphs: list[Graph]) -> Graph:
    sizes = torch.tensor([len(graph.x) for graph in graphs])
    starts = sizes.cumsum(0) - sizes
    return Graph(
        torch.cat([graph.x for graph in graphs]),
        torch.cat([graph.edges + start for graph, start in zip(graphs, starts, strict=True)], 1),
        torch.arange(len(graphs)).repeat_interleave(sizes),
        torch.cat([graph.y for graph in graphs]),
    )


class GCN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(2, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, graph: Graph) -> Tensor:
        source, target = graph.edges
        h = graph.x
        for layer in (self.first, self.second):
            h = layer(h)
            h = (h + torch.zeros_like(h).index_add(0, target, h[source])).relu()
        pooled = torch.zeros(len(graph.y), h.shape[1]).index_add(0, graph.graph, h)
        return self.head(pooled)


def loss(model: nn.Module, batch: Graph) -> tuple[Tensor, int]:
    """(total, count)."""
    return F.cross_entropy(model(batch), batch.y, reduction="sum"), len(batch.y)


def by_hand() -> list[float]:
    def mean(model: nn.Module, batch: Graph) -> Tensor:
        total, count = loss(model, batch)
        return total / count

    return plain_loop(built(GCN), Rings(), mean, collate=merge)


PROGRAM = Program(
    [
        "model=custom",
        "model._target_=tests.programs.graphs.GCN",
        "data=custom",
        "data.train._target_=tests.programs.graphs.Rings",
        "+data.collate._target_=tests.programs.graphs.merge",
        "task=custom",
        "task._target_=tests.programs.graphs.loss",
    ],
    by_hand,
)
