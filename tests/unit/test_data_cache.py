"""Shards from elsewhere: fetched once a node, verified, within bounds, whatever goes wrong."""

import errno
import hashlib
import json
import multiprocessing as mp
import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from descent.data import cache as cache_module
from descent.data import files
from descent.data.cache import NodeCache, use_cache
from descent.data.images import Images
from descent.data.shards import local_file
from descent.data.tokens import Tokens
from descent.errors import DataError
from descent.storage import LocalStore, open_store
from descent.storage.local import explaining
from descent.training.input.feed import Feed
from descent.training.input.sampling import SampleOrder
from tests.unit.test_data_tokens import write_tokens


class Elsewhere(LocalStore):
    """A folder that is treated as if it lay beyond a network; counts what is fetched, and can fail."""

    folder = None

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.fetched: list[str] = []
        self.faults: list = []

    @property
    def address(self) -> str:
        return f"s3://far{self.root}"

    def download(self, key: str, target: Path, **expected) -> None:
        """As of a folder; a fault is done to the file for the time of this transfer."""
        self.fetched.append(key)
        if not self.faults:
            return super().download(key, target, **expected)
        file, content = self.root / key, (self.root / key).read_bytes()
        try:
            with explaining(target):
                self.faults.pop(0)(file)
            return super().download(key, target, **expected)
        finally:
            file.write_bytes(content)


@pytest.fixture
def far(tmp_path):
    """A store with three files of 1,000 bytes, and `name -> sha256`."""
    folder = tmp_path / "far"
    folder.mkdir()
    for name in "abc":
        (folder / name).write_bytes(name.encode() * 1000)
    return Elsewhere(folder)


def sha256(name: str) -> str:
    return hashlib.sha256(name.encode() * 1000).hexdigest()


def own(folder: Path) -> Path:
    """The cache's own folder below the one that the user gives."""
    return folder / "descent-data-cache"


def get(cache: NodeCache, far: Elsewhere, name: str) -> Path:
    return cache.get(far, name, 1000, sha256(name))


def test_a_file_is_fetched_once(tmp_path, far):
    cache = NodeCache(tmp_path / "cache", 10_000)
    paths = {get(cache, far, "a") for _ in range(3)}
    assert far.fetched == ["a"]
    assert paths.pop().read_bytes() == b"a" * 1000


def test_what_was_used_longest_ago_goes_first(tmp_path, far):
    cache = NodeCache(tmp_path / "cache", 2_500)
    a, b = get(cache, far, "a"), get(cache, far, "b")
    os.utime(b, ns=(1, 1))
    os.utime(a, ns=(2, 2))
    c = get(cache, far, "c")
    assert (a.exists(), b.exists(), c.exists()) == (True, False, True)
    mapped = np.memmap(a, dtype=np.uint8, mode="r")
    os.utime(a, ns=(1, 1))
    get(cache, far, "b")
    assert not a.exists()
    assert bytes(mapped) == b"a" * 1000, "a process that has the file mapped keeps it"
    held = [f for f in own(tmp_path / "cache").iterdir() if f.is_file() and f.name != "CACHEDIR.TAG"]
    assert sum(f.stat().st_size for f in held) <= 2_500


def flip(target: Path) -> None:
    content = bytearray(target.read_bytes())
    content[len(content) // 2] ^= 1
    target.write_bytes(content)


def cut(target: Path) -> None:
    os.truncate(target, 700)


@pytest.mark.parametrize("fault", [flip, cut])
def test_a_corrupt_or_cut_transfer_is_fetched_again_and_refused_at_last(tmp_path, far, fault):
    cache = NodeCache(tmp_path / "cache", 10_000)
    far.faults = [fault, fault]
    assert get(cache, far, "a").read_bytes() == b"a" * 1000
    assert far.fetched == ["a"] * 3
    far.faults = [fault] * 3
    with pytest.raises(DataError, match=r"is corrupt: its SHA-256|700 bytes instead of 1000") as caught:
        get(cache, far, "b")
    assert f"{far.address}/b" in str(caught.value)
    assert not list((own(tmp_path / "cache") / "coming").glob(f"*{sha256('b')}*")), "nothing half done"
    assert get(cache, far, "b").read_bytes() == b"b" * 1000


def full(_: Path) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_takes_the_cache_s_own_files_first_and_is_named_at_last(tmp_path, far):
    cache = NodeCache(tmp_path / "cache", 10_000)
    a = get(cache, far, "a")
    far.faults = [full]
    get(cache, far, "b")
    assert not a.exists(), "it gave way"
    far.faults = [full] * 5
    with pytest.raises(DataError, match=r"No space left on device.*data\.cache\.dir"):
        get(cache, far, "c")
    far.faults = []
    assert get(cache, far, "c").exists()


def test_a_file_larger_than_the_cache_is_refused_with_both_sizes(tmp_path, far):
    with pytest.raises(DataError, match=r"has 1000 bytes, the cache holds 900: .*data\.cache\.gb"):
        get(NodeCache(tmp_path / "cache", 900), far, "a")


def _fetch_all(folder: str, source: str, start, out) -> None:
    far = Elsewhere(Path(source))
    cache = NodeCache(Path(folder), 10_000)
    start.wait()
    for name in "abc" * 5:
        assert get(cache, far, name).read_bytes() == name.encode() * 1000
    out.put(len(far.fetched))


@pytest.mark.usefixtures("far")
def test_the_workers_of_a_node_share_one_fetch(tmp_path):
    context = mp.get_context("spawn")
    start, out = context.Event(), context.Queue()
    workers = [
        context.Process(target=_fetch_all, args=(str(tmp_path / "cache"), str(tmp_path / "far"), start, out))
        for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    start.set()
    assert sum(out.get(timeout=60) for _ in workers) == 3
    for worker in workers:
        worker.join(30)
        assert worker.exitcode == 0


def _die_while_fetching(folder: str, source: str) -> None:
    far = Elsewhere(Path(source))
    far.faults = [lambda _: os.kill(os.getpid(), signal.SIGKILL)]
    get(NodeCache(Path(folder), 2_500), far, "a")


def test_what_a_dead_process_was_fetching_takes_no_room(tmp_path, far):
    child = mp.get_context("spawn").Process(
        target=_die_while_fetching, args=(str(tmp_path / "cache"), str(tmp_path / "far"))
    )
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    coming = own(tmp_path / "cache") / "coming"
    assert any(coming.iterdir())
    cache = NodeCache(tmp_path / "cache", 2_500)
    get(cache, far, "b")
    get(cache, far, "c")
    assert not any(coming.iterdir())
    assert get(cache, far, "a").read_bytes() == b"a" * 1000


# --- what is not the cache's own stays ---


def test_files_beside_the_cache_and_foreign_names_in_it_are_never_deleted(tmp_path, far):
    """As when somebody gives a home folder: it holds far more than the cache may."""
    home = tmp_path / "home"
    (home / "papers").mkdir(parents=True)
    kept = [home / "thesis.tex", home / "a.bin", home / ("f" * 64), home / "papers" / "b.lock"]
    for file in kept:
        file.write_bytes(b"x" * 5000)
    cache = NodeCache(home, 1_500)
    first = get(cache, far, "a")
    kept += [own(home) / "notes.txt", own(home) / "coming" / "notes"]
    for file in kept[-2:]:
        file.write_bytes(b"x" * 5000)
    (own(home) / ("0" * 64)).symlink_to(home / "thesis.tex")
    get(cache, far, "b")
    assert not first.exists(), "its own file gave way"
    assert all(file.stat().st_size == 5000 for file in kept)
    assert (own(home) / "CACHEDIR.TAG").read_text().startswith("Signature: 8a477f597d28d172789f06886806bc55\n")


def test_a_folder_of_the_cache_s_name_that_holds_somebody_s_files_is_refused(tmp_path, far):
    own(tmp_path).mkdir()
    (own(tmp_path) / "mine").write_bytes(b"x")
    with pytest.raises(DataError, match=r"data\.cache\.dir=.*holds files and no CACHEDIR.TAG"):
        get(NodeCache(tmp_path, 10_000), far, "a")
    assert [f.name for f in own(tmp_path).iterdir()] == ["mine"]


@pytest.mark.parametrize(
    "sha256", ["../" * 20 + "etc/x", "../" + "a" * 61, "A" * 64, "g" * 64, "a" * 63 + "\n", "", "a/b"]
)
def test_a_hash_that_is_none_never_becomes_a_path(tmp_path, far, sha256):
    with pytest.raises(DataError, match=r"sha256 .* is not 64 hexadecimal digits"):
        NodeCache(tmp_path / "cache", 10_000).get(far, "a", 1000, sha256)
    assert not (tmp_path / "cache").exists()


def test_a_name_from_an_index_can_not_bend_the_path_of_its_copy(tmp_path, far):
    odd = "a.b c\u202e$(x)"
    (tmp_path / "far" / odd).write_bytes(b"a" * 1000)
    path = NodeCache(tmp_path / "cache", 10_000).get(far, odd, 1000, sha256("a"))
    assert path == own(tmp_path / "cache") / sha256("a") and path.read_bytes() == b"a" * 1000


@pytest.mark.parametrize(
    "change", [{"sha256": "../" + "a" * 61}, {"sha256": "Z" * 64}, {"file": "../x"}, {"file": "a//b"}]
)
@pytest.mark.parametrize("where", ["shards", "members"])
def test_what_an_index_says_is_looked_at_before_it_is_a_path(tmp_path, change, where):
    shard = {"file": "a", "bytes": 1000, "sha256": sha256("a"), "samples": 1}
    entries = {"shards": shard, "members": shard, where: {**shard, **change}}
    about = {"classes": ["x"], "members": entries["members"]}
    content = {"format": "descent-shards-1", "kind": "images", "about": about, "shards": [entries["shards"]]}
    (tmp_path / "index.json").write_text(json.dumps(content))
    (tmp_path / "a").write_bytes(b"a" * 1000)
    with pytest.raises(DataError, match=r"64 hexadecimal digits|does not lie beside the index"):
        Images(str(tmp_path), size=[1, 1])


# --- a set of shards elsewhere, through the feed ---


@pytest.fixture
def far_tokens(tmp_path, monkeypatch):
    """12 shards of 40 windows on s3://far, and the store that serves them."""
    rng = np.random.default_rng(0)
    shards = [rng.integers(0, 256, 40 * 8 + 1) for _ in range(12)]
    write_tokens(tmp_path / "set", shards, "uint8", 256)
    opened = Elsewhere(tmp_path / "set")
    monkeypatch.setattr(
        files, "open_store", lambda where: opened if str(where) == "s3://far/set" else open_store(where)
    )
    monkeypatch.setattr(cache_module, "_cache", [])
    use_cache(str(tmp_path / "cache"), 2.3e-6)  # 2,300 bytes: 7 of the 12 shards
    return opened


def test_an_epoch_from_elsewhere_is_the_local_one_and_shards_come_ahead(far_tokens, tmp_path):
    data = Tokens("s3://far/set", 8, window=80)
    local = Tokens(str(tmp_path / "set"), 8, window=80)
    order = SampleOrder.of(data, 30, seed=5)
    feed = Feed(data, order, torch.device("cpu"))
    seen = []
    for step in range(1, 2 * len(data) // 30 + 1):
        feed.prepare(step, [(0, (0, 16)), (1, (16, 30))], 8)
        parts = [feed.fetch(step, *piece) for piece in ((0, 8), (8, 16), (16, 24), (24, 30))]
        indices = order.samples_of(step)
        torch.testing.assert_close([torch.cat(part) for part in zip(*parts, strict=True)], list(local.gather(indices)))
        seen += indices.tolist()
    assert sorted(seen) == sorted([*range(len(data))] * 2)
    # each shard at most about once an epoch: a window's shards stay until the window is through
    assert 12 < len(far_tokens.fetched) <= 28


@pytest.mark.usefixtures("far_tokens")
def test_a_cache_too_small_for_two_windows_is_refused():
    with pytest.raises(DataError, match=r"data\.cache\.gb=2.3e-06: two windows of 480 samples"):
        Tokens("s3://far/set", 8, window=480)


def test_a_shard_that_stays_corrupt_ends_the_run_by_name(far_tokens):
    data = Tokens("s3://far/set", 8, window=80)
    far_tokens.faults = [flip] * 99
    with pytest.raises(DataError, match=r"s3://far.*\.bin"):
        data.gather(np.arange(4))


@pytest.mark.usefixtures("far_tokens")
def test_one_file_from_elsewhere_is_fetched_again_when_it_changed(tmp_path):
    file = tmp_path / "set" / "0.bin"
    first = local_file("s3://far/set/0.bin")
    assert first.read_bytes() == file.read_bytes()
    assert local_file("s3://far/set/0.bin") == first
    file.write_bytes(b"changed")
    os.utime(file, ns=(1, 1))
    assert local_file("s3://far/set/0.bin").read_bytes() == b"changed"


def test_two_threads_want_the_same_shard(tmp_path, far):
    cache, found = NodeCache(tmp_path / "cache", 10_000), []
    threads = [threading.Thread(target=lambda: found.append(get(cache, far, "a"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(set(found)) == 1 and len(found) == 4
    assert far.fetched == ["a"]
