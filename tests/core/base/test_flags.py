"""Static flags on a device."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from lrkfac.core.base.flags import flags_like


@given(st.lists(st.booleans(), min_size=1, max_size=200))
def test_flags_are_those_of_the_list(flags):
    assert flags_like(flags, torch.zeros(())).tolist() == [int(flag) for flag in flags]
