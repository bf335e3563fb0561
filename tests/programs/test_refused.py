"""What can't be trained is refused before the run: in one line, by its name, with what to do instead."""

from pathlib import Path

import pytest

from descent.errors import DescentError
from tests.distributed.replicas import Case
from tests.programs.program import RUN

BASE = [
    "model=custom",
    "model._target_=tests.programs.refused.Net",
    "data=custom",
    "data.train._target_=tests.programs.pictures.Pictures",
]
OWN = ["task=custom", "task._target_=tests.programs.refused."]
REFUSED: dict[str, tuple[list[str], list[str]]] = {
    "a stream": (["data.train._target_=tests.programs.refused.Stream"], ["stream", "descent data index", "map-style"]),
    "a DataLoader": (
        ["data.train._target_=tests.programs.refused.loader"],
        ["DataLoader", "batch.size", "data.collate"],
    ),
    "samples of several shapes": (["data.train._target_=tests.programs.refused.Ragged"], ["data.collate._target_"]),
    "dicts without a task": (
        ["data.train._target_=tests.programs.segmentation.Masks"],
        ["{'image': float32 [2, 1, 8, 8]", "task=custom", "task=auto"],
    ),
    "a coupled loss": ([OWN[0], OWN[1] + "contrastive"], ["refused.contrastive", "couple(features)", "slots=1"]),
    "a mean over pixels": ([OWN[0], OWN[1] + "pixels"], ["descent.Mean(total, count)", "pixels"]),
    "words": ([OWN[0], OWN[1] + "words"], ["gives str", "descent.Mean"]),
    "a table": ([OWN[0], OWN[1] + "table"], ["gives float32 [2, 10] for 2 samples", "descent.Mean"]),
    "no key loss": ([OWN[0], OWN[1] + "without_loss"], ["'cross_entropy'", "without the key 'loss'"]),
    "no gradient": ([OWN[0], OWN[1] + "detached"], ["no gradient reaches", "detached"]),
    "nothing counted": ([OWN[0], OWN[1] + "nothing"], ["count is 0"]),
    "a negative count": ([OWN[0], OWN[1] + "negative"], ["count -2", "0 or more"]),
    "one argument": ([OWN[0], OWN[1] + "one_argument"], ["refused.one_argument", "must take (model, batch)"]),
    "a hidden state": (
        ["model._target_=tests.programs.refused.Hidden"],
        ["carries 'hidden' from batch to batch", "begin each forward with a new state"],
    ),
    "a hidden state without equal bits": (
        ["model._target_=tests.programs.refused.Hidden", "reduction=fast"],
        ["carries 'hidden' from batch to batch"],
    ),
    "a hidden state, with a task": (
        ["model._target_=tests.programs.refused.Hidden", OWN[0], OWN[1] + "entropy"],
        ["carry 'hidden' from batch to batch", "begin each forward with a new state"],
    ),
    "a hidden state deep inside": (
        ["model._target_=tests.programs.refused.Deep"],
        ["carries 'inner.0.cell.state[0]'", "let a sample be a longer piece"],
    ),
    "a hidden state in a buffer": (
        ["model._target_=tests.programs.refused.HiddenBuffer"],
        ["carries 'hidden' from batch to batch", "begin each forward with a new state"],
    ),
    "a hidden state of the task": (
        [OWN[0], OWN[1] + "Remembers"],
        ["refused.Remembers", "carry 'last'", "begin each forward with a new state"],
    ),
    "a memory": ([OWN[0], OWN[1] + "Moving"], ["refused.Moving"]),
    "a module of the task": (
        [OWN[0], OWN[1] + "Projected"],
        ["'head.weight'", "into the model", "a parameter of the task itself", "a teacher"],
    ),
    "a task that is a module": ([OWN[0], OWN[1] + "ProjectedModule"], ["'head.weight'", "into the model"]),
    "a loss of its parameters alone": (
        [OWN[0], OWN[1] + "Temperature"],
        ["the loss doesn't depend on the model's parameters"],
    ),
    "no method": ([OWN[0], OWN[1] + "NoMethod"], ["loss(model, batch)"]),
    "couple alone": ([OWN[0], OWN[1] + "NoFeatures"], ["features(model, batch)"]),
    "features of a batch": ([OWN[0], OWN[1] + "Mixed"], ["depend on the other samples"]),
    "a phase without a module": (
        [OWN[0], OWN[1] + "Half", "+task.phases={one: nowhere}"],
        ["phases.one", "no module 'nowhere'"],
    ),
    "a module of two phases": (
        [OWN[0], OWN[1] + "Half", '+task.phases={one: "1", two: "1"}'],
        ["'1.weight'", "the phases one and two"],
    ),
    "a phase without a method": ([OWN[0], OWN[1] + "Half", '+task.phases={three: "1"}'], ["no method three"]),
    "options of no phase": (["+optimizer.phases.generator.lr=0.1"], ["optimizer.phases", "no phases"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_by_name_with_a_way_out(tmp_path: Path, name: str) -> None:
    overrides, words = REFUSED[name]
    with pytest.raises(DescentError) as caught:
        Case.of([*RUN, *BASE, *overrides], tmp_path, 2)
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == []
