"""Whatever is wrong with a user's files (IDX, arrays, tables) is refused in one line: file, row, column, remedy."""

import gzip
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits, load_iris

from descent.data.arrays import Arrays
from descent.data.csv_file import Csv
from descent.data.idx import IdxFolder, read_idx
from tests.unit.data_refusal import refusal

# --- IDX ---


@pytest.fixture
def idx(tmp_path):
    pixels, labels = load_digits(return_X_y=True)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(
        bytes.fromhex("00000803 00000014 00000008 00000008") + pixels[:20].astype("u1").tobytes()
    )
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(
        bytes.fromhex("00000801 00000014") + labels[:20].astype("u1").tobytes()
    )
    return tmp_path


def test_idx_missing_folder_and_file(idx):
    for make, missing in (
        ({"path": str(idx / "none")}, f"folder {idx / 'none'}"),
        ({"path": str(idx), "split": "evaluate"}, f"{idx / 't10k-images-idx3-ubyte.gz'}"),
    ):
        message = refusal(IdxFolder, **make)
        assert message.startswith(missing)
        assert "apt-get install dataset-fashion-mnist" in message
        assert "data.path=FOLDER" in message
    assert "data.path is not set" in refusal(IdxFolder, path=None)
    assert "std=0.0 must be above 0" in refusal(IdxFolder, path=str(idx), std=0.0)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda raw: b"\x00\x00\x0d\x03" + raw[4:], "byte 0: the magic number is 0x00000d03"),
        (lambda raw: b"\x00\x00\x08\x01" + raw[4:], "not 0x00000803"),
        (lambda raw: raw[:7], "byte 7: the file ends within its header of 16 bytes"),
        (lambda raw: raw[:0], "byte 0: the file ends within its header"),
        (lambda raw: raw[:-5], "byte 1291: the file ends here, but its header promises 1296 bytes"),
        (lambda raw: raw + b"!", "byte 1296: more bytes follow"),
        (lambda raw: raw[:4] + b"\xff" * 12 + raw[16:], "promises 79228162458924105385300197391 "),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_idx_damage_is_named_with_its_byte(idx, damage, words, zipped):
    file = idx / "train-images-idx3-ubyte"
    broken = damage(file.read_bytes())
    if zipped:
        file.unlink()
        file = file.with_name(f"{file.name}.gz")
        broken = gzip.compress(broken)
    file.write_bytes(broken)
    message = refusal(IdxFolder, path=str(idx))
    assert words in message
    assert str(file) in message


def test_idx_gzip_that_is_cut_or_not_gzip_or_corrupt(idx):
    raw = (idx / "train-images-idx3-ubyte").read_bytes()
    packed = gzip.compress(raw)
    file = idx / "cut.gz"
    file.write_bytes(packed[: len(packed) // 2])
    assert "the file ends here, but its header promises 1296" in refusal(read_idx, file, 3)
    file.write_bytes(raw)
    assert f"{file} can't be read: Not a gzipped file" in refusal(read_idx, file, 3)
    file.write_bytes(packed[:-8] + bytes(8))  # the check sum
    assert f"{file} can't be read: CRC check failed" in refusal(read_idx, file, 3)
    file.write_bytes(packed[:-8])
    assert "byte 1296: corrupt gzip data" in refusal(read_idx, file, 3)


def test_idx_counts_and_labels(idx):
    labels = idx / "train-labels-idx1-ubyte"
    whole = labels.read_bytes()
    labels.write_bytes(bytes.fromhex("00000801 00000013") + whole[8:-1])
    message = refusal(IdxFolder, path=str(idx))
    assert "holds 20 images" in message
    assert "holds 19 labels" in message
    labels.write_bytes(whole[:13] + b"\x0a" + whole[14:])
    message = refusal(IdxFolder, path=str(idx))
    assert f"{labels}: label 10 of sample 5 (byte 13) is not below num_outputs=10" in message


# --- arrays ---


@pytest.fixture
def arrays(tmp_path):
    """Writes an .npz of iris after `change(x, y)`, gives its path."""

    def write(change=lambda x, y: (x, y)):
        x, y = change(*(part.copy() for part in load_iris(return_X_y=True)))
        np.savez(tmp_path / "iris.npz", inputs=x, targets=y)
        return str(tmp_path / "iris.npz")

    return write


def at(array, place, value):
    array = array.astype(float)
    array[place] = value
    return array


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, y: (x[:-1], y), "[inputs] has 149 rows, "),
        (lambda x, y: (x[:-1], y), "[targets] has 150: they must agree"),
        (lambda x, y: (at(x, (7, 2), np.nan), y), "[inputs], row 7 (from 0): holds nan"),
        (lambda x, y: (at(x, (149, 0), -np.inf), y), "[inputs], row 149 (from 0): holds -inf"),
        (lambda x, y: (x, at(y, 12, np.nan)), "[targets], row 12 (from 0): holds nan"),
        (lambda x, y: (x, at(y, 3, -1).astype(int)), "row 3 (from 0): label -1 is negative"),
        (
            lambda x, y: (x, at(y, 4, 3).astype(int)),
            "row 4 (from 0): label 3 is not below num_outp",
        ),
        (lambda x, y: (x, at(y, 5, 0.5)), "row 5 (from 0): label 0.5 is not a whole number"),
        (lambda x, y: (x.astype(object), y), "[inputs] holds Python objects"),
        (lambda x, y: (x, y.astype(str)), "[targets] holds <U21: give real numbers"),
        (lambda x, y: (x + 1j, y), "[inputs] holds complex128"),
        (lambda x, y: (x[0, 0], y), "[inputs] is a single number"),
        (lambda x, y: (x[:0], y[:0]), "[inputs] has no rows"),
        (lambda x, y: ((x > 0) * np.uint64(2**63), y), "integers must be below 2**63"),
    ],
)
def test_arrays_with_a_flaw(arrays, change, words):
    path = arrays(change)
    message = refusal(Arrays, path, num_outputs=3, targets_are="classes")
    assert words in message
    assert path in message


def test_a_flaw_beyond_the_first_piece_has_the_right_row(arrays, monkeypatch):
    monkeypatch.setattr("descent.data.arrays._CHUNK_BYTES", 256)
    assert "row 101 (from 0)" in refusal(Arrays, arrays(lambda x, y: (at(x, (101, 1), np.nan), y)))
    assert "row 88 (from 0)" in refusal(Arrays, arrays(lambda x, y: (x, at(y, 88, -2))), targets_are="classes")


def test_array_files_and_settings(arrays, tmp_path):
    path = arrays()
    assert "has no array 'x'; it has inputs, targets" in refusal(Arrays, path, inputs_key="x")
    assert "data.path is not set: give data.path=FILE.npz" in refusal(Arrays)
    assert "data.path is not set" in refusal(Arrays, inputs="x.npy")
    assert "either path (.npz) or inputs" in refusal(Arrays, path, inputs="x.npy")
    assert "targets_are='labels' is neither" in refusal(Arrays, path, targets_are="labels")
    message = refusal(Arrays, path, targets_are="values", num_outputs=2)
    assert "num_outputs=2, but a target has 1 values" in message
    missing = str(tmp_path / "none")
    assert f"{missing} doesn't exist" in refusal(Arrays, missing)
    assert f"{missing} doesn't exist" in refusal(Arrays, inputs=missing, targets=missing)


def test_array_files_that_are_broken(arrays, tmp_path):
    path = Path(arrays())
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    assert "is not an .npz archive" in refusal(Arrays, str(path))
    path.write_bytes(whole[:300] + b"????" + whole[304:])
    assert f"{path} [inputs] can't be read: Bad CRC-32" in refusal(Arrays, str(path))
    x, y = load_iris(return_X_y=True)
    x_file, y_file = tmp_path / "x.npy", tmp_path / "y.npy"
    np.save(x_file, x)
    np.save(y_file, y)
    x_file.write_bytes(x_file.read_bytes()[:-8])
    files = {"inputs": str(x_file), "targets": str(y_file)}
    assert f"{x_file} is not a whole .npy file" in refusal(Arrays, **files)
    x_file.write_bytes(b"a,b\n1,2\n")
    assert f"{x_file} is not a whole .npy file" in refusal(Arrays, **files)
    np.save(x_file, x.astype(object), allow_pickle=True)
    assert f"{x_file} holds Python objects" in refusal(Arrays, **files)


# --- tables ---


@pytest.fixture
def table(tmp_path):
    """Writes iris as CSV with one cell (row as in an editor, column) replaced."""

    def write(row=None, column=0, value=""):
        frame = load_iris(as_frame=True).frame
        lines = frame.to_csv(index=False).splitlines()
        if row is not None:
            cells = lines[row - 1].split(",")
            cells[column] = value
            lines[row - 1] = ",".join(cells)
        file = tmp_path / "iris.csv"
        file.write_text("\n".join(lines) + "\n")
        return str(file)

    return write


@pytest.mark.parametrize(
    ("row", "column", "value", "words"),
    [
        (2, 0, "5,1", "row 2: 6 columns, but the header has 5"),
        (17, 1, "x1", "row 17, column 'sepal width (cm)': value 'x1' is not a finite number"),
        (151, 3, "", "row 151, column 'petal width (cm)': empty cell is not a finite number"),
        (9, 2, "nan", "row 9, column 'petal length (cm)': value 'nan' is not a finite"),
        (9, 2, "1e999", "row 9, column 'petal length (cm)': value '1e999' is not a finite"),
        (9, 2, "1_0", "row 9, column 'petal length (cm)': value '1_0' is not a finite"),
        (30, 4, "", "row 30, column 'target': empty cell has no target"),
        (
            30,
            4,
            "setosa",
            "row 30, column 'target': value 'setosa' is unlike most others (numbers)",
        ),
        (1, 0, "target", "row 1: the column name 'target' occurs more than once"),
        (40, 1, '"3.5', "row 40: "),
    ],
)
def test_a_table_with_a_flaw(table, row, column, value, words):
    path = table(row, column, value)
    message = refusal(Csv, path, "target")
    assert f"{path}, {words}" in message


def test_rows_are_counted_as_an_editor_does(tmp_path):
    file = tmp_path / "notes.csv"
    file.write_text('note,x,y\n"two\nlines",1,0\n\nplain,oops,1\n')
    message = refusal(Csv, str(file), "y", ["x"])
    assert f"{file}, row 5, column 'x': value 'oops'" in message


def test_table_files_and_settings(table, tmp_path):
    path = table()
    assert "data.path is not set: give data.path=FILE.csv" in refusal(Csv, target="y")
    assert "data.target is not set" in refusal(Csv, path)
    message = refusal(Csv, path, "species")
    assert "row 1: no column 'species'; there are sepal length (cm), " in message
    assert "is data.delimiter right?" in refusal(Csv, path, "target", delimiter=";")
    assert "no column 'width'" in refusal(Csv, path, "target", ["width"])
    assert "data.features is empty" in refusal(Csv, path, "target", [])
    assert "which is data.target" in refusal(Csv, path, "target", ["target"])
    assert "data.delimiter='::' must be one" in refusal(Csv, path, "target", delimiter="::")
    assert "data.targets_are='x' is neither" in refusal(Csv, path, "target", targets_are="x")
    assert f"{tmp_path / 'none'} doesn't exist" in refusal(Csv, str(tmp_path / "none"), "y")
    assert "are more than data.max_mb=0.001, and reading" in refusal(Csv, path, "target", max_mb=0.001)
    file = tmp_path / "odd.csv"
    file.write_text("a,b\n")
    assert f"{file}: no rows below the header" in refusal(Csv, str(file), "b")
    file.write_text("b\n1\n")
    assert "no column is left beside the target 'b'" in refusal(Csv, str(file), "b")
    file.write_bytes(b"a,b\n\xff\xfe,1\n")
    assert f"{file} is not UTF-8 text" in refusal(Csv, str(file), "b")


def test_a_value_that_is_no_number_in_a_column_of_values(table):
    message = refusal(Csv, table(30, 4, "setosa"), "target", targets_are="values")
    assert "row 30, column 'target': value 'setosa' is not a finite number" in message
