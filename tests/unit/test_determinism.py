"""What torch says of an operation without a deterministic kernel becomes one line that names the cure."""

import pytest
import torch

from service.errors import TrainingError
from service.training.determinism import only_deterministic, refuse_undeterministic


def test_an_operation_without_a_deterministic_kernel_is_named_with_the_cure() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError) as torchs:
            torch.zeros(3).put_(torch.tensor([1, 1]), torch.ones(2))
    finally:
        torch.use_deterministic_algorithms(False)
    with pytest.raises(
        TrainingError, match=r"reduction=exact: put_ does not have .*use reduction=fast"
    ):
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


def test_a_cpu_needs_no_mode() -> None:
    only_deterministic(torch.device("cpu"))
    assert not torch.are_deterministic_algorithms_enabled()
