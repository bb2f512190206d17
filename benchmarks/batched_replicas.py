"""Does it pay to compute equal steps of many small replicas at once? One after the other against stacked weights.

    OMP_NUM_THREADS=1 python -m benchmarks.batched_replicas --device cpu --name batched_replicas_cpu
    python -m benchmarks.batched_replicas --device cuda

Each replica of a Llama takes AdamW steps on batches of its own. In turns, in one process:

sequential  each replica for itself: forward, backward, `torch.optim.AdamW` (torch's default implementation)
fused       the same with the optimizer's fused implementation
stacked     `torch.func.vmap(grad)` over weights of shape [replicas, ...], and one fused AdamW step for all of them;
            also with attention as plain matrix products, since torch batches not every kernel of it

Gradients are not clipped, as a norm of its own for each replica would cost the stacked form a little more. Before
anything is timed, all must agree on the weights after two steps.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.record import parser, table, write_record
from lowcomm.models.llama import Llama
from lowcomm.tensors import rng

VOCAB_SIZE = 256
LR, WEIGHT_DECAY, BETAS = 1e-3, 0.1, (0.9, 0.95)

# a step of all replicas, from their batches [replicas, batch, seq + 1] to their losses [replicas]
Step = Callable[[Tensor], Tensor]


def main() -> None:
    """Measure, print, record."""
    flags = parser(__doc__, "batched_replicas")
    flags.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    flags.add_argument("--sizes", nargs="+", default=["500k", "1m", "10m"], help="of the Llama")
    flags.add_argument("--replicas", nargs="+", type=int, default=[4, 8, 16])
    flags.add_argument("--batch", type=int, default=4, help="sequences of a replica's step")
    flags.add_argument("--seq_len", type=int, default=128)
    flags.add_argument("--steps", type=int, default=5, help="in a block")
    flags.add_argument("--repeats", type=int, default=5, help="blocks of each, in turns")
    flags.add_argument("--quick", action="store_true", help="one tiny case: does it run at all?")
    given = flags.parse_args()
    if given.quick:
        given.sizes, given.replicas, given.batch, given.seq_len, given.steps, given.repeats = ["500k"], [2], 1, 16, 1, 2
    device = torch.device(given.device)
    results = [measure(given, size, n, device) for size in given.sizes for n in given.replicas]
    rows = [
        (
            *(x["size"], str(x["replicas"])),
            *(f"{1e3 * seconds['median']:,.1f}" for seconds in x["step_s"].values()),
            f"{x['best_sequential_over_best_stacked']:.2f}",
        )
        for x in results
    ]
    columns = ("size", "replicas", *(f"{name} ms" for name in results[0]["step_s"]), "ratio")
    text = (
        f"Milliseconds of one step of all replicas, {given.batch} x {given.seq_len} tokens each, float32, on the "
        f"{given.device}; medians of {given.repeats} blocks of {given.steps} steps in turns"
        f"{'' if given.device == 'cuda' else ', CPU time'}. The ratio is the faster of the first two over the faster "
        f"of the last two: above 1 stacking pays.\n\n{table(columns, rows)}"
    )
    print(text)
    results_and_threads = {"torch_threads": torch.get_num_threads(), "cases": results}
    print(f"record: {write_record(given, results_and_threads, text)}")


def measure(given: argparse.Namespace, size: str, num_replicas: int, device: torch.device) -> dict[str, Any]:
    """Seconds of a step of all replicas, each way in turns."""
    models = [build(size, seed, device) for seed in range(num_replicas)]
    ways = {
        "sequential": Sequential([build(size, seed, device) for seed in range(num_replicas)], fused=False),
        "fused": Sequential([build(size, seed, device) for seed in range(num_replicas)], fused=True),
        "stacked": Stacked(models),
        "stacked, plain attention": Stacked(models, plain_attention=True),
    }
    generator = rng(0, "batched_replicas")
    shape = (num_replicas, given.batch, given.seq_len + 1)
    # each batch once: gradients of what is learnt by heart are slow on a CPU
    batches = [
        torch.randint(VOCAB_SIZE, shape, generator=generator).to(device)
        for _ in range(2 + (given.repeats + 1) * given.steps)
    ]
    for way in ways.values():
        for batch in batches[:2]:
            way.step(batch)
    for name, way in ways.items():
        for x, y in zip(way.weights(), ways["sequential"].weights(), strict=True):
            torch.testing.assert_close(x, y, rtol=0.0, atol=2.5 * LR)  # where a gradient is about 0, Adam's sign is too
            assert (x - y).abs().mean() < 0.01 * LR, f"{name} and sequential disagree"

    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(given.repeats + 1):
        block = batches[2 + i * given.steps : 2 + (i + 1) * given.steps]
        for name, way in ways.items():
            started_s = now(device)
            for batch in block:
                way.step(batch)
            seconds[name].append((now(device) - started_s) / given.steps)
    step_s = {  # the first blocks warm up
        name: {"median": statistics.median(xs[1:]), "min": min(xs[1:]), "max": max(xs[1:])}
        for name, xs in seconds.items()
    }
    print(size, num_replicas, {name: f"{1e3 * x['median']:.1f} ms" for name, x in step_s.items()}, flush=True)
    best_s = [
        min(x["median"] for name, x in step_s.items() if name.startswith("stacked") == stacked)
        for stacked in (False, True)
    ]
    return {
        "size": size,
        "replicas": num_replicas,
        "step_s": step_s,
        "best_sequential_over_best_stacked": best_s[0] / best_s[1],
    }


def build(size: str, seed: int, device: torch.device) -> nn.Module:
    """One replica; other seeds give others, so that none can be mixed up."""
    return Llama(size).build(VOCAB_SIZE, seed).to(device)


def loss_of(logits: Tensor, batch: Tensor) -> Tensor:
    """Mean cross-entropy of each next token."""
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


class Sequential:
    """Each replica for itself."""

    def __init__(self, models: list[nn.Module], fused: bool) -> None:
        self.models = models
        self.optimizers = [
            torch.optim.AdamW(m.parameters(), LR, BETAS, weight_decay=WEIGHT_DECAY, fused=fused or None) for m in models
        ]

    def step(self, batches: Tensor) -> Tensor:
        """One step of all."""
        losses = []
        for model, optimizer, batch in zip(self.models, self.optimizers, batches, strict=True):
            loss = loss_of(model(batch[:, :-1]), batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        return torch.stack(losses)

    def weights(self) -> list[Tensor]:
        """Stacked, by parameter."""
        return [
            torch.stack([x.detach() for x in xs]) for xs in zip(*(m.parameters() for m in self.models), strict=True)
        ]


class Stacked:
    """All replicas at once."""

    def __init__(self, models: list[nn.Module], plain_attention: bool = False) -> None:
        parameters, buffers = stack_module_state(models)
        self.parameters = {name: x.detach().requires_grad_() for name, x in parameters.items()}
        self.buffers = buffers
        skeleton = models[0]

        def loss(parameters: dict[str, Tensor], buffers: dict[str, Tensor], batch: Tensor) -> Tensor:
            logits = functional_call(skeleton, (parameters, buffers), (batch[:, :-1],))
            return loss_of(logits, batch)

        self.gradients = vmap(grad_and_value(loss))
        self.plain_attention = plain_attention
        values = list(self.parameters.values())
        # elementwise, so that one optimizer over [replicas, ...] is one for each
        self.optimizer = torch.optim.AdamW(values, LR, BETAS, weight_decay=WEIGHT_DECAY, fused=True)

    def step(self, batches: Tensor) -> Tensor:
        """One step of all."""
        detached = {name: x.detach() for name, x in self.parameters.items()}
        with sdpa_kernel(SDPBackend.MATH) if self.plain_attention else nullcontext():
            gradients, losses = self.gradients(detached, self.buffers, batches)
        for name, x in self.parameters.items():
            x.grad = gradients[name]
        self.optimizer.step()
        return losses

    def weights(self) -> list[Tensor]:
        """Stacked, by parameter."""
        return [x.detach() for x in self.parameters.values()]


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was asked; on the CPU those of this process, as it may be shared."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    main()
