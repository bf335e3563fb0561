"""Every error that Descent raises on purpose.

    DescentError               caught by the command line: one line, no traceback
    ├── ConfigError            the composed config is wrong: file, key, value, what would be right
    ├── DataError              a data file is missing or malformed: file, row, column
    ├── StoreError             a folder or a bucket can't be read or written
    ├── CheckpointError        a checkpoint is missing, incomplete, or not of this run
    ├── TrackingError          the tracking server can't be reached or refuses
    ├── ClusterError           the Ray cluster can't be reached or can't place what was asked
    └── TrainingError          the training itself ended: the user's code failed, nothing is finite

The first six are a user's to mend before any work starts: exit code 2.
"""


class DescentError(Exception):
    """Base of all; `exit_code` is what the command line ends with."""

    exit_code = 1


class ConfigError(DescentError):
    """The configuration can't be run as it stands."""

    exit_code = 2


class DataError(DescentError):
    """A data set is missing, malformed, or doesn't fit the model."""

    exit_code = 2


class StoreError(DescentError):
    """Something stored can't be read or written: names the place, what was asked and what to do.

    kind: "missing", "denied", "credentials", "full", "damaged", "unavailable", "address", "key".
    """

    exit_code = 2

    def __init__(self, message: str, *, kind: str = "unavailable") -> None:
        super().__init__(message)
        self.kind = kind


class CheckpointError(DescentError):
    """A checkpoint can't be used."""

    exit_code = 2


class TrackingError(DescentError):
    """The tracking server can't be used."""

    exit_code = 2


class ClusterError(DescentError):
    """The cluster can't be reached or can't ever place the run."""

    exit_code = 2


class TrainingError(DescentError):
    """A training that had started ended without reaching its last step."""

    exit_code = 1
