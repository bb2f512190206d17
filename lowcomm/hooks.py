"""Communication hooks for torch's DistributedDataParallel and FSDP2.

hook = lowcomm.ddp_hook(Reducer(PowerSGD(rank=4), EF14())) hook.register(model)        # once, on the
DistributedDataParallel, before its first backward

hook = lowcomm.fsdp_hook(Reducer(Quantized(), EF14()), comm) hook.register(model)        # once, after fully_shard; comm
joins the ranks that hold the same shard
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lowcomm.comm.agreement import check_agreement
from lowcomm.comm.base import Comm
from lowcomm.comm.distributed import DistributedComm, over
from lowcomm.engine.held import require_real
from lowcomm.reduce import NonFinite, Reducer, ReducerState
from lowcomm.state import restore, state_tree

_ALIKE = "register hooks of one reducer on one model, sharded alike, on all ranks"


class Bucket(Protocol):
    """The gradients that DDP passes to a hook, as one flat buffer (torch.distributed.GradBucket)."""

    def buffer(self) -> Tensor:
        """All gradients of the bucket."""
        ...

    def gradients(self) -> list[Tensor]:
        """Views into `buffer`."""
        ...

    def parameters(self) -> list[Tensor]:
        """Whose gradients these are."""
        ...

    def index(self) -> int:
        """Its place among the buckets of a backward, from 0; hooks are called in this order."""
        ...

    def is_last(self) -> bool:
        """Whether this is the last bucket of a backward."""
        ...


@dataclass(frozen=True)
class _Full:
    """A bucket that waits for the last one."""

    buffer: Tensor
    gradients: list[Tensor]
    parameters: list[Tensor]
    future: torch.futures.Future[Tensor]

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Each parameter and its gradient."""
        return list(zip(self.parameters, self.gradients, strict=True))


class DDPHook:
    """Averages the gradients of a model in DistributedDataParallel with a `Reducer`; made by `ddp_hook`.

    Once DDP's last bucket is full, all gradients are averaged as one list, in the order of the model's parameters, and
    DDP waits. So the state does not depend on DDP's buckets, which change after the first backward, and resuming is
    exact. The price is that nothing is sent during backward.

    16-bit gradients and errors are averaged and kept in float32. When a rank's gradients are not finite and the
    compressor cannot carry that, all gradients become NaN on every rank, so gradient scalers skip the step everywhere;
    the state is unchanged.
    """

    def __init__(self, reducer: Reducer) -> None:
        self._reducer = reducer
        self._comm: DistributedComm | None = None
        self._parameters: list[Tensor] = []
        self._state: ReducerState | None = None
        self._waiting: list[_Full] = []

    def register(self, model: nn.parallel.DistributedDataParallel) -> None:
        """Average this model's gradients from now on, over its process group; all ranks call it.

        Raises:
            ValueError: when the hook serves a model already, or a gradient will be sparse or not real; on all ranks,
                when they bring different models or reducers.
        """
        if self._comm is not None:
            raise ValueError("this hook serves a model already: its state is that model's; make another by ddp_hook()")
        ignored: set[str] = set(model.parameters_to_ignore)
        # As DDP counts them: a tied one unless all its names are ignored; one of the model itself is called ".name".
        named = model.module.named_parameters(remove_duplicate=False)
        kept = [p for name, p in named if (name if "." in name else f".{name}") not in ignored]
        self._parameters = [p for p in dict.fromkeys(kept) if p.requires_grad]
        shapes = _shapes(model.module, self._parameters)
        comm = over(model.process_group, self._parameters[0].device)
        check_agreement(comm, {"reducer": repr(self._reducer), "gradient list": shapes}, _ALIKE)
        self._comm = comm
        self._state = self._reducer.init([_wide(p.detach()) for p in self._parameters])
        model.register_comm_hook(self, _average)

    def state_dict(self) -> dict[str, Any]:
        """What a restart needs beside the model's and the optimizer's own; of this rank alone.

        Raises:
            ValueError: when the hook is not registered yet.
        """
        return {"reducer": state_tree(self._registered()[1])}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; after `register`, on the rank that saved it.

        Raises:
            ValueError: when the hook is not registered yet, or the state is of another model or reducer.
        """
        restore(self._registered()[1], state["reducer"], self._parameters[0].device)

    def average(self, bucket: Bucket) -> torch.futures.Future[Tensor]:
        """Called by DDP for each bucket; returns a future of the means, in the bucket's buffer."""
        if bucket.index() == 0:
            self._waiting.clear()  # what a backward left that broke off
        device = bucket.buffer().device
        future: torch.futures.Future[Tensor] = torch.futures.Future(devices=[device] if device.type == "cuda" else None)
        self._waiting.append(_Full(bucket.buffer(), bucket.gradients(), bucket.parameters(), future))
        if bucket.is_last():
            self._average_all([pair for full in self._waiting for pair in full.pairs()])
            for full in self._waiting:
                full.future.set_result(full.buffer)
            self._waiting.clear()
        return future

    def _average_all(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """Average all gradients of a backward in place, given with their parameters in any order."""
        comm, state = self._registered()
        place = {id(p): i for i, p in enumerate(self._parameters)}
        gradients = [gradient for _, gradient in sorted(pairs, key=lambda pair: place[id(pair[0])])]
        assert len(gradients) == len(self._parameters), "DDP left out a parameter"
        try:
            means, self._state = self._reducer.mean([_wide(g) for g in gradients], state, comm).result()
        except NonFinite:
            for gradient in gradients:
                gradient.fill_(float("nan"))
            return
        for gradient, mean in zip(gradients, means, strict=True):
            gradient.copy_(mean)

    def _registered(self) -> tuple[DistributedComm, ReducerState]:
        if self._comm is None or self._state is None:
            raise ValueError("the hook serves no model yet; call its register(model) first")
        return self._comm, self._state


class FSDPHook:
    """Averages gradients that FSDP2 has reduced within islands over the islands, with a `Reducer`; made by `fsdp_hook`.

    Each sharded module's gradient shard is one vector, in FSDP's reduce dtype, with its own state; FSDP waits for the
    mean. Non-finite and 16-bit gradients are treated as in `DDPHook`, but per module: other modules' states advance
    even if the step is then skipped.

    The vector must hold all parameters, with zeros for those without a gradient. Without
    `FSDPModule.set_reduce_scatter_unused_params` (older torch), each parameter must get a gradient in every backward.
    """

    def __init__(self, reducer: Reducer, comm: Comm) -> None:
        if not reducer.compressor.elementwise:
            raise ValueError(
                f"FSDP's gradients are pieces of flat vectors, and {reducer.compressor} needs whole tensors; choose "
                "another compressor, such as Quantized"
            )
        self._reducer, self._comm = reducer, comm
        self._states: dict[str, ReducerState] = {}
        self._saved: Mapping[str, Any] = {}

    def register(self, model: nn.Module) -> None:
        """Average the gradients of all modules in ``model`` that were sharded, itself included; all ranks call it.

        Raises:
            ValueError: when there is none, or a gradient will be sparse or not real; on all ranks, when they bring
                different shards or reducers.
        """
        sharded = {name: module for name, module in model.named_modules() if hasattr(module, "set_all_reduce_hook")}
        if not sharded:
            raise ValueError("no module of the model is sharded; call torch's fully_shard on it first")
        shapes = _shapes(model, [p for p in model.parameters() if p.requires_grad])
        facts = {"reducer": repr(self._reducer), "sharded modules": "\n".join(sharded), "gradient list": shapes}
        check_agreement(self._comm, facts, _ALIKE)
        for name, module in sharded.items():
            module.set_all_reduce_hook(partial(self.average, name))
            if hasattr(module, "set_reduce_scatter_unused_params"):
                module.set_reduce_scatter_unused_params(True, recurse=False)

    def state_dict(self) -> dict[str, Any]:
        """What a restart needs beside the model's and the optimizer's own; of this rank alone."""
        return {**self._saved, **{name: state_tree(state) for name, state in self._states.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there, on the rank that saved it; before the first backward."""
        self._states, self._saved = {}, dict(state)

    def average(self, name: str, gradient: Tensor) -> None:
        """Called by FSDP for the module of this name: averages its shard in place.

        Raises:
            ValueError: when the loaded state is of another model or reducer.
        """
        wide = [_wide(gradient)]
        if name not in self._states:
            self._states[name] = self._reducer.init(wide)
            if name in self._saved:
                restore(self._states[name], self._saved[name], gradient.device)
        try:
            (mean,), self._states[name] = self._reducer.mean(wide, self._states[name], self._comm).result()
        except NonFinite:
            gradient.fill_(float("nan"))
            return
        gradient.copy_(mean)


def ddp_hook(reducer: Reducer) -> DDPHook:
    """A communication hook for torch's DistributedDataParallel that averages gradients with ``reducer``.

    Call its ``register(model)`` in place of ``model.register_comm_hook``. Save each rank's ``state_dict`` in the
    checkpoint: it holds the error feedback.
    """
    return DDPHook(reducer)


def fsdp_hook(reducer: Reducer, comm: Comm) -> FSDPHook:
    """An all-reduce hook for modules that torch's ``fully_shard`` has sharded over the ranks of an island.

    Args:
        reducer: averages over islands, in place of the all-reduce of hybrid sharding.
        comm: the ranks that hold the same shard, one of each island: for n ranks in islands of k, consecutive in rank,
            ``connect(...).sub(range(rank % k, n, k))``.

    Raises:
        ValueError: when the compressor looks at shapes.
    """
    return FSDPHook(reducer, comm)


def _average(state: DDPHook, bucket):  # type: ignore[no-untyped-def]  # torch refuses annotations but its own
    return state.average(bucket)


def _shapes(model: nn.Module, parameters: Sequence[Tensor]) -> str:
    """What gradients there will be of these parameters, a line each, as local shards where they are sharded.

    Raises:
        ValueError: when one will be sparse, or is not real.
    """
    sparse = {id(x.weight) for x in model.modules() if getattr(x, "sparse", False) and hasattr(x, "weight")}
    names, lines = {id(p): name for name, p in model.named_parameters()}, []
    for p in parameters:
        name, local = names[id(p)], p.to_local() if hasattr(p, "to_local") else p
        require_real(name, p)
        if id(p) in sparse:
            raise ValueError(f"{name!r} will have sparse gradients, and only dense ones are averaged: set sparse=False")
        lines.append(f"{name} {p.dtype}{list(local.shape)}")
    return "\n".join(lines)


def _wide(x: Tensor) -> Tensor:
    """In float32 if it has 16 bits."""
    return x.float() if x.itemsize < 4 else x
