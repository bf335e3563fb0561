"""What stands for the harmless objects that people save beside their weights: settings, NumPy numbers, paths.

A torch file is a pickle, and torch reads it with weights_only=True, which calls nothing but what is on its list.
The names below are added to that list for the time of one reading. Each of them means a class of this module, never
the object that the name belongs to: so nothing is imported, and no code but the few lines below gets to see what
the file holds. A name that isn't here is refused.
"""

from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Unread:
    """An object of no concern to the weights: whatever the file says of it is dropped."""

    def __new__(cls, *_: Any) -> "Unread":
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class Items:
    """A dict of another library, in which there may be weights: read as an OrderedDict, which torch fills."""

    def __new__(cls, *_: Any) -> OrderedDict[Any, Any]:  # type: ignore[misc]
        return OrderedDict()


class ArrayType(Unread):
    """NumPy's dtype: its name, such as "f4", and whether its bytes are in this machine's order."""

    def __init__(self, name: Any = "", *_: Any) -> None:
        self.name, self.native = (name if isinstance(name, str) else ""), True

    def __setstate__(self, state: Any) -> None:
        self.native = isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", "|", "=")


class Array(Unread):
    """NumPy's array: its shape, dtype and bytes."""

    state: tuple[Any, ...] = ()

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, tuple) else ()

    def tensor(self) -> Tensor | None:
        """The array as a tensor; None for what no weight is: text, objects, an array whose parts disagree."""
        match self.state:
            case (_, tuple(shape), ArrayType(name=name, native=True), bool(by_columns), bytes(raw)) if name in _NUMBERS:
                sizes = [size for size in shape if isinstance(size, int) and size >= 0]
                flat = np.frombuffer(raw, np.dtype(name)) if len(raw) % np.dtype(name).itemsize == 0 else None
                if flat is None or len(sizes) != len(shape) or int(np.prod(sizes, dtype=object)) != flat.size:
                    return None
                return torch.from_numpy(flat.reshape(sizes, order="F" if by_columns else "C").copy())
        return None


_NUMBERS = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "b1")
_OF_NUMPY = {"scalar": Unread, "_reconstruct": Array}

STAND_INS: dict[str, type] = {
    **{f"numpy.{core}.multiarray.{name}": cls for core in ("core", "_core") for name, cls in _OF_NUMPY.items()},
    "numpy.ndarray": Unread,
    "numpy.dtype": ArrayType,
    **dict.fromkeys(
        (
            *(f"numpy.{name}" for name in ("bool_", "float16", "float32", "float64", "int32", "int64", "str_")),
            *(
                f"builtins.{name}"
                for name in ("bool", "bytes", "dict", "float", "int", "list", "object", "str", "tuple")
            ),
            *(f"builtins.{name}" for name in ("frozenset", "range", "slice")),
            *(f"pathlib.{name}" for name in ("Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")),
            *(f"pathlib._local.{name}" for name in ("Path", "PosixPath", "WindowsPath")),
            *(f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")),
            "argparse.Namespace",
            "types.SimpleNamespace",
            "typing.Any",
            "uuid.UUID",
            "torch.torch_version.TorchVersion",
            *(f"omegaconf.base.{name}" for name in ("ContainerMetadata", "Metadata")),
            "omegaconf.dictconfig.DictConfig",
            "omegaconf.listconfig.ListConfig",
            *(
                f"omegaconf.nodes.{kind}Node"
                for kind in ("Any", "Boolean", "Bytes", "Float", "Integer", "Path", "String")
            ),
        ),
        Unread,
    ),
    **dict.fromkeys(
        (
            "collections.defaultdict",
            "addict.addict.Dict",
            "easydict.EasyDict",
            "lightning.fabric.utilities.data.AttributeDict",
            "lightning_fabric.utilities.data.AttributeDict",
            "pytorch_lightning.utilities.parsing.AttributeDict",
            "ml_collections.config_dict.config_dict.ConfigDict",
            "mmengine.config.config.ConfigDict",
            "yacs.config.CfgNode",
        ),
        Items,
    ),
}
"""Name in the file -> the class of this module that stands for it."""
