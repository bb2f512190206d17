"""Whether all ranks were started alike."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowcomm.comm.agreement import check_agreement
from tests.world import run_world

FACTS = st.lists(st.tuples(st.text("ab\n", max_size=6), st.text("ab\né", max_size=6)), min_size=3, max_size=3)


@given(FACTS)
def test_ranks_that_differ_refuse_on_each_of_them(by_rank):
    def program(comm):
        facts = dict(zip(("one", "other"), by_rank[comm.rank], strict=True))
        try:
            check_agreement(comm, facts, "begin alike")
        except ValueError as error:
            return str(error)
        return ""

    (said,) = set(run_world(3, program))
    differing = {
        name: [r for r in range(3) if by_rank[r][i] != by_rank[0][i]] for i, name in enumerate(("one", "other"))
    }
    what = next((name for name, ranks in differing.items() if ranks), None)
    if what is None:
        assert said == ""
    else:
        assert said.startswith(f"the {what} of ranks {differing[what]} differs from rank 0's: ")
        assert said.endswith("; begin alike")


def test_the_first_line_that_differs_is_quoted():
    def program(comm):
        text = "same\nmine\nlonger" if comm.rank else "same\nyours"
        with pytest.raises(ValueError, match="mine on rank 1, yours on rank 0"):
            check_agreement(comm, {"list": text}, "")
        with pytest.raises(ValueError, match="nothing on rank 1, last on rank 0"):
            check_agreement(comm, {"list": "a" if comm.rank else "a\nlast"}, "")

    run_world(2, program)
