"""A run as one frozen object: what to train, on what, how, and how replicas talk.

YAML and flags mirror it (see `lowcomm.cli`); `describe` turns it back into YAML's shape.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import inspect
import json
from abc import ABC
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from lowcomm.algorithms.base import Algorithm
from lowcomm.algorithms.diloco import DiLoCo
from lowcomm.data import Data
from lowcomm.models.base import ModelConfig
from lowcomm.models.llama import Llama
from lowcomm.optim.schedule import Cosine, Schedule
from lowcomm.optim.steps import needs_closure, said
from lowcomm.participation.options import Participation
from lowcomm.rounds.qsr import QSR


@dataclass(frozen=True)
class Optimizer:
    """The inner optimizer: any torch.optim.Optimizer.

    Attributes:
        path: its class by dotted path.
        args: its keyword arguments.
        decay_vectors: whether weight decay also applies to tensors of fewer than 2 dimensions (norms, biases).
    """

    path: str = "torch.optim.AdamW"
    args: dict[str, Any] = field(default_factory=lambda: {"lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.1})
    decay_vectors: bool = False

    def __post_init__(self) -> None:
        _, *accepted = inspect.signature(self.load()).parameters  # the first is for the parameters
        unknown = sorted(set(self.args) - set(accepted))
        if unknown:
            raise ValueError(f"optimizer.args: {self.path} does not take {unknown}; it takes {accepted}")
        if needs_closure(self.load()):
            raise ValueError(
                f"optimizer.path {self.path!r} computes the loss anew within its step, and here gradients are averaged "
                "and clipped once a step: choose one whose step() takes no closure"
            )
        lr = self.args.get("lr")
        if lr is not None and not (isinstance(lr, int | float) and lr > 0):
            raise ValueError(f"optimizer.args.lr is {lr!r}; it must be a positive number")

    def load(self) -> type[torch.optim.Optimizer]:
        """The class that `path` names."""
        module, _, name = self.path.rpartition(".")
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(
                f"optimizer.path {self.path!r} cannot be imported ({error}); give one such as torch.optim.AdamW"
            ) from error
        if not (inspect.isclass(found) and issubclass(found, torch.optim.Optimizer)):
            raise ValueError(f"optimizer.path {self.path!r} is not a torch.optim.Optimizer")
        return found

    def build(self, groups: Iterable[Any]) -> torch.optim.Optimizer:
        """The optimizer for these parameters or parameter groups.

        Raises:
            ValueError: when it refuses `args` or the parameters.
        """
        args: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in self.args.items()}
        try:
            return self.load()(groups, **args)
        except Exception as error:  # it may be anybody's code
            raise ValueError(
                f"optimizer.args: {self.path} cannot be made with {self.args} ({said(error)}); correct, add or leave "
                "out what it says, or choose another optimizer (docs/optimizers.md lists those that were tried)"
            ) from error


@dataclass(frozen=True)
class Batch:
    """How many sequences an inner step sees.

    Papers differ: in DiLoCo (2023) every replica has the whole batch, so n replicas see n times the data in the same
    steps; Streaming DiLoCo and the scaling-law papers split one batch among the replicas.

    Attributes:
        size: sequences.
        per: "replica" gives each replica `size`; "run" splits `size` among them.
        num_micro_batches: parts of a replica's batch whose gradients are accumulated.
    """

    size: int = 16
    per: Literal["replica", "run"] = "replica"
    num_micro_batches: int = 1

    def __post_init__(self) -> None:
        for name in ("size", "num_micro_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"batch.{name} is {getattr(self, name)}; it must be at least 1")

    def of_replica(self, num_replicas: int) -> int:
        """Sequences of one replica's inner step."""
        share, rest = divmod(self.size, num_replicas if self.per == "run" else 1)
        if rest or share % self.num_micro_batches:
            raise ValueError(
                f"batch.size {self.size} per {self.per} does not split into {num_replicas} replicas with "
                f"{self.num_micro_batches} micro-batches each; choose a multiple"
            )
        return share


@dataclass(frozen=True)
class Evaluation:
    """When and on how much held-out text to evaluate.

    Attributes:
        every: inner steps between evaluations; 0 evaluates at the end only.
        num_tokens: validation tokens, the same each time (all there are, if fewer).
        batch_size: sequences at a time.
    """

    every: int = 0
    num_tokens: int = 2**17
    batch_size: int = 32

    def __post_init__(self) -> None:
        if self.every < 0 or self.num_tokens < 1 or self.batch_size < 1:
            raise ValueError(f"evaluation {self}: every must be at least 0, num_tokens and batch_size at least 1")


@dataclass(frozen=True)
class Checkpointing:
    """When to save what a restart needs.

    Attributes:
        every: inner steps between checkpoints; 0 saves none.
        keep: newest checkpoints that stay on disk.
    """

    every: int = 500
    keep: int = 2

    def __post_init__(self) -> None:
        if self.every < 0 or self.keep < 1:
            raise ValueError(f"checkpoint {self}: every must be at least 0 and keep at least 1")


@dataclass(frozen=True)
class Log:
    """What is written while training; metrics.jsonl always is.

    Attributes:
        every: inner steps between lines; their loss is the mean over the steps since the last.
        tensorboard: also write TensorBoard files into the run directory.
        wandb_project: also send to this Weights & Biases project.
    """

    every: int = 10
    tensorboard: bool = False
    wandb_project: str | None = None

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"log.every is {self.every}; it must be at least 1")


@dataclass(frozen=True)
class Run:
    """Everything that decides a run's result.

    Attributes:
        participation: rounds that do not wait for everyone; null: they do.
        num_steps: inner steps; or give num_tokens.
        num_tokens: training tokens of all replicas together, rounded down to whole steps.
        precision: "fp32"; "bf16_mixed" keeps parameters in float32 and computes in bfloat16 (autocast); "bf16" keeps
            the parameters in bfloat16 too (the anchor stays in float32).
        compile: torch.compile the model with its loss.
        clip_norm: largest global L2 norm of a gradient; null leaves gradients as they are.
        seed: of everything random. Draws in a model's forward, such as dropout, are the same at each start but differ
            after a resume.
        device: "auto" takes CUDA when there is one.
        backend: "auto" takes NCCL when each process has a GPU of its own, else gloo.
        timeout_s: how long a message may take before its sender counts as lost.
        on_loss: when a replica is lost: "stop", or "go_on" with the remaining ones (gloo only).
        grace_s: how long replicas that notice a loss wait for the others; later ones are lost too.
    """

    model: ModelConfig = Llama()
    data: Data = Data()
    algorithm: Algorithm = DiLoCo()
    participation: Participation | None = None
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Cosine()
    batch: Batch = Batch()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpointing = Checkpointing()
    log: Log = Log()
    num_steps: int | None = None
    num_tokens: int | None = None
    precision: Literal["fp32", "bf16_mixed", "bf16"] = "fp32"
    compile: bool = False
    clip_norm: float | None = 1.0
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    timeout_s: float = 600.0
    on_loss: Literal["stop", "go_on"] = "stop"
    grace_s: float = 30.0

    def __post_init__(self) -> None:
        if (self.num_steps is None) == (self.num_tokens is None):
            raise ValueError("give either num_steps or num_tokens, the length of the run, and not both")
        if self.num_steps is not None and self.num_steps < 1:
            raise ValueError(f"num_steps is {self.num_steps}; it must be at least 1")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm is {self.clip_norm}; it must be positive, or null for no clipping")
        every = getattr(getattr(self.algorithm, "then", self.algorithm), "every", None)
        warmup = getattr(self.schedule, "num_warmup_steps", 0)
        if isinstance(every, QSR) and every.num_warmup_steps < warmup:
            raise ValueError(
                f"QSR's num_warmup_steps is {every.num_warmup_steps}, but the learning rate rises for {warmup} steps: "
                "so low a rate would make the first round far too long; give QSR the schedule's number"
            )
        if self.participation is not None and (self.evaluation.every, self.on_loss) != (0, "stop"):
            if self.on_loss != "stop":
                raise ValueError("participation goes with on_loss 'stop' so far")
            if not isinstance(every, int) or self.evaluation.every % every:
                raise ValueError(
                    f"evaluation.every is {self.evaluation.every}, but replicas that need not wait for each other meet "
                    f"only in rounds, every {every} steps; choose a multiple, or 0"
                )
        if not self.timeout_s > 0:
            raise ValueError(f"timeout_s is {self.timeout_s}; it must be positive")
        if not self.grace_s > 0:
            raise ValueError(f"grace_s is {self.grace_s}; it must be positive")

    def steps(self, num_replicas: int) -> int:
        """Inner steps of this run on so many replicas."""
        if self.num_steps is not None:
            return self.num_steps
        assert self.num_tokens is not None
        step_tokens = self.batch.of_replica(num_replicas) * num_replicas * self.data.seq_len
        if self.num_tokens < step_tokens:
            raise ValueError(f"num_tokens is {self.num_tokens}, but one step takes {step_tokens}; give at least that")
        return self.num_tokens // step_tokens


# What may differ between a run and its resumption: nothing here changes a result.
_PASSING = ("checkpoint", "log", "timeout_s", "on_loss", "grace_s")


def describe(value: Any) -> Any:
    """A config object as plain lists, dicts and scalars in the shape of its YAML."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: describe(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        if not isinstance(value, ABC):
            return fields
        return {"class_path": f"{type(value).__module__}.{type(value).__qualname__}", "init_args": fields}
    if isinstance(value, list | tuple):
        return [describe(x) for x in value]
    if isinstance(value, dict):
        return {k: describe(v) for k, v in value.items()}
    return value


def decisive(described: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a described run that determines its result."""
    return {k: v for k, v in described.items() if k not in _PASSING}


def identity(run: Run, num_replicas: int, data_fingerprint: str) -> str:
    """A hash of what determines a run's result."""
    key = json.dumps([decisive(describe(run)), num_replicas, data_fingerprint], sort_keys=True)
    return hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
