"""Lines for a person, on a terminal or in a log, that stay whole and that no closed window can stop."""

import contextlib
import io
import logging
import os
import sys
from collections.abc import Iterable
from typing import TextIO

from rich.console import Console
from rich.markup import escape


class LastingStream(io.TextIOBase):
    """A stream whose reader may go away: after the first failed write, everything written is dropped.

    `descent train | head` closes its pipe after ten lines, a closed terminal answers each write with
    an input/output error, a log on a full disk with 'no space left'. None of these may end a training.
    The stream's file descriptor is pointed at the null device, so that what other libraries write to it
    and Python's own flush at exit succeed as well.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self.broken = False

    def write(self, text: str) -> int:
        """Write `text`, or drop it once the reader is gone."""
        if not self.broken:
            try:
                return self._stream.write(text)
            except (OSError, ValueError):
                self._drop_everything()
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:  # type: ignore[override]
        """Write each of `lines`."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush the stream underneath, unless its reader is gone."""
        if not self.broken:
            try:
                self._stream.flush()
            except (OSError, ValueError):
                self._drop_everything()

    def _drop_everything(self) -> None:
        self.broken = True
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)

    def writable(self) -> bool:
        """Always: that is the point of this class."""
        return True

    def isatty(self) -> bool:
        """Whether the stream underneath is a terminal."""
        return not self.broken and self._stream.isatty()

    def fileno(self) -> int:
        """The file descriptor of the stream underneath."""
        return self._stream.fileno()

    @property
    def encoding(self) -> str:
        """The encoding of the stream underneath."""
        return self._stream.encoding or "utf-8"

    @encoding.setter
    def encoding(self, _: str) -> None:
        raise AttributeError("the encoding is the underlying stream's")


def lasting_output() -> None:
    """Let this process outlive the readers of its stdout and stderr."""
    if not isinstance(sys.stdout, LastingStream):
        sys.stdout = LastingStream(sys.stdout)
    if not isinstance(sys.stderr, LastingStream):
        sys.stderr = LastingStream(sys.stderr)


def print_line(console: Console, text: str, style: str = "") -> None:
    """Print `text` as it stands: brackets are no markup.

    On a terminal, lines break between words. In a file or a pipe they don't break at all.
    """
    console.print(escape(text), style=style or None, highlight=False, soft_wrap=not console.is_terminal, emoji=False)


def print_value(console: Console, label: str, value: str) -> None:
    """A label and one long word (a path, an address) that no line break of ours cuts.

    On a terminal that is too narrow for both, the value has a line of its own.
    """
    line = f"{label:<14}{value}"
    if console.is_terminal and len(line) > console.width:
        print_verbatim(console, label)
        line = f"  {value}"
    print_verbatim(console, line)


def print_verbatim(console: Console, line: str) -> None:
    """One line exactly as it is, to be copied: nothing is a markup, and no line break is added."""
    console.print(escape(line), highlight=False, soft_wrap=True, emoji=False)


class SilentConsole(Console):
    """For a run from Python that shows no progress: warnings go to the logger `descent`, everything else nowhere."""

    def __init__(self) -> None:
        super().__init__(file=io.StringIO(), quiet=True)


def print_warning(console: Console, text: str) -> None:
    """One line that the user should read, with a yellow mark before it."""
    if isinstance(console, SilentConsole):
        logging.getLogger("descent").warning(text)
        return
    console.print(f"[yellow]![/yellow] {escape(text)}", highlight=False, soft_wrap=not console.is_terminal, emoji=False)


def print_error(error: BaseException) -> None:
    """The error as one line on stderr, without secrets."""
    from descent.config.secrets import redact

    line = escape(redact(" ".join(str(error).split())))
    Console(stderr=True).print(f"[red]error:[/red] {line}", highlight=False, soft_wrap=True, emoji=False)


class Starting:
    """Shows that a run is on its way before there is anything else to show: one line, or a spinner on a terminal."""

    def __init__(self, console: Console, *, in_logs: bool = True) -> None:
        """in_logs: whether the line is printed where there is no terminal, too."""
        text = "starting: reading the configuration and the data, building the model, starting Ray"
        self._status = console.status(text) if console.is_terminal else None
        if self._status is not None:
            self._status.start()
        elif in_logs:
            print_line(console, text)

    def stop(self) -> None:
        """Something else is shown from now on; may be called again."""
        if self._status is not None:
            self._status.stop()
            self._status = None


def significant(value: float) -> str:
    """A number with four significant digits, however small it is.

    >>> significant(2.30259), significant(0.00001234), significant(0.0), significant(12345.6)
    ('2.303', '1.234e-05', '0', '12,346')
    """
    if value == 0:
        return "0"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:#.4g}"


def duration(seconds: float) -> str:
    """Seconds as a person says them.

    >>> duration(0.42), duration(75), duration(3700), duration(200_000)
    ('0.4 s', '1 min 15 s', '1 h 1 min', '2 d 7 h')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    for size, unit, smaller, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit} {int(seconds % size // smaller)} {small}"
    raise AssertionError(seconds)
