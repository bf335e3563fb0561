"""`descent data …`: sharded data sets on the command line; parses, calls, prints."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from descent.cli.output import refusals

if TYPE_CHECKING:
    from descent.data.shards import ShardIndex

app = typer.Typer(
    help="Make, look at and move data sets that lie in shards.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    with bars:
        task = bars.add_task("starting", total=None)
        yield lambda what, done, total: bars.update(task, description=what, completed=done, total=total)


def _print_index(index: "ShardIndex", where: str) -> None:
    console = Console(highlight=False, soft_wrap=True)
    unit = {"tokens": "tokens", "images": "images", "parquet": "rows"}.get(index.kind, "samples")
    console.print(
        f"{escape(where)}: {index.samples:,} {unit} in {len(index.shards):,} shards, {index.bytes:,} bytes, "
        f"digest {index.digest}"
    )
    for key in ("dtype", "vocabulary", "tokenizer", "separator", "files"):
        if index.about.get(key) is not None:
            console.print(f"  {key:<11} {escape(str(index.about[key]))}")
    classes = index.about.get("classes")
    if isinstance(classes, list):
        named = ", ".join(str(name) for name in classes[:8]) + (" …" if len(classes) > 8 else "")
        console.print(f"  {len(classes)} classes  {escape(named)}")


def _print_next(index: "ShardIndex", where: str) -> None:
    extra = " data.target=COLUMN" if index.kind == "parquet" else ""
    Console(highlight=False, soft_wrap=True).print(
        f"Next:  descent train data={index.kind} data.path={escape(where)}{extra}"
    )


@app.command()
def tokenize(
    source: Annotated[Path, typer.Argument(help="A text file, or a folder of them.")],
    target: Annotated[Path, typer.Argument(help="The folder to write shards and index.json to.")],
    tokenizer: Annotated[str, typer.Option(help="bytes, or a tokenizer.json (needs the extra [text]).")] = "bytes",
    pattern: Annotated[str, typer.Option(help="Which files of a folder.")] = "**/*.txt",
    separator: Annotated[
        str | None, typer.Option(help="The token after each file; default: the tokenizer's own.")
    ] = None,
    shard_tokens: Annotated[int, typer.Option(help="Tokens in a shard.")] = 1 << 25,
) -> None:
    """Turn text into shards of token ids for data=tokens.

    Examples:

      descent data tokenize book.txt tokens

      descent data tokenize docs tokens --pattern "**/*.md" --tokenizer tokenizer.json
    """
    from descent.data import tokenize as work

    with refusals(), _progress() as report:
        index = work.tokenize(
            source.expanduser(),
            target.expanduser(),
            work.tokenizer_of(tokenizer, separator),
            pattern=pattern,
            shard_tokens=shard_tokens,
            progress=lambda done, total: report("tokenizing", done, total),
        )
    _print_index(index, str(target))
    _print_next(index, str(target))


@app.command()
def index(
    folder: Annotated[Path, typer.Argument(help="A folder of *.tar (images), *.parquet or *.bin.")],
    dtype: Annotated[str | None, typer.Option(help="Of *.bin files: uint8, uint16 or uint32.")] = None,
    vocabulary: Annotated[int | None, typer.Option(help="Of *.bin files: number of tokens.")] = None,
) -> None:
    """Write index.json for shards that exist: what each holds, its size and its hash.

    Images in a tar belong to the class whose folder they lie in there, or to the number in
    the .cls file beside them.

    Examples:

      descent data index shards

      descent data index tokens --dtype uint16 --vocabulary 50257
    """
    from descent.data.sharded_sets import make_index

    with refusals(), _progress() as report:
        made = make_index(folder.expanduser(), report, dtype=dtype, vocabulary=vocabulary)
    _print_index(made, str(folder))
    _print_next(made, str(folder))


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(help="A folder or s3://… with an index.json.")],
    verify: Annotated[bool, typer.Option("--verify", help="Read every shard and compare with its hash.")] = False,
) -> None:
    """Show what a sharded data set holds; with --verify, whether its shards are what the index says.

    Examples:

      descent data inspect tokens

      descent data inspect s3://bucket/tokens --verify
    """
    from descent.data import sharded_sets
    from descent.data.files import open_data
    from descent.data.shards import read_index

    with refusals(), _progress() as report:
        store = open_data(path)
        found = read_index(store)
        wrong = sharded_sets.verify(store, found, report) if verify else []
    _print_index(found, path)
    for line in wrong:
        Console(highlight=False, soft_wrap=True).print(f"  [red]✗[/red] {escape(line)}")
    if wrong:
        raise typer.Exit(1)
    if verify:
        print("  all shards are what the index says")


@app.command()
def copy(
    source: Annotated[str, typer.Argument(help="A folder or s3://… with an index.json.")],
    target: Annotated[str, typer.Argument(help="A folder or s3://… to copy it to.")],
) -> None:
    """Copy a sharded data set and verify the copy; a copy that was interrupted goes on where it stopped.

    Example:

      descent data copy tokens s3://bucket/tokens
    """
    from descent.data import sharded_sets

    with refusals(), _progress() as report:
        done, kept = sharded_sets.copy(source, target, report)
    _print_index(done, target)
    if kept:
        print(f"  {kept} of its files were there already")
    _print_next(done, target)
