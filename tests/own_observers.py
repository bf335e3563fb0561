"""Observers as a user writes them, for tests."""

import threading
from typing import Any

calls: list[tuple[str, int]] = []
"""(event, step) of all calls of `note`."""
GATE = threading.Event()
"""Until it is set, `Slow` waits in its first step."""


def note(run: Any, log: Any, scale: float = 1.0) -> None:
    """A function that is called for every event."""
    calls.append((run.event, run.step))
    if "train/loss" in run.metrics:
        log.scalar("loss", scale * run.metrics["train/loss"])


class Everything:
    """Says a thing of each kind, and asks for a stop after the evaluation of a step."""

    def __init__(self, stop_at: int = -1) -> None:
        self.stop_at = stop_at

    def on_step(self, run: Any, log: Any) -> None:
        log.scalars({"a": run.step, "group/b": run.world_size})

    def on_evaluate(self, run: Any, log: Any) -> None:
        log.table("seen", [{"name": name, "value": value} for name, value in run.metrics.items()])
        if run.step == self.stop_at:
            log.stop("good\nenough")

    def on_end(self, run: Any, log: Any) -> None:
        from matplotlib.figure import Figure
        from PIL import Image

        log.text("how", f"{run.state} {run.config['seed']} {run.metrics['train/loss']}")
        log.figure("plot", Figure())
        log.figure("pixels", Image.new("L", (2, 2)))
        kept = run.run_dir / "mine.bin"
        kept.write_bytes(b"123")
        log.file(kept)


class Failing:
    """Raises in its second step."""

    def on_step(self, run: Any, log: Any) -> None:
        log.scalar("alive", 1.0)
        if run.step == 2:
            raise KeyError("a slip")


class Changing:
    """Tries to change what it is shown."""

    def on_step(self, run: Any, log: Any) -> None:  # noqa: ARG002
        run.metrics["train/loss"] = 0.0


class Secretive:
    """Gives a name that lies outside of its own."""

    def on_step(self, run: Any, log: Any) -> None:  # noqa: ARG002
        log.scalar("../train/loss", 0.0)


class Slow:
    """Waits in each step until it may go on."""

    def on_step(self, run: Any, log: Any) -> None:  # noqa: ARG002
        GATE.wait(60)


class Misspelt:
    def on_step(self, run: Any, log: Any) -> None: ...

    def on_evaluation(self, run: Any, log: Any) -> None: ...


class Narrow:
    def on_step(self, run: Any) -> None: ...


class Nothing:
    pass
