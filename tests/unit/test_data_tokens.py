"""Tokens and text: what is on disk is what a sample says, shard by shard."""

import json
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from descent.data.shards import INDEX, ShardIndex, shard_of, write_index
from descent.data.splits import hold_out
from descent.data.text import Text, text_files
from descent.data.tokenize import Bytes, tokenize, tokenizer_of
from descent.data.tokens import DTYPES, Tokens
from descent.errors import DataError
from tests.unit.test_data_refusals import refusal

LIBRARY = Path(sysconfig.get_paths()["stdlib"])


def write_tokens(folder: Path, shards: list[np.ndarray], dtype: str, vocabulary: int) -> None:
    """Shards as another program might write them, with their index."""
    folder.mkdir(exist_ok=True)
    listed = []
    for number, ids in enumerate(shards):
        file = folder / f"{number}.bin"
        ids.astype(DTYPES[dtype]).tofile(file)
        listed.append(shard_of(file, file.name, len(ids)))
    write_index(
        folder,
        ShardIndex("tokens", tuple(listed), {"dtype": dtype, "vocabulary": vocabulary}),
    )


def joined(folder: Path, pattern: str) -> bytes:
    return b"".join(file.read_bytes() + b"\0" for file in text_files(folder, pattern))


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=6),
    block=st.integers(1, 30),
    kind=st.sampled_from([("uint8", 256), ("uint16", 30_000), ("uint16", 65_536), ("uint32", 2**31)]),
    seed=st.integers(0, 1000),
)
def test_windows_of_every_shard_and_their_next_tokens(tmp_path_factory, lengths, block, kind, seed):
    dtype, vocabulary = kind
    rng = np.random.default_rng(seed)
    shards = [rng.integers(0, vocabulary, n, dtype=np.int64) for n in lengths]
    folder = tmp_path_factory.mktemp("tokens")
    write_tokens(folder, shards, dtype, vocabulary)
    expected = [
        (ids[at : at + block], ids[at + 1 : at + block + 1])
        for ids in shards
        for at in range(0, len(ids) - block, block)
    ]
    if not expected:
        assert "no shard has the" in refusal(Tokens, str(folder), block)
        return
    data = Tokens(str(folder), block)
    assert len(data) == len(expected)
    chosen = rng.integers(0, len(data), 50)
    inputs, targets = data.gather(chosen)
    np.testing.assert_array_equal(inputs, np.stack([expected[i][0] for i in chosen]))
    np.testing.assert_array_equal(targets, np.stack([expected[i][1] for i in chosen]))
    assert inputs.dtype == targets.dtype == torch.int64
    assert data.num_outputs == vocabulary


def test_tokenized_bytes_are_the_files_whatever_the_shards(tmp_path):
    for number, shard_tokens in enumerate((1 << 20, 7000, 100)):
        out = tmp_path / str(number)
        found = []
        index = tokenize(
            LIBRARY / "json",
            out,
            Bytes(),
            pattern="**/*.py",
            shard_tokens=shard_tokens,
            progress=lambda done, total, found=found: found.append((done, total)),
        )
        written = b"".join((out / shard.file).read_bytes() for shard in index.shards)
        assert written == joined(LIBRARY / "json", "**/*.py")
        assert all(shard.samples == shard_tokens for shard in index.shards[:-1])
        assert found[-1][0] == found[-1][1] > 0
        assert Tokens(str(out), 32).index == index


def test_a_hugging_face_tokenizer_gives_its_ids_and_separates_files(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    files = text_files(LIBRARY / "json", "*.py")
    trained = Tokenizer(models.BPE(unk_token="[UNK]"))
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.train(
        [str(file) for file in files],
        trainers.BpeTrainer(vocab_size=400, special_tokens=["[UNK]", "<|endoftext|>"]),
    )
    trained.save(str(tmp_path / "tokenizer.json"))
    tokenizer = tokenizer_of(str(tmp_path / "tokenizer.json"), None)
    index = tokenize(LIBRARY / "json", tmp_path / "out", tokenizer, pattern="*.py")
    end = trained.token_to_id("<|endoftext|>")
    expected = [
        token for file in files for token in [*trained.encode(file.read_text(), add_special_tokens=False).ids, end]
    ]
    written = np.fromfile(tmp_path / "out" / index.shards[0].file, dtype="<u2")
    assert written.tolist() == expected
    assert index.about["vocabulary"] == trained.get_vocab_size()
    assert "knows no such token" in refusal(tokenizer_of, str(tmp_path / "tokenizer.json"), "<other>")


def test_a_tokenizer_that_is_none(tmp_path):
    (tmp_path / "t.json").write_text("{}")
    assert "is not a tokenizer.json" in refusal(tokenizer_of, str(tmp_path / "t.json"), None)
    assert "doesn't exist" in refusal(tokenizer_of, str(tmp_path / "none.json"), None)
    assert "always separates files by a zero byte" in refusal(tokenizer_of, "bytes", "x")


def test_a_set_is_not_written_over_and_empty_text_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("hello\n")
    tokenize(tmp_path, tmp_path / "out", Bytes())
    assert "holds a data set already" in refusal(tokenize, tmp_path, tmp_path / "out", Bytes())
    assert "no file matches '*.md'" in refusal(tokenize, tmp_path, tmp_path / "b", Bytes(), pattern="*.md")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "empty.txt").write_text("")
    done = tokenize(tmp_path / "c", tmp_path / "d", Bytes())  # its separator is a token
    assert done.samples == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda found: found.update(format="x"), "is not an index of shards"),
        (
            lambda found: found.update(kind="images"),
            "kind is 'images', data of kind 'tokens' are needed: use data=images",
        ),
        (lambda found: found.update(shards=[]), "a list 'shards'"),
        (lambda found: found["shards"][0].pop("sha256"), "shard 0: needs exactly file, bytes, sha256, samples"),
        (lambda found: found["shards"][0].update(samples=-1), "shard 0: bytes and samples must be whole numbers"),
        (lambda found: found["shards"][0].update(file="../secret"), "does not lie beside the index"),
        (lambda found: found["shards"][0].update(file="/etc/passwd"), "does not lie beside the index"),
        (lambda found: found["shards"].append(found["shards"][0]), "names a file twice"),
        (lambda found: found["about"].update(dtype="float32"), "dtype 'float32' is none of uint8"),
        (lambda found: found["about"].update(vocabulary="many"), "vocabulary 'many' is not a number"),
        (lambda found: found["shards"][0].update(samples=7), "bytes for 7 tokens of uint8"),
        (lambda found: found["shards"][0].update(bytes=7, samples=7), "the index says 7: write it again"),
    ],
)
def test_what_is_wrong_with_an_index_is_named(tmp_path, change, words):
    write_tokens(tmp_path, [np.arange(50) % 256], "uint8", 256)
    found = json.loads((tmp_path / INDEX).read_text())
    change(found)
    (tmp_path / INDEX).write_text(json.dumps(found))
    message = refusal(Tokens, str(tmp_path), 8)
    assert words in message
    assert str(tmp_path) in message


def test_tokens_without_path_index_or_shard(tmp_path):
    assert "data.path is not set" in refusal(Tokens)
    assert f"{tmp_path}/index.json: there is no such file" in refusal(Tokens, str(tmp_path))
    (tmp_path / INDEX).write_text("{")
    assert "is not JSON" in refusal(Tokens, str(tmp_path))
    write_tokens(tmp_path, [np.arange(50)], "uint8", 256)
    assert "block=0 must be at least 1" in refusal(Tokens, str(tmp_path), 0)
    (tmp_path / "0.bin").unlink()
    assert f"{tmp_path}/0.bin doesn't exist" in refusal(Tokens, str(tmp_path), 8)
    assert "no storage for gs:// here" in refusal(Tokens, "gs://bucket/x")


# --- text ---


def test_text_of_a_folder_and_of_a_file_is_their_bytes(tmp_path):
    text = joined(LIBRARY / "json", "*.py")
    data = Text(str(LIBRARY / "json"), 16, "*.py")
    inputs, targets = data.gather(np.arange(len(data)))
    assert bytes(inputs.flatten().tolist()) == text[: 16 * len(data)]
    assert bytes(targets.flatten().tolist()) == text[1 : 16 * len(data) + 1]
    (tmp_path / "all.txt").write_bytes(text)
    alone = Text(str(tmp_path / "all.txt"), 16)
    assert len(alone) == len(data)
    torch.testing.assert_close(alone.gather(np.arange(5)), data.gather(np.arange(5)))
    assert (data.num_outputs, data.input_shape) == (256, (16,))


def test_text_that_is_not_there(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    assert "data.path is not set" in refusal(Text)
    assert f"{tmp_path / 'no.txt'} doesn't exist" in refusal(Text, str(tmp_path / "no.txt"))
    assert f"{tmp_path / 'empty.txt'} is empty" in refusal(Text, str(tmp_path / "empty.txt"))
    assert "no file matches '*.md'" in refusal(Text, str(tmp_path), 8, "*.md")
    (tmp_path / "short.txt").write_text("short")
    assert "5 bytes don't fill one window of block=8" in refusal(Text, str(tmp_path / "short.txt"), 8)


# --- the held-out part of a sharded set keeps its shards ---


@settings(deadline=None, max_examples=30)
@given(
    counts=st.lists(st.integers(0, 40), min_size=2, max_size=8),
    share=st.floats(0.05, 0.6),
    seed=st.integers(0, 99),
)
def test_parts_know_which_shard_their_samples_lie_in(tmp_path_factory, counts, share, seed):
    folder = tmp_path_factory.mktemp("parts")
    write_tokens(folder, [np.arange(2 * n + 1) for n in counts], "uint16", 100)
    if sum(counts) < 2:
        return
    data = Tokens(str(folder), 2, window=10)
    try:
        parts = hold_out(data, share, seed)
    except DataError:
        return
    for part in parts:
        numbers = part.parent_indices(np.arange(len(part)))
        assert (np.diff(numbers) > 0).all()
        expected = np.searchsorted(numbers, data.layout.starts)
        np.testing.assert_array_equal(part.layout.starts, expected)
