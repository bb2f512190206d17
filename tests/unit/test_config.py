"""The arithmetic of a run's config: batches, lengths, what tells runs apart, and values that it refuses."""

from dataclasses import replace

import pytest

from lowcomm import QSR, DiLoCo
from lowcomm.config import Batch, Checkpointing, Evaluation, Log, Optimizer, Run, identity
from lowcomm.data import Data
from lowcomm.optim.schedule import Cosine
from tests.refusals import refused

RUN = Run(num_steps=3)


def test_a_batch_is_for_each_replica_or_split_among_them():
    assert (Batch(12).of_replica(3), Batch(12, "run").of_replica(3)) == (12, 4)
    assert Batch(12, "run", 2).of_replica(3) == 4
    for batch in (Batch(12, "run"), Batch(15, "run", 2), Batch(6, num_micro_batches=4)):
        with pytest.raises(ValueError, match="does not split into 5 replicas"):
            batch.of_replica(5)


@pytest.mark.parametrize(("per", "step_tokens"), [("replica", 3 * 6 * 8), ("run", 6 * 8)])
def test_tokens_are_those_of_all_replicas_in_whole_steps(per, step_tokens):
    run = Run(num_tokens=step_tokens * 5 - 1, batch=Batch(6, per), data=Data(seq_len=8))
    assert run.steps(3) == 4
    assert replace(run, num_tokens=step_tokens).steps(3) == 1
    with pytest.raises(ValueError, match=f"one step takes {step_tokens}"):
        replace(run, num_tokens=step_tokens - 1).steps(3)


def test_what_changes_a_result_changes_the_identity_and_nothing_else_does():
    same = [RUN, replace(RUN, checkpoint=Checkpointing(7), log=Log(3), timeout_s=5.0)]
    assert len({identity(run, 2, "a") for run in same}) == 1
    others = [{"seed": 1}, {"clip_norm": None}, {"evaluation": Evaluation(5)}, {"batch": Batch(8)}, {"device": "cpu"}]
    runs = [RUN, *(replace(RUN, **other) for other in others)]
    found = [*(identity(run, 2, "a") for run in runs), identity(RUN, 3, "a"), identity(RUN, 2, "b")]
    assert len(set(found)) == len(found)


test_values_out_of_range_are_refused = refused(
    (lambda: Run(), "either num_steps or num_tokens"),
    (lambda: replace(RUN, clip_norm=0.0), "clip_norm is 0.0"),
    (lambda: replace(RUN, timeout_s=0.0), "timeout_s is 0.0"),
    (lambda: Batch(num_micro_batches=0), "batch.num_micro_batches is 0"),
    (lambda: Evaluation(every=-1), "every must be at least 0"),
    (lambda: Evaluation(num_tokens=0), "num_tokens and batch_size at least 1"),
    (lambda: Checkpointing(keep=0), "keep at least 1"),
    (lambda: Log(every=0), "log.every is 0"),
    (lambda: Optimizer(args={"lr": 0.0}), "lr is 0.0; it must be a positive number"),
    (lambda: Optimizer("torch.optim.lr_scheduler.StepLR", {}), "is not a torch.optim.Optimizer"),
    (lambda: Optimizer("AdamW"), "cannot be imported"),
    (lambda: replace(RUN, algorithm=DiLoCo(QSR(num_warmup_steps=8)), schedule=Cosine(9)), "rises for 9 steps"),
)


def test_the_least_values_are_taken():
    assert (Evaluation(0, 1, 1), Checkpointing(0, 1), Log(1), Batch(1)) is not None
    replace(RUN, algorithm=DiLoCo(QSR(num_warmup_steps=9)), schedule=Cosine(9))
