"""A method of somebody else's is one short file, and the laws of all methods see what is wrong with it."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from lowcomm.cli import main
from tests.conformance import test_algorithms as laws
from tests.stranger import elastic_averaging
from tests.stranger.elastic_averaging import ElasticAveraging


def test_it_is_short():
    assert len(Path(elastic_averaging.__file__).read_text().splitlines()) <= 60


@dataclass(frozen=True)
class CentreStays(ElasticAveraging):
    """Replicas come to a centre that never moves."""

    def commit(self, t, engine, state, sent, means):
        super().commit(t, engine, state, sent, [mean * 0 for mean in means])


@dataclass(frozen=True)
class WrongWay(ElasticAveraging):
    """The centre flees from the replicas."""

    def commit(self, t, engine, state, sent, means):
        super().commit(t, engine, state, sent, [-mean for mean in means])


def test_the_laws_hold_for_it():
    laws.test_training_gets_somewhere(ElasticAveraging(4))
    laws.test_replicas_on_equal_data_stay_equal(ElasticAveraging(4))
    laws.test_rounds_are_counted_and_traffic_is_that_of_an_echo(ElasticAveraging(4))
    for num_ranks in (1, 2, 5):
        laws.test_all_ranks_end_with_the_same_parameters(ElasticAveraging(4), num_ranks)
    for stop in (1, 4, 6):
        laws.test_state_restored_in_the_middle_of_a_run_goes_on_bitwise(ElasticAveraging(4), stop)


def test_it_is_found_by_its_path(capsys):
    path = f"{ElasticAveraging.__module__}.{ElasticAveraging.__name__}"
    assert main(["train", "--algorithm", path, "--algorithm.every", "3", "--num_steps", "9", "--dry_run"]) == 0
    assert "3 rounds in 9 steps" in capsys.readouterr().out


@pytest.mark.parametrize("mutant", [CentreStays, WrongWay])
def test_one_that_gets_nowhere_breaks_them(mutant):
    with pytest.raises(AssertionError):
        laws.test_training_gets_somewhere(mutant(4))
