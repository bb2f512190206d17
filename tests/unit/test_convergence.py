"""The table of benchmarks/convergence.py: which runs it sets beside each other, and the page made from its records."""

import argparse
import lzma
import re
from itertools import permutations

import pytest

from benchmarks.comparison import Row, rounding
from benchmarks.convergence import (
    Case,
    Tuned,
    best_of,
    choices,
    config,
    edge_of,
    extend,
    rest,
    rows_of,
    save,
    summary,
    tried,
)
from benchmarks.convergence_page import RESULTS, best_rows, record, tables
from benchmarks.halves import halves
from benchmarks.methods import METHODS
from benchmarks.record import ROOT


def row(losses):
    return Row("one", 4, Tuned(1e-3, ()), losses, wire_bytes=1.0)


def test_methods_are_compared_by_the_seeds_that_both_have():
    three, one, two = row({0: 2.0, 1: 1.0, 2: 3.0}), row({0: 2.2}), row({0: 2.2, 2: 3.3})
    assert one.behind(three).value == pytest.approx(0.1)
    assert three.behind(one).value == pytest.approx(2.0 / 2.2 - 1)
    assert two.behind(three).value == pytest.approx(0.1)
    assert three.loss == pytest.approx(2.0)


def test_one_replica_sends_nothing_and_is_recorded(tmp_path):
    given = argparse.Namespace(name="single", out=tmp_path, commit="abcdef1", size="500k", batch=4, seq_len=128)
    vars(given).update(every=15, precision="fp32", replicas=[1], grid=[1.0], rates_only=True, seeds=1)
    vars(given).update(extended=[], choose_on=None)
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
    given = argparse.Namespace(replicas=[4, 8], among=None, seeds=2, grid=[0.5, 1.0], rates_only=False)
    vars(given).update(extended=[], choose_on=None)
    return given


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


def test_what_lies_within_the_noise_of_its_limit_is_a_tie():
    """Of one seed what rounding alone does; of several that over the root of their number, or half of their range."""
    baseline = row({0: 2.0, 1: 2.0, 2: 2.0, 3: 2.0})
    one, steady, wild = row({0: 2.01}), row(dict.fromkeys(range(4), 2.01)), row({0: 2.01, 1: 2.05, 2: 1.97, 3: 2.01})
    errors = [x.behind(baseline, 0.006).error for x in (one, steady, wild)]
    assert errors == pytest.approx([0.006, 0.003, 0.02])
    assert [x.behind(baseline, 0.006).holds(0.0) for x in (one, steady, wild)] == [
        "tie" if e > 0.005 else "no" for e in errors
    ]
    assert [one.behind(baseline, 0.006).holds(limit) for limit in (-0.002, 0.0101, 0.012)] == ["no", "tie", "yes"]
    assert one.behind(baseline).holds(0.1) == "yes, one run each"
    runs = {
        f"data parallel{x} | {n} replicas | lr 1 | seed 0": {"val_loss": 1.0 + n / 100}
        for x in ("", ", Muon")
        for n in (2, 4)
    }
    runs |= {
        "DiLoCo | 2 replicas | lr 1 | seed 0": {"val_loss": 9.0},
        "DiLoCo | 4 replicas | lr 1 | seed 0": {"val_loss": 1.0},
    }
    assert rounding(runs) == pytest.approx(1.04 / 1.02 - 1)
    assert rounding(dict(list(runs.items())[:1])) is None


def losses(cases):
    return {case.key: {"val_loss": loss} for case, loss in cases}


def test_a_grid_is_extended_where_its_best_rate_is_the_last_that_was_tried(given):
    given.extended = ["Local SGD", "data parallel"]
    base = METHODS["Local SGD"].lr
    low, high = choices(given, "Local SGD")
    found = losses([(Case("Local SGD", 4, low, 0), 2.0), (Case("Local SGD", 4, high, 0), 1.0)])
    assert edge_of(given, "Local SGD", high, found) == "highest"
    (more,) = extend(given, ["Local SGD", "DiLoCo"], found)
    assert more == Case("Local SGD", 4, Tuned(2 * base, ()), 0)
    assert best_of(given, "Local SGD", found | losses([(more, 0.5)])).lr == 2 * base
    given.extended = []
    assert best_of(given, "Local SGD", found | losses([(more, 0.5)])) == high, (
        "the grid's, which a better one lies beyond"
    )
    assert edge_of(given, "Local SGD", high, found | losses([(more, 0.5)])) == "highest"
    given.extended = ["Local SGD"]
    ended = found | losses([(more, 1.5)])
    assert edge_of(given, "Local SGD", high, ended) == "" and extend(given, ["Local SGD"], ended) == []


def test_choices_may_be_made_on_a_text_of_their_own(given, tmp_path):
    given.choose_on = tmp_path / "choose.txt"
    vars(given).update(train=tmp_path / "train.txt", validation=tmp_path / "report.txt", separator="-", size="500k")
    vars(given).update(
        tokens=4096, batch=4, seq_len=128, every=15, eval_tokens=1000, precision="fp32", device="cpu", compile=False
    )
    low, high = choices(given, "Local SGD")
    tried_on = [Case("Local SGD", 4, tuned, 0, is_choosing=True) for tuned in (low, high)]
    found = losses([(tried_on[0], 1.0), (tried_on[1], 2.0), (Case("Local SGD", 4, high, 0), 0.1)])
    assert best_of(given, "Local SGD", found) == low
    reported = rest(given, ["Local SGD"], found)
    assert Case("Local SGD", 4, low, 0) in reported and not any(case.is_choosing for case in reported)
    for case, name in ((tried_on[0], "choose.txt"), (reported[0], "report.txt")):
        assert config(given, case)["data"]["validation"]["init_args"]["paths"][0].endswith(name)


def test_halves_hold_every_document_once(tmp_path):
    texts = [tmp_path / name for name in ("all.txt.xz", "a.txt.xz", "b.txt.xz")]
    with lzma.open(texts[0], "wt", encoding="utf-8") as file:
        file.write("\0".join("abcde"))
    halves(texts[0], "\0", *texts[1:])
    assert [lzma.decompress(x.read_bytes()) for x in texts[1:]] == [b"a\0c\0e", b"b\0d"]


PAGE = (ROOT / "docs" / "convergence.md").read_text(encoding="utf-8")


def test_the_summary_is_what_its_record_says():
    given, runs = record("convergence")
    assert summary(given, runs).strip() in (RESULTS / "convergence" / "summary.md").read_text(encoding="utf-8")


def test_the_pages_tables_are_what_the_records_say():
    for name, lines in tables().items():
        assert "\n".join(lines) in PAGE, f"{name}: put in what `python -m benchmarks.convergence_page` prints"


def test_the_pages_losses_are_in_the_records():
    """Each number of four decimals: the loss of a run, or the mean or half of the range of the seeds of a method."""
    known = set()
    for path in RESULTS.glob("*/record.json"):
        if path.parent.name.startswith(("convergence", "slow_momenta", "eager_rounds")):
            known |= {f"{run['val_loss']:.4f}" for run in record(path.parent.name)[1].values() if run["val_loss"]}
    rows = [*rows_of(*record("convergence")), *best_rows("convergence_small_seeds")]
    known |= {f"{x:.4f}" for row in rows for x in (row.loss, row.spread)}
    quoted = set(re.findall(r"(?<![\d.])1\.\d{4}(?!\d)", PAGE)) | set(re.findall(r"± (0\.\d{4})", PAGE))
    assert len(quoted) > 80 and quoted <= known, sorted(quoted - known)


def test_the_pages_figures_of_noise_are_those_of_the_record():
    given, runs = record("convergence")
    by_name = {row.name: row for row in rows_of(given, runs) if row.num_replicas == 4}
    qhadopt, adamw = (
        2 * by_name[f"data parallel{x}"].spread / by_name[f"data parallel{x}"].loss for x in (", QHADOPT", "")
    )
    page = " ".join(PAGE.split())
    assert f"end up to {100 * rounding(runs):.2f} % apart" in page
    assert f"with QHADOPT differ by {100 * qhadopt:.1f} %, those with AdamW by {100 * adamw:.1f} %" in page
    highest = [row for row in rows_of(given, runs) if row.edge == "highest" and METHODS[row.name].tuned_as is None]
    assert len({row.name for row in highest}) == 7 and "Seven methods" in page
    own = {row.name: row.loss for row in rows_of(given, runs) if row.num_replicas == 4}
    twice = 100 * (
        own["DiLoCo, rounds twice"] / runs[Case("data parallel", 4, Tuned(7.5e-4, ()), 0).key]["val_loss"] - 1
    )
    assert f"for rounds of 30, in which ours is {twice:.1f} % behind" in page


def test_the_gaps_in_the_pages_other_tables_are_in_the_records():
    """Beside data parallel, with the same optimizer or AdamW, or DiLoCo; of smaller records between any two runs."""
    known = set()
    for path in RESULTS.glob("*/record.json"):
        name = path.parent.name
        if name.startswith("convergence"):
            rows = [*best_rows(name), *rows_of(*record(name))]
            for row in rows:
                beside = {"data parallel", "DiLoCo", METHODS[row.name].beside}
                others = [x for x in rows if x.num_replicas == row.num_replicas and x.name in beside]
                known |= {f"{100 * row.behind(other).value:+.1f}" for other in others}
        elif name.startswith(("slow_momenta", "eager_rounds")):
            found = [run["val_loss"] for run in record(name)[1].values() if run["val_loss"]]
            known |= {f"{100 * (a / b - 1):+.1f}" for a, b in permutations(found, 2)}
    printed = {line for lines in tables().values() for line in lines}
    cells = [line for line in PAGE.splitlines() if line.startswith("|") and line not in printed]
    quoted = {gap for line in cells for gap in re.findall(r"[+-]\d+\.\d(?= %)", line)}
    assert len(quoted) > 30 and quoted <= known, sorted(quoted - known)
