"""What torch says of an operation without a deterministic kernel becomes one line that names the cure."""

from collections.abc import Iterator

import pytest
import torch

from descent.errors import TrainingError
from descent.training.determinism import only_deterministic, refuse_undeterministic


@pytest.fixture
def default_mode() -> Iterator[None]:
    """Whatever the test sets, the next one finds torch as it is by itself."""
    threads = torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("default_mode")
def test_an_operation_without_a_deterministic_kernel_is_named_with_the_cure() -> None:
    only_deterministic(torch.device("cpu"))
    with pytest.raises(RuntimeError) as torchs:
        torch.zeros(3).put_(torch.tensor([1, 1]), torch.ones(2))
    with pytest.raises(TrainingError, match=r"reduction=exact: put_ does not have .*use reduction=fast"):
        refuse_undeterministic(torchs.value)


def test_any_other_error_stays_what_it_is() -> None:
    """As the trainer uses it: what it lets pass is raised again."""
    other = RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    def step() -> None:
        try:
            raise other
        except RuntimeError as error:
            refuse_undeterministic(error)
            raise

    with pytest.raises(RuntimeError) as seen:
        step()
    assert seen.value is other


@pytest.mark.usefixtures("default_mode")
def test_threads_add_up_in_one_order() -> None:
    def gradient() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(50, 64, generator=generator, requires_grad=True)
        index = torch.randint(0, 50, (4000,), generator=generator)
        (weight[index].sin() * torch.randn(4000, 64, generator=generator)).sum().backward()
        assert weight.grad is not None
        return weight.grad

    torch.set_num_threads(1)
    expected = gradient()
    torch.set_num_threads(2)
    only_deterministic(torch.device("cpu"))
    for _ in range(20):
        assert torch.equal(gradient(), expected)
