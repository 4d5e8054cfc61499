"""What models of the ecosystem bring along besides layers: each works with the right values, or is refused by name."""

import logging

import pytest
import torch

from lrkfac import find_layers
from lrkfac.core.base.private_torch import fake_mode

LOGGER = "torch._subclasses.fake_tensor"


def graph(p, i):
    return (i["adjacency"] @ i["x"] @ p["w"]).tanh() @ p["o"]


GRAPH = {"w": torch.ones(3, 4), "o": torch.ones(4, 2)}
NODES = {"x": torch.ones(5, 3), "adjacency": torch.eye(5)}


def test_runs_without_values_do_not_log_the_exceptions_that_they_handle(caplog):
    """With every input twice as long, the product with the adjacency matrix fails."""
    with caplog.at_level(logging.DEBUG, LOGGER):
        layers = find_layers(graph, GRAPH, NODES)
        assert not layers.uncovered and not caplog.records
        with pytest.raises(RuntimeError, match="same reduction dim"), fake_mode():
            torch.ones(2, 3) @ torch.ones(2, 3)
        assert not caplog.records
        logging.getLogger(LOGGER).error("of other users of torch")
    assert [record.getMessage() for record in caplog.records] == ["of other users of torch"]
