"""Steps that can't be committed because a loss or a gradient is not finite: which rank, layer and samples are the cause.

All of this runs on such steps only. Each rank computes its own slots once more, alone, and looks
for the cause; the ranks exchange their findings, so that all of them report the same.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from descent.data.batch import Batch
from descent.messages import Notice
from descent.training.buffers import Buffers
from descent.training.collectives import Group
from descent.training.determinism import begin_stream
from descent.training.input.sampling import Indices, stream_seed
from descent.training.step import MicroBatch, StepInput, StepResult
from descent.training.task import Task, not_finite_rows

_LISTED = 8
"""Samples and slots that are named one by one; of the rest only the number."""
_BYTES = 4096
"""The size of a rank's answer in the exchange."""

Fetch = Callable[[int, int], Batch]
"""(first, stop) within the step's global batch -> these samples as a batch on the device."""

Finding = dict[str, Any]
"""What was found in one slot: slot, loss, layers, samples, bad, of, inputs; plain values, fit for JSON."""


@dataclass(frozen=True)
class Inspector:
    """Looks for numbers that aren't finite in a step's slots, without touching `.grad` and without a collective."""

    model: nn.Module
    task: Task
    buffers: Buffers
    seed: int
    scale: Tensor
    """The gradient of a micro-batch's loss sum, as in the step: a 0-d tensor on the device."""
    uses_non_torch_rng: bool

    def inspect(self, given: StepInput, fetch: Fetch, samples: Indices) -> list[Finding]:
        """The slots of this rank that are not finite.

        samples: [batch size], the number in the data set of each sample of the global batch.
        """
        found = []
        try:
            for slot, pieces in groupby(given.micro_batches, key=lambda micro: micro.slot):
                finding = self._inspect_slot(given.step, slot, list(pieces), fetch, samples)
                if finding["layers"] or finding["bad"] or finding["loss"] in ("nan", "inf", "-inf"):
                    found.append(finding)
        except Exception as error:  # a diagnosis may fail; it must not end the run
            found.append({"slot": -1, "error": f"{type(error).__name__}: {error}"[:200]})
        finally:
            self.buffers.restart()
        return found

    def _inspect_slot(self, step: int, slot: int, pieces: list[MicroBatch], fetch: Fetch, samples: Indices) -> Finding:
        begin_stream(stream_seed(self.seed, step, slot), self.scale.device, self.uses_non_torch_rng)
        self.buffers.restart()
        loss, layers, rows, from_input = 0.0, dict[str, None](), list[int](), False
        for micro in pieces:
            batch = fetch(micro.first, micro.stop)
            value = self.task.loss(self.model, batch, range(micro.first, micro.stop)).total
            spoilt = self._spoilt_layers(value)
            layers.update(dict.fromkeys(spoilt))
            loss += float(value.detach())
            bad, by_input = self._bad_rows(batch)
            rows += [micro.first + row for row in bad]
            from_input |= by_input
        return {
            "slot": slot,
            "loss": str(loss),
            "layers": self._in_order(layers),
            "samples": [int(samples[row]) for row in rows[:_LISTED]],
            "bad": len(rows),
            "of": pieces[-1].stop - pieces[0].first,
            "inputs": from_input,
        }

    def _spoilt_layers(self, loss: Tensor) -> list[str]:
        """The layers (modules that own parameters) whose gradient's norm is not finite."""
        named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        gradients = torch.autograd.grad(
            loss, [p for _, p in named], self.scale.to(loss.dtype), retain_graph=True, allow_unused=True
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

    def _bad_rows(self, batch: Batch) -> tuple[list[int], bool]:
        """The rows of the micro-batch that are the cause, and whether already their inputs are not finite."""
        by_input = not_finite_rows(batch)
        if by_input:
            return by_input, True
        alone = not self.buffers.row_length  # batch norm, for one, can't take one sample alone
        return self.task.bad_rows(self.model, batch, lambda total: bool(self._spoilt_layers(total)), alone=alone), False


def exchange(group: Group, suspects: Sequence[int], found: list[Finding]) -> list[dict[str, Any]]:
    """Every rank's answer, by rank: {"suspects": ranks, "slots": findings, "more": how many findings are left out}.

    suspects: the ranks whose part of the gradient arrived here not finite. found: this rank's findings.
    Raises PeerLost.
    """
    answer = {"suspects": list(suspects), "slots": [_short(f) for f in found[:_LISTED]], "more": 0}
    while len(raw := json.dumps(answer).encode()) > _BYTES:
        answer["slots"].pop()  # type: ignore[attr-defined]
    answer["more"] = len(found) - len(answer["slots"])  # type: ignore[arg-type]
    raw = json.dumps(answer).encode()
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
    answers: list[dict[str, Any]],
) -> Notice:
    """The notice of a step whose first attempt was not finite, the same on all ranks.

    shares: per rank its slots. first: the first attempt's result. committed: whether the second one was.
    answers: what `exchange` gave.
    """
    if committed:
        slots = [s for s, loss in enumerate(first.slot_losses) if loss - loss != 0.0]
        holders = {r for s in slots for r, (lo, hi) in enumerate(shares) if lo <= s < hi}
        ranks = sorted(holders | {r for answer in answers for r in answer["suspects"]})
        where = f" on rank {', '.join(map(str, ranks))}" if ranks else ""
        what = "loss" if slots else "gradient"
        detail = f"the {what} was not finite{where}, but is when computed again from the same state"
        extra = {"ranks": ranks, "slots": slots}
        return Notice("step repeated", step, generation, ranks[0] if len(ranks) == 1 else None, detail, extra)
    findings = [{"rank": r, **slot} for r, answer in enumerate(answers) for slot in answer["slots"]]
    more = sum(answer["more"] for answer in answers)
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
