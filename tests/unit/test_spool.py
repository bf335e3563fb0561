"""The spool: what was appended is read once and in order, whatever happened to the files."""

import json
import math
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from descent.tracking import spool as spool_module
from descent.tracking.delivery import Batch, DeliveryThread
from descent.tracking.spool import Spool, SpoolBusyError

RECORDS = st.lists(
    st.dictionaries(st.text(max_size=8), st.integers() | st.text(max_size=20), max_size=3),
    min_size=1,
    max_size=8,
)


def read_all(spool: Spool) -> list:
    """Everything that is left, acknowledged as it goes."""
    found = []
    while batch := spool.read():
        found += [record for _, record in batch]
        spool.acknowledge(batch[-1][0])
    return found


@settings(max_examples=60, deadline=None)
@given(records=RECORDS, cut=st.integers(min_value=0), more=RECORDS)
def test_a_torn_end_loses_only_the_record_it_tore(records, cut, more):
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        spool = Spool(directory)
        for record in records:
            spool.append(record)
        spool.close()
        path = directory / "records.jsonl"
        whole = path.read_bytes()
        kept = whole[: cut % (len(whole) + 1)]
        path.write_bytes(kept)

        spool = Spool(directory)
        for record in more:
            spool.append(record)
        assert read_all(spool) == records[: kept.count(b"\n")] + more
        spool.close()


@settings(max_examples=60, deadline=None)
@given(records=RECORDS, junk=st.binary(max_size=40), at=st.integers(0, 7))
def test_a_damaged_line_is_skipped_and_the_others_stay(records, junk, at):
    junk = b"\xff" + junk.replace(b"\n", b"")  # never JSON
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        lines = [json.dumps(record).encode() for record in records]
        lines.insert(at, junk)
        (directory / "records.jsonl").write_bytes(b"\n".join(lines) + b"\n")
        spool = Spool(directory)
        assert [record for record in read_all(spool) if record is not None] == records
        spool.close()


@pytest.mark.parametrize("mark", ["", "x", "-5", "99999999", "3"])
def test_without_a_sound_mark_nothing_is_skipped_beyond_a_line(tmp_path, mark):
    spool = Spool(tmp_path)
    spool.append({"n": 1})
    spool.append({"n": 2})
    spool.close()
    (tmp_path / "acknowledged").write_text(mark)
    spool = Spool(tmp_path)
    assert read_all(spool)[-1] == {"n": 2}
    spool.close()


def test_acknowledged_records_are_not_read_after_reopening(tmp_path):
    spool = Spool(tmp_path)
    for n in range(5):
        spool.append({"n": n})
    spool.acknowledge(spool.read()[2][0])
    spool.close()
    spool = Spool(tmp_path)
    assert spool.pending() == 2
    assert read_all(spool) == [{"n": 3}, {"n": 4}]
    assert spool.pending_bytes == 0
    spool.close()


def test_space_is_reused_once_all_is_delivered(tmp_path, monkeypatch):
    monkeypatch.setattr(spool_module, "REUSE_BYTES", 100)
    spool = Spool(tmp_path)
    for n in range(50):
        spool.append({"n": n})
    assert len(read_all(spool)) == 50
    assert (tmp_path / "records.jsonl").stat().st_size == 0
    spool.append({"n": 50})
    spool.close()
    spool = Spool(tmp_path)
    assert read_all(spool) == [{"n": 50}]
    spool.close()


def test_one_holder_at_a_time(tmp_path):
    spool = Spool(tmp_path)
    with pytest.raises(SpoolBusyError):
        Spool(tmp_path)
    spool.close()
    Spool(tmp_path).close()


def test_threads_append_whole_lines(tmp_path):
    spool = Spool(tmp_path)

    def work(thread: int) -> None:
        for n in range(200):
            spool.append({"thread": thread, "n": n, "padding": "x" * (n % 50)})

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = read_all(spool)
    for i in range(4):
        assert [r["n"] for r in found if r["thread"] == i] == list(range(200))
    spool.close()


def test_kept_files_have_names_of_their_own(tmp_path):
    spool = Spool(tmp_path / "spool")
    source = tmp_path / "plot.png"
    source.write_text("one")
    first = spool.keep_file(source)
    source.write_text("two")
    second = spool.keep_file(source)
    assert (spool.files / first).read_text() == "one"
    assert (spool.files / second).read_text() == "two"
    spool.drop_file(first)
    assert not (spool.files / first).exists()
    assert (spool.files / second).exists()
    spool.close()


class RefusingSink:
    """A store in memory that refuses what MLflow would, batch by batch, and fails at first."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.metrics: list = []
        self.params: dict[str, str] = {}
        self.performed: list = []

    def send(self, batch: Batch) -> None:
        if self.failures:
            self.failures -= 1
            raise ConnectionError("gone")
        assert len(batch.metrics) + len(batch.params) + len(batch.tags) <= 1000
        assert len(batch.params) <= 100
        if any(key.startswith("bad") for key in [*(m[0] for m in batch.metrics), *batch.params]):
            raise ValueError("refused")
        self.metrics += batch.metrics
        self.params.update(batch.params)

    def connect(self) -> None:
        pass

    def perform(self, record: dict) -> None:
        self.performed.append((record["op"], len(self.metrics)))

    def refuses(self, error: Exception) -> bool:
        return isinstance(error, ValueError)

    def is_transient(self, error: Exception) -> bool:
        return isinstance(error, ConnectionError)

    def probe(self) -> None:
        self.send(Batch())


def test_one_refused_value_costs_nothing_else(tmp_path):
    spool = Spool(tmp_path)
    metrics = {f"m{i}": float(i) for i in range(2500)} | {"bad/metric": 1.0, "nan": math.nan}
    spool.append({"op": "batch", "step": 3, "time": 7, "metrics": metrics})
    spool.append({"op": "batch", "params": {f"p{i}": "v" for i in range(250)} | {"bad": "v"}})
    spool.append({"op": "text", "text": "", "path": ""})
    spool.append({"op": "batch", "step": 4, "time": 8, "metrics": {"last": 1.0}})
    sink = RefusingSink(failures=2)
    delivery = DeliveryThread(spool, sink)
    delivery.start()
    assert delivery.finish(60)
    assert (delivery.delivered, delivery.refused) == (4, 2)
    keys = [metric[0] for metric in sink.metrics]
    assert sorted(keys) == sorted([*(f"m{i}" for i in range(2500)), "nan", "last"])
    assert len(sink.params) == 250
    assert sink.performed == [("text", 2501)]  # after what came before it, before the rest
    refused = [json.loads(line) for line in (tmp_path / "refused.jsonl").read_text().splitlines()]
    assert [r["record"]["metrics"] or r["record"]["params"] for r in refused] == [
        [["bad/metric", 1.0, 7, 3]],
        {"bad": "v"},
    ]
