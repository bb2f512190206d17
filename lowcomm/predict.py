"""Predicts a run's traffic by running its algorithm on meta tensors, with `EchoComm` in place of other replicas."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lowcomm.assemble import build_engine, without_values
from lowcomm.comm.echo import EchoComm
from lowcomm.comm.metered import Meter, MeteredComm
from lowcomm.config import Run
from lowcomm.rounds.buffers import align

_MAX_STEPS = 2000


@dataclass(frozen=True)
class Prediction:
    """Traffic of one replica.

    Attributes:
        num_parameters: trainable ones.
        num_steps: inner steps counted: all, or for runs of more than 2,000 steps those up to the last round that ends
            within 2,000, or up to the first round if that is longer.
        num_rounds: in those steps.
        round_bytes: sent in one round, on average.
        step_bytes: sent for each inner step, on average.
    """

    num_parameters: int
    num_steps: int
    num_rounds: int
    round_bytes: float
    step_bytes: float


def predict(run: Run, num_replicas: int, vocab_size: int) -> Prediction:
    """Count the bytes that each of ``num_replicas`` replicas sends."""
    num_steps = run.steps(num_replicas)
    model = without_values(run, vocab_size)
    engine = build_engine(run, model, num_steps)
    meter = Meter()
    comm = MeteredComm(EchoComm(num_replicas), meter)
    state = run.algorithm.init(engine, comm)
    counted, num_rounds, sent = 0, 0, 0  # at the end of the last round
    for t in range(1, num_steps + 1):
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        run.algorithm.before_update(t, engine, state, comm)
        if t == 1:
            engine.update()  # now the optimizer has its states
        elif engine.schedule is not None:
            engine.schedule.step()  # the length of a round may follow the learning rate
        run.algorithm.after_update(t, engine, state, comm)
        if run.algorithm.num_rounds(state) > num_rounds and (t <= _MAX_STEPS or num_rounds == 0):
            counted, num_rounds, sent = t, run.algorithm.num_rounds(state), meter.bytes_sent
        if t >= _MAX_STEPS and num_rounds > 0 and t < num_steps:
            break
    else:
        run.algorithm.finish(num_steps, engine, state, comm)
        align(run.algorithm, engine, comm)
        counted, num_rounds, sent = num_steps, run.algorithm.num_rounds(state), meter.bytes_sent
    num_parameters = sum(x.numel() for x in engine.slots()["param"])
    return Prediction(num_parameters, counted, num_rounds, sent / max(1, num_rounds), sent / counted)
