"""A share from a GPU: copied by way of pinned memory while the next step computes."""

from pathlib import Path

import torch
from torch import Tensor, nn

from descent.checkpoint.manifest import commit_checkpoint
from descent.checkpoint.reader import read_checkpoint
from descent.checkpoint.writer import ShareWriter
from descent.messages import ShareWritten
from tests.unit.test_share_writer import state_of


def test_the_copy_behind_the_next_step_is_of_the_step_before(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(300, 400), nn.ReLU(), nn.Linear(400, 1)).cuda()
    optimizer = torch.optim.AdamW(model.parameters())
    shares: list[ShareWritten] = []
    writer = ShareWriter(tmp_path, shares.append)
    optimizer.register_step_pre_hook(lambda *_: writer.wait_for_copy())
    expected: dict[int, dict[str, Tensor]] = {}
    for step in range(1, 7):
        optimizer.zero_grad()
        model(torch.rand(8, 300, device="cuda")).square().sum().backward()
        optimizer.step()
        state = state_of(model, optimizer)
        assert any(t.is_cuda for t in state.values())
        expected[step] = {n: t.detach().cpu().clone() for n, t in state.items()}
        writer.write(state, step=step, rank=0, world_size=1, generation=1, scalars={})
    writer.wait_until_written()
    assert writer._buffer.is_pinned()
    assert [s.error for s in shares] == [None] * 6
    for share in shares:
        target = commit_checkpoint(tmp_path, [share], run="r", config_sha256="c")
        tensors, _ = read_checkpoint(target)
        assert all(torch.equal(tensors[n], t) for n, t in expected[share.step].items())
