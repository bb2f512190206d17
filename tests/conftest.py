"""Settings of every test: one thread per process, and hypothesis without a deadline, repeatable in CI."""

import os

import pytest
import torch
from hypothesis import settings

# two test processes share two cores, and sums in a fixed order are needed for bitwise comparisons
torch.set_num_threads(1)

settings.register_profile("lowcomm", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("lowcomm")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "multiprocess" in item.path.parts:
            item.add_marker(pytest.mark.real)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-golden", action="store_true", help="keep today's numbers in tests/golden")
