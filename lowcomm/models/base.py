"""The interface of a model: a frozen description that builds the same weights everywhere."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowcomm.tensors import rng


@dataclass(frozen=True)
class ModelConfig(ABC):
    """A causal language model: its module maps tokens ``[batch, seq]`` (int64) to logits ``[batch, seq, vocab]``.

    What forward returns holds them as `logits_of` knows.
    """

    def build(self, vocab_size: int, seed: int) -> nn.Module:
        """The module in training mode, fp32, on the CPU: bitwise the same for equal arguments, whatever ran before.

        No global random state is changed. Under ``with torch.device("meta")`` the module has shapes and no values.

        Args:
            vocab_size: the number of token ids that the tokenizer uses; the model may have room for more.
            seed: of the initial weights.

        Raises:
            ValueError: when ``vocab_size`` is below 1 or more than the model has room for, or when the default device
                is an accelerator, whose random numbers would differ from the CPU's.
        """
        if vocab_size < 1:
            raise ValueError(f"vocab_size is {vocab_size}; it must be at least 1")
        device = torch.get_default_device()
        if device.type not in ("cpu", "meta"):
            raise ValueError(
                f"the default device is {device}; initial weights are drawn on the CPU so that they are the same on "
                "every machine: build the model outside of torch.device(...) and move it with .to(device)"
            )
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(rng(seed, "model").get_state())
            return self.construct(vocab_size).train()

    @abstractmethod
    def construct(self, vocab_size: int) -> nn.Module:
        """The module, initialised from torch's global CPU generator, which `build` has seeded."""


def logits_of(output: Any) -> Tensor:
    """The logits ``[batch, seq, vocab]`` in what a model's forward returns.

    That is the tensor itself, an entry or attribute ``logits``, or the first tensor of three dimensions in a tuple.

    Raises:
        ValueError: when there are none.
    """
    found = output
    if isinstance(output, Mapping):
        found = output.get("logits")
    elif hasattr(output, "logits"):
        found = output.logits
    elif isinstance(output, (tuple, list)):
        found = next((x for x in output if isinstance(x, Tensor) and x.ndim == 3), None)
    if isinstance(found, Tensor) and found.ndim == 3 and found.is_floating_point():
        return found
    given = f"{found.dtype}{list(found.shape)}" if isinstance(found, Tensor) else f"a {type(output).__name__} without"
    raise ValueError(
        f"the model's forward returns {given} where there should be floating-point logits [batch, seq, vocab]: return "
        'them as a tensor, as "logits" of a dict or object, or first in a tuple'
    )


def check_vocabulary(model: str, num_embeddings: int, vocab_size: int) -> None:
    """Raise ValueError when a model with ``num_embeddings`` token ids meets a tokenizer that has ``vocab_size``."""
    if num_embeddings < vocab_size:
        raise ValueError(
            f"{model} has a vocabulary of {num_embeddings} tokens and the tokenizer needs {vocab_size}: enlarge the "
            "model's vocabulary to at least that, or choose a tokenizer that fits the model"
        )
