"""The stand-in refuses what a GPU refuses, and keeps its memory apart."""

import pytest
import torch


def test_a_tensor_on_the_cpu_is_no_neighbour() -> None:
    on_gpu, on_cpu = torch.ones(3, device="cuda"), torch.ones(3)
    for wrong in (
        lambda: on_gpu + on_cpu,
        lambda: on_gpu.add_(on_cpu),
        lambda: torch.nn.functional.linear(on_gpu, on_cpu[None]),
        lambda: torch._foreach_add([on_gpu], [on_cpu]),
    ):
        with pytest.raises(RuntimeError, match="same device"):
            wrong()
    assert (on_gpu + torch.tensor(2.0)).tolist() == [3.0] * 3  # a scalar is


def test_memory_is_copied_where_it_changes_sides_and_shared_where_it_does_not() -> None:
    on_gpu = torch.arange(6.0, device="cuda")
    on_cpu, view = on_gpu.cpu(), on_gpu.view(2, 3)[1]
    on_gpu.mul_(2)
    assert on_cpu.tolist() == [0, 1, 2, 3, 4, 5] and view.tolist() == [6, 8, 10]
    assert view.is_cuda and view.data_ptr() == on_gpu[3:].data_ptr()


def test_gradients_are_those_of_the_cpu() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten())
    x, found = torch.randn(5, 1, 8, 8), []
    for device in ("cpu", "cuda"):
        net.to(device).zero_grad()
        net(x.to(device)).square().mean().backward()
        found.append([p.grad.cpu().clone() for p in net.parameters() if p.grad is not None])
    torch.testing.assert_close(*found)
