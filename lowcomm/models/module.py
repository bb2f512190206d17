"""Any module of the user's own, by its dotted path."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lowcomm.models.base import ModelConfig, check_vocabulary, logits_of


@dataclass(frozen=True)
class Module(ModelConfig):
    """``Class(**args)`` of ``package.module``; forward maps tokens ``[batch, seq]`` to logits ``[batch, seq, vocab]``.

    Attributes:
        path: "package.module.Class", importable from where the run starts.
        args: the arguments of the class by name, the size of its vocabulary among them.
    """

    path: str
    args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not all(part.isidentifier() for part in self.path.split(".")) or "." not in self.path:
            raise ValueError(f"path is {self.path!r}; it must look like 'package.module.Class'")

    def construct(self, vocab_size: int) -> nn.Module:
        module_name, _, class_name = self.path.rpartition(".")
        try:
            found = getattr(importlib.import_module(module_name), class_name)
        except (ModuleNotFoundError, AttributeError) as error:
            raise ValueError(
                f"path {self.path!r} names nothing that can be imported ({error}): check its spelling, and that the "
                "package is installed or its folder is on PYTHONPATH"
            ) from error
        if not (isinstance(found, type) and issubclass(found, nn.Module)):
            raise ValueError(f"{self.path} is {found!r}; it must be a subclass of torch.nn.Module")
        try:
            inspect.signature(found).bind(**self.args)
        except TypeError as error:
            raise ValueError(f"{self.path} does not take the args {dict(self.args)}: {error}; correct them") from error
        model = found(**self.args)
        self._check_contract(model, vocab_size)
        return model

    def _check_contract(self, model: nn.Module, vocab_size: int) -> None:
        """Try two tokens with the highest id, to find wrong shapes before a run starts."""
        modes = [(module, module.training) for module in model.modules()]
        try:
            with torch.no_grad():
                logits = logits_of(model.eval()(torch.full((1, 2), vocab_size - 1)))
        except IndexError as error:
            raise ValueError(
                f"{self.path} does not accept token id {vocab_size - 1} ({error}): the tokenizer needs a vocabulary "
                f"of {vocab_size}; enlarge the model's in args, now {dict(self.args)}"
            ) from error
        except (TypeError, RuntimeError) as error:
            if torch.get_default_device().type == "meta":  # `lowcomm.sim.record.timing` knows what to say
                raise
            raise ValueError(
                f"{self.path} cannot pass forward tokens [1, 2], int64 ({error}): forward must take tokens [batch, seq]"
                " alone, of any length up to seq_len"
            ) from error
        finally:
            for module, training in modes:
                module.training = training
        if logits.shape[:-1] != (1, 2):
            raise ValueError(
                f"{self.path} maps tokens [1, 2] to {list(logits.shape)}; forward must return [batch, seq, vocab]"
            )
        check_vocabulary(f"{self.path} with args {dict(self.args)}", logits.shape[-1], vocab_size)
