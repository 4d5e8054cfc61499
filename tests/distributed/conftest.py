"""Functions that run in several processes once for all tests: what they return is shared by pytest's workers."""

import os
import pickle
import time
from functools import cache

import pytest

from tests.distributed.cases import every_case
from tests.distributed.processes import run

LIMIT = 300.0
"""Seconds that a worker of pytest-xdist waits for another whose processes run."""


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """``once(name, function, world, *arguments)``: the results by rank, from the first worker that asks."""
    folder = tmp_path_factory.getbasetemp()
    shared = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder

    @cache
    def results(name, function, world, *arguments):
        path = shared / name
        try:
            path.mkdir()
        except FileExistsError:
            return awaited(path / "done")
        try:
            done = run(function, world, path, *arguments, limit=LIMIT)
        except Exception as error:
            done = str(error)  # once for all tests
        (path / "partial").write_bytes(pickle.dumps(done))
        (path / "partial").rename(path / "done")
        return done

    def check(*call):
        done = results(*call)
        assert not isinstance(done, str), done
        return done

    return check


@pytest.fixture(scope="session")
def trained(once):
    """Results by rank of all cases of a number of processes."""
    return lambda world: once(f"world{world}", every_case, world)


def awaited(path):
    """What another worker writes."""
    end = time.monotonic() + LIMIT
    while not path.exists():
        if time.monotonic() > end:
            return f"no result after {LIMIT:g} seconds"
        time.sleep(0.2)
    return pickle.loads(path.read_bytes())
