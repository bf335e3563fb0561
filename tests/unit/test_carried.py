"""A state that goes from one batch into the next is refused by name, whatever keeps it; what is only looked at is not."""

import pytest

from descent.config import compose
from descent.errors import ConfigError
from descent.training.plan import Prepared, prepare

RUN = ["model=custom", "trusted_modules=[tests]", "workers=2", "slots=2", "batch.size=12", "steps=2", "epochs=null"]


def prepared(model: str, *more: str) -> Prepared:
    return prepare(compose([*RUN, f"model._target_=tests.own_optim.{model}", *more]).config, cores=2.0, gpus=0.0)


@pytest.mark.parametrize("more", [(), ("batch.size=3",), ("reduction=fast",)], ids=str)
@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("CarriesAttribute", "hidden"),
        ("CarriesList", r"memory\[0\]"),
        ("CarriesBuffer", "carried"),
        ("CarriesGrowingBuffer", "carried"),
        ("CarriesLateBuffer", "carried"),
    ],
)
def test_a_carried_state_is_refused_by_name(model: str, name: str, more: tuple[str, ...]) -> None:
    with pytest.raises(
        ConfigError, match=f"{model}: carries .{name}. from batch to batch; .*begin each forward with"
    ) as e:
        prepared(model, *more)
    assert "register_buffer" not in str(e.value) and "\n" not in str(e.value)


def test_a_forward_that_takes_the_state_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"TakesHidden: its forward takes 'hidden' beside the inputs; .*begin each"):
        prepared("TakesHidden")


def test_a_task_that_carries_the_state_is_refused_by_name() -> None:
    task = ("task=custom", "task._target_=tests.own_optim.CarryingTask")
    with pytest.raises(ConfigError, match="CarryingTask: model or task carry 'hidden' from batch to batch"):
        prepared("Recurrent", *task)


@pytest.mark.parametrize("model", ["Recurrent", "OnlyLooksAtHidden"])
@pytest.mark.parametrize("more", [(), ("batch.size=3",), ("batch.micro_size=1",)], ids=str)
def test_one_that_begins_anew_in_each_forward_trains(model: str, more: tuple[str, ...]) -> None:
    assert prepared(model, *more).plan.changing_buffers == ()
