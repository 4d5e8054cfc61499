"""The independent libraries take the steps that the benchmarks time."""

import pytest
import torch

from benchmarks.libraries import steps_of_libraries
from benchmarks.networks import perceptron

pytestmark = pytest.mark.peers


def test_both_libraries_take_steps():
    pytest.importorskip("asdl", reason="the extra 'peers' is not installed")
    found, missing = steps_of_libraries(perceptron(8, 4, torch.device("cpu")))
    assert set(found) == {"ASDL", "curvlinops"} and not missing
