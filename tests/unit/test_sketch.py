"""Sketches: what is right in expectation is, projections never add, and heavy entries are found."""

import pytest
import torch

from lowcomm import Task
from lowcomm.comm.echo import EchoComm
from lowcomm.compress.sketch import Sketch, _hadamard
from lowcomm.tensors import rng
from tests.compressors import CountSketch
from tests.world import run_world


def normal(*shape, key=0):
    return torch.randn(shape, generator=rng(0, "test", key), dtype=torch.float64)


def rounds(compressor, x, num):
    """The means of several rounds on one vector, by one rank."""
    state = compressor.init(x)
    for _ in range(num):
        _, mean, state = Task(compressor.mean(x, state, EchoComm(1))).result()
        yield mean


@pytest.mark.parametrize("size", [1, 2, 8, 64])
def test_hadamard_is_the_matrix(size):
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    x = normal(3, size)
    assert torch.allclose(_hadamard(x), x @ matrix / size**0.5)


@pytest.mark.parametrize("num", [1, 50, 64, 150])
def test_a_sketch_is_a_projection(num):
    """What is left is orthogonal to what is sent, so it is never longer than the vector."""
    x = normal(num)
    for mean in rounds(Sketch(0.25, block=64), x, 5):
        padded = num not in (1, 64)
        assert padded or torch.allclose(mean @ (x - mean), torch.zeros(()).double(), atol=1e-12)
        assert (x - mean).norm() <= x.norm() * (1 + 1e-12)


def test_a_full_sketch_is_exact():
    x = normal(100)
    assert all(torch.allclose(mean, x) for mean in rounds(Sketch(1.0, block=16), x, 3))


@pytest.mark.parametrize("exact", [True, False])
def test_heavy_entries_of_the_mean_are_found(exact):
    """They may be small on every rank; and entries that are heavy on one rank but not on average are none."""
    heavy = [3, 77, 500, 998, 1021]
    compressor = CountSketch(rows=5, density=0.5, keep=5 / 1024, exact=exact)

    def program(comm):
        x = 0.05 * normal(1024, key=comm.rank)
        x[heavy] += torch.tensor([4.0, -4.0, 5.0, 6.0, -5.0], dtype=torch.float64)
        x[100] += (-1) ** comm.rank * 50.0
        return x, Task(compressor.mean(x, compressor.init(x), comm)).result()[1]

    results = run_world(4, program)
    exact_mean = sum(x for x, _ in results) / 4
    for _, mean in results:
        assert mean.nonzero().flatten().tolist() == heavy
        assert torch.allclose(mean[heavy], exact_mean[heavy], rtol=1e-12 if exact else 0.3)


def test_rows_of_a_count_sketch_are_balanced_and_collide_at_random():
    """Cells are equally full, and entries that share one in one row seldom do in another."""
    like, num_columns, length = torch.empty(960, dtype=torch.float64), 60, 960
    compressor = CountSketch()
    rows = [compressor._row(like, num_columns, length, 1, i) for i in range(40)]
    pairs = torch.zeros(length, length, dtype=torch.int64)
    for row in rows:
        assert (row.cell.bincount() == length // num_columns).all()
        assert torch.equal(row.cell[row.source], torch.arange(length) // (length // num_columns))
        pairs += row.cell[:, None] == row.cell[None]
    pairs.fill_diagonal_(0)
    expected = 40 * (length / num_columns - 1) / (length - 1)
    assert pairs.double().mean() == pytest.approx(expected, rel=0.01)
    assert (pairs > 8).double().mean() < 0.005


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        *((Sketch, {"density": 0.0}), (Sketch, {"density": 1.5}), (Sketch, {"block": 48})),
        *((CountSketch, {"rows": 2}), (CountSketch, {"density": 2.0}), (CountSketch, {"keep": 0.05})),
    ],
    ids=str,
)
def test_bad_options_are_refused(cls, options):
    CountSketch(density=0.3, rows=3, keep=0.1)  # three times 0.1 is more than 0.3, by a rounding
    with pytest.raises(ValueError, match=f"{next(iter(options))}="):
        cls(**options)
