"""The objects that `descent.train` got from Python, on their way to the workers: through Ray's memory, never over a disk.

What a notebook's cell or a script's main module defines travels by value, as Ray's own remote functions do. Nothing but
this process's own register is packed, and a worker unpacks only what the run that started it has packed.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray import cloudpickle

from descent.config import given
from descent.errors import ConfigError


class Parcel:
    """The packed objects, put into a cluster's memory once for all workers."""

    def __init__(self, objects: dict[str, Any]) -> None:
        """objects: placeholder -> object. Raises ConfigError for what can't be packed."""
        self._objects = {target: _packed(target, one) for target, one in objects.items()}
        self._reference: Any = None

    @property
    def size(self) -> int:
        """Bytes in all."""
        return sum(map(len, self._objects.values()))

    def reference(self) -> Any:
        """Where the workers find the content, for an actor's argument."""
        if self._reference is None:
            content = cloudpickle.dumps((_folder_of_script(), self._objects))
            self._reference = ray.put(np.frombuffer(content, dtype=np.uint8))
        return self._reference

    def forget_cluster(self) -> None:
        """The cluster is gone, and its memory with it; the next one gets the content anew."""
        self._reference = None


def _packed(target: str, one: Any) -> bytes:
    try:
        content: bytes = cloudpickle.dumps(one)
        return content
    except Exception as error:  # whatever a user's class raises
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"{given.keyword_of(target)}: this {type(one).__name__} can't be sent to the workers ({reason}); "
            "give a function or class that builds it there"
        ) from error


def _folder_of_script() -> str | None:
    """The folder of the script that runs, in which Python looks for modules first; None in a notebook or a shell."""
    file = getattr(sys.modules.get("__main__"), "__file__", None)
    folder = str(Path(file).resolve().parent) if file else None
    return folder if folder in {str(Path(entry)) for entry in sys.path} else None


def open_parcel(content: Any) -> None:
    """Register, in this worker, the objects that `Parcel` has packed."""
    folder, objects = cloudpickle.loads(memoryview(content))
    if folder is not None and folder not in sys.path:
        sys.path.append(folder)
    given.register({target: cloudpickle.loads(packed) for target, packed in objects.items()})
