"""Lines for a person: as they stand, whole, and without a reader no harm."""

import io
import os
import subprocess
import sys

import pytest
from rich.console import Console

from descent.cluster.run.console import (
    LastingStream,
    SilentConsole,
    print_error,
    print_line,
    print_value,
    print_warning,
)
from descent.errors import ConfigError


@pytest.mark.parametrize("printer", [print_line, print_warning, lambda c, t: print_value(c, "label", t)])
@pytest.mark.parametrize("terminal", [True, False])
def test_brackets_are_no_markup_and_log_lines_do_not_break(printer, terminal):
    out = io.StringIO()
    text = "trusted_modules=[my_model] [red]and[/red] [/] :warning: " + "word " * 30
    printer(Console(file=out, width=60, force_terminal=terminal, color_system=None), text)
    joined = " ".join(out.getvalue().split())
    assert " ".join(text.split()) in joined
    if not terminal:
        assert out.getvalue().rstrip().count("\n") == 0


def test_a_terminal_of_80_columns_breaks_lines_between_words():
    out = io.StringIO()
    words = [f"word{i}" for i in range(60)]
    print_warning(Console(file=out, width=80, force_terminal=True, color_system=None), " ".join(words))
    lines = out.getvalue().splitlines()
    assert len(lines) > 3 and all(len(line.rstrip()) <= 80 for line in lines)
    assert [word for line in lines for word in line.split() if word != "!"] == words


def test_an_error_is_one_line_with_its_brackets(capsys):
    print_error(ConfigError("model._target_=x: add trusted_modules=[x]\nas an override"))
    assert capsys.readouterr().err == "error: model._target_=x: add trusted_modules=[x] as an override\n"


WRITER = """
import sys
from rich.console import Console
from descent.cluster.run.console import lasting_output
lasting_output()
console = Console()
for i in range(5000):
    console.print(f"line {i}", soft_wrap=True)
    print("plain")
print("still here", file=sys.stderr)
"""


def test_a_reader_that_goes_away_ends_nothing():
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    assert writer.stdout is not None and writer.stderr is not None
    assert writer.stdout.readline() == "line 0\n"
    writer.stdout.close()
    assert writer.stderr.read() == "still here\n"
    assert writer.wait() == 0


def test_a_stream_that_fails_once_is_not_asked_again():
    read, write = os.pipe()
    stream = LastingStream(os.fdopen(write, "w", buffering=1))
    os.close(read)
    assert stream.write("nobody\n") == 7 and stream.broken
    stream.write("listens\n")
    stream.flush()


def test_a_long_value_has_a_line_of_its_own_on_a_narrow_terminal():
    out = io.StringIO()
    path = "/".join(["folder"] * 11)
    print_value(Console(file=out, width=80, force_terminal=True, color_system=None), "checkpoint", path)
    assert [line.rstrip() for line in out.getvalue().splitlines()] == ["checkpoint", f"  {path}"]


def test_without_a_display_warnings_go_to_the_log(caplog):
    print_warning(SilentConsole(), "read [this]")
    print_line(SilentConsole(), "and not this")
    assert [record.getMessage() for record in caplog.records] == ["read [this]"]
