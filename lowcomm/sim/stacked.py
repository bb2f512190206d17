"""Computes equal steps of many small replicas at once, over stacked weights.

Parameters do not change while a rank sleeps in a step. So each rank announces its batch when its step begins; the first
to need its gradients computes those of all announced batches by `torch.func.vmap`. This is faster if one replica's
kernels do not fill the device: on a GPU, not on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from lowcomm.config import Run
from lowcomm.engine.around import Around
from lowcomm.engine.base import Ready
from lowcomm.engine.torch_engine import TorchEngine, next_token_loss

_CANNOT = (
    "this model cannot be computed for several replicas at once ({}): set stacked to false, or leave out what draws "
    "random numbers (dropout), changes buffers (batch norm) or looks at values in forward"
)


class Stack:
    """The replicas of a simulation whose gradients are computed together.

    Updates and evaluations stay separate. Weights are stacked anew each time, a copy that is cheap beside a forward
    pass.

    Args:
        autocast: of every replica, as in `TorchEngine`.
        loss: likewise.
        compile: run the forward of all replicas together through torch.compile.

    Attributes:
        num_calls: how often gradients were computed.
        num_gradients: how many replicas' they were, summed over the calls.
    """

    def __init__(
        self,
        autocast: torch.dtype | None = None,
        loss: Callable[[nn.Module, Any], Tensor] = next_token_loss,
        compile: bool = False,
    ) -> None:
        self.num_calls = self.num_gradients = 0
        self._loss, self._autocast = loss, autocast
        self._losses = torch.compile(self._each_loss, dynamic=False) if compile else self._each_loss
        self._first: _Loss | None = None  # the replicas' code, and what is the same in all of them
        self._trained: dict[int, dict[str, nn.Parameter]] = {}
        self._announced: dict[int, Tensor] = {}
        self._found: dict[int, tuple[list[Tensor], Tensor]] = {}  # gradients and loss that nobody has taken yet

    def join(self, rank: int, engine: TorchEngine) -> StackedEngine:
        """One more replica; its engine keeps its optimizer, clipping and schedule.

        Raises:
            ValueError: when its buffers or frozen parameters are not those of the replicas before it.
        """
        if self._first is None:
            self._first = _Loss(engine.model, self._loss)
        mine, first = _fixed(engine.model), _fixed(self._first.model)
        differing = sorted(mine.keys() ^ first.keys()) + [
            name for name in mine.keys() & first.keys() if not torch.equal(mine[name], first[name])
        ]
        if differing:
            raise ValueError(
                f"rank {rank}'s buffers or frozen parameters are not those of the others ({', '.join(differing)}), so "
                "the replicas cannot be computed together: set stacked to false"
            )
        self._trained[rank] = {name: p for name, p in engine.model.named_parameters() if p.requires_grad}
        return StackedEngine(self, rank, engine)

    def leave(self, rank: int) -> None:
        """Compute no more for a rank that has ended or was lost."""
        for of_rank in (self._trained, self._announced, self._found):
            of_rank.pop(rank, None)

    def announce(self, rank: int, batch: Tensor) -> None:
        """A rank will take the gradients of this batch, and does not change its parameters before."""
        assert rank not in self._announced and rank not in self._found, "announced twice in one step"
        self._announced[rank] = batch

    def take(self, rank: int) -> tuple[list[Tensor], Tensor]:
        """A rank's gradients, in the order of `Engine.slots`, and its loss; computed now, with all announced ones, if
        needed.

        Raises:
            ValueError: when the model or its loss cannot be computed for several replicas at once.
        """
        if rank not in self._found:
            self._compute()
        return self._found.pop(rank)

    def line(self) -> str:
        """What there is to say about it after a run."""
        average = self.num_gradients / max(1, self.num_calls)
        return f"stacked: gradients computed {self.num_calls:,} times, for {average:.1f} replicas at once on average"

    def _compute(self) -> None:
        ranks = sorted(self._announced)
        trained = [self._trained[rank] for rank in ranks]
        weights = {name: torch.stack([x[name].detach() for x in trained]).requires_grad_() for name in trained[0]}
        batches = torch.stack([self._announced[rank] for rank in ranks])
        assert self._first is not None, "who announces has joined"
        fixed = _fixed(self._first.model)
        versions = {name: x._version for name, x in fixed.items()}
        try:
            # the fused kernels of attention are not batched but called for one replica after the other
            with sdpa_kernel(SDPBackend.MATH):
                losses = self._losses(weights, batches)
        except RuntimeError as error:
            if "vmap" not in str(error):
                raise
            raise ValueError(_CANNOT.format(" ".join(str(error).split()))) from error
        changed = [name for name, x in fixed.items() if x._version != versions[name]]
        if changed:
            raise ValueError(_CANNOT.format(f"it changes {', '.join(changed)}"))
        # a replica's loss knows no weights but its own, so this is the gradient of each
        gradients = torch.autograd.grad(losses, list(weights.values()), torch.ones_like(losses), materialize_grads=True)
        self.num_calls += 1
        self.num_gradients += len(ranks)
        by_rank = zip(*(x.contiguous().unbind() for x in gradients), strict=True)
        for rank, mine, my_loss in zip(ranks, by_rank, losses.detach().float().unbind(), strict=True):
            self._found[rank] = (list(mine), my_loss)
        self._announced.clear()

    def _each_loss(self, weights: dict[str, Tensor], batches: Tensor) -> Tensor:
        """The loss of every replica, from its own weights and batch; all are stacked along dim 0."""
        first = self._first

        def loss(weights: dict[str, Tensor], batch: Tensor) -> Tensor:
            assert first is not None, "who announces has joined"
            with self._casting(batch.device):
                value: Tensor = functional_call(first, {f"model.{name}": x for name, x in weights.items()}, (batch,))
            return value

        losses: Tensor = vmap(loss, randomness="error")(weights, batches)
        return losses

    def _casting(self, device: torch.device) -> AbstractContextManager[object]:
        return nullcontext() if self._autocast is None else torch.autocast(device.type, self._autocast)


class StackedEngine(Around):
    """A replica whose gradients come from a `Stack`; all else is its own engine's."""

    def __init__(self, stack: Stack, rank: int, inner: TorchEngine) -> None:
        super().__init__(inner)
        self._stack, self._rank = stack, rank
        self._parameters = [p for p in inner.model.parameters() if p.requires_grad]
        self._announced: Any = None

    def announce(self, batch: Tensor) -> None:
        """What the next `backward` will be of; its gradients may be computed from now on, so change no parameter."""
        self._stack.announce(self._rank, batch)
        self._announced = batch

    def backward(self, batch: Any, ready: Ready | None = None) -> Tensor:
        """Gradients come all at once, so nobody may ask for each."""
        assert ready is None, "refused by `require_stackable`"
        if self._announced is None:
            self.announce(batch)
        assert self._announced is batch, "another batch was announced"
        self._announced = None
        gradients, loss = self._stack.take(self._rank)
        for p, gradient in zip(self._parameters, gradients, strict=True):
            p.grad = gradient
        return loss

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Not while a batch is announced."""
        assert self._announced is None, "its gradients may be computed already"
        super().load_state_dict(state)


def require_stackable(run: Run, timing_only: bool, num_resident: int | None) -> None:
    """Refuse what cannot be computed for several replicas at once, as far as the config tells.

    Raises:
        ValueError: saying what to change.
    """
    reasons = {
        "timing_only is true, and there is nothing to compute": timing_only,
        f"num_resident is {num_resident}, and all replicas must be there at once": num_resident is not None,
        "the algorithm's overlap is on, which sends gradients one after the other": run.algorithm.sends_in_backward(),
        f"batch.num_micro_batches is {run.batch.num_micro_batches}, not 1": run.batch.num_micro_batches > 1,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"replicas cannot be stacked: {reason}; change that, or set stacked to false")


class _Loss(nn.Module):
    """A model and its loss as one module, since that is what `functional_call` lends weights to."""

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Tensor) -> Tensor:
        return self.loss(self.model, batch)


def _fixed(model: nn.Module) -> dict[str, Tensor]:
    """What training does not change."""
    return dict(model.named_buffers()) | {name: p for name, p in model.named_parameters() if not p.requires_grad}
