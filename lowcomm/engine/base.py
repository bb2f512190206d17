"""The interface of the inner loop: parameters, gradients, optimizer state, one step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

# Told the number of a parameter (its place in the slots) and its gradient, final for this step.
Ready = Callable[[int, Tensor], None]


class Engine(ABC):
    """The inner loop of one replica: a model, an optimizer, and their step.

    A step is `backward` then `update`; between the two an algorithm may change the gradients. If `needs_all_gradients`
    is None, parts of the update may be taken earlier, even during backward: `update_part`.
    """

    @abstractmethod
    def backward(self, batch: Any, ready: Ready | None = None) -> Tensor:
        """Compute fresh gradients for one optimizer step (micro-batches accumulated): forward, then backward.

        Args:
            ready: called once for each parameter when its gradient is final, in about the reverse order of forward;
                parameters without a gradient come last, with zeros. It may read and keep the gradient, but neither
                change it nor wait. Of this engine it may call only `update_part` and `gradients`, for parameters
                already called. All calls end before this returns.

        Returns the batch's mean loss as a 0-d float32 tensor on the model's device.
        """

    @abstractmethod
    def update(self) -> None:
        """Clip the gradients, take one optimizer step, advance the learning-rate schedule.

        Skips parameters that `update_part` has updated since `backward` began.
        """

    @abstractmethod
    def update_part(self, numbers: Sequence[int]) -> None:
        """Take the optimizer step of these parameters (indices in the slots) before `update` ends the step.

        At most once per step each, with a final gradient, and only if `needs_all_gradients` is None. The whole step is
        bitwise that of `update` alone.
        """

    @abstractmethod
    def needs_all_gradients(self) -> str | None:
        """Why an update needs all gradients, and the remedy: "clip_norm is 1.0, and ...: set it to None".

        None if, as far as is known, each parameter's update needs only its own gradient.
        """

    @abstractmethod
    def evaluate(self, batch: Any) -> Tensor:
        """The mean loss of ``batch`` without gradients, in evaluation mode, as a 0-d float32 tensor.

        Where the optimizer wants to be evaluated at another point than it trains at: there.
        """

    @abstractmethod
    def standing(self, params: list[Tensor]) -> AbstractContextManager[list[Tensor]]:
        """Inside, the model holds these parameters in place of its own, to evaluate or save; nothing else is allowed.

        Optimizers with ``train()`` and ``eval()``, such as schedule-free ones, move them to where they want to be
        evaluated. Gives the way there of each parameter, in float32; nothing without such a move.
        """

    @abstractmethod
    def has_stepped(self) -> bool:
        """Whether the optimizer has ever taken a step: a gradient scaler may skip the first ones."""

    @abstractmethod
    def slots(self) -> Mapping[str, list[Tensor]]:
        """Live local tensors by name; all lists have the same order and length.

        "param": every trainable parameter once; always present. "grad": between `backward` and `update`; zeros where
        there was no gradient. After the first update, a slot for each per-parameter state of the optimizer, such as
        "exp_avg"; a parameter that has no states yet, since it got no gradient, has an empty tensor there.
        """

    def gradients(self, numbers: Sequence[int]) -> list[Tensor]:
        """Live, final gradients of these parameters; unlike "grad" of `slots`, also during backward."""
        gradients = self.slots()["grad"]
        return [gradients[i] for i in numbers]

    def buffers(self) -> list[Tensor]:
        """Live buffers that training has changed, such as running statistics; each once. By default none."""
        return []

    def recalculate(self) -> None:  # noqa: B027  # without values there is nothing to do
        """Make `buffers` anew for the present parameters, by forward passes over the last training inputs."""

    @abstractmethod
    def names(self) -> list[str]:
        """The model's name of each parameter, such as "layers.3.attention.weight", in the order of the slots."""

    @abstractmethod
    def lr(self) -> float:
        """The learning rate of the next `update` (first parameter group)."""

    @abstractmethod
    def skip(self, num_steps: int) -> None:
        """Advance the learning-rate schedule by steps that this replica does not take."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything a restart needs: parameters, buffers, optimizer, schedule, random state."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict` in place: tensors from `slots` stay valid."""
