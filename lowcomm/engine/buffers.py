"""State beside the parameters: buffers that training changes, such as the running statistics of batch norm."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from lowcomm.tensors import digest

# Enough for statistics, and few inputs to hold in memory.
NUM_FORWARDS = 8


class Buffers:
    """The buffers of a model, of which those count whose bytes training has changed.

    On the meta device there are no bytes: there it is those that torch's norms change, and no others.

    Attributes:
        recent: repeats of the last forward passes in training, see `watch`; oldest first.
    """

    def __init__(self, model: nn.Module) -> None:
        self.recent: deque[Callable[[], object]] = deque(maxlen=NUM_FORWARDS)
        self._model = model
        self._device = next((x.device for x in model.parameters()), torch.device("cpu"))
        self.begin()

    def begin(self) -> None:
        """From now on changes count."""
        self._before = {} if self._device.type == "meta" else {k: digest([x]) for k, x in self._model.named_buffers()}

    def watch(self) -> RemovableHandle:
        """Keep the inputs of the last forward passes in training mode, without copies, until the hook is removed."""
        return self._model.register_forward_hook(self._keep, with_kwargs=True)

    def _keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any) -> None:
        if module.training:
            # detached: an input may carry the graph of another model
            args, kwargs = tree_map_only(Tensor, Tensor.detach, (args, kwargs))
            kind = self._device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
            self.recent.append(partial(_repeat, module, args, kwargs, kind, dtype))

    def __getstate__(self) -> dict[str, Any]:
        """Without inputs: a copied or pickled model carries its hook, and so this."""
        return self.__dict__ | {"recent": deque(maxlen=NUM_FORWARDS)}

    def changed(self) -> list[Tensor]:
        """Live, each once, in the model's order."""
        if self._device.type == "meta":
            found = [x for m in self._model.modules() if isinstance(m, (_NormBase, _SpectralNorm)) for x in m.buffers()]
            return list({id(x): x for x in found}.values())
        return [x for name, x in self._model.named_buffers() if digest([x]) != self._before.get(name)]

    def recalculate(self, forwards: Sequence[Callable[[], object]]) -> None:
        """Pass forward in training mode, so that buffers fit the parameters as they are now.

        The statistics of batch norm become means over these passes alone; other buffers move on from where they are.
        Draws of random numbers, counts of batches and training modes are put back.
        """
        modes = [(module, module.training) for module in self._model.modules()]
        changed = {id(x) for x in self.changed()}
        tracking = [m for m, _ in modes if isinstance(m, _BatchNorm) and m.num_batches_tracked is not None]
        norms = [m for m in tracking if {id(m.running_mean), id(m.running_var)} & changed]
        kept = [(m, m.momentum, [x.clone() for x in _statistics(m)]) for m in norms]
        if not self._model.training:
            self._model.train()
        for norm in tracking:
            if norm not in norms:  # it was frozen
                norm.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # torch's sign for a mean over all passes
        try:
            with torch.no_grad(), torch.random.fork_rng([self._device] if self._device.type == "cuda" else []):
                for forward in forwards:
                    forward()
        finally:
            for norm, momentum, before in kept:
                norm.momentum = momentum
                unused = not norm.num_batches_tracked
                for x, old in zip(_statistics(norm), before, strict=True):
                    if unused or x is norm.num_batches_tracked:
                        x.copy_(old)
            for module, training in modes:
                module.training = training


def _statistics(norm: Any) -> list[Tensor]:
    return [norm.running_mean, norm.running_var, norm.num_batches_tracked]


def _repeat(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], kind: str, dtype: torch.dtype | None
) -> None:
    with torch.autocast(kind, dtype, enabled=dtype is not None):
        module(*args, **kwargs)
