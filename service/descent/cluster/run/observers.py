"""Observers: the user's own code that watches a run, and keeps figures of its own beside the run's in MLflow.

An observer is an object with some of the methods `on_step(run, log)`, `on_evaluate(run, log)` and
`on_end(run, log)`, or a function `observe(run, log)` that is called for each of these events. `run` is what is
known of the run at the event (`RunView`), `log` takes what the observer has to say (`ObserverLog`).

Observers run in the process of the controller, on one thread of their own: no step waits for one. They live as
long as the process: a resume builds them anew, and shows them the steps that come from there on.
"""

import difflib
import inspect
import threading
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from descent.cluster.run.observer_log import ObserverLog
from descent.config import RunConfig, build, resolve_target
from descent.config.build import in_one_line
from descent.errors import ConfigError
from descent.messages import EvaluationRecord, TrainingRecord

if TYPE_CHECKING:
    from collections.abc import Iterator

    from descent.tracking import Tracker

EVENTS = ("on_step", "on_evaluate", "on_end")
_WAITING = 10_000
"""So many events wait for slow observers; of the steps that come on top nothing is told to them."""
_SOON_S = 2.0
"""After this long the user reads what is waited for."""
_PATIENCE_S = 60.0
"""How long the end of a run waits for observers that are behind."""


@dataclass(frozen=True)
class RunView:
    """What an observer sees of a run at one event; nothing in it can be changed."""

    event: str
    """"on_step", "on_evaluate" or "on_end"."""
    step: int
    """The step that was committed, or whose state was evaluated; at the end the last committed one."""
    metrics: Mapping[str, float]
    """The metrics of the step or of the evaluation; at the end the last value of each metric."""
    config: Mapping[str, Any]
    """The run's configuration, with *** in place of secrets."""
    run_dir: Path
    """The run's folder."""
    world_size: int = 0
    """Replicas that train."""
    state: str = "RUNNING"
    """At the end: FINISHED, FAILED or KILLED."""


@dataclass(frozen=True)
class Observer:
    """One of the user's observers."""

    name: str
    """Its key in the config: observers.NAME."""
    where: str
    """The key and the class, for messages."""
    calls: Mapping[str, Callable[..., Any]]
    """Event -> what is called with (run, log)."""


def build_observers(config: RunConfig) -> tuple[Observer, ...]:
    """The observers of the config. Raises ConfigError for what isn't one."""
    return tuple(_build(config, name, spec) for name, spec in config.observers.items())


def _build(config: RunConfig, name: str, spec: Mapping[str, Any]) -> Observer:
    key = f"observers.{name}"
    where = f"{key}._target_={spec['_target_']}"
    target = resolve_target(spec["_target_"], config.trusted_modules, f"{key}._target_")
    arguments = {k: v for k, v in spec.items() if k != "_target_"}
    if inspect.isfunction(target) and _takes_two(partial(target, **arguments)):
        found: Any = partial(target, **arguments)
    else:
        found = build(spec, config.trusted_modules, key)
    return Observer(name, where, _calls_of(found, where))


def _calls_of(found: Any, where: str) -> dict[str, Callable[..., Any]]:
    calls = {event: call for event in EVENTS if callable(call := getattr(found, event, None))}
    for other in dir(found):
        if other.startswith("on_") and other not in EVENTS and callable(getattr(found, other, None)):
            if similar := difflib.get_close_matches(other, EVENTS, 1, 0.7):
                raise ConfigError(f"{where}: nothing calls its {other}; did you mean {similar[0]}?")
    if not calls and callable(found) and not inspect.isclass(found):
        calls = dict.fromkeys(EVENTS, found)
    if not calls:
        raise ConfigError(
            f"{where}: gives a {type(found).__name__} with none of the methods {', '.join(EVENTS)}; an observer is a "
            "class with some of these, or a function, and each is called with (run, log)"
        )
    for event, call in calls.items():
        if not _takes_two(call):
            name = "it" if call is found else event
            raise ConfigError(f"{where}: {name} must take two arguments, (run, log)")
    return calls


def _takes_two(call: Callable[..., Any]) -> bool:
    try:
        inspect.signature(call).bind(None, None)
    except TypeError:
        return False
    except ValueError:  # a signature that Python can't read
        return True
    return True


class Observers:
    """Calls the observers of a run, one event after the other, on one thread.

    An observer that raises is named once and is called no more; the training goes on. Thread-safe.
    """

    def __init__(
        self,
        observers: tuple[Observer, ...],
        config: Mapping[str, Any],
        run_dir: Path,
        tracker: "Tracker",
        note: Callable[[str], None],
    ) -> None:
        """config: without secrets. note: shows the user a line."""
        self._observers = {observer.name: observer for observer in observers}
        self._config, self._run_dir, self._tracker, self._note = _frozen(config), run_dir, tracker, note
        self.finish_early: Callable[[str], None] = lambda _: None
        """Asks for the run's end, as finished, for the reason that an observer gives."""
        self._waiting: deque[_Event] = deque()
        self._changed = threading.Condition()
        self._ending = False
        self._left_out = 0
        self._latest: dict[str, float] = {}
        self._last = (0, 0)
        self._busy_with = ""
        self._thread = threading.Thread(target=self._work, name="observers", daemon=True)
        if observers:
            self._thread.start()

    def record(self, record: TrainingRecord, world_size: int) -> None:
        """A step was committed, or an evaluation after it; returns at once."""
        if not self._observers:
            return
        evaluated = isinstance(record, EvaluationRecord)
        self._latest.update(record.metrics)
        self._last = (record.step, world_size)
        event = _Event("on_evaluate" if evaluated else "on_step", record.step, dict(record.metrics), world_size)
        with self._changed:
            if not evaluated and len(self._waiting) >= _WAITING:
                self._left_out += 1
                return
            self._waiting.append(event)
            self._changed.notify()

    def finish(self, state: str, step: int, patience_s: float = _PATIENCE_S) -> None:
        """The run is over: tell the observers, and wait until they have said what they have to say."""
        if not self._observers:
            return
        with self._changed:
            self._waiting.append(_Event("on_end", step, dict(self._latest), self._last[1], state))
            self._ending = True
            self._changed.notify()
        self._thread.join(min(_SOON_S, patience_s))
        if self._thread.is_alive():
            self._note(f"waiting for observers that are behind, {self._busy_with}")
            self._thread.join(max(0.0, patience_s - _SOON_S))
        if self._thread.is_alive():
            self._note(
                f"observers: {self._busy_with or 'one'} is still busy {patience_s:.0f} s after the last step, and "
                f"{len(self._waiting)} events wait for it; the run ends without them"
            )
        if self._left_out:
            self._note(f"observers: slower than the training, so {self._left_out:,} steps were not shown to them")

    def abandon(self) -> None:
        """The run has broken off: no further event is told."""
        with self._changed:
            self._waiting.clear()
            self._ending = True
            self._changed.notify()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._ending:
                    self._changed.wait()
                if not self._waiting:
                    return
                event = self._waiting.popleft()
            for observer in tuple(self._observers.values()):
                self._tell(observer, event)

    def _tell(self, observer: Observer, event: "_Event") -> None:
        call = observer.calls.get(event.kind)
        if call is None:
            return
        view = RunView(
            event.kind,
            event.step,
            MappingProxyType(event.metrics),
            self._config,
            self._run_dir,
            event.world_size,
            event.state,
        )
        with self._busy(observer):
            log = ObserverLog(observer.name, event.step, self._tracker, self.finish_early)
            try:
                call(view, log)
            except (Exception, SystemExit) as error:
                del self._observers[observer.name]
                line = in_one_line(error)
                log.failed(line)
                self._note(
                    f"{observer.where}: its {event.kind} failed at step {event.step:,}: {line}; it is called no more, "
                    "and the training goes on"
                )

    @contextmanager
    def _busy(self, observer: Observer) -> "Iterator[None]":
        self._busy_with = observer.where
        yield
        self._busy_with = ""


@dataclass(frozen=True)
class _Event:
    kind: str
    step: int
    metrics: dict[str, float] = field(default_factory=dict)
    world_size: int = 0
    state: str = "RUNNING"


def _frozen(tree: Any) -> Any:
    """Plain values, in which nothing can be changed."""
    if isinstance(tree, Mapping):
        return MappingProxyType({key: _frozen(value) for key, value in tree.items()})
    return tuple(map(_frozen, tree)) if isinstance(tree, list) else tree
