"""A save from a GPU: copied by way of pinned memory while the next step computes."""

from pathlib import Path

import torch
from torch import Tensor, nn

from descent.checkpoint import manifest as checkpoint
from descent.checkpoint.writer import ShareWriter
from descent.messages import ShareWritten
from tests.unit.test_saver import state_of


def test_the_copy_behind_the_next_step_is_of_the_step_before(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(300, 400), nn.ReLU(), nn.Linear(400, 1)).cuda()
    optimizer = torch.optim.AdamW(model.parameters())
    parts: list[ShareWritten] = []
    saver = ShareWriter(tmp_path, parts.append)
    optimizer.register_step_pre_hook(lambda *_: saver.copied())
    expected: dict[int, dict[str, Tensor]] = {}
    for step in range(1, 7):
        optimizer.zero_grad()
        model(torch.rand(8, 300, device="cuda")).square().sum().backward()
        optimizer.step()
        state = state_of(model, optimizer)
        assert any(t.is_cuda for t in state.values())
        expected[step] = {n: t.detach().cpu().clone() for n, t in state.items()}
        saver.save(state, step=step, rank=0, world_size=1, generation=1, scalars={})
    saver.wait()
    assert saver._buffer.is_pinned()
    assert [p.error for p in parts] == [None] * 6
    for part in parts:
        target = checkpoint.commit(tmp_path, [part], run="r", config_sha256="c")
        tensors, _ = checkpoint.load(target)
        assert all(torch.equal(tensors[n], t) for n, t in expected[part.step].items())
