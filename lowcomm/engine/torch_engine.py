"""The inner loop for any torch module and optimizer, in one process on one device."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from lowcomm.engine.base import Engine, Ready
from lowcomm.engine.buffers import NUM_FORWARDS, Buffers
from lowcomm.engine.held import trainable
from lowcomm.models.base import logits_of
from lowcomm.optim import steps
from lowcomm.tensors import copy_


def next_token_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean cross-entropy in fp32 of each next token; ``batch [batch, seq + 1]`` is int64 on the model's device.

    The model maps tokens ``[batch, seq]`` to logits ``[batch, seq, vocab]``, in any form that `logits_of` knows.
    """
    logits = logits_of(model(batch[:, :-1]))
    return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


class TorchEngine(Engine):
    """A model, already on its device and in its dtype, and an optimizer of its parameters.

    ``requires_grad`` is read once, at construction. A trainable parameter unused in a step has a zero gradient, so its
    momentum and weight decay proceed as on other replicas.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        loss: Callable[[nn.Module, Any], Tensor] = next_token_loss,
        schedule: LRScheduler | None = None,
        num_micro_batches: int = 1,
        clip_norm: float | None = 1.0,
        autocast: torch.dtype | None = None,
        compile: bool = False,
    ) -> None:
        """Works on the given model, optimizer and schedule, without copies.

        Args:
            model: the replica, in training mode.
            optimizer: of all trainable parameters of the model and no others.
            loss: the mean loss of a (micro-)batch as a 0-d tensor.
            schedule: advanced after each optimizer step; None keeps the learning rate.
            num_micro_batches: equal parts of a batch, whose gradients are averaged.
            clip_norm: the largest global L2 norm of the gradients; None does not clip.
            autocast: the dtype of forward's matrix products, such as torch.bfloat16; None computes in the parameters'.
            compile: run the model's forward and the loss together through torch.compile.

        Raises:
            ValueError: for a number out of range, or a mismatch of model, optimizer and schedule.
        """
        if num_micro_batches < 1:
            raise ValueError(f"num_micro_batches is {num_micro_batches}; it must be at least 1")
        if clip_norm is not None and clip_norm <= 0:
            raise ValueError(f"clip_norm is {clip_norm}; it must be above 0, or None not to clip")
        if schedule is not None and schedule.optimizer is not optimizer:
            raise ValueError("the schedule was built for another optimizer; build it for the one given here")
        self.model, self.optimizer, self.schedule = model, optimizer, schedule
        self._parameters = trainable(model, optimizer)
        # Without autograd: arithmetic on what `slots` hands out must not record a graph.
        self._values = [p.detach() for p in self._parameters]
        self._device = self._parameters[0].device
        self._plain_loss, self._loss = loss, torch.compile(loss) if compile else loss
        self._num_micro_batches, self._clip_norm, self._autocast = num_micro_batches, clip_norm, autocast
        self._updated: set[int] = set()  # since backward began
        # Schedule-free optimizers and the like evaluate at another point than they train at
        self.has_modes = hasattr(optimizer, "train") and hasattr(optimizer, "eval")
        self._has_stepped = self._is_moved = False
        optimizer.register_step_post_hook(self._note_step)
        if self.has_modes:
            optimizer.train()  # type: ignore[attr-defined]
        self._buffers, self._batches = Buffers(model), deque[Any](maxlen=NUM_FORWARDS)
        self._recalculates: bool | None = None  # None: not known before the first backward

    def backward(self, batch: Any, ready: Ready | None = None) -> Tensor:
        """``batch`` is the loss's input; with micro-batches, a tensor or tuple of tensors cut along dim 0.

        Raises:
            ValueError: when the batch cannot be cut equally, or ``ready`` is given and a gradient accumulates in parts,
                as with reentrant activation checkpointing.
        """
        self._drop_gradients()
        num = self._num_micro_batches
        losses = []
        for k, micro_batch in enumerate(_micro_batches(batch, num), start=1):
            with self._casting():
                loss = self._loss(self.model, micro_batch)
            with self._reporting(ready) if ready is not None and k == num else nullcontext():
                (loss / num).backward()
            losses.append(loss.detach().float())
        for parameter in self._parameters:
            parameter.grad = _dense_gradient(parameter)
        if self._recalculates is None:
            self._recalculates = bool(self._buffers.changed())
        if self._recalculates:
            self._batches.append(batch)
        return sum(losses[1:], start=losses[0]) / num

    def update(self) -> None:
        assert self._parameters[0].grad is not None, "update comes after backward"
        if self._clip_norm is not None:
            nn.utils.clip_grad_norm_(self._parameters, self._clip_norm)
        self._step(set(range(len(self._parameters))) - self._updated)
        if self.schedule is not None:
            self.schedule.step()
        self._drop_gradients()

    def update_part(self, numbers: Sequence[int]) -> None:
        """Also refuses some optimizers.

        Raises:
            ValueError: when the optimizer keeps its step count or other state for all parameters together.
        """
        assert self.needs_all_gradients() is None, "a part of an update that needs the whole"
        assert self._updated.isdisjoint(numbers), "updated twice in one step"
        assert all(self._parameters[i].grad is not None for i in numbers), "update_part comes after the gradient"
        before = _options(self.optimizer)
        self._updated.update(numbers)
        self._step(set(numbers))
        if _options(self.optimizer) != before:
            raise ValueError(
                f"a step of {type(self.optimizer).__name__} changes what all its parameters share, so they cannot be "
                "updated one after the other: choose an optimizer that keeps its state for each parameter, as those in "
                "torch.optim, or switch off the algorithm's overlap"
            )

    def needs_all_gradients(self) -> str | None:
        if self._clip_norm is not None:
            return f"clip_norm is {self._clip_norm}, and the norm of all gradients is known at its end: set it to None"
        if steps.needs_closure(type(self.optimizer)):
            name = type(self.optimizer).__name__
            return f"{name} computes the loss anew within its step: choose an optimizer whose step() takes no closure"
        return None

    def evaluate(self, batch: Any) -> Tensor:
        """The batch is not cut into micro-batches, so it must fit as a whole."""
        if self.has_modes and self._has_stepped and not self._is_moved:
            with self.standing(self._values):
                return self.evaluate(batch)
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            with torch.no_grad(), self._casting():
                return self._loss(self.model, batch).float()
        finally:
            for module, training in modes:
                module.training = training

    @contextmanager
    def standing(self, params: list[Tensor]) -> Iterator[list[Tensor]]:
        """Also restores the parameters bitwise, which switching an optimizer back and forth would not."""
        kept = [x.clone() for x in self._values]
        copy_(self._values, params)
        ways = list[Tensor]()
        try:
            if self.has_modes and self._has_stepped:
                before = [x.clone() for x in self._values]
                self.optimizer.eval()  # type: ignore[attr-defined]
                self._is_moved = True
                ways = [x.float() - y.float() for x, y in zip(self._values, before, strict=True)]
            yield ways
        finally:
            if self._is_moved:
                self.optimizer.train()  # type: ignore[attr-defined]
            self._is_moved = False
            copy_(self._values, kept)

    def has_stepped(self) -> bool:
        return self._has_stepped

    def slots(self) -> Mapping[str, list[Tensor]]:
        """Optimizer states are the tensors that every parameter with states has in its own shape."""
        slots = {"param": list(self._values)}
        if any(p.grad is not None for p in self._parameters):
            slots["grad"] = self._filled()
        states = [self.optimizer.state.get(p, {}) for p in self._parameters]
        for name in next((state for state in states if state), {}):
            tensors = [
                state.get(name) if state else p.new_empty(0) for p, state in zip(self._values, states, strict=True)
            ]
            # torch's convention: "step" counts, and has the shape of a 0-d parameter
            if name != "step" and all(
                isinstance(x, Tensor) and (x.shape == p.shape or not state)
                for x, p, state in zip(tensors, self._values, states, strict=True)
            ):
                slots[name] = tensors
        return slots

    def gradients(self, numbers: Sequence[int]) -> list[Tensor]:
        found = self._filled(numbers)
        for i, gradient in zip(numbers, found, strict=True):
            if gradient.layout != torch.strided:
                raise ValueError(
                    f"the gradient of {self.names()[i]!r} is sparse, and only dense ones are averaged: set the layer's "
                    "sparse to False, or choose a method that averages no gradients, such as DiLoCo"
                )
        return found

    def buffers(self) -> list[Tensor]:
        return self._buffers.changed()

    def recalculate(self) -> None:
        """The inputs are the last batches of `backward` and, after `watch_forward`, of forward passes elsewhere."""
        if self._device.type == "meta":
            return
        forwards = list(self._buffers.recent)
        for batch in self._batches:
            forwards += [partial(self._forward, x) for x in _micro_batches(batch, self._num_micro_batches)]
        if not forwards:
            warnings.warn(
                "buffers such as running statistics could not be recalculated for the last parameters, as the model "
                "itself was not called since its first step or the last restart: check an evaluation, or pass some "
                "batches forward in training mode before it, such as by torch.optim.swa_utils.update_bn",
                stacklevel=2,
            )
        self._buffers.recalculate(forwards)

    def watch_forward(self) -> RemovableHandle:
        """For loops that do not call `backward`: count changes of buffers from now on, and keep the last inputs."""
        self._buffers.begin()
        return self._buffers.watch()

    def _forward(self, batch: Any) -> None:
        with self._casting():
            self._plain_loss(self.model, batch)

    def names(self) -> list[str]:
        """A tied parameter has its first name."""
        return [name for name, p in self.model.named_parameters() if p.requires_grad]

    def lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def skip(self, num_steps: int) -> None:
        if self.schedule is not None:
            for _ in range(num_steps):
                self.schedule.step()

    def state_dict(self) -> dict[str, Any]:
        """Without gradients. Tensors of the model and optimizer are live: save or copy them before the next step."""
        on_cuda = self._device.type == "cuda"
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            "rng_cpu": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state(self._device) if on_cuda else None,
            "batches": list(self._batches),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The state may be from another device; random numbers then differ.

        Raises:
            ValueError: when only one of engine and state has a schedule.
        """
        if (self.schedule is None) != (state["schedule"] is None):
            has, lacks = ("state", "engine") if self.schedule is None else ("engine", "state")
            raise ValueError(
                f"the {has} has a learning-rate schedule and the {lacks} has none; resume with the same one"
            )
        self._drop_gradients()
        self._has_stepped = bool(state["optimizer"]["state"])
        self.model.load_state_dict(state["model"])
        steps.load(self.optimizer, state["optimizer"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["rng_cpu"].cpu())
        if self._device.type == "cuda" and state["rng_cuda"] is not None:
            torch.cuda.set_rng_state(state["rng_cuda"].cpu(), self._device)
        self._batches.clear()
        self._batches.extend(tree_map_only(Tensor, lambda x: x.to(self._device), state.get("batches", [])))

    def _casting(self) -> AbstractContextManager[object]:
        return nullcontext() if self._autocast is None else torch.autocast(self._device.type, self._autocast)

    @contextmanager
    def _reporting(self, ready: Ready) -> Iterator[None]:
        """A context that calls ``ready`` once for each parameter, for the remaining ones at its end."""
        waiting = set(range(len(self._parameters)))

        def report(i: int, parameter: nn.Parameter) -> None:
            if i not in waiting:
                raise ValueError(
                    "a parameter's gradient came in parts, so it cannot be sent while backward goes on: switch off "
                    "reentrant activation checkpointing, or the algorithm's overlap"
                )
            waiting.remove(i)
            parameter.grad = _dense_gradient(parameter)
            ready(i, parameter.grad)

        hooks = [p.register_post_accumulate_grad_hook(partial(report, i)) for i, p in enumerate(self._parameters)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        gradients = self._filled()
        for i in sorted(waiting, reverse=True):
            ready(i, gradients[i])

    def _filled(self, numbers: Sequence[int] | None = None) -> list[Tensor]:
        """The gradients of these parameters (None: all), set to zeros where there was none."""
        found = []
        for i in range(len(self._parameters)) if numbers is None else numbers:
            parameter = self._parameters[i]
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            found.append(parameter.grad)
        return found

    def _step(self, numbers: set[int]) -> None:
        """The optimizer step of these parameters alone: torch skips those without a gradient."""
        hidden = [(p, p.grad) for i, p in enumerate(self._parameters) if i not in numbers]
        for p, _ in hidden:
            p.grad = None
        steps.step(self.optimizer)
        for p, gradient in hidden:
            p.grad = gradient

    def _note_step(self, *_: Any) -> None:
        self._has_stepped = True

    def _drop_gradients(self) -> None:
        self._updated.clear()
        for p in self._parameters:
            p.grad = None


def _dense_gradient(parameter: nn.Parameter) -> Tensor:
    """Zeros where there is none; a sparse gradient becomes dense."""
    if parameter.grad is None:
        return torch.zeros_like(parameter)
    return parameter.grad if parameter.grad.layout == torch.strided else parameter.grad.to_dense()


def _options(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The options of each parameter group, with numbers in place of tensors."""
    return [
        {name: x.tolist() if isinstance(x, Tensor) else x for name, x in group.items() if name != "params"}
        for group in optimizer.param_groups
    ]


def _micro_batches(batch: Any, num: int) -> list[Any]:
    if num == 1:
        return [batch]
    if isinstance(batch, tuple):
        return list(zip(*(_micro_batches(x, num) for x in batch), strict=True))
    if not isinstance(batch, Tensor):
        raise ValueError(
            f"a batch is a {type(batch).__name__}; micro-batches are cut from a tensor or tuple of tensors"
        )
    if batch.shape[0] % num:
        raise ValueError(
            f"a batch of {batch.shape[0]} cannot be cut into num_micro_batches {num} equal parts: make the batch size "
            "a multiple of it"
        )
    return list(batch.chunk(num))
