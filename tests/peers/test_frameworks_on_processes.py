"""Frameworks on two processes: with ``group=``, these train as one process that has the whole batches."""

import re

import pytest

from tests.distributed.processes import torchrun

pytestmark = [pytest.mark.peers, pytest.mark.slow]


@pytest.mark.parametrize("library", ["accelerate", "lightning", "transformers"])
def test_two_processes_train_as_one(library):
    pytest.importorskip(library, reason="the extra 'peers' is not installed")
    lines = re.findall(
        r"^distance (\S+), moved (\S+)$", torchrun("tests.peers.on_two_processes", library), re.MULTILINE
    )
    assert len(lines) == 2
    for distance, moved in lines:
        assert float(distance) < 1e-12 and float(moved) > 1e-2
