"""Builds a training replica from a config: what `lowcomm train` does on every rank."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lowcomm.algorithms.base import standing
from lowcomm.attendance import Seat, attend
from lowcomm.checkpoint import Checkpoints, state_bytes
from lowcomm.claim import claimed
from lowcomm.comm.agreement import check_agreement
from lowcomm.comm.base import Comm
from lowcomm.comm.distributed import connect, disconnect, under_torchrun
from lowcomm.comm.launched import launched, number
from lowcomm.comm.metered import Meter, MeteredComm
from lowcomm.comm.solo import SoloComm
from lowcomm.config import Run, describe, identity
from lowcomm.data import LoadedData
from lowcomm.engine.base import Engine
from lowcomm.engine.torch_engine import TorchEngine
from lowcomm.environment import environment
from lowcomm.ledger import Ledger
from lowcomm.membership import Members
from lowcomm.metrics import (
    Metrics,
    ProgressSink,
    Sink,
    TensorBoardSink,
    WandbSink,
    check_names,
    file_of,
    truncate_after,
)
from lowcomm.models.flops import flops_per_token, peak_flops
from lowcomm.models.length import check_length
from lowcomm.optim.groups import parameter_groups
from lowcomm.places import name_of, place_of
from lowcomm.replica import Replica
from lowcomm.resume import check_beginning, resume
from lowcomm.state import state_tree
from lowcomm.tensors import digest, num_bytes, rng
from lowcomm.train import Plan, train

_DTYPES = {"fp32": torch.float32, "bf16_mixed": torch.float32, "bf16": torch.bfloat16}
_ALIKE = (
    "all replicas must start from the same config, data, software and initial parameters: compare command lines and "
    "versions"
)


@dataclass(frozen=True)
class Place:
    """This rank's device and message backend (None: a single rank)."""

    device: torch.device
    backend: str | None


def device_of(run: Run) -> torch.device:
    """Choose the device of this process.

    Raises:
        ValueError: when the config asks for CUDA and it is not available.
    """
    has_cuda = torch.cuda.is_available()
    if run.device == "cuda" and not has_cuda:
        raise ValueError("device is 'cuda', but torch sees no GPU here; use device 'cpu' or 'auto'")
    if not has_cuda or run.device == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", number("LOCAL_RANK", 0) % torch.cuda.device_count())


def place(run: Run) -> Place:
    """Choose the device and backend of this rank.

    Raises:
        ValueError: when the config asks for CUDA or NCCL and it is not available, or variables are wrong.
    """
    has_cuda, device = torch.cuda.is_available(), device_of(run)
    if run.backend == "nccl" and (run.device == "cpu" or not has_cuda):
        raise ValueError("backend is 'nccl', which needs CUDA, but this run has no GPU; use backend 'gloo' or 'auto'")
    if not under_torchrun():
        return Place(device, None)
    if run.on_loss == "go_on" and run.backend == "nccl":
        raise ValueError("on_loss is 'go_on', which needs gloo for now; set backend to 'gloo', or on_loss to 'stop'")
    own_gpu = device.type == "cuda" and number("LOCAL_WORLD_SIZE", 1) <= torch.cuda.device_count()
    return Place(
        device, run.backend if run.backend != "auto" else "nccl" if own_gpu and run.on_loss == "stop" else "gloo"
    )


def run_replica(run: Run, out: Path, resumes: bool) -> dict[str, Any]:
    """Train this rank's replica to the end and return its summary line.

    Writes into ``out``, which it claims first: config.yaml, environment.json and final.safetensors (replica 0),
    checkpoints/, and lines of metrics (`lowcomm.metrics`).

    Raises:
        ValueError: before training, for anything wrong with config, data, directory, or between the ranks.
        Diverged, PeerLost, Late, OSError: while training.
    """
    where = place(run)
    if where.device.type == "cuda":
        torch.cuda.set_device(where.device)
    launch = launched()
    with claimed(out, name_of(0 if launch is None else launch.rank)):
        comm: Comm = SoloComm() if where.backend is None else connect(where.backend, run.timeout_s, run.grace_s)
        try:
            return _run_replica(run, out, resumes, where, comm)
        finally:
            disconnect()


@dataclass(frozen=True)
class Assembled:
    """A replica, its plan, its model and its run id."""

    replica: Replica
    plan: Plan
    model: nn.Module
    run_id: str

    def summary(self) -> dict[str, Any]:
        """Write and return the last line of the run."""
        num_parameters = sum(x.numel() for x in self.replica.engine.slots()["param"])
        name = type(self.replica.algorithm).__name__
        return self.replica.ledger.summary(name, num_parameters, self.plan.bytes_per_token)

    def save(self, path: Path) -> None:
        """Rank 0 writes the weights to use; all members call it after training."""
        replica = self.replica

        def write(comm: MeteredComm) -> None:
            with standing(replica.algorithm, replica.engine, replica.state, comm.tagged("evaluation")):
                if comm.rank == 0:
                    save_weights(self.model, path)

        replica.talk(write)


def assemble(
    run: Run,
    loaded: LoadedData,
    comm: MeteredComm,
    device: torch.device,
    write: Callable[[dict[str, Any]], None],
    around: Callable[[Engine], Engine] = lambda engine: engine,
    seat: Seat | None = None,
) -> Assembled:
    """Build one member's replica, and check that all members were started alike.

    Args:
        loaded: ``run.data`` as this process read it.
        write: receives metrics lines.
        around: wraps the engine, such as in a virtual clock.
        seat: at the meeting that decides who takes part in rounds; needed where the run has a `participation`.
    """
    num_replicas = len(comm.members)
    batch_size, num_steps = run.batch.of_replica(num_replicas), run.steps(num_replicas)
    data = loaded.open(comm.place, num_replicas, batch_size, run.seed)
    validation = data.validation(run.evaluation.batch_size, run.evaluation.num_tokens)
    model = run.model.build(data.vocab_size, run.seed)
    check_length(model, run.data.seq_len)
    check_state(model)
    check_optimizer(run, num_steps, device)
    model = cast_(model, _DTYPES[run.precision]).to(device)
    run_id = identity(run, num_replicas, data.fingerprint)
    engine = around(build_engine(run, model, num_steps))  # before the first exchange: whatever moves it must know it
    facts = {
        "config": run_id,
        "model": digest([x for x in model.state_dict().values() if isinstance(x, Tensor)]),
        "validation text": data.validation_fingerprint,
    }
    check_agreement(comm.tagged("start"), facts, _ALIKE)

    ledger = open_ledger(run, model, comm, device, write)
    _seed_draws(run.seed, comm.rank, device)
    members = Members(comm, run.on_loss == "go_on")
    state = run.algorithm.init(engine, comm)
    attendance = attend(run.participation, seat, comm, run.algorithm, state)
    replica = Replica(run.algorithm, engine, state, data.train, ledger, members, device, attendance)
    plan = Plan(num_steps, run.evaluation.every, run.checkpoint.every, validation.batches, validation.bytes_per_token)
    return Assembled(replica, plan, model, run_id)


def cast_(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """In place: floating-point parameters in another dtype; buffers and complex numbers keep theirs.

    So do the parameters of norms with running statistics, as torch wants both in one dtype.
    """
    norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.running_mean is not None]
    kept = {id(p) for m in norms for p in m.parameters()}
    for p in model.parameters():
        if p.is_floating_point() and id(p) not in kept:
            p.data = p.data.to(dtype)
    return model


def check_state(model: nn.Module) -> None:
    """Refuse extra state that is no tensor, which neither final.safetensors nor a start-up check could hold.

    Raises:
        ValueError: naming it.
    """
    for name, x in model.state_dict().items():
        if not isinstance(x, Tensor):
            raise ValueError(
                f"the model's state has {name!r}, a {type(x).__name__}, but only tensors can be saved: let its "
                "get_extra_state return a tensor, or keep what it holds in a buffer"
            )


def check_optimizer(run: Run, num_steps: int, device: torch.device) -> None:
    """Let the optimizer take one step of a small layer, whose gradients are dense.

    Raises:
        ValueError: when it cannot.
    """
    with torch.random.fork_rng(devices=[]):
        toy = nn.Linear(8, 8).to(device, _DTYPES[run.precision])
    engine = build_engine(run, toy, num_steps)
    for p in toy.parameters():
        p.grad = torch.zeros_like(p)
    engine.update()


def _seed_draws(seed: int, rank: int, device: torch.device) -> None:
    """Seed torch's global generators, which models draw from in forward (dropout); a resumed run starts them anew."""
    torch.set_rng_state(rng(seed, "forward", rank).get_state())
    if device.type == "cuda":
        torch.cuda.set_rng_state(rng(seed, "forward", rank, device=device).get_state(), device)


def describe_into(run: Run, out: Path) -> None:
    """Write the resolved config and the environment beside the results."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.yaml").write_text(yaml.safe_dump(describe(run), sort_keys=False))
    (out / "environment.json").write_text(json.dumps(environment(), indent=1))


def _run_replica(run: Run, out: Path, resumes: bool, where: Place, comm: Comm) -> dict[str, Any]:
    mine = place_of(comm, num_shards=1)
    num_ranks, is_first = len(comm.members), mine.name == name_of(0)
    metered = MeteredComm(mine.across, Meter(), stream=where.device if where.backend == "nccl" else None)
    path = file_of(out, mine.name)
    check_names(out)
    if not resumes and any(out.glob("metrics*.jsonl")):  # of any rank; none writes before all have looked
        raise ValueError(f"{out} already holds a run; go on with it by --resume, or choose another --out")
    metrics = Metrics(path, _sinks(run, out, run.steps(len(metered.members))) if is_first else [])
    try:
        assembled = assemble(run, run.data.load(), metered, where.device, metrics.write)
        replica = assembled.replica
        checkpoints = Checkpoints(out / "checkpoints", mine, assembled.run_id, run.checkpoint.keep)
        if run.checkpoint.every:
            checkpoints.require_space(num_ranks * checkpoint_bytes(replica.engine, replica.state))
        if resumes:
            if not checkpoints.steps():
                check_beginning(run, path)
            truncate_after(path, resume(replica, checkpoints))
        if is_first:
            describe_into(run, out)
        train(replica, assembled.plan, checkpoints)
        assembled.save(out / "final.safetensors")
        return assembled.summary()
    finally:
        metrics.close()


def save_weights(model: nn.Module, path: Path) -> None:
    """Write parameters and buffers as safetensors; tied ones once, under the first of their names in the model.

    Views of larger tensors, which `safetensors` refuses, are written as copies.

    Raises:
        OSError: when the file cannot be written.
    """
    names: dict[Any, str] = {}  # of each tensor, the first: transformers and strict loading look for that one
    tensors, storages = dict[str, Tensor](), set[int]()
    metadata = {"format": "pt"}
    for name, x in model.state_dict().items():
        first = names.setdefault((x.data_ptr() or name, x.dtype, x.shape, x.stride()), name)
        if first != name:
            metadata[name] = first  # from which `safetensors.torch.load_model` knows the other names
            continue
        storage = x.untyped_storage()
        is_whole = x.nbytes == storage.nbytes() and storage.data_ptr() not in storages
        storages.add(storage.data_ptr())
        tensors[name] = x.contiguous() if is_whole else x.clone(memory_format=torch.contiguous_format)
    try:
        save_file(tensors, str(path), metadata)
    except (SafetensorError, OSError) as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def build_engine(run: Run, model: nn.Module, num_steps: int) -> TorchEngine:
    """The engine of a run, for a model already on its device."""
    optimizer = run.optimizer.build(parameter_groups(model, run.optimizer.decay_vectors))
    return TorchEngine(
        model,
        optimizer,
        schedule=run.schedule.build(optimizer, num_steps),
        num_micro_batches=run.batch.num_micro_batches,
        clip_norm=run.clip_norm,
        autocast=autocast_of(run),
        compile=run.compile,
    )


def autocast_of(run: Run) -> torch.dtype | None:
    """The dtype of forward's matrix products, as `TorchEngine` takes it."""
    return torch.bfloat16 if run.precision == "bf16_mixed" else None


def without_values(run: Run, vocab_size: int) -> nn.Module:
    """The run's model on the meta device: shapes alone."""
    with torch.device("meta"):
        return cast_(run.model.build(vocab_size, run.seed), _DTYPES[run.precision])


def open_ledger(
    run: Run, model: nn.Module, comm: MeteredComm, device: torch.device, write: Callable[[dict[str, Any]], None]
) -> Ledger:
    """The ledger of one member; its lines go to ``write``."""
    num_replicas = len(comm.members)
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return Ledger(
        write=write,
        meter=comm.meter,
        now=comm.now,
        rank=comm.rank,
        num_replicas=num_replicas,
        step_tokens=run.batch.of_replica(num_replicas) * run.data.seq_len,
        log_every=run.log.every,
        token_flops=None if peak is None else flops_per_token(model, run.data.seq_len),
        peak_flops=peak,
    )


def checkpoint_bytes(engine: Engine, state: Any) -> int:
    """The approximate size of this rank's checkpoint, assuming two optimizer states per parameter."""
    now = state_bytes({"engine": engine.state_dict(), "algorithm": state_tree(state)})
    return now + 2 * num_bytes(engine.slots()["param"])


def _sinks(run: Run, out: Path, num_steps: int) -> list[Sink]:
    sinks: list[Sink] = [ProgressSink(num_steps)]
    if run.log.tensorboard:
        sinks.append(TensorBoardSink(out / "tensorboard"))
    if run.log.wandb_project is not None:
        sinks.append(WandbSink(run.log.wandb_project, out.name))
    return sinks
