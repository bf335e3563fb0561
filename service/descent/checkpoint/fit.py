"""Fits weights of a file to a model's names: which part of the file, which prefix, which names under which rules."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from descent.checkpoint.weight_files import Parts
from descent.errors import CheckpointError

Rules = Mapping[str, str | None]
"""Beginning of a name in the file (or "^…", a regular expression) -> what stands there in the model; None: leave out."""

_INSIDE = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What wrappers (torch.compile, FSDP, gradient checkpointing) put into the names of the modules that they wrap."""
_WRAPPERS = ("module", "model")
"""Prefixes that say nothing: DDP's and Lightning's."""
_OF_TENSORFLOW = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
"""Names in the first files of Hugging Face, which were made from TensorFlow's."""
_AVERAGED = re.compile(r"(^|[_.])(ema|swa|averaged)($|[_.])")
_USUAL = ("state_dict", "model_state_dict", "model")
_SHOWN = 5


@dataclass
class Fitted:
    """Weights under the model's own names, and what was chosen for that."""

    weights: dict[str, Tensor]
    choices: list[str] = field(default_factory=list)
    """What a person should know of how the file was read, such as "prefix 'net.' taken off"."""


@dataclass(frozen=True)
class _Own:
    """The model's tensors by name; tied ones are one tensor with several names."""

    tensors: Mapping[str, Tensor]
    names: Mapping[str, str]
    """Name without what wrappers put into it -> name."""

    @classmethod
    def of(cls, model: nn.Module) -> "_Own":
        tensors = model.state_dict(keep_vars=True)
        return cls(tensors, {_INSIDE.sub("", name): name for name in tensors})

    def group(self, name: str, tensor: Tensor) -> int | None:
        """Which tensor of the model has this name and shape; None if there is none."""
        own = self.tensors.get(self.names.get(name, ""))
        return None if own is None or own.shape != tensor.shape else id(own)


def fit(model: nn.Module, parts: Parts, *, key: str | None = None, rules: Sequence[Rules] = ()) -> Fitted:
    """The part of a file whose names and shapes fit the model best, under the model's names.

    key: the part to take (`init_key`). rules: for names that differ by more than a prefix (`init_map`), applied in
    order to every name. A prefix that all names of the model, or all fitting names of the file, have is taken off or put
    before where more names fit then.

    Raises CheckpointError for a key that the file doesn't have, for a rule that fits no name, and where several prefixes
    fit equally well.
    """
    own = _Own.of(model)
    chosen = {place: parts[place] for place in _asked_for(parts, key)}
    tried: list[tuple[int, str, Fitted]] = []
    unused = set(range(len(rules)))
    for place, tensors in chosen.items():
        renamed = dict(tensors)
        for index, rule in enumerate(rules):
            before, renamed = renamed, _renamed(renamed, rule)
            if renamed.keys() != before.keys():
                unused.discard(index)
        score, fitted = _with_prefix(own, renamed)
        tried.append((score, place, fitted))
    if unused:
        first = next(iter(rules[min(unused)]), "")
        some = ", ".join(list(next(iter(chosen.values())))[:_SHOWN])
        raise CheckpointError(f"init_map: no name begins with {first!r}; names in the file are {some}, …")
    best = max(score for score, _, _ in tried)
    equal = [(place, fitted) for score, place, fitted in tried if score == best]
    place, fitted = min(equal, key=lambda one: _rank(one[0]))
    others = [other or "the whole file" for other, _ in equal if other != place]
    if others and best and key is None:
        what = " (averaged weights)" if _AVERAGED.search(place) else ""
        fitted.choices.insert(
            0, f"{place!r}{what} taken, and not {_some(others)}, which fits as well: init_key=… chooses"
        )
    return fitted


def _asked_for(parts: Parts, key: str | None) -> list[str]:
    if key is None:
        return list(parts)
    found = [place for place in parts if place == key] or [p for p in parts if p.rpartition(".")[2] == key]
    if len(found) != 1:
        there = ", ".join(place or "(the whole file)" for place in parts)
        raise CheckpointError(f"init_key={key}: the file has no such part; it has {there}")
    return found


def _rank(place: str) -> tuple[int, int]:
    """Averaged weights first, as in Descent's own checkpoints; then the usual names; then as the file has them."""
    last = place.rpartition(".")[2]
    return (0 if _AVERAGED.search(place) else 1, _USUAL.index(last) if last in _USUAL else len(_USUAL))


def _renamed(tensors: Mapping[str, Tensor], rules: Rules) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for old, new in rules.items():
            if old.startswith("^"):
                if re.search(old, name) is None:
                    continue
                try:
                    target = None if new is None else re.sub(old, new, name)
                except (re.error, IndexError) as error:
                    raise CheckpointError(f"init_map: {old!r} -> {new!r}: {error}") from error
            elif name.startswith(old):
                target = None if new is None else new + name[len(old) :]
            else:
                continue
            if target is not None:
                renamed[target] = tensor
            break
        else:
            renamed[name] = tensor
    return renamed


def _with_prefix(own: _Own, tensors: Mapping[str, Tensor]) -> tuple[int, Fitted]:
    """(how many of the model's tensors fit, the tensors under the model's names) with the prefix that fits best."""
    plain = {_plain(name): tensor for name, tensor in tensors.items()}
    fits: dict[tuple[str, str], set[int]] = {("", ""): set()}
    for name, tensor in plain.items():  # a prefix that the file's names have and the model's don't
        for prefix, rest in _split(name):
            group = own.group(rest, tensor)
            if group is not None:
                fits.setdefault((prefix, ""), set()).add(group)
    for name in own.names:  # … and one that the model's names have and the file's don't
        for prefix, rest in _split(name):
            if prefix and rest in plain and (group := own.group(name, plain[rest])) is not None:
                fits.setdefault(("", prefix), set()).add(group)
    counts = Counter({prefixes: len(groups) for prefixes, groups in fits.items()})
    for off, before in [*counts]:  # a few tensors of the right shape fit anywhere
        of = len(set(map(id, own.tensors.values()))) if off else len(plain)
        if (off or before) and set(off[:-1].split(".")) - set(_WRAPPERS) and 2 * counts[off, before] < of:
            del counts[off, before]
    best = max(counts.values())
    if counts["", ""] == best:
        return best, Fitted({own.names.get(name, name): tensor for name, tensor in plain.items()})
    equal = [prefixes for prefixes, count in counts.items() if count == best]
    if len(equal) > 1:
        stripped = [taken for taken, _ in equal if taken]
        which = (
            f"under each of the prefixes {_some(stripped)}"
            if stripped
            else f"at each of {_some([p for _, p in equal])}"
        )
        example = f"{{{stripped[0]}: ''}}" if stripped else f"{{'': {equal[0][1]}}}"
        raise CheckpointError(f"the model's names fit {which} of the file; say which by init_map={example}")
    off_, before = equal[0]
    kept = {
        own.names.get(before + n[len(off_) :], before + n[len(off_) :]): t
        for n, t in plain.items()
        if n.startswith(off_)
    }
    left = [name for name in plain if not name.startswith(off_)]
    said = []
    if off_ and (set(off_.rstrip(".").split(".")) - set(_WRAPPERS) or left):
        said.append(f"prefix {off_!r} taken off" + (f", names without it left out: {_some(left)}" if left else ""))
    if before:
        said.append(f"prefix {before!r} put before")
    return best, Fitted(kept, said)


def _plain(name: str) -> str:
    """A name of a file without what wrappers have put into it.

    >>> _plain("model._orig_mod.layer.LayerNorm.gamma")
    'model.layer.LayerNorm.weight'
    """
    name = _INSIDE.sub("", name)
    for old, new in _OF_TENSORFLOW.items():
        name = name.removesuffix(old) + new if name.endswith(old) else name
    return name


def _split(name: str) -> Iterator[tuple[str, str]]:
    """
    >>> list(_split("a.b"))
    [('', 'a.b'), ('a.', 'b')]
    """
    yield "", name
    at = name.find(".")
    while at >= 0:
        yield name[: at + 1], name[at + 1 :]
        at = name.find(".", at + 1)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
