"""A trained model as something that others can run without Descent.

`model.pt2` is torch.export's archive: the graph as JSON and each tensor as raw bytes. What
torch would pickle into it is the sample input, which is left out here, and tensor subclasses or
script objects, which are refused; `pickled_records` checks the result.

The archive takes tensors by name and gives tensors, in tuples, lists and dicts: whatever classes the model's own
inputs and outputs have (dataclasses, Hugging Face's ModelOutput), whoever loads it doesn't need them.
"""

import contextlib
import copy
import dataclasses
import inspect
import io
import json
import linecache
import logging
import traceback
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from descent.errors import TrainingError

ARCHIVE = "model.pt2"
_TOLERANCE = {"rtol": 1e-3, "atol": 1e-4}
"""Between the archive's outputs and the model's: other kernels may be used, so bits may differ."""


@dataclass(frozen=True)
class Sample:
    """Arguments for a model's forward, of a few samples; and under which names an archive takes their tensors."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    tensors: dict[str, Tensor]
    """On the CPU, half precision as float32."""
    spec: TreeSpec
    leaves: tuple[Any, ...]
    """The leaves of (args, kwargs) in order: the name of a tensor, or a value that is part of the model from now on."""

    @classmethod
    def of(cls, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> "Sample":
        """args, kwargs: what forward takes; trees of tensors and plain values.

        Raises TrainingError if there is no tensor in them.
        """
        args, kwargs = tuple(map(_plain, args)), {name: _plain(value) for name, value in kwargs.items()}
        found, spec = tree_flatten((args, kwargs))
        names = iter(_names(model, args, kwargs))
        tensors: dict[str, Tensor] = {}
        leaves: list[Any] = []
        for leaf, name in zip(found, names, strict=True):
            if isinstance(leaf, Tensor):
                tensors[name] = _as_input(leaf)
                leaves.append(_Name(name))
            else:
                leaves.append(leaf)
        if not tensors:
            raise TrainingError(f"{type(model).__name__}: its arguments hold no tensor, so there is nothing to export")
        return cls(args, kwargs, tensors, spec, tuple(leaves))

    @property
    def is_one_tensor(self) -> bool:
        """Whether the model takes one tensor and nothing else, which then needs no name."""
        return len(self.args) == 1 and isinstance(self.args[0], Tensor) and not self.kwargs

    @property
    def num_rows(self) -> int | None:
        """How many samples there are: the common length of dimension 0; None where the tensors differ in it."""
        sizes = {tensor.shape[0] if tensor.dim() else None for tensor in self.tensors.values()}
        return sizes.pop() if len(sizes) == 1 else None

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> "Sample":
        """The same arguments with other tensors."""
        return dataclasses.replace(self, tensors=dict(tensors))

    def arguments(self, tensors: Mapping[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) of the model's forward with these tensors."""
        leaves = [tensors[leaf] if isinstance(leaf, _Name) else leaf for leaf in self.leaves]
        args, kwargs = tree_unflatten(leaves, self.spec)
        return args, kwargs


class _Name(str):
    """The place of a tensor among leaves."""


def _names(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[str]:
    """A name for each leaf: that of forward's parameter, followed by the keys and places on the way to the leaf."""
    parameters = inspect.signature(model.forward).parameters.values()
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    heads = [*positional, *(f"input_{i}" for i in range(len(positional), len(args)))]
    given = [*zip(heads, args, strict=False), *kwargs.items()]
    taken: set[str] = set()
    for head, value in given:
        for path, _ in torch.utils._pytree.tree_flatten_with_path(value)[0]:
            parts = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", "")))) for key in path]
            name = "".join(c if c.isalnum() else "_" for c in "_".join([head, *parts]))
            while name in taken:
                name += "_"
            taken.add(name)
            yield name


def _plain(value: Any) -> Any:
    """The same tree as plain dicts, lists and tuples, which torch.export knows without the library that it came from."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return value  # torch knows named tuples by their class, and a model may need that
    if isinstance(value, tuple | list):
        return type(value)(map(_plain, value))
    return value


class _Exported(nn.Module):
    """The network behind named tensors, with outputs of plain classes."""

    def __init__(self, network: nn.Module, sample: Sample) -> None:
        super().__init__()
        # No graph holds the sample itself, which may be somebody's data.
        self.network, self.sample = network, dataclasses.replace(sample, args=(), kwargs={}, tensors={})

    def forward(self, **tensors: Tensor) -> Any:
        args, kwargs = self.sample.arguments(tensors)
        return plain_outputs(self.network(*args, **kwargs))

    @classmethod
    def with_names(cls, network: nn.Module, sample: Sample) -> nn.Module:
        """With a forward whose parameters have the names of the tensors: torch.export goes by the signature."""
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        names = list(sample.tensors)

        def forward(self: _Exported, *args: Tensor, **kwargs: Tensor) -> Any:
            return cls.forward(self, **dict(zip(names, args, strict=False)), **kwargs)

        forward.__signature__ = inspect.Signature([inspect.Parameter(n, kind) for n in ("self", *names)])  # type: ignore[attr-defined]
        return type("Exported", (cls,), {"forward": forward})(network, sample)


def plain_outputs(value: Any) -> Any:
    """A model's output as tensors in tuples, lists and dicts; what is no tensor (None, a cache of keys) is left out."""
    kept = _kept(value)
    if kept is None:
        raise TrainingError(f"its output is a {type(value).__name__} without any tensor")
    return kept


def _kept(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type | Mapping):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        value = dict(zip(value._fields, value, strict=True))
    if isinstance(value, Mapping):
        named = {str(key): kept for key, item in value.items() if (kept := _kept(item)) is not None}
        return named or None
    if isinstance(value, tuple | list):
        listed = [kept for item in value if (kept := _kept(item)) is not None]
        return (tuple(listed) if isinstance(value, tuple) else listed) or None
    return None


def predictions_of(model: nn.Module, sample: Sample) -> Any:
    """What the model gives for the sample, as the archive gives it."""
    args, kwargs = sample.arguments(sample.tensors)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return plain_outputs(model(*args, **kwargs))


def export_model(
    model: nn.Module, sample: Tensor | Sample, out_dir: Path, preprocessing: nn.Module | None = None
) -> Path:
    """Write `out_dir/model.pt2`: the network in evaluation mode, on the CPU; half precision becomes float32.

    sample: the arguments of some samples, or one tensor [n, …] with n >= 1. The number of samples is free in the
    archive, and the length of integer sequences [n, t] where the model allows other lengths. An archive of a model with
    one tensor as its only argument takes that tensor; all others take the sample's names as keywords.
    With `preprocessing`, the archive applies it first, and the sample, one tensor, is what it takes.

    `model` itself is left as it is. Raises `TrainingError` if torch can't trace the network (with the line of the
    model, and why), or where the archive gives other numbers than the model.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    return save_program(exported(model, sample, preprocessing), out_dir / ARCHIVE, model)


def save_program(program: torch.export.ExportedProgram, path: Path, model: nn.Module) -> Path:
    """Write what `exported` gave for the model. Raises TrainingError where that would need a pickle."""
    torch.export.save(program, path)
    _require_no_pickle(path, model)
    return path


def exported(
    model: nn.Module, sample: Tensor | Sample, preprocessing: nn.Module | None = None
) -> torch.export.ExportedProgram:
    """The network as torch.export has traced it, without the sample; see `export_model`. Raises TrainingError."""
    if isinstance(sample, Tensor):
        sample = Sample.of(model, (sample,), {})
    network, name = _on_cpu(model), type(model).__name__
    if preprocessing is not None:
        assert sample.is_one_tensor
        network = nn.Sequential(copy.deepcopy(preprocessing), network).eval()
    if sample.num_rows == 1:  # torch.export would take a batch of 1 for a constant
        sample = sample.with_tensors({n: torch.cat([t, t]) for n, t in sample.tensors.items()})
    program = _traced(network, sample, name)
    _require_equal(network, program, sample, name)
    # torch.export.save would pickle it, and the sample may be somebody's data
    program.example_inputs = None
    return program


def _traced(network: nn.Module, sample: Sample, name: str) -> torch.export.ExportedProgram:
    given = tuple(sample.tensors.values())
    args, kwargs = (given, {}) if sample.is_one_tensor else ((), dict(sample.tensors))
    try:
        with torch.no_grad(), _without_torchs_lines():
            plain = sample.is_one_tensor and isinstance(predictions_of(network, sample), Tensor)
            wrapped = network if plain else _Exported.with_names(network, sample)
            dims, fewer = _free_dims(sample, lengths=True), _free_dims(sample, lengths=False)
            try:
                return torch.export.export(wrapped, args, kwargs, dynamic_shapes=dims)
            except Exception:
                if dims == fewer:
                    raise
                return torch.export.export(wrapped, args, kwargs, dynamic_shapes=fewer)
    except Exception as error:  # torch._dynamo has dozens of kinds
        raise TrainingError(f"{name} can't be exported with torch.export: {_where_and_why(error)}") from error


def _free_dims(sample: Sample, *, lengths: bool) -> tuple[dict[int, Any], ...]:
    """For each tensor the sizes that may differ in later calls: the number of samples, and the lengths of sequences.

    The lengths, and all sizes where the tensors don't share a number of samples, are free where torch finds no reason
    against that.
    """
    auto, batch = torch.export.Dim.AUTO, torch.export.Dim("batch")
    found: list[dict[int, Any]] = []
    for tensor in sample.tensors.values():
        sequences = lengths and tensor.dim() == 2 and not tensor.is_floating_point() and tensor.shape[1] > 1
        if sample.num_rows is None:
            found.append(dict.fromkeys(range(tensor.dim()), auto))
        else:
            found.append({0: batch, **({1: auto} if sequences else {})})
    return tuple(found)


def input_shapes(program: torch.export.ExportedProgram) -> list[tuple[int, ...]]:
    """The shape of each input of the archive, with -1 for a size that is free."""
    inputs = set(program.graph_signature.user_inputs)
    nodes = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in inputs]
    return [tuple(map(_known_size, node.meta["val"].shape)) for node in nodes]


def _known_size(size: int | torch.SymInt) -> int:
    known = size if isinstance(size, int) else size.node.maybe_as_int()
    return -1 if known is None else int(known)


@contextlib.contextmanager
def _without_torchs_lines() -> Iterator[None]:
    """torch.export logs and prints graphs and advice for its own developers; the error says what matters."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch.fx.experimental.symbolic_shapes", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _where_and_why(error: BaseException) -> str:
    """The line of the model at which tracing failed, and torch's reason in a sentence."""
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if "data-dependent" in reason:
        reason = (
            "what happens here depends on the values in a tensor, and a traced graph must not: torch.where, torch.cond"
        )
    library = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((*library, "<"))]
    if not frames:
        return reason[:300]
    last = frames[-1]
    source = (last.line or linecache.getline(last.filename, last.lineno or 0)).strip()
    return f"{Path(last.filename).name}, line {last.lineno} ({source}): {reason[:300]}"


def _require_equal(network: nn.Module, program: torch.export.ExportedProgram, sample: Sample, name: str) -> None:
    """Raise TrainingError where the traced graph gives other numbers than the network: for all rows, and for one."""
    module, rows = program.module(), sample.num_rows
    subsets = [sample.tensors]
    if rows is not None:
        subsets.append({key: tensor[:1] for key, tensor in sample.tensors.items()})
    for tensors in subsets:
        try:
            expected = predictions_of(network, sample.with_tensors(tensors))
        except Exception:  # a model that can't take one sample
            continue
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            given = module(*tensors.values()) if sample.is_one_tensor else module(**tensors)
        for one, other in zip(tree_flatten(expected)[0], tree_flatten(given)[0], strict=True):
            if not torch.allclose(one.double(), other.double(), equal_nan=True, **_TOLERANCE):
                raise TrainingError(
                    f"{name} can't be exported with torch.export: the traced graph gives other numbers than the model "
                    "(by up to {:g}); does the forward depend on more than its arguments?".format(
                        (one.double() - other.double()).abs().max()
                    )
                )


def pickled_records(archive: Path) -> list[str]:
    """Names of the records in a .pt2 archive that its loader would unpickle."""
    pickled = []
    with zipfile.ZipFile(archive) as records:
        for info in records.infolist():
            if info.filename.endswith("_config.json"):
                entries = json.loads(records.read(info)).get("config", {})
                pickled += [name for name, entry in entries.items() if entry.get("use_pickle")]
            elif "/sample_inputs/" in info.filename and info.file_size:
                pickled.append(info.filename)
    return pickled


def _on_cpu(model: nn.Module) -> nn.Module:
    """A copy for inference. Each tensor gets its own memory: the archive stores the whole
    storage behind a tensor, and a trainer may keep all parameters as views of one."""
    network = copy.deepcopy(model).eval()
    with torch.no_grad():
        for tensor in [*network.parameters(), *network.buffers()]:
            cast = tensor.detach().to("cpu", _single(tensor.dtype))
            tensor.data = cast.clone(memory_format=torch.contiguous_format)
    for parameter in network.parameters():
        parameter.grad = None
    return network


def _as_input(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", _single(tensor.dtype))


def _single(dtype: torch.dtype) -> torch.dtype:
    """float32 for half precision, which a CPU only emulates; any other dtype itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _require_no_pickle(path: Path, model: nn.Module) -> None:
    pickled = pickled_records(path)
    if pickled:
        path.unlink()
        raise TrainingError(
            f"{type(model).__name__} can't be exported without pickle: {', '.join(pickled[:5])} "
            "are tensor subclasses or script objects; use plain tensors"
        )
