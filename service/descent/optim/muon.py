"""One optimizer that updates hidden matrices with Muon and all other parameters with AdamW."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from descent.errors import ConfigError
from descent.optim.parameter_groups import norm_and_bias

_USE_MUON = "use_muon"


def hidden_weights(model: nn.Module) -> set[str]:
    """Names of the trainable 2-D weights between the input and the output of a network.

    Left out are embeddings (their rows are looked up and not multiplied), weights tied to an
    embedding, norms over two dimensions, and the output head. The head is the last `nn.Linear`
    of `model.named_modules()`, that is, the one constructed last.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    head = id(linears[-1].weight) if linears else None
    excluded = norm_and_bias(model)
    return {
        name
        for name, p in model.named_parameters()
        if p.requires_grad and p.ndim == 2 and p not in excluded and id(p) not in embeddings and id(p) != head
    }


class MuonWithAdamW(Optimizer):
    """torch's Muon on the hidden 2-D weights, torch's AdamW on everything else.

    Muon replaces the momentum of a matrix by the nearest (semi-)orthogonal matrix, so that all
    directions are learned equally fast: Jordan et al., "Muon: An optimizer for hidden
    layers in neural networks", 2024. With `adjust_lr_fn="match_rms_adamw"` (Liu et al.,
    arXiv:2502.16982) its updates are as large as AdamW's, so one `lr` fits both parts.
    With `"original"` Muon needs a larger `lr`: give AdamW's part a smaller one by `groups`.

    Args:
        params: parameter groups; `use_muon` (default false) selects Muon for a group. `split` sets it.
        momentum, nesterov, ns_steps, adjust_lr_fn: arguments of Muon.
        betas, eps, fused, foreach: arguments of AdamW.

    Raises ValueError for a value that Muon or AdamW refuses.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 2e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = "match_rms_adamw",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        *,
        fused: bool | None = None,
        foreach: bool | None = None,
    ) -> None:
        self._muon_defaults: dict[str, Any] = {
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
        }
        self._adamw_defaults: dict[str, Any] = {
            "betas": betas,
            "eps": eps,
            "fused": fused,
            "foreach": foreach,
        }
        shared = {"lr": lr, "weight_decay": weight_decay, _USE_MUON: False}
        # torch checks the arguments of an optimizer when it is constructed, and one of the two parts
        # may be empty. So one of each is constructed here, only to have all arguments checked.
        probe = [torch.zeros(1, 1)]
        Muon(probe, lr=lr, weight_decay=weight_decay, **self._muon_defaults)
        AdamW(probe, lr=lr, weight_decay=weight_decay, **self._adamw_defaults)
        # The two parts have no option in common; if they had, one value would serve both.
        super().__init__(params, {**shared, **self._muon_defaults, **self._adamw_defaults})
        for group in self.param_groups:
            if group[_USE_MUON]:
                # Muon has no fused and no foreach kernels.
                group["fused"] = group["foreach"] = None
                group["eps"] = 1e-7  # torch's default for the orthogonalization
        self._link()

    def _link(self) -> None:
        """Construct Muon and AdamW on this optimizer's own group dicts and state, so that they share them."""
        self._parts: list[Optimizer] = []
        for use_muon, kind in ((True, Muon), (False, AdamW)):
            groups = [g for g in self.param_groups if bool(g[_USE_MUON]) is use_muon]
            if groups:
                part = kind(groups)
                part.state = self.state
                self._parts.append(part)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._link()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters once. `closure` recomputes the loss before, as in torch."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss

    @staticmethod
    def split(model: nn.Module, groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Divide each group of (name, parameter) pairs into hidden weights and the rest.

        A group with `use_muon: false` goes to AdamW undivided; this is for a matrix that
        `hidden_weights` takes for a hidden one by mistake, such as a table of positions.

        Raises ConfigError if the model has no hidden 2-D weight.
        """
        hidden = hidden_weights(model)
        if not hidden:
            raise ConfigError(
                "optimizer=muon: the model has no hidden 2-D weight (a matrix that is neither an "
                "embedding nor the last Linear); use optimizer=adamw"
            )
        found = []
        for group in groups:
            allowed = group.get(_USE_MUON, True)
            for use_muon in (True, False):
                own = [(n, p) for n, p in group["params"] if (allowed and n in hidden) is use_muon]
                if own:
                    found.append({**group, "params": own, _USE_MUON: use_muon})
        return found
