"""Skip what this machine cannot run; one thread for each of several test processes."""

import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: processes that spin on each other's threads are 20-100 times slower

import torch  # noqa: E402


@pytest.fixture
def threads():
    """One thread until the test sets more by what it gets: two wait for each other at every small operation, for long where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
