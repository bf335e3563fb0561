"""Steps that can't be committed because a loss or a gradient is not finite: who, where, which samples.

All of this runs on such steps only. Each rank computes its own slots once more, alone,
and looks into them; what the ranks found is exchanged, so that all tell the same.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from descent.messages import Notice
from descent.training.buffers import Buffers
from descent.training.collectives import Group
from descent.training.determinism import begin_stream
from descent.training.input.sampling import Indices, stream_seed
from descent.training.objective import Objective
from descent.training.step import Fetch, StepInput, StepResult

_LISTED = 8
"""Samples and slots that are named one by one; of the rest only the number."""
_ALONE = 64
"""Samples of a micro-batch that are run one by one where nothing else tells them apart."""
_BYTES = 4096
"""What a rank has to say in the exchange."""

Finding = dict[str, Any]
"""One slot: slot, loss, layers, samples, bad, of, inputs; plain values, fit for JSON."""


@dataclass(frozen=True)
class Inspector:
    """Looks for what is not finite in a step's slots, without touching `.grad` or talking to anyone."""

    model: nn.Module
    objective: Objective
    buffers: Buffers
    autocast: Callable[[], AbstractContextManager[Any]]
    uses_non_torch_rng: bool

    def look(self, given: StepInput, fetch: Fetch, samples: Indices) -> list[Finding]:
        """The slots of this rank that are not finite; `samples` are the global batch's numbers."""
        found = []
        try:
            for slot, bounds in given.slots:
                finding = self._slot(given, slot, bounds, fetch, samples)
                if finding["layers"] or finding["bad"] or finding["loss"] in ("nan", "inf", "-inf"):
                    found.append(finding)
        except Exception as error:  # a diagnosis may fail; it must not end the run
            found.append({"slot": -1, "error": f"{type(error).__name__}: {error}"[:200]})
        finally:
            self.buffers.restart()
        return found

    def _slot(self, given: StepInput, slot: int, bounds: tuple[int, int], fetch: Fetch, samples: Indices) -> Finding:
        begin_stream(stream_seed(given.seed, given.step, slot), given.scale.device, self.uses_non_torch_rng)
        self.buffers.restart()
        loss, layers, rows, from_input = 0.0, dict[str, None](), list[int](), False
        for start, stop in given.micro_batches(*bounds):
            inputs, targets = fetch(start, stop)
            output, value = self._forward(inputs, targets)
            spoilt = self._spoilt_layers(value, given.scale)
            layers.update(dict.fromkeys(spoilt))
            loss += float(value.detach())
            bad, by_input = self._rows(inputs, output, targets, given.scale, bool(spoilt))
            rows += [start + row for row in bad]
            from_input |= by_input
        return {
            "slot": slot,
            "loss": str(loss),
            "layers": self._in_order(layers),
            "samples": [int(samples[row]) for row in rows[:_LISTED]],
            "bad": len(rows),
            "of": bounds[1] - bounds[0],
            "inputs": from_input,
        }

    def _forward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        with self.autocast():
            output = self.model(inputs)
        return output, self.objective(output, targets)

    def _spoilt_layers(self, loss: Tensor, scale: Tensor) -> list[str]:
        """The layers (modules that own parameters) whose gradient's norm is not finite."""
        named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        gradients = torch.autograd.grad(
            loss, [p for _, p in named], scale.to(loss.dtype), retain_graph=True, allow_unused=True
        )
        spoilt = {
            name.rpartition(".")[0] or name: None
            for (name, _), g in zip(named, gradients, strict=True)
            if g is not None and not torch.linalg.vector_norm(g).isfinite()
        }
        return list(spoilt)

    def _in_order(self, layers: dict[str, None]) -> list[str]:
        names = (n.rpartition(".")[0] or n for n, _ in self.model.named_parameters())
        return [name for name in dict.fromkeys(names) if name in layers]

    def _rows(
        self, inputs: Tensor, output: Tensor, targets: Tensor, scale: Tensor, spoilt: bool
    ) -> tuple[list[int], bool]:
        """The micro-batch's samples that are to blame, and whether their very inputs are not finite."""
        with torch.no_grad():
            by_input = _not_finite(inputs)
            if by_input:
                return by_input, True
            rows = set(_not_finite(output))
            for row in range(len(targets)):
                alone = slice(row, row + 1)
                if not self.objective(output[alone], targets[alone]).isfinite():
                    rows.add(row)
        if not rows and spoilt and not self.buffers.size:
            # Only the backward is not finite. (Batch norm can't take one sample alone.)
            for row in range(min(len(targets), _ALONE)):
                value = self._forward(inputs[row : row + 1], targets[row : row + 1])[1]
                if self._spoilt_layers(value, scale):
                    rows.add(row)
        return sorted(rows), False


def _not_finite(tensor: Tensor) -> list[int]:
    """The rows of [n, …] that hold something that is not finite."""
    if not tensor.is_floating_point():
        return []
    return (~tensor.reshape(len(tensor), -1).isfinite().all(1)).nonzero().flatten().tolist()


def exchange(group: Group, suspects: Sequence[int], found: list[Finding]) -> list[dict[str, Any]]:
    """What every rank has to say, by rank: {"suspects": ranks, "slots": findings, "more": not told}."""
    told = {"suspects": list(suspects), "slots": [_short(f) for f in found[:_LISTED]], "more": 0}
    while len(raw := json.dumps(told).encode()) > _BYTES:
        told["slots"].pop()  # type: ignore[attr-defined]
    told["more"] = len(found) - len(told["slots"])  # type: ignore[arg-type]
    raw = json.dumps(told).encode()
    table = torch.zeros(group.world_size, _BYTES + 16, dtype=torch.int32)
    table[group.rank, : len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    rows = group.sum_(table.to(group.device)).to("cpu", torch.uint8)
    return [json.loads(row.numpy().tobytes().rstrip(b"\0")) for row in rows]


def _short(finding: Finding) -> Finding:
    layers = finding.get("layers", [])
    return {**finding, "layers": [name[-60:] for name in layers[:3]], "num_layers": len(layers)}


def notice(
    step: int,
    generation: int,
    shares: Sequence[tuple[int, int]],
    first: StepResult,
    committed: bool,
    told: list[dict[str, Any]],
) -> Notice:
    """What all ranks tell about a step whose first attempt was not finite."""
    if committed:
        slots = [s for s, loss in enumerate(first.slot_losses) if loss - loss != 0.0]
        holders = {r for s in slots for r, (lo, hi) in enumerate(shares) if lo <= s < hi}
        ranks = sorted(holders | {r for said in told for r in said["suspects"]})
        where = f" on rank {', '.join(map(str, ranks))}" if ranks else ""
        what = "loss" if slots else "gradient"
        detail = f"the {what} was not finite{where}, but is when computed again from the same state"
        extra = {"ranks": ranks, "slots": slots}
        return Notice("step repeated", step, generation, ranks[0] if len(ranks) == 1 else None, detail, extra)
    findings = [{"rank": r, **slot} for r, said in enumerate(told) for slot in said["slots"]]
    more = sum(said["more"] for said in told)
    sentences = [_sentence(f) for f in findings[:_LISTED]]
    if len(findings) + more > _LISTED:
        sentences.append(f"and {len(findings) + more - len(sentences)} more slots")
    detail = "; ".join(sentences) or "each slot alone is finite, but their sum is not: it overflows"
    rank = findings[0]["rank"] if findings else None
    return Notice("step skipped", step, generation, rank, detail, {"slots": findings, "more": more})


def _sentence(finding: Finding) -> str:
    """One slot in words."""
    where = f"rank {finding['rank']}, slot {finding['slot']}"
    if "error" in finding:
        return f"rank {finding['rank']}: not finite, and the search for the cause failed: {finding['error']}"
    parts = [f"loss {finding['loss']}"]
    if finding["layers"]:
        others = finding["num_layers"] - 1
        parts.append(
            f"gradient not finite in {finding['layers'][0]}" + (f" and {others} more layers" if others else "")
        )
    if finding["bad"]:
        named = ", ".join(map(str, finding["samples"]))
        whole = finding["bad"] == finding["of"]
        count = f"all {finding['of']} samples" if whole else f"{finding['bad']} of {finding['of']}"
        cause = "the inputs of samples" if finding["inputs"] else "samples"
        parts.append(f"{cause} {named}{' …' if finding['bad'] > _LISTED else ''} ({count})")
    return f"{where}: {', '.join(parts)}"
