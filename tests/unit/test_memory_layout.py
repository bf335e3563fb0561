"""Parameters in every memory layout: each reducer and each optimizer gives the numbers of plain PyTorch."""

import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from descent.config import compose
from descent.errors import ConfigError
from descent.optim.memory_layout import is_dense, shares_places
from descent.optim.optimizers import build_optimizer
from descent.training.collectives import Group
from descent.training.plan import build_optimizer_for
from descent.training.reduction.buckets import FlatBuckets
from descent.training.reduction.compressed import as_matrix

CPU = torch.device("cpu")
GROUP = Group(0, 1, CPU, threading.Event())
OPTIMIZERS = [
    p.stem for p in sorted((Path(__file__).parents[2] / "configs" / "optimizer").glob("*.yaml")) if p.stem != "custom"
]


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))


LAYOUTS: dict[str, Tensor] = {
    "row-major": drawn(5, 4),
    "transposed": drawn(4, 5).T,
    "channels_last": drawn(5, 3, 2, 4).to(memory_format=torch.channels_last),
    "channels_last_3d": drawn(4, 3, 2, 2, 3).to(memory_format=torch.channels_last_3d),
    "permuted": drawn(2, 3, 4, 5).permute(2, 0, 3, 1),
    "first dimension innermost": drawn(3, 2, 6).permute(2, 0, 1),
    "every second column": drawn(5, 8)[:, ::2],
    "a stretch of each row": drawn(5, 9)[:, 2:6],
    "with a dimension of one": drawn(5, 1, 1, 3).to(memory_format=torch.channels_last),
    "no dimension": drawn(1)[0],
}


class Layouts(nn.Module):
    """One parameter in each layout, and a Linear so that there is a hidden matrix and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.several = nn.ParameterList(nn.Parameter(t.clone(memory_format=torch.preserve_format)) for t in self.made())
        self.linear, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        for index, (p, given) in enumerate(zip(self.several, self.made(), strict=True)):
            p.data = given  # clone would close the gaps
            assert p.stride() == given.stride(), index

    @staticmethod
    def made() -> list[Tensor]:
        # each in memory of its own, gaps included
        return [torch.empty(t.untyped_storage().nbytes() // 4).copy_(_storage(t)).as_strided(
            t.shape, t.stride(), t.storage_offset()) for t in LAYOUTS.values()]  # fmt: skip


def _storage(tensor: Tensor) -> Tensor:
    return torch.empty(0).set_(tensor.untyped_storage())


def row_major(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        n: nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format)) for n, p in model.named_parameters()
    }


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_updates_every_layout_alike(name: str) -> None:
    """On gradients as the reducers lay them out, against the same optimizer, unfused, on row-major parameters."""
    torch.manual_seed(0)
    config = compose([f"optimizer={name}", "optimizer.lr=0.05"]).config
    model = Layouts()
    plain = row_major(model)
    gaps = {n: _storage(p.detach()).clone() for n, p in model.named_parameters() if not is_dense(p)}
    optimizer = build_optimizer_for(config, model, CPU)
    groups = [
        {**{k: v for k, v in g.items() if k not in ("params", "param_names", "fused", "foreach")},
         "params": list(zip(g["param_names"], [plain[n] for n in g["param_names"]], strict=True))}
        for g in optimizer.param_groups
    ]  # fmt: skip
    reference = type(optimizer)(groups, foreach=False)
    buckets = FlatBuckets(model, 3, lambda _: None)
    for step in range(4):
        for index, (n, p) in enumerate(model.named_parameters()):
            gradient = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + index))
            plain[n].grad = gradient
            assert p.grad is not None
            p.grad.copy_(gradient)
        optimizer.step()
        reference.step()
        for n, p in model.named_parameters():
            torch.testing.assert_close(
                p.detach(), plain[n].detach(), rtol=1e-5, atol=1e-6, msg=lambda m, n=n: f"{n}: {m}"
            )
    buckets.close()
    for n, before in gaps.items():  # what lies between the entries belongs to somebody else
        p = dict(model.named_parameters())[n].detach()
        after, untouched = _storage(p), torch.ones(len(before), dtype=torch.bool)
        untouched.as_strided(p.shape, p.stride(), p.storage_offset()).fill_(False)
        assert torch.equal(after[untouched], before[untouched])


def test_gradients_in_the_flat_buffer_are_laid_out_as_autograd_lays_them_out() -> None:
    model = Layouts()
    sum((p * p).sum() for p in model.parameters()).backward()  # type: ignore[union-attr]
    wanted = [(p.grad.stride(), p.grad.clone()) for p in model.parameters() if p.grad is not None]
    buckets = FlatBuckets(model, 2, lambda _: None)
    sum((p * p).sum() for p in model.parameters()).backward()  # type: ignore[union-attr]
    for p, (stride, gradient) in zip(model.parameters(), wanted, strict=True):
        assert p.grad is not None and torch.equal(p.grad, gradient)
        assert [a == b for a, b, size in zip(p.grad.stride(), stride, p.shape, strict=True) if size > 1].count(
            False
        ) == 0
    assert int(buckets.flat.count_nonzero()) == sum(int(p.grad.count_nonzero()) for p in model.parameters())
    buckets.close()


def test_powersgd_factors_matrices_of_the_first_dimension() -> None:
    """Up to the order of the columns, the matrix is that of the row-major gradient."""
    for name, tensor in LAYOUTS.items():
        if tensor.dim() < 2 or name == "permuted":
            continue
        parameter = nn.Parameter(tensor)
        block = torch.zeros(tensor.numel())
        if is_dense(tensor):
            block.as_strided(tensor.shape, tensor.stride()).copy_(tensor)
        else:
            block.view(tensor.shape).copy_(tensor)
        matrix = as_matrix(parameter, block)
        assert matrix.untyped_storage().data_ptr() == block.untyped_storage().data_ptr()
        flat = tensor.reshape(len(tensor), -1)
        assert matrix.shape == flat.shape
        assert sorted(map(tuple, matrix.T.tolist())) == sorted(map(tuple, flat.T.tolist()))


def test_which_layouts_are_dense_and_which_share_places() -> None:
    dense = {name: is_dense(t) for name, t in LAYOUTS.items()}
    assert [n for n, d in dense.items() if not d] == ["every second column", "a stretch of each row"]
    assert not any(shares_places(t) for t in LAYOUTS.values())
    shared = [drawn(1, 3).expand(4, 3), drawn(6).as_strided((4, 3), (1, 1)), drawn(8).unfold(0, 4, 2)]
    assert all(shares_places(t) and not is_dense(t) for t in shared)
    assert not shares_places(drawn(1, 3).expand(1, 3))


def test_a_fused_optimizer_on_a_slice_is_refused_by_name() -> None:
    model = nn.Linear(4, 4)
    model.weight.data = drawn(4, 8)[:, ::2]
    with pytest.raises(ConfigError, match=r"optimizer\.fused=true.*'weight' is a slice"):
        build_optimizer(model, torch.optim.AdamW, {"lr": 0.1, "fused": True}, CPU)
