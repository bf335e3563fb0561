"""The one thread of a process in which users' data sets are built and read.

PyTorch's DataLoader reads a data set in one thread of each process: the thread that built it, or the
main thread of a forked copy. Users' data sets rely on that. A shared file handle has one position, so
two threads that `seek` and `read` at the same time get each other's records; an SQLite connection may
only be used in the thread that opened it. So a data set of a user's own class is built and read in
this thread alone, unless the class says `thread_safe = True`.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_lock = threading.Lock()
_current = threading.local()
_threads: list[ThreadPoolExecutor] = []


def data_thread() -> ThreadPoolExecutor:
    """The executor of the thread; the thread starts with the first task."""
    with _lock:
        if not _threads:
            _threads.append(ThreadPoolExecutor(1, "data", initializer=_mark))
        return _threads[0]


def in_data_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call `function` in the data thread and return what it returns, or raise what it raises."""
    if getattr(_current, "is_data_thread", False):
        return function(*args, **kwargs)
    return data_thread().submit(function, *args, **kwargs).result()


def _mark() -> None:
    _current.is_data_thread = True


# A forked process has no copy of the thread, only of the executor that waits for it.
os.register_at_fork(after_in_child=_threads.clear)
