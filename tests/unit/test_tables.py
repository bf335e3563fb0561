"""Tables: which columns are taken, how text becomes categories, and that nothing is learnt of evaluation rows."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.compose import ColumnTransformer
from sklearn.metrics import r2_score
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from descent.config import build, compose
from descent.data.base import indices_in_root
from descent.data.csv_file import Csv
from descent.data.splits import split_indices
from descent.data.table_columns import Columns
from descent.errors import ConfigError, DataError
from descent.models.mlp import MLP
from descent.training.input.building import build_data, build_sets
from descent.training.plan import build_model, filled_spec

NUM_ROWS = 80


def table(num_rows=NUM_ROWS, seed=0):
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "id": [f"house {i}" for i in range(num_rows)],
            "area": rng.normal(100, 30, num_rows),
            "city": rng.choice(["Rome", "Oslo", "Bonn"], num_rows),
            "month": rng.integers(1, 13, num_rows),
            "price": rng.normal(3e5, 1e5, num_rows),
        }
    )


@pytest.fixture
def file(tmp_path):
    table().to_csv(tmp_path / "houses.csv", index=False)
    return str(tmp_path / "houses.csv")


def scikit_learn(frame, train, categories):
    """The inputs as scikit-learn makes them of the same table, in its order of columns: numbers, then categories."""
    numbers = [c for c in ("area", "month") if c not in categories]
    transformer = ColumnTransformer(
        [
            ("numbers", StandardScaler(), numbers),
            ("categories", OneHotEncoder(handle_unknown="ignore", sparse_output=False), categories),
        ]
    )
    return transformer.fit(frame.iloc[train]).transform(frame)


def in_the_same_order(data):
    """The inputs of a table of area, city and month, with the categories moved behind the numbers."""
    names = [data.preprocessing.names[at] for at in data.preprocessing.source.tolist()]
    kinds = [name in data.preprocessing.categories for name in names]
    return data.inputs[:, np.argsort(kinds, kind="stable")].numpy()


@pytest.mark.parametrize("categories", [["city"], ["city", "month"]])
def test_numbers_and_categories_are_those_of_scikit_learn(file, categories):
    train, evaluate = split_indices(NUM_ROWS, 0.2, 3)
    # pandas has the numbers of the months as integers, whose order is that of numbers; ours is that of texts
    frame = pd.read_csv(file, dtype={"month": str} if "month" in categories else None)
    expected = scikit_learn(frame, train, categories)
    for split, rows in (("train", train), ("evaluate", evaluate)):
        data = Csv(file, "price", drop=["id"], categories=categories, split=split, holdout=0.2, seed=3)
        np.testing.assert_allclose(in_the_same_order(data), expected[rows], atol=1e-5)
        assert data.input_shape == (expected.shape[1],)


def test_a_category_that_no_training_row_has_becomes_zeros_and_is_minus_1_in_the_raw_columns(tmp_path):
    frame = table()
    _, evaluate = split_indices(NUM_ROWS, 0.1, 0)
    frame.loc[evaluate[0], "city"] = "Atlantis"
    frame.to_csv(tmp_path / "a.csv", index=False)
    path = str(tmp_path / "a.csv")
    train = Csv(path, "price", drop=["id"], split="train")
    data = Csv(path, "price", drop=["id"], split="evaluate")
    assert train.preprocessing.categories == {"city": ("Bonn", "Oslo", "Rome")}
    assert data.inputs[0, 1:4].tolist() == [0, 0, 0]
    assert (data.inputs[1:, 1:4].sum(1) == 1).all()
    assert data.preprocessing.undo(data.inputs)[0, 1] == -1


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_raw_columns_become_inputs_and_come_back(data):
    num_rows = data.draw(st.integers(2, 20))
    kinds = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=5))  # 0: numbers; else the number of texts
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    names = tuple(f"c{i}" for i in range(len(kinds)))
    texts = {n: tuple(f"t{j}" for j in range(kind)) for n, kind in zip(names, kinds, strict=True) if kind}
    values = np.stack([rng.integers(0, k, num_rows) if k else rng.normal(5, 3, num_rows) for k in kinds], axis=1)
    columns = Columns(names, values.astype(float), texts, frozenset(set(names) - set(texts)), "a table")
    learnt = columns.learn(np.arange(num_rows // 2 + 1))
    raw = columns.raw(learnt)
    torch.testing.assert_close(learnt.undo(learnt(raw)), raw, rtol=1e-5, atol=1e-5)


def test_only_the_named_columns_are_standardized(file):
    raw = pd.read_csv(file)
    data = Csv(file, "price", ["area", "month"], standardize=["area"])
    np.testing.assert_array_equal(data.inputs[:, 1], raw["month"].to_numpy("f4"))
    train, _ = split_indices(NUM_ROWS, 0.1, 0)
    np.testing.assert_allclose(data.inputs[train, 0].mean(), 0, atol=1e-6)
    assert Csv(file, "price", "area", standardize=False).preprocessing is None


SPLIT_BY_DESCENT = ["data.evaluate=null", "data.train.split=all", "data.holdout=0.25", "data.test=0.2", "seed=5"]


def test_where_descent_splits_the_statistics_are_those_of_the_training_rows(file):
    overrides = [f"data.path={file}", "data.target=price", "data.drop=[id]", *SPLIT_BY_DESCENT]
    train, evaluate = build_data(compose(["data=csv", "loss=mse", *overrides]).config)
    rows = indices_in_root(train, np.arange(len(train)))
    expected = scikit_learn(pd.read_csv(file), rows, ["city"])
    for part in (train, evaluate):
        found = part.gather(np.arange(len(part)))[0][:, [0, 4, 1, 2, 3]].numpy()
        np.testing.assert_allclose(found, expected[indices_in_root(part, np.arange(len(part)))], atol=1e-5)
        assert part.preprocessing is not None and part.input_shape == (5,)


def test_the_built_in_table_is_standardized_by_its_training_rows_too():
    train, _ = build_data(compose(["data=breast_cancer", *SPLIT_BY_DESCENT]).config)
    inputs, _ = train.gather(np.arange(len(train)))
    torch.testing.assert_close(inputs.double().mean(0), torch.zeros(30).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(inputs.double().std(0, correction=0), torch.ones(30).double(), atol=1e-5, rtol=0)


def two_files(tmp_path, train, evaluate, target):
    train.to_csv(tmp_path / "train.csv", index=False)
    evaluate.to_csv(tmp_path / "evaluate.csv", index=False)
    given = [f"data.path={tmp_path}/train.csv", f"data.target={target}", "data.drop=[id]", "data.train.split=all"]
    evaluate_on = [f"data.evaluate.path={tmp_path}/evaluate.csv", "data.evaluate.split=all"]
    return build_data(compose(["data=csv", *given, *evaluate_on]).config)


def test_an_evaluation_file_follows_the_training_file(tmp_path):
    frame, other = table(), table(30, seed=1)
    other["area"] += 500
    other["city"] = other["city"].replace("Bonn", "Atlantis")
    train, evaluate = two_files(tmp_path, frame, other, "price")
    expected = (other["area"] - train.preprocessing.mean[0].item()) / train.preprocessing.std[0].item()
    np.testing.assert_allclose(evaluate.inputs[:, 0], expected, rtol=1e-5)
    names = ["Bonn", "Oslo", "Rome"]
    np.testing.assert_array_equal(evaluate.inputs[:, 1:4], np.array([[c == n for n in names] for c in other["city"]]))


def test_the_classes_of_an_evaluation_file_have_the_numbers_that_training_gave_them(tmp_path):
    other = table(30, seed=1)
    other = other[other["city"] != "Bonn"]
    train, evaluate = two_files(tmp_path, table(), other, "city")
    assert evaluate.class_names == train.class_names == ("Bonn", "Oslo", "Rome")
    assert [evaluate.class_names[i] for i in evaluate.targets] == other["city"].tolist()
    other.loc[other.index[0], "city"] = "Atlantis"
    with pytest.raises(
        DataError, match=r"data.evaluate: .*evaluate.csv has the class 'Atlantis', which the training set"
    ):
        two_files(tmp_path, table(), other, "city")
    with pytest.raises(DataError, match="are area, city; the training set has area, city, month: give both the same"):
        two_files(tmp_path, table(), table().drop(columns="month"), "price")


def test_rows_without_a_category_are_bad_records(tmp_path):
    frame = table()
    frame.loc[7, "city"] = None
    frame.to_csv(tmp_path / "a.csv", index=False)
    with pytest.raises(DataError, match="row 9, column 'city': empty cell is no category: fill it"):
        Csv(str(tmp_path / "a.csv"), "price", drop=["id"])
    data = Csv(str(tmp_path / "a.csv"), "price", drop=["id"], on_error="skip")
    assert data.inputs[[6, 8]].isfinite().all()
    with pytest.raises(DataError, match="row 9"):
        data.gather(np.array([7]))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"drop": ["ID"]}, "no column 'ID'; there are id, area, city, month, price"),
        ({"drop": ["price"]}, "data.drop holds 'price', which is data.target"),
        ({"drop": ["id"], "features": ["area"]}, "data.features and data.drop are both set"),
        ({"drop": ["id", "area", "city", "month"]}, "no column is left beside the target 'price'"),
        ({"drop": ["id"], "standardize": ["id"]}, "data.standardize names 'id', which is no input column"),
        ({"drop": ["id"], "standardize": ["city"]}, "data.standardize names 'city', which holds categories"),
        ({"drop": ["id"], "categories": ["town"]}, "data.categories names 'town', which is no input column"),
    ],
)
def test_names_of_columns_that_do_not_fit_are_refused(file, arguments, words):
    with pytest.raises(DataError, match=words):
        Csv(file, "price", **arguments)


def test_a_column_with_another_text_in_each_row_is_refused_unless_it_is_named(tmp_path):
    table(120).to_csv(tmp_path / "a.csv", index=False)
    with pytest.raises(DataError, match=r"column 'id': 120 different texts: leave it out \(data.drop=\[id\]\), or"):
        Csv(str(tmp_path / "a.csv"), "price")
    assert Csv(str(tmp_path / "a.csv"), "price", ["id"], categories=["id"]).input_shape == (108,)


def test_the_test_file_and_further_evaluation_files_follow_the_training_file(tmp_path, file):
    table(30, seed=2).to_csv(tmp_path / "other.csv", index=False)
    spec = ["_target_: descent.data.csv_file.Csv", f"path: {tmp_path}/other.csv", "target: price", "drop: [id]"]
    other = "{" + ", ".join(spec) + "}"
    given = [f"data.path={file}", "data.target=price", "data.drop=[id]", f"data.test={other}"]
    sets = build_sets(compose(["data=csv", "loss=mse", *given, f"data.evaluations.more={other}"]).config)
    for part in (sets.test, sets.others["more"]):
        assert part.preprocessing is sets.train.preprocessing
        raw = Csv(str(tmp_path / "other.csv"), "price", ["area"], standardize=False).inputs[:, 0]
        expected = (raw - sets.train.preprocessing.mean[0]) / sets.train.preprocessing.std[0]
        torch.testing.assert_close(part.inputs[:, 0], expected.float(), rtol=1e-5, atol=1e-5)


# --- values to predict ---


def values_config(file, *overrides):
    return compose(
        ["data=csv", f"data.path={file}", "data.target=price", "data.drop=[id]", "loss=mse", *overrides]
    ).config


def test_the_model_begins_with_the_scale_of_the_training_rows_and_a_saved_spec_has_it(file):
    config = values_config(file, *SPLIT_BY_DESCENT)
    train, _ = build_data(config)
    rows = indices_in_root(train, np.arange(len(train)))
    prices = pd.read_csv(file)["price"].to_numpy("f4")[rows].astype("f8")
    model, inputs = build_model(config, train), train.gather(np.arange(8))[0]
    np.testing.assert_allclose(model.target_scale, [prices.mean(), prices.std()], rtol=1e-9)
    plain = MLP(train.input_shape, 1, init="kaiming_normal")
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(inputs), prices.mean() + prices.std() * plain(inputs), rtol=1e-5, atol=0)
    assert build(filled_spec(config, train), [], "model").target_scale == model.target_scale


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.target_scale=false"],
        ["data.target_scale=null"],
        ["loss=bce_with_logits", "data.targets_are=values"],
        ["data.target=city", "loss=cross_entropy"],
    ],
)
def test_no_scale_is_taken_where_it_means_nothing(file, overrides):
    config = values_config(file, *overrides)
    assert build_model(config, build_data(config)[0]).target_scale is None


def test_whole_numbers_are_values_for_a_loss_that_compares_values(tmp_path):
    table().assign(price=lambda t: t.price.astype(int)).to_csv(tmp_path / "a.csv", index=False)
    train, evaluate = build_data(values_config(tmp_path / "a.csv"))
    assert (train.num_outputs, evaluate.class_names, train.targets.dtype) == (1, None, torch.float32)
    train, _ = build_data(values_config(tmp_path / "a.csv", "data.target=month", "loss=cross_entropy"))
    assert train.num_outputs == 12
    with pytest.raises(DataError, match=r"column 'city': value '.*' is not a finite number"):
        build_data(values_config(tmp_path / "a.csv", "data.target=city"))


@pytest.mark.parametrize("scale", [[1.0], [0.0, 0.0], [0.0, -1.0], [float("nan"), 1.0], "ab", 3.0])
def test_scales_that_are_none_are_refused(scale):
    with pytest.raises(ConfigError, match=r"model.target_scale=.*give \[mean, deviation\]"):
        MLP([2], 1, target_scale=scale)


def test_a_few_steps_explain_prices_of_hundreds_of_thousands(tmp_path):
    frame = table(400)
    frame["price"] = 2500 * frame["area"] + frame["city"].map({"Rome": 5e4, "Oslo": 1e5, "Bonn": 0.0})
    frame.to_csv(tmp_path / "a.csv", index=False)
    config = values_config(tmp_path / "a.csv")
    train, evaluate = build_data(config)
    model = build_model(config, train)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(200):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(train.inputs), train.targets).backward()
        optimizer.step()
    with torch.no_grad():
        assert r2_score(evaluate.targets, model(evaluate.inputs)) > 0.9
