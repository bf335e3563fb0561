"""The columns of a table: numbers and categories, and how they become the inputs of a model.

What is learnt of the columns (mean, deviation, which categories there are) is learnt of the training samples alone,
and the other sets follow.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from descent.data.bad_records import KnownBad
from descent.data.base import Indices, TensorData
from descent.data.preprocessing import Floats, Preprocessing, Standardize, standardization_of
from descent.errors import DataError


class TableColumns(Preprocessing):
    """Float64 [n, columns] to float32 [n, width]: a number stays one column, a category becomes a column for each of its texts.

    In the raw columns, a category is the number of its text in `categories[name]`. A text that the training samples
    don't have is -1, and becomes zeros in all of its columns.

    names: of the raw columns. mean, std: [columns]; a number becomes (raw - mean) / std.
    """

    source: Tensor
    code: Tensor
    mean: Tensor
    std: Tensor

    def __init__(
        self, names: Sequence[str], categories: Mapping[str, Sequence[str]], mean: Floats, std: Floats
    ) -> None:
        super().__init__()
        self.names = tuple(names)
        self.categories = {name: tuple(texts) for name, texts in categories.items()}
        # For each column of the inputs: its raw column, and the category that it stands for; -1 for a number.
        pairs = [
            (at, code)
            for at, name in enumerate(self.names)
            for code in (range(len(self.categories[name])) if name in self.categories else [-1])
        ]
        source, code = torch.tensor(pairs, dtype=torch.int64).T
        self.register_buffer("source", source.contiguous())
        self.register_buffer("code", code.contiguous())
        self.register_buffer("mean", torch.from_numpy(np.array(mean))[source])
        self.register_buffer("std", torch.from_numpy(np.array(std))[source])

    def forward(self, raw: Tensor) -> Tensor:
        values = raw.double().index_select(1, self.source)
        return torch.where(self.code < 0, (values - self.mean) / self.std, (values == self.code).double()).float()

    def undo(self, inputs: Tensor) -> Tensor:
        values = inputs.double()
        # Counted from 1, so that zeros in all columns of a category become 0, and then -1.
        summands = torch.where(self.code < 0, values * self.std + self.mean, values.round() * (self.code + 1))
        raw = torch.zeros(len(inputs), len(self.names), dtype=torch.float64, device=inputs.device)
        raw.index_add_(1, self.source, summands)
        return raw - torch.tensor([float(name in self.categories) for name in self.names], device=inputs.device)


@dataclass(frozen=True)
class Columns:
    """The input columns of a table, before anything is learnt of them.

    names: [columns]. values: [rows, columns]; of a category, the number of its text in `texts[name]`.
    texts: the texts of each column of categories. standardized: the columns of numbers that are standardized.
    source: the table, for messages.
    """

    names: tuple[str, ...]
    values: Floats
    texts: Mapping[str, tuple[str, ...]]
    standardized: frozenset[str]
    source: str

    def of(self, rows: Indices) -> "Columns":
        """The same columns of these rows."""
        return Columns(self.names, self.values[rows], self.texts, self.standardized, self.source)

    def learn(self, rows: Indices) -> Preprocessing | None:
        """The preprocessing by these rows; None where the numbers are used as they are.

        Raises DataError where a column can't be standardized, or there is no row to learn of.
        """
        if not (self.standardized or self.texts):
            return None
        if len(rows) == 0:
            raise DataError(
                f"{self.source}: none of its training rows can be used, so nothing can be learnt of its columns"
            )
        # The mean of a category's numbers means nothing, and isn't used.
        with np.errstate(over="ignore", invalid="ignore"):
            learnt = standardization_of(self.values, rows)
        mean, std = learnt.mean.numpy(), learnt.std.numpy()
        for at, name in enumerate(self.names):
            if name not in self.standardized:
                mean[at], std[at] = 0.0, 1.0
            elif not np.isfinite(mean[at] + std[at]):
                raise DataError(f"{self.source}, column {name!r}: its numbers are too large to be standardized")
        if not self.texts:
            return Standardize(mean, std)
        categories = {}
        for name, texts in self.texts.items():
            present = np.unique(self.values[rows, self.names.index(name)]).astype(np.int64)
            categories[name] = [texts[number] for number in present]
        return TableColumns(self.names, categories, mean, std)

    def raw(self, preprocessing: Preprocessing | None) -> Tensor:
        """The values as `preprocessing` takes them, [rows, columns]: the numbers of the categories are its own."""
        if not isinstance(preprocessing, TableColumns):
            return torch.from_numpy(self.values)
        values = self.values.copy()
        for name, texts in self.texts.items():
            at, known = self.names.index(name), preprocessing.categories[name]
            number_of = {text: number for number, text in enumerate(known)}
            numbers = np.array([number_of.get(text, -1) for text in texts], dtype=np.float64)
            codes = np.nan_to_num(values[:, at], nan=-1.0).astype(np.int64)  # an unusable row has no number
            values[:, at] = np.where(codes < 0, -1.0, numbers[codes])
        return torch.from_numpy(values)


class TableData(TensorData):
    """A table in memory, whose preprocessing is learnt of the training samples.

    columns, targets, bad: of the samples of this set. preprocessing: learnt of the training samples already.
    target_scale: (mean, standard deviation) of the training samples' values, which a model may begin with; None where
    the targets are classes, or nobody wants that.
    """

    def __init__(
        self,
        columns: Columns,
        targets: Tensor,
        preprocessing: Preprocessing | None,
        *,
        num_outputs: int,
        name: str,
        source: str,
        class_names: Sequence[str] | None = None,
        bad: KnownBad | None = None,
        target_scale: tuple[float, float] | None = None,
    ) -> None:
        self._columns = columns
        self.target_scale = target_scale
        super().__init__(
            self._inputs(preprocessing),
            targets,
            num_outputs=num_outputs,
            name=name,
            source=source,
            class_names=class_names,
            preprocessing=preprocessing,
            bad=bad,
        )

    def _inputs(self, preprocessing: Preprocessing | None) -> Tensor:
        raw = self._columns.raw(preprocessing)
        made: Tensor = raw.float() if preprocessing is None else preprocessing(raw)
        return made

    def _use(self, preprocessing: Preprocessing | None) -> None:
        self.inputs, self.preprocessing = self._inputs(preprocessing), preprocessing
        self.input_shape, self._digest = tuple(self.inputs.shape[1:]), None

    def learn_of(self, samples: Indices) -> None:
        """Learn the preprocessing of these samples: they are the ones to train on. Views must be made afterwards."""
        usable = samples if self._bad is None else samples[~self._bad.is_bad[samples]]
        self._use(self._columns.learn(usable))
        if self.target_scale is not None:
            self.target_scale = scale_of(self.targets[torch.from_numpy(usable)].numpy())

    def follow(self, train: "TableData", where: str) -> None:
        """Use the preprocessing and the class numbers of the training set.

        Raises DataError, with the key `where` of this set, where its columns or its targets are others.
        """
        ours, theirs = self._columns, train._columns
        if ours.names != theirs.names:
            raise DataError(
                f"{where}: the input columns of {self.source} are {', '.join(ours.names)}; the training set has "
                f"{', '.join(theirs.names)}: give both the same columns in the same order (data.features=[…])"
            )
        for name in ours.names:
            if (name in ours.texts) != (name in theirs.texts):
                kinds = ("text", "numbers") if name in ours.texts else ("numbers", "text")
                raise DataError(
                    f"{where}: column {name!r} of {self.source} holds {kinds[0]}, and {kinds[1]} in the training set: mend "
                    f"the table, or name the column as categories in both (data.categories=[{name}])"
                )
        self._follow_targets(train, where)
        self._use(train.preprocessing)

    def _follow_targets(self, train: "TableData", where: str) -> None:
        ours, theirs = self.class_names, train.class_names
        if ours == theirs:
            return
        if ours is None or theirs is None:
            kinds = ("values", "classes") if ours is None else ("classes", "values")
            raise DataError(
                f"{where}: the targets of {self.source} are {kinds[0]}, and {kinds[1]} in the training set: set "
                "data.targets_are to classes or values"
            )
        unknown = [name for name in ours if name not in theirs]
        if unknown:
            raise DataError(
                f"{where}: {self.source} has the class {unknown[0]!r}, which the training set doesn't have; there are "
                f"{', '.join(theirs[:8])}{' …' if len(theirs) > 8 else ''}"
            )
        number_of = torch.tensor([theirs.index(name) for name in ours])
        self.targets = self.labels = number_of[self.targets]
        self.class_names, self.num_outputs = theirs, train.num_outputs


def scale_of(values: npt.NDArray[np.float32]) -> tuple[float, float]:
    """(mean, standard deviation) of the values, [n, 1]; the deviation of a constant is 1."""
    mean, deviation = float(values.mean(dtype=np.float64)), float(values.std(dtype=np.float64))
    return mean, deviation if deviation > 1e-12 * abs(mean) else 1.0
