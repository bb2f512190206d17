"""The table of benchmarks/convergence.py: which runs it sets beside each other."""

import argparse

import pytest

from benchmarks.convergence import Case, Row, Tuned, best_of, choices, save, tried
from benchmarks.methods import METHODS


def row(losses):
    return Row("one", 4, Tuned(1e-3, ()), losses, wire_bytes=1.0)


def test_methods_are_compared_by_the_seeds_that_both_have():
    three, one, two = row({0: 2.0, 1: 1.0, 2: 3.0}), row({0: 2.2}), row({0: 2.2, 2: 3.3})
    assert one.behind(three) == pytest.approx(0.1)
    assert three.behind(one) == pytest.approx(2.0 / 2.2 - 1)
    assert two.behind(three) == pytest.approx(0.1)
    assert three.loss == pytest.approx(2.0)


def test_one_replica_sends_nothing_and_is_recorded(tmp_path):
    given = argparse.Namespace(name="single", out=tmp_path, commit="abcdef1", size="500k", batch=4, seq_len=128)
    vars(given).update(every=15, precision="fp32", replicas=[1], grid=[1.0], rates_only=True, seeds=1)
    runs = {}
    for name, loss in (("data parallel", 1.7), ("DiLoCo", 1.75)):
        case = Case(name, 1, choices(given, name)[0], 0)
        runs[case.key] = {
            "val_loss": loss,
            "wire_bytes": 0,
            "num_parameters": 5,
            "tokens": 9,
            "t": 3,
            "commit": "abcdef1",
        }
    summary = (save(given, runs) / "summary.md").read_text(encoding="utf-8")
    assert "+2.94%" in next(line for line in summary.splitlines() if line.startswith("| 1        | DiLoCo"))
    assert (tmp_path / "single" / "pareto.png").exists()


@pytest.fixture
def given():
    return argparse.Namespace(replicas=[4, 8], grid=[0.5, 1.0], rates_only=False)


def test_what_was_tried_beyond_the_grid_is_shown_but_not_chosen(given):
    cases = [Case("GASLoC", 4, tuned, 0) for tuned in choices(given, "GASLoC")]
    results = {case.key: {"val_loss": 3.0 - i} for i, case in enumerate(cases)}
    others = [
        Case("GASLoC", 4, Tuned(1e-4, (0.7, 0.5)), 0),
        Case("GASLoC", 8, cases[0].tuned, 0),
        Case("GASLoC", 4, cases[0].tuned, 1),
        Case("GASLoC, one group", 4, cases[0].tuned, 0),
    ]
    results |= {case.key: {"val_loss": 0.1} for case in others}
    assert best_of(given, "GASLoC", results) == cases[-1].tuned
    found = tried(given, "GASLoC", results)
    assert found[0] == ("0.0001 with 0.7/0.5", 0.1)
    assert sorted(found[1:]) == sorted((str(case.tuned), 3.0 - i) for i, case in enumerate(cases))


def test_others_go_with_the_rate_in_the_middle_times_their_factor(given):
    lr, factor = METHODS["MT-DAO"].lr, METHODS["MT-DAO"].others_factor
    rates = [choice.lr for choice in choices(given, "MT-DAO")]
    assert rates == pytest.approx([0.5 * lr, lr, *[factor * lr] * (len(METHODS["MT-DAO"].others) - 1)])
    assert factor != 1
