"""A stand-in for a GPU: torch's device "cuda", computed on the CPU (device.cpp says what it can show).

Built once by g++ against the installed torch, and loaded before torch, which asks only once what
there is. For a torch without CUDA; one that has it wants its GPU.
"""

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

from tests.debian import install

_ASKED = "DESCENT_TESTS_GPU_STAND_IN"
"""Set for the processes that a test starts."""
_SOURCE = Path(__file__).with_name("device.cpp")
_MEMORY = 1 << 30
"""Bytes of the card, which decide what may lie on it."""


def is_wanted() -> bool:
    """Whether this process, or the one that started it, put the stand-in in a GPU's place."""
    return _ASKED in os.environ


def stand_in() -> bool:
    """Put it in place where torch has no CUDA; whether it did."""
    torch_dir = _torch_dir()
    if (torch_dir / "lib" / "libtorch_cuda.so").exists():
        return False
    assert "torch" not in sys.modules, "the stand-in must be there before torch"
    for library in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(torch_dir / "lib" / library), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(_built(torch_dir)))
    os.environ[_ASKED] = "1"
    _tell_python()
    return True


def _torch_dir() -> Path:
    found = importlib.util.find_spec("torch")
    assert found is not None and found.origin is not None
    return Path(found.origin).parent


def _built(torch_dir: Path) -> Path:
    """The library, from an earlier run where source and torch are the same."""
    version = (torch_dir / "version.py").read_bytes()
    digest = hashlib.sha256(_SOURCE.read_bytes() + version + str(torch_dir).encode()).hexdigest()
    library = _SOURCE.parent / "__pycache__" / f"{digest[:16]}.so"
    if not library.exists():
        assert shutil.which("g++") or install("g++"), "building the stand-in needs g++"
        library.parent.mkdir(exist_ok=True)
        partial = library.with_suffix(f".{os.getpid()}")
        include, lib = torch_dir / "include", torch_dir / "lib"
        subprocess.run(
            [
                "g++",
                "-std=c++20",
                "-O1",
                "-shared",
                "-fPIC",
                "-w",
                f"-I{include}",
                f"-I{include}/torch/csrc/api/include",
                str(_SOURCE),
                "-o",
                str(partial),
                f"-L{lib}",
                "-ltorch_cpu",
                "-lc10",
                f"-Wl,-rpath,{lib}",
            ],
            check=True,
        )
        partial.replace(library)
    return library


def _tell_python() -> None:
    """What of torch.cuda is written in Python or missing in a build without CUDA."""
    import torch

    class Stream:  # names of types, as in `torch.cuda.Event | None`
        def __new__(cls, *_: object) -> Any:
            return torch.Stream(device="cuda")

    class Event:
        def __new__(cls, enable_timing: bool = False) -> Any:
            return torch.Event("cuda", enable_timing=enable_timing)

    properties = types.SimpleNamespace(name="stand-in", total_memory=_MEMORY, major=9, minor=0)
    for name, value in {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "Stream": Stream,
        "current_stream": Stream,
        "Event": Event,
        "stream": lambda given: given,
        "synchronize": lambda *_: None,
        "get_device_properties": lambda *_: properties,
        "is_bf16_supported": lambda *_, **__: True,
    }.items():
        setattr(torch.cuda, name, value)
