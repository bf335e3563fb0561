"""The tables that come with scikit-learn, read without importing scikit-learn.

The import would cost two seconds of a core in every process that opens the data, for one call of
`loadtxt`: on a small machine a fifth of the time to the first step.
"""

import importlib.util
from pathlib import Path

import numpy as np
import numpy.typing as npt

from descent.errors import DataError


def read_table(file: str, skip_header: bool) -> npt.NDArray[np.float64]:
    """The numbers of one of scikit-learn's CSV files, [rows, columns].

    Raises DataError where scikit-learn is missing, or the file in scikit-learn.
    """
    package = importlib.util.find_spec("sklearn")
    if package is None or not package.submodule_search_locations:
        raise DataError(f"{file} comes with scikit-learn, which is not installed: pip install scikit-learn")
    path = Path(package.submodule_search_locations[0]) / "datasets" / "data" / file
    try:
        return np.loadtxt(path, delimiter=",", skiprows=int(skip_header))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: can't be read ({error}); reinstall scikit-learn") from error
