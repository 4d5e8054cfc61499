"""Each row of the table of what is covered and what is refused."""

import re
import warnings
from pathlib import Path

import pytest

import lrkfac
from lrkfac.structures import layer_wise
from tests import coverage_table

ROWS = {row.what: row for rows in coverage_table.GROUPS.values() for row in rows}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_row(row):
    if row.outcome == "refused":
        with pytest.raises((ValueError, TypeError), match=row.words):
            lrkfac.find_layers(*row.make())
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # where no layer is covered
        layers = lrkfac.find_layers(*row.make(), uncovered="jacobian" if row.jacobian else "plain")
    assert row.note in str(layers) and (bool(row.note) or "outputs of one example" not in str(layers))
    if row.outcome == "not covered":
        assert any(re.search(row.words, reason) for _, reason in layers.uncovered), str(layers)
        return
    assert not layers.uncovered and all(layer.by_example for layer in layers) == (row.outcome == "covered"), str(layers)
    if row.outcome == "without examples" or (row.note and not layers.independent):
        with pytest.raises(ValueError, match="structure: "):
            lrkfac.precondition_by_fisher(layers, layer_wise(), damping=0.1)


def test_the_page_is_the_table():
    assert (Path(__file__).parents[1] / "docs" / "coverage.md").read_text() == coverage_table.page()
