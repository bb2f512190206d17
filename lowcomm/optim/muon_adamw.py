"""Muon for hidden matrices and AdamW for the rest, as one optimizer: the inner optimizer of MuLoCo (arXiv:2505.23725).

Muon (Keller Jordan 2024) replaces the momentum of a matrix by a nearby matrix whose singular values are all about 1,
through five Newton-Schulz steps. That makes sense where a matrix maps features to features. Embeddings and the head,
whose rows are single tokens, and vectors are AdamW's. Both optimizers are torch's own.

Differs from the paper in: tensors of three and more dimensions go to AdamW (the authors flatten them for Muon); what is
hidden follows from a parameter's place in the model, not from words in its name. The defaults are Muon's own; the
authors' runs took momentum 0.9 without Nesterov.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer

Named = tuple[str, Tensor]


class MuonAdamW(Optimizer):
    """Muon and AdamW side by side, over the groups of this optimizer.

    A parameter is a hidden matrix if `is_hidden` says so. A group with a key ``hidden`` (True or False) decides for
    all of its parameters instead, for models that count their embedding or head among their blocks. Groups with both
    kinds are cut in two, Muon's come first, and a schedule acts on all. Groups that are added later come last.

    States are those of the two: "momentum_buffer" of a hidden matrix; "exp_avg", "exp_avg_sq" and "step" elsewhere. So
    no state is there for every parameter, and methods that average optimizer states find none.
    """

    def __init__(
        self,
        params: Iterable[Named] | Iterable[dict[str, Any]],
        lr: float = 0.02,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        nesterov: bool = True,
        adjust_lr_fn: Literal["original", "match_rms_adamw"] = "original",
        adamw_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        """Nothing is copied; states are made at the first step.

        Args:
            params: (name, parameter) pairs, such as ``model.named_parameters()``, or groups of them.
            lr: Muon's, by which singular values move in a step.
            weight_decay: of both, decoupled: each step takes off its learning rate times this.
            momentum: Muon's.
            nesterov: orthogonalise what the momentum will be, not what it is.
            adjust_lr_fn: how Muon's lr depends on a matrix of ``rows x columns``: "original" multiplies it by
                sqrt(max(1, rows / columns)); "match_rms_adamw" by 0.2 sqrt(max(rows, columns)), which moves entries
                about as far as AdamW does, so that AdamW's lr and weight decay fit.
            adamw_lr: None takes ``lr`` for both.
            betas, eps: AdamW's.

        Raises:
            ValueError: for a number out of range, parameters without names, or when no parameter is hidden.
        """
        if not 0 <= momentum < 1:
            raise ValueError(f"MuonAdamW(momentum={momentum}): it must be at least 0 and below 1; 0.95 is usual")
        if adamw_lr is not None and not adamw_lr > 0:
            raise ValueError(f"MuonAdamW(adamw_lr={adamw_lr}): it must be positive, or None to take lr = {lr} for both")
        hidden, others = _split(params)
        if not hidden:
            raise ValueError(
                "MuonAdamW finds no hidden matrix, that is, no parameter of 2 dimensions within a numbered block such "
                "as layers.0: take torch.optim.AdamW, or mark a group with hidden=True"
            )
        rate = lr if adamw_lr is None else adamw_lr
        self._muon = partial(
            Muon, lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov, adjust_lr_fn=adjust_lr_fn
        )
        self._adamw = partial(AdamW, lr=rate, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__([*hidden, *others], {})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add (name, parameter) pairs, split as those of the constructor, with its options where the group has none.

        Raises:
            ValueError: for parameters without names or held already, or that Muon cannot train; none is added then.
        """
        hidden, others = _split([param_group])
        groups = list(self._muon(hidden).param_groups) if hidden else []
        if any(not group["nesterov"] and p.dtype == torch.bfloat16 for group in groups for p in group["params"]):
            raise ValueError(
                "MuonAdamW(nesterov=False): torch's Muon then rescales the momentum of bfloat16 matrices in place; "
                "set nesterov to True, or keep parameters in float32 (precision bf16_mixed)"
            )
        if others:
            groups += self._adamw(others).param_groups
        num_before = len(self.param_groups)
        try:
            for group in groups:
                super().add_param_group(group)
        except ValueError:
            del self.param_groups[num_before:]  # the matrices, when it is the others that are refused
            raise
        self._share()

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles have; torch's own leaves out what it does not know."""
        return {**super().__getstate__(), "_muon": self._muon, "_adamw": self._adamw}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also called by `load_state_dict`, which puts new groups and states in the place of the old."""
        super().__setstate__(state)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of both; parameters without a gradient are left as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss

    def _share(self) -> None:
        """Let the two work on this optimizer's own groups and states."""
        hidden = [group for group in self.param_groups if group["hidden"]]
        others = [group for group in self.param_groups if not group["hidden"]]
        self._parts: list[Optimizer] = [Muon(hidden), *([AdamW(others)] if others else [])]
        for part in self._parts:
            part.state = self.state


def is_hidden(name: str, parameter: Tensor) -> bool:
    """Whether it is a matrix within a numbered block: 2 dimensions, and a whole number between the dots of its name.

    So "model.layers.3.mlp.up_proj.weight" is, and "model.embed_tokens.weight" and "lm_head.weight" are not. In a plain
    `nn.Sequential` every module is numbered.
    """
    return parameter.ndim == 2 and any(part.isdecimal() for part in name.split("."))


def _split(params: Iterable[Named] | Iterable[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The groups of hidden matrices, then those of the rest, each marked with ``hidden``."""
    given: list[Any] = list(params)
    groups = given if given and isinstance(given[0], dict) else [{"params": given}]
    parts: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for group in groups:
        members = list(group["params"])
        if not all(isinstance(member, tuple) for member in members):
            raise ValueError(
                "MuonAdamW tells hidden matrices by their names: give (name, parameter) pairs, such as "
                "model.named_parameters()"
            )
        for hidden, part in parts.items():
            chosen = [(name, p) for name, p in members if group.get("hidden", is_hidden(name, p)) == hidden]
            if chosen:
                part.append({**group, "params": chosen, "hidden": hidden})
    return parts[True], parts[False]
