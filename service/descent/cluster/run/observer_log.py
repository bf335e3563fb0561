"""What an observer says: scalars, figures, tables, texts and files for the run's page in MLflow, and the wish to stop."""

import csv
import io
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from descent.tracking import Tracker

_NAME = re.compile(r"\w[\w\-. ]*(/\w[\w\-. ]*)*")


class ObserverLog:
    """The second argument of an observer's methods, at one step. All names are below the observer's own: NAME/….

    Nothing here waits for MLflow: what is said goes into the run's spool.
    """

    def __init__(
        self, observer: str, step: int, tracker: "Tracker", stop: Callable[[str], None] = lambda _: None
    ) -> None:
        """observer: the name of the one who says it. stop: asks for the run's end, for a reason."""
        self._observer, self._step, self._tracker, self._stop = observer, step, tracker, stop

    def scalar(self, name: str, value: float) -> None:
        """A metric at this step. Raises ValueError for a name that MLflow has no place for, TypeError for no number."""
        self.scalars({name: value})

    def scalars(self, values: Mapping[str, float]) -> None:
        """Several metrics at this step."""
        self._tracker.log_metrics(self._step, {self._below(name): float(value) for name, value in values.items()})

    def figure(self, name: str, figure: Any) -> None:
        """A picture: a figure of matplotlib (`savefig`), or an image of Pillow (`save`).

        Figures are best made with matplotlib.figure.Figure: pyplot has one current figure for all threads.
        """
        path = self._at_step(name, ".png")
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / path.name
            if hasattr(figure, "savefig"):
                figure.savefig(file)
            elif hasattr(figure, "save"):
                figure.save(file)
            else:
                raise TypeError(f"a {type(figure).__name__} is no figure of matplotlib and no image of Pillow")
            self._tracker.log_file(file, str(path.parent))

    def table(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """A table of rows {column: value}, which MLflow's page shows as one; the columns are those of all rows."""
        rows = list(rows)
        out = io.StringIO()
        columns = list(dict.fromkeys(column for row in rows for column in row))
        table = csv.DictWriter(out, columns, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        self._tracker.log_text(out.getvalue(), str(self._at_step(name, ".csv")))

    def text(self, name: str, text: str) -> None:
        """A text."""
        self._tracker.log_text(text, str(self._at_step(name, ".txt")))

    def file(self, path: str | Path, folder: str | None = None) -> None:
        """A file, which is copied before this returns. folder: below the observer's own; a later file replaces one there."""
        self._tracker.log_file(Path(path), self._observer if folder is None else self._below(folder))

    def stop(self, reason: str) -> None:
        """Let the run end after a step that is under way, with a checkpoint, as FINISHED for this reason.

        At which step depends on how fast this observer is, and so do the bits of the last state.
        """
        self._stop(f"observers.{self._observer}: {' '.join(str(reason).split())[:300]}")

    def failed(self, line: str) -> None:
        """Keep with the run why the observer is called no more."""
        self._tracker.set_tags({f"descent.observer_error.{self._observer}": line})

    def _below(self, name: str) -> str:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(
                f"{name!r} can't be a name: letters, digits, '_', '-', '.' and spaces, and '/' between parts"
            )
        return f"{self._observer}/{name}"

    def _at_step(self, name: str, suffix: str) -> Path:
        return Path(self._below(name)) / f"step-{self._step:06d}{suffix}"
