"""`python -m tests.bench [NAME…]`: run the benchmarks; each ends with one JSON line, all with one table."""

import importlib
import signal
import sys
import time

from rich.console import Console

from tests.bench.measure import BenchError, Result, show

NAMES = (
    "step_loop",
    "two_workers",
    "startup",
    "memory",
    "exactness",
    "slots",
    "recovery",
    "fault_tax",
    "regroup_scale",
    "store",
    "checkpoint_stall",
    "input",
    "resume",
)


def main(names: list[str]) -> int:
    """Exit code 0, 1 when a benchmark could not be run, 2 for an unknown name; a missed target is no error."""
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        print(
            f"error: no benchmark {', '.join(unknown)}; there are: {', '.join(NAMES)}",
            file=sys.stderr,
        )
        return 2
    # A time-out's SIGTERM must reach the blocks that end the measured processes.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    console = Console(width=None if sys.stdout.isatty() else 120)
    everything: list[Result] = []
    failed = []
    for name in names or NAMES:
        begin = time.monotonic()
        try:
            results = importlib.import_module(f"tests.bench.{name}").run()
        except BenchError as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed.append(name)
            continue
        show(console, results, f"{name} ({time.monotonic() - begin:.0f} s)")
        for result in results:
            print(result.to_json(), flush=True)
        everything += results
    if len(names) != 1:
        show(console, everything, "all")
    if failed:
        print(f"error: could not be run: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
