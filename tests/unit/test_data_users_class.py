"""A user's own data set: read by one thread, as PyTorch's DataLoader reads it, and its errors in one line each."""

import copy
import sqlite3
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from descent.config import compose
from descent.data.bad_records import BadRecords
from descent.data.map_style import MapStyle, adapt
from descent.errors import DataError, DescentError
from descent.training.input.feed import Feed
from descent.training.input.sampling import SampleOrder
from descent.training.plan import build_data, prepare

CPU = torch.device("cpu")
MODULE = '''
import sqlite3, threading, time
import torch
from torch.utils.data import Dataset

class OneHandle(Dataset):
    """Records of 8 bytes in a file, read through one handle: a seek, then a read."""
    def __init__(self, file):
        self.handle = open(file, "rb")
        self.threads = {threading.get_ident()}
    def __len__(self):
        return 200
    def __getitem__(self, index):
        self.threads.add(threading.get_ident())
        self.handle.seek(8 * index)
        time.sleep(0.0002)
        number = int.from_bytes(self.handle.read(8), "little")
        return torch.tensor([float(number)]), number % 2

class Table(Dataset):
    num_outputs = 2
    def __init__(self, file):
        self.connection = sqlite3.connect(file)
    def __len__(self):
        return self.connection.execute("select count(*) from numbers").fetchone()[0]
    def __getitem__(self, index):
        (number,) = self.connection.execute("select number from numbers where rowid = ?", (index + 1,)).fetchone()
        return torch.tensor([float(number)] * 64), number % 2

class Strange(Exception):
    def __init__(self, code, detail):
        super().__init__(f"code {code}: {detail}")

class Fails(Dataset):
    num_outputs = 2
    def __init__(self, at=0, fail_in="read"):
        self.at = at
        if fail_in == "init":
            raise Strange(3, "no table")
        self.fail_in = fail_in
    def __len__(self):
        if self.fail_in == "len":
            raise Strange(4, "no length")
        return 40
    def __getitem__(self, index):
        if index == self.at:
            raise Strange(7, "torn\\nin two")
        return torch.zeros(64), index % 2
'''


@pytest.fixture(autouse=True)
def _module(tmp_path, monkeypatch):
    (tmp_path / "user_data.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("user_data", None)


def config(kind: str, *overrides: str):
    return compose(
        ["data=custom", f"data.train._target_=user_data.{kind}", "trusted_modules=[user_data]", *overrides]
    ).config


@pytest.mark.timeout(60)
def test_one_file_handle_gives_the_records_that_were_asked_for_while_training_and_evaluation_read(tmp_path):
    (tmp_path / "records").write_bytes(b"".join(i.to_bytes(8, "little") for i in range(200)))
    train, evaluate = build_data(config("OneHandle", "+data.train.file=records", "data.holdout=0.3"))
    order = SampleOrder.of(train, 20, seed=1)
    training, evaluating = Feed(train, order, CPU), Feed(evaluate, None, CPU)
    for step in range(1, 8):
        training.prepare(step, [(0, (0, 20))], 5)
        held_out, _ = evaluating.take(np.arange(10))
        assert held_out[:, 0].tolist() == evaluate.parent_indices(np.arange(10)).tolist()
        got = torch.cat([training.fetch(step, first, first + 5)[0] for first in range(0, 20, 5)])
        assert got[:, 0].tolist() == train.parent_indices(order.samples_of(step)).tolist()
    threads = train.data.dataset.threads
    assert len(threads) == 1 and threading.get_ident() not in threads


@pytest.mark.timeout(60)
def test_an_sqlite_connection_can_be_used_for_building_checking_and_reading_ahead(tmp_path):
    with sqlite3.connect(tmp_path / "table.db") as connection:
        connection.execute("create table numbers (number int)")
        connection.executemany("insert into numbers values (?)", [(i,) for i in range(60)])
    found = prepare(config("Table", "+data.train.file=table.db", "batch.size=10", "workers=1"), cores=1, gpus=0)
    order = SampleOrder.of(found.train, 10, seed=0)
    feed = Feed(found.train, order, CPU)
    feed.prepare(1, [(0, (0, 10))], 10)
    inputs, _ = feed.fetch(1, 0, 10)
    assert inputs[:, 0].tolist() == found.train.parent_indices(order.samples_of(1)).tolist()
    assert found.train.digest == found.train.digest


def test_a_class_that_says_thread_safe_is_read_by_as_many_threads_as_it_says():
    class Parallel(Dataset):
        thread_safe = True
        readers = 3

        def __init__(self):
            self.meeting = threading.Barrier(3)
            self.open = False

        def __len__(self):
            return 30

        def __getitem__(self, index):
            if self.open:
                self.meeting.wait(30)  # passes only where three threads read at the same time
            return torch.tensor([float(index)]), 0

    data = adapt(Parallel())
    data.dataset.open = True
    order = SampleOrder.of(data, 3, seed=0)
    feed = Feed(data, order, CPU)
    feed.prepare(1, [(0, (0, 3))], 1)
    got = [int(feed.fetch(1, first, first + 1)[0]) for first in range(3)]
    assert got == order.samples_of(1).tolist()


def test_without_saying_so_no_two_threads_are_ever_inside_a_class():
    class Counts(Dataset):
        def __init__(self):
            self.inside, self.most = 0, 0

        def __len__(self):
            return 50

        def __getitem__(self, index):
            self.inside += 1
            self.most = max(self.most, self.inside)
            time.sleep(0.0002)
            self.inside -= 1
            return torch.tensor([float(index)]), 0

    data = MapStyle(Counts())
    with ThreadPoolExecutor(4) as threads:
        batches = list(threads.map(data.gather, [np.arange(i, i + 8) for i in range(20)]))
    assert data.dataset.most == 1
    assert [int(inputs[0]) for inputs, _ in batches] == list(range(20))


def test_a_class_with_gather_of_its_own_is_read_in_one_thread_too():
    class Whole:
        name, source, digest, input_shape, num_outputs = "whole", "here", "0" * 16, (1,), 2

        def __init__(self):
            self.threads = set()

        def __len__(self):
            return 12

        def __getitem__(self, index):
            return torch.tensor([float(index)]), torch.tensor(0)

        def gather(self, indices):
            self.threads.add(threading.current_thread().name)
            if 11 in indices:
                raise RuntimeError("gone")
            return torch.from_numpy(indices)[:, None].float(), torch.zeros(len(indices), dtype=torch.int64)

    data = adapt(Whole())
    assert data.gather(np.array([3, 1]))[0].tolist() == [[3.0], [1.0]]
    assert data.dataset.threads == {"data_0"}
    with pytest.raises(DataError, match=r"Whole\.gather: RuntimeError: gone \(test_data_users_class\.py, line \d+\)$"):
        data.gather(np.array([11]))


# --- errors ---


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], "sample 0 of user_data.Fails: Strange: code 7: torn in two (user_data.py, line "),
        (
            ["+data.train.fail_in=len"],
            "user_data.Fails: len() failed with Strange: code 4: no length (user_data.py, line ",
        ),
        (["+data.train.fail_in=init"], "data.train: Fails failed: Strange: code 3: no table (user_data.py, line "),
    ],
)
def test_any_exception_of_a_users_class_is_one_line_with_its_file_and_line(overrides, words):
    with pytest.raises(DescentError) as caught:
        prepare(config("Fails", *overrides), cores=1, gpus=0)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_located_error_keeps_its_class_whatever_its_constructor_takes():
    composed = compose(["data=custom", "data.train._target_=user_data.Fails", "trusted_modules=[user_data]"])

    class TwoArguments(DataError):
        def __init__(self, first, second):
            super().__init__(f"data.train: {first} {second}")

    for error in (BadRecords("data.train: torn", [1, 2]), TwoArguments("a", "b")):
        located = composed.located(error)
        assert type(located) is type(error)
        assert str(error) in str(located)


def test_bad_records_survive_the_way_between_processes():
    other = copy.deepcopy(BadRecords("torn", [3, 4]))  # goes the way of pickling
    assert (str(other), other.rows) == ("torn", [3, 4])


def test_a_first_sample_that_cannot_be_read_is_skipped_where_bad_ones_are():
    train, _ = build_data(config("Fails", "data.on_error=skip", "data.holdout=0"))
    assert train.input_shape == (64,)
    feed = Feed(train, None, CPU, on_error="skip")
    assert feed.take(np.array([0, 1]))[0].shape == (2, 64)
    assert feed.replaced() == 1
