"""Leaving a process group ends gloo's threads: one that frees a tensor while Python ends would abort the process."""

from tests.torchrun import torchrun


def test_no_thread_of_gloo_outlives_disconnect():
    assert torchrun(2, "tests/multiprocess/disconnecting.py").count("left: 0 of True") == 2
