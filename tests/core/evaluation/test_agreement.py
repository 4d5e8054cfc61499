"""Checks of agreement, as far as one process shows them; see tests/distributed for several."""

import pytest
import torch

from lrkfac.core.base.processes import Processes
from lrkfac.core.evaluation.agreement import check_device


def test_a_group_without_a_backend_for_the_parameters_is_refused():
    two = Processes("two", 1, 2)
    check_device(two, torch.device("cuda"), {"cpu": "gloo", "cuda": "nccl"})
    with pytest.raises(ValueError, match=r"a backend for tensors on 'cuda', as the parameters of rank 1 are.*gloo"):
        check_device(two, torch.device("cuda"), {"cpu": "gloo"})
