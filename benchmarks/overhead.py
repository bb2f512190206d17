"""What lowcomm costs: tokens/s of DiLoCo in `lowcomm.train.train` over that of a bare torch loop.

    python -m benchmarks.overhead                                                                    # one replica
    python -m torch.distributed.run --standalone --nproc_per_node 2 -m benchmarks.overhead --name overhead_two_replicas

Both loops train a Llama of the same size on the same batches in the same process, in blocks of steps that alternate
bare, lowcomm, bare, lowcomm. The lowcomm loop is the real one with ledger and metrics file; it is asked for its next
batch at every step, and at the start of a block that call first runs a bare block, so nothing of the loop is cut up.
Each block of it holds at least one round. The first pair of blocks warms up and is not counted. On several replicas
the bare loops run side by side and never wait for each other, so that DiLoCo's waiting counts against it in full;
replicas meet before each block, outside of the clock.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.record import parser, table, write_record
from lowcomm.algorithms.diloco import DiLoCo
from lowcomm.assemble import build_engine, place
from lowcomm.checkpoint import Checkpoints
from lowcomm.comm.distributed import connect, disconnect
from lowcomm.comm.metered import Meter, MeteredComm
from lowcomm.comm.solo import SoloComm
from lowcomm.config import Batch, Checkpointing, Log, Run
from lowcomm.ledger import Ledger
from lowcomm.membership import Members
from lowcomm.metrics import Metrics, file_of
from lowcomm.models.llama import Llama
from lowcomm.optim.schedule import Cosine
from lowcomm.places import name_of, place_of
from lowcomm.replica import Replica
from lowcomm.train import Plan, train

LOG_EVERY = 10
NUM_WARMUP_STEPS = 10


@dataclass(frozen=True)
class Pair:
    """One bare block and the lowcomm block after it, over all replicas.

    Attributes:
        bare_tokens_per_s, lowcomm_tokens_per_s: sums over replicas, each by its own clock.
        ratio: lowcomm over bare.
        wait: the mean share of the lowcomm block that a replica waited for messages.
    """

    bare_tokens_per_s: float
    lowcomm_tokens_per_s: float
    ratio: float
    wait: float


class BareLoop:
    """What someone without lowcomm would write; nothing in `run` is ours but the model."""

    def __init__(self, model: nn.Module, batches: list[Tensor], device: torch.device, num_steps: int) -> None:
        self.model, self.batches, self.device = model, batches, device
        matrices = [p for p in model.parameters() if p.ndim >= 2]
        vectors = [p for p in model.parameters() if p.ndim < 2]
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)

        def factor(step: int) -> float:
            if step < NUM_WARMUP_STEPS:
                return (step + 1) / NUM_WARMUP_STEPS
            return 0.5 * (1 + math.cos(math.pi * (step + 1 - NUM_WARMUP_STEPS) / (num_steps - NUM_WARMUP_STEPS)))

        self.schedule = LambdaLR(self.optimizer, factor)
        self.num_done = 0

    def run(self, num_steps: int) -> None:
        """Some steps."""
        for step in range(self.num_done, self.num_done + num_steps):
            batch = self.batches[step % len(self.batches)].to(self.device)
            logits = self.model(batch[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            if (step + 1) % LOG_EVERY == 0:
                loss.item()
        self.num_done += num_steps


class Alternating:
    """The stream of the lowcomm loop; before each of its blocks it runs and times the bare loop."""

    def __init__(
        self, bare: BareLoop, num_blocks: int, block_steps: int, meter: Meter, meet: Callable[[], object]
    ) -> None:
        self.seconds: list[tuple[float, float, float]] = []  # bare, lowcomm, lowcomm's wait for messages
        self._bare, self._num_blocks, self._block_steps = bare, num_blocks, block_steps
        self._meter, self._meet = meter, meet
        self._num_batches = 0
        self._bare_s = self._started_s = self._waited_s = 0.0

    def next(self) -> Tensor:
        """The next batch; between two blocks, after a bare one."""
        if self._num_batches % self._block_steps == 0:
            if self._num_batches:
                self._end_block()
            if len(self.seconds) < self._num_blocks:
                self._begin_block()
        self._num_batches += 1
        return self._bare.batches[(self._num_batches - 1) % len(self._bare.batches)]

    def _end_block(self) -> None:
        lowcomm_s = self._clock() - self._started_s
        self._meter.settle()
        self.seconds.append((self._bare_s, lowcomm_s, self._meter.wait_s - self._waited_s))

    def _begin_block(self) -> None:
        self._meet()
        started_s = self._clock()
        self._bare.run(self._block_steps)
        self._bare_s = self._clock() - started_s
        self._meet()
        self._meter.settle()
        self._waited_s, self._started_s = self._meter.wait_s, self._clock()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: this run is never saved."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to load."""

    def _clock(self) -> float:
        if self._bare.device.type == "cuda":
            torch.cuda.synchronize(self._bare.device)
        return time.perf_counter()


def main() -> None:
    """Measure, print, record."""
    flags = parser(__doc__, "overhead")
    flags.add_argument("--size", default="10m", help="of the Llama")
    flags.add_argument("--blocks", type=int, default=7, help="counted pairs of blocks")
    flags.add_argument("--steps", type=int, default=100, help="in a block")
    flags.add_argument("--every", type=int, default=100, help="steps of a round")
    flags.add_argument("--batch", type=int, default=4, help="sequences of a replica's step")
    flags.add_argument("--seq_len", type=int, default=128)
    flags.add_argument("--device", choices=["cpu", "cuda", "auto"], default="auto")
    given = flags.parse_args()
    if given.blocks < 1 or given.steps % given.every:
        raise SystemExit("--blocks must be at least 1 and --steps a multiple of --every: each block has whole rounds")

    # one step more than the blocks: the end of the last one is seen when the next batch is asked for
    num_steps = (given.blocks + 1) * given.steps + 1
    run = Run(
        model=Llama(given.size),
        algorithm=DiLoCo(every=given.every),
        schedule=Cosine(num_warmup_steps=NUM_WARMUP_STEPS),
        batch=Batch(given.batch),
        checkpoint=Checkpointing(every=0),
        log=Log(every=LOG_EVERY),
        num_steps=num_steps,
        device=given.device,
    )
    where = place(run)
    comm = SoloComm() if where.backend is None else connect(where.backend)
    metered = MeteredComm(comm, Meter(), stream=where.device if where.backend == "nccl" else None)
    try:
        with tempfile.TemporaryDirectory() as folder:
            seconds = measure(run, given, where.device, metered, Path(folder))
        gathered = comm.all_gather(torch.tensor(seconds, dtype=torch.float64)).wait()  # [blocks, 3] of each replica
    finally:
        disconnect()
    if comm.rank == 0:
        report(given, gathered)


def measure(
    run: Run, given: argparse.Namespace, device: torch.device, comm: MeteredComm, folder: Path
) -> list[tuple[float, float, float]]:
    """Seconds of each counted pair: bare, lowcomm, and of that waiting for messages."""
    assert run.num_steps is not None
    generator = torch.Generator().manual_seed(comm.rank)
    shape = (given.batch, given.seq_len + 1)
    # Each batch once: a model that has learnt few batches by heart has gradients so small that the CPU's arithmetic
    # slows down, and the two models do so at different times.
    batches = [torch.randint(256, shape, generator=generator) for _ in range(run.num_steps)]
    bare = BareLoop(run.model.build(256, run.seed).to(device), batches, device, run.num_steps)
    meeting = comm.tagged("meeting")
    stream = Alternating(bare, given.blocks + 1, given.steps, comm.meter, lambda: meeting.all_sum(torch.ones(1)).wait())
    engine = build_engine(run, run.model.build(256, run.seed).to(device), run.num_steps)
    metrics = Metrics(file_of(folder, name_of(comm.rank)))
    ledger = Ledger(
        write=metrics.write,
        meter=comm.meter,
        now=comm.now,
        rank=comm.rank,
        num_replicas=len(comm.members),
        step_tokens=given.batch * given.seq_len,
        log_every=run.log.every,
        token_flops=None,
        peak_flops=None,
    )
    replica = Replica(run.algorithm, engine, run.algorithm.init(engine, comm), stream, ledger, Members(comm), device)
    plan = Plan(run.num_steps, evaluate_every=0, save_every=0, validation=batches[:1], bytes_per_token=1.0)
    try:
        train(replica, plan, Checkpoints(folder, place_of(comm, 1), "overhead"))
    finally:
        metrics.close()
    return stream.seconds[1:]


def report(given: argparse.Namespace, gathered: list[Tensor]) -> None:
    """Print and record the pairs; ``gathered`` is [blocks, 3] of each replica."""
    block_tokens = given.steps * given.batch * given.seq_len
    seconds = torch.stack(gathered)  # [replicas, blocks, 3]
    pairs = []
    for bare_s, lowcomm_s, wait_s in (block.unbind(1) for block in seconds.unbind(1)):  # each [replicas]
        bare, ours = float((block_tokens / bare_s).sum()), float((block_tokens / lowcomm_s).sum())
        pairs.append(Pair(bare, ours, ours / bare, float((wait_s / lowcomm_s).mean())))
    ratios = [pair.ratio for pair in pairs]
    median, low, high = statistics.median(ratios), min(ratios), max(ratios)
    columns = ("pair", "bare tokens/s", "lowcomm tokens/s", "ratio", "waiting")
    rows = [
        (str(i), f"{x.bare_tokens_per_s:,.0f}", f"{x.lowcomm_tokens_per_s:,.0f}", f"{x.ratio:.4f}", f"{x.wait:.2%}")
        for i, x in enumerate(pairs, 1)
    ]
    result = f"ratio {median:.4f} [{low:.4f}, {high:.4f}]"
    summary = (
        f"tokens/s of DiLoCo(every={given.every}) in lowcomm over a bare torch loop: {result} (median, min, max of "
        f"{len(pairs)} alternating pairs of blocks).\n\nLlama {given.size}, {len(gathered)} replica(s), {given.steps} "
        f"steps a block, {given.batch} x {given.seq_len} tokens a step and replica, float32. Waiting is the share of a "
        f"lowcomm block spent in messages.\n\n{table(columns, rows)}"
    )
    print(summary)
    ratio = {"median": median, "min": low, "max": high}
    results = {"num_replicas": len(gathered), "ratio": ratio, "pairs": [asdict(pair) for pair in pairs]}
    print(f"record: {write_record(given, results, summary)}\n{result}")


if __name__ == "__main__":
    main()
