"""What an algorithm may know of the inner loop: parameters, gradients, optimizer state, one step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

# Told the number of a parameter (its place in the slots) and its gradient, final for this step.
Ready = Callable[[int, Tensor], None]


class Engine(ABC):
    """The inner loop of one replica: a model, an optimizer and how they take a step.

    A step is `backward` then `update`; between the two an algorithm may change the gradients. Where
    `needs_all_gradients` is None, parts of the update may be taken earlier, even while backward goes on: `update_part`.
    """

    @abstractmethod
    def backward(self, batch: Any, ready: Ready | None = None) -> Tensor:
        """Compute fresh gradients for one optimizer step (micro-batches accumulated): forward, then backward.

        Args:
            ready: called once for each parameter, as soon as its gradient is final for this step, in about the reverse
                of the order in which forward used them; those that got none come last, with zeros. It may read the
                gradient and keep it, but neither change it nor wait; of this engine it may call `update_part` and
                `gradients` alone, for parameters that it has been told of. All calls are over when this returns.

        Returns the batch's mean loss as a 0-d float32 tensor on the model's device; nothing is copied to the host.
        """

    @abstractmethod
    def update(self) -> None:
        """Clip the gradients, take one optimizer step, advance the learning-rate schedule.

        Parameters that `update_part` updated since `backward` began are left as they are.
        """

    @abstractmethod
    def update_part(self, numbers: Sequence[int]) -> None:
        """Take the optimizer step of these parameters (their places in the slots) alone, before `update` ends the step.

        Each at most once in a step, with a final gradient, and only where `needs_all_gradients` is None. The result of
        the whole step is that of `update` alone, bit for bit.
        """

    @abstractmethod
    def needs_all_gradients(self) -> str | None:
        """Why an update must wait for all gradients, and what to change: "clip_norm is 1.0, and ...: set it to None".

        None when each parameter's update takes nothing but its own gradient, as far as can be known.
        """

    @abstractmethod
    def evaluate(self, batch: Any) -> Tensor:
        """The mean loss of ``batch`` without gradients, in evaluation mode, as a 0-d float32 tensor."""

    @abstractmethod
    def slots(self) -> Mapping[str, list[Tensor]]:
        """Live local tensors by name, the same order and length in each list.

        "param" is always there: every trainable parameter once, frozen ones left out, tied ones not repeated.
        "grad" is there between `backward` and `update`; a parameter that got no gradient has zeros.
        After the first update, one slot for each per-parameter state of the optimizer, such as "exp_avg".
        """

    def gradients(self, numbers: Sequence[int]) -> list[Tensor]:
        """Live gradients of these parameters, final for this step; unlike "grad" of `slots`, also within backward."""
        gradients = self.slots()["grad"]
        return [gradients[i] for i in numbers]

    @abstractmethod
    def names(self) -> list[str]:
        """The name of each parameter in the order of the slots, as the model calls it: "layers.3.attention.weight"."""

    @abstractmethod
    def lr(self) -> float:
        """The learning rate that the next `update` uses (of the first parameter group)."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything a restart needs: parameters, buffers, optimizer, schedule, random state."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`, in place: tensors handed out by `slots` stay valid."""
