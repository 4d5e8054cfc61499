"""Tree operations; their arithmetic on leaves: ``test_lazy.py``."""

from collections import namedtuple

import pytest
import torch

from lrkfac.core.base.dtypes import wide
from lrkfac.core.base.lazy import LazyMatrix
from lrkfac.core.base.tree_checks import check_like, paths
from lrkfac.core.base.trees import add_scaled, counter, scaled, vdot

Pair = namedtuple("Pair", ["left", "right"])
TREE = {"b": [torch.ones(2), Pair(torch.ones(3), (torch.ones(1),))], "a": torch.ones(2, 2)}


def test_paths_name_every_leaf_in_the_order_of_optree():
    assert paths(TREE) == ("a", "b.0", "b.1.left", "b.1.right.0")
    assert paths({"0.weight": torch.ones(1)}) == ("0.weight",)
    assert [x.numel() for x in check_like(TREE, TREE, "thing")] == [4, 2, 3, 1]


def test_sums_of_all_leaves():
    """Half precision keeps its dtype, but sums in float32."""
    assert vdot(TREE, scaled(2.0, TREE)) == 2 * 10
    assert counter(TREE) == 0 and counter(TREE).dtype == torch.int64 and counter({}) == 0
    half = {"w": torch.full((5000,), 0.5, dtype=torch.bfloat16)}
    assert vdot(half, half) == 1250 and vdot(half, half).dtype == torch.float32
    assert add_scaled(half, torch.tensor(2.0), half)["w"].dtype == torch.bfloat16
    assert wide(half["w"]).dtype == torch.float32 and wide(torch.ones(1).double()).dtype == torch.float64


OTHERS = [
    ({"a": torch.ones(2, 2)}, r"thing: .*missing \['b.0', 'b.1.left', 'b.1.right.0'\], unexpected \[\]"),
    ({**TREE, "c": torch.ones(1)}, r"unexpected \['c'\]"),
    ({**TREE, "a": torch.ones(3)}, r"expected 'a' of shape \(2, 2\), got \(3,\)"),
    ({**TREE, "a": LazyMatrix.of(torch.ones(2, 3))}, r"expected 'a' of shape \(2, 2\), got \(2, 3\)"),
    ({**TREE, "a": 1.0}, "expected 'a' of shape .*, got float"),
    ({**TREE, "b": tuple(TREE["b"])}, "the tree differs"),
]


@pytest.mark.parametrize("other, words", OTHERS)
def test_check_like_names_what_differs(other, words):
    with pytest.raises(ValueError, match=words):
        check_like(TREE, other, "thing")
