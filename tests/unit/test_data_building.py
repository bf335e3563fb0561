"""Data sets are built alike however often, by the run's seed; what can't be is refused, and so are keys that nothing follows."""

import os
import subprocess
import sys

import numpy as np
import pytest

from descent.config import compose
from descent.errors import DescentError
from descent.training.input.building import build_sets
from descent.training.plan import build_data, build_model, prepare

MODULE = '''
import random
import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

class Base(Dataset):
    num_outputs = 2
    def __len__(self): return 60
    def __getitem__(self, index): return torch.full((4,), float(index)), index % 2

class ShufflesInInit(Base):
    """Draws from all three global generators while it is built; splits by itself."""
    def __init__(self, part="train"):
        self.order = list(range(120))
        random.shuffle(self.order)
        self.order = self.order[:60] if part == "train" else self.order[60:]
        self.noise = np.random.rand() + float(torch.rand(()))
    def __getitem__(self, index):
        return torch.tensor([self.order[index], self.noise]).float(), index % 2

class OwnGenerator(Base):
    def __init__(self): self.scale = np.random.default_rng().random()
    def __getitem__(self, index): return torch.full((4,), self.scale * index), index % 2

class DrawsFromItsOwn(Base):
    """A seeded generator of its own, drawn from at each read: what a sample is depends on the reads before."""
    def __init__(self): self.generator = np.random.default_rng(0)
    def __getitem__(self, index): return torch.tensor(self.generator.random(4)).float(), index % 2

class OtherClasses(Base):
    count = 0
    def __init__(self):
        OtherClasses.count += 1
        self.classes = ["a", "b"][:: 1 if OtherClasses.count % 2 else -1]

class DrawsForOne(Base):
    def __getitem__(self, index): return torch.rand(4) if index == 30 else torch.zeros(4), index % 2

class Augments(Base):
    def __getitem__(self, index): return torch.rand(4) + random.random() + np.random.rand(), index % 2

class SaysThatItDraws(DrawsForOne):
    draws_random_numbers = True

class Words(Base):
    def __init__(self): self.words = list({f"word{i}" for i in range(60)})
    def __getitem__(self, index): return torch.tensor([float(self.words[index][4:])] * 4), index % 2

class NumpyNet(nn.Linear):
    def __init__(self):
        super().__init__(4, 2)
        self.weight.data += torch.from_numpy(np.random.rand(2, 4)).float() + random.random()
'''


@pytest.fixture(autouse=True)
def _module(tmp_path, monkeypatch):
    (tmp_path / "made_data.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("made_data", None)


def config(kind: str, *overrides: str):
    data = ["data=custom", f"data.train._target_=made_data.{kind}"]
    return compose([*data, "trusted_modules=[made_data]", "batch.size=10", "workers=1", *overrides]).config


def refusal(config) -> str:
    with pytest.raises(DescentError) as caught:
        prepare(config, cores=1, gpus=0)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def everything(data) -> list:
    return data.gather(np.arange(len(data)))[0].tolist()


def test_what_a_class_draws_while_it_is_built_follows_the_seed():
    def built(seed: int) -> list:
        np.random.seed(None)
        given = config("ShufflesInInit", f"seed={seed}", "+data.evaluate._target_=made_data.ShufflesInInit",
                       "+data.evaluate.part=evaluate")  # fmt: skip
        train, evaluate = build_data(given)
        numbers = [row[0] for row in [*everything(train), *everything(evaluate)]]
        assert sorted(numbers) == list(range(120)), "both draw the same, so the parts are disjoint"
        return everything(train)

    assert built(3) == built(3)
    assert built(3) != built(4)
    prepare(config("ShufflesInInit"), cores=1, gpus=0)


def test_what_a_network_draws_while_it_is_built_follows_the_seed():
    def built(seed: int) -> list:
        given = config("Base", f"seed={seed}", "model=custom", "model._target_=made_data.NumpyNet")
        return build_model(given, build_data(given)[0]).weight.tolist()

    assert built(3) == built(3)
    assert built(3) != built(4)


@pytest.mark.parametrize("kind", ["OwnGenerator", "DrawsFromItsOwn"])
def test_what_nothing_seeds_is_refused_with_the_cure(kind):
    message = refusal(config(kind))
    assert message.startswith("data.train: sample ")
    assert f"of made_data.{kind} differs when the data set is built and read again" in message
    assert "seed the generators that it makes itself (numpy.random.default_rng(0)" in message


def test_other_classes_at_the_second_build_are_refused():
    message = refusal(config("OtherClasses"))
    assert "made_data.OtherClasses built twice differs in its classes: ('a', 'b') and ('b', 'a')" in message


def test_draws_on_a_few_samples_are_refused_unless_the_class_says_that_it_draws():
    message = refusal(config("DrawsForOne", "data.holdout=0.2"))
    assert "sample 30 of made_data.DrawsForOne draws random numbers (torch), most others don't" in message
    found = prepare(config("SaysThatItDraws"), cores=1, gpus=0)
    assert found.train.draws_random_numbers
    assert prepare(config("Augments"), cores=1, gpus=0).train.draws_random_numbers


# --- keys that nothing follows ---


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data=stdlib", "data.holdout=0.2"], "data.holdout=0.2: stdlib has an evaluation set of its own, so nothing"),
        (["loss=mse", "model.num_outputs=1", "data=csv", "data.path=v.csv", "data.target=y",
          "checkpoint.keep_best=eval/accuracy"],
         "checkpoint.keep_best=eval/accuracy: the evaluations of this run have no such figure; did you mean eval/"),
        (["data=text", "data.path=t.txt", "model=gpt", "data.block=8", "data.holdout=0", "checkpoint.keep_best=eval/accuracy"],
         "checkpoint.keep_best=eval/accuracy: there is nothing to evaluate on; set data.holdout"),
    ],
)  # fmt: skip
def test_a_key_that_nothing_follows_is_refused(tmp_path, overrides, words):
    (tmp_path / "v.csv").write_text("x,y\n" + "".join(f"{i},{i + 0.5}\n" for i in range(100)))
    (tmp_path / "t.txt").write_text("hello world, " * 90)
    assert words in refusal(compose([*overrides, "batch.size=4", "workers=1"]).config)


def test_with_the_cure_a_test_part_is_split_off():
    given = compose(["data.test=0.2", "data.evaluate=null", "data.train.split=all"]).config
    train, evaluate = build_data(given)
    assert len(train) + len(evaluate) == 1797 - round(1797 * 0.2)


@pytest.mark.parametrize(
    "overrides", [["data.test=0.2"], ["data.test=0.2", "data.evaluate=null", "data.train.split=all"]]
)
def test_a_test_part_is_disjoint_from_the_others_and_the_same_whatever_trains(overrides):
    sets = build_sets(compose(overrides).config)
    assert len(sets.test) == pytest.approx(0.2 * (len(sets.train) + len(sets.test)), rel=0.15)
    rows = [{tuple(x.flatten().tolist()) for x in data.gather(np.arange(len(data)))[0]} for data in sets[:3]]
    assert all(rows) and len(rows[0] & rows[2]) <= 2 and len(rows[1] & rows[2]) <= 2  # digits has a few doubles
    again = build_sets(compose([*overrides, "workers=1", "model=resnet"]).config)
    assert again.test.digest == sets.test.digest


def test_a_test_set_of_its_own_and_further_sets_by_name():
    given = [
        "data.test={_target_: descent.data.digits.Digits}",
        "data.evaluations.b._target_=descent.data.breast_cancer.BreastCancer",
    ]
    sets = build_sets(compose(given).config)
    assert len(sets.test) == 1797 and len(sets.train) == len(build_sets(compose([]).config).train)
    assert list(sets.others) == ["b"]


def test_the_workers_of_a_private_cluster_hash_texts_alike_in_every_run():
    code = (
        "from descent.cluster.workers import ray_cluster\n"
        "ray_cluster.connect(None)\n"
        "import ray\n"
        "print(ray.get(ray.remote(lambda: hash('word')).remote()))\n"
        "ray_cluster.disconnect()\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONHASHSEED"}
    in_worker = _printed(code, environment)
    assert in_worker == _printed("print(hash('word'))", {**environment, "PYTHONHASHSEED": "0"})


def _printed(code: str, environment: dict[str, str]) -> str:
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout
