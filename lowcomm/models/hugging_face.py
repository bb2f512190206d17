"""Any causal language model of the transformers library, by name or local directory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from lowcomm.models.base import ModelConfig, check_vocabulary
from lowcomm.optional import require


@dataclass(frozen=True)
class HuggingFace(ModelConfig):
    """A model as AutoModelForCausalLM builds it, in fp32; its forward returns an object with ``logits``.

    Attributes:
        name: a model's name on the hub, or a local directory with a ``config.json``.
        pretrained: load the weights too; otherwise only the configuration is read and the weights are random.
        revision: a branch, tag or commit on the hub; None takes the default branch.
    """

    name: str
    pretrained: bool = False
    revision: str | None = None

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("name is empty; give a model's name on the hub or a local directory with a config.json")

    def construct(self, vocab_size: int) -> nn.Module:
        try:
            return self._construct(vocab_size)
        except OSError as error:
            raise ValueError(
                f"HuggingFace({self.name!r}) cannot be read: {error}; check name, revision and the network, or give a "
                "local directory with a config.json (and, for pretrained, weights)"
            ) from error

    def _construct(self, vocab_size: int) -> nn.Module:
        transformers = require("transformers")
        config = transformers.AutoConfig.from_pretrained(self.name, revision=self.revision)
        check_vocabulary(f"HuggingFace({self.name!r})", config.get_text_config().vocab_size, vocab_size)
        config.use_cache = False  # keys and values of past tokens serve generation only
        model: nn.Module
        if self.pretrained and torch.get_default_device().type != "meta":  # which has shapes alone
            model = transformers.AutoModelForCausalLM.from_pretrained(
                self.name, revision=self.revision, config=config, dtype=torch.float32
            )
        else:
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        return model
