"""What processes do differently is an error on each of them that says so; none waits for another for ever."""

import pytest

from tests.distributed.processes import run
from tests.distributed.refusals import FAULTS, WAITING, every_refusal

pytestmark = pytest.mark.slow


WHERE_TO_LOOK = "rank 0 of 2", "timeout of the group", "error on another rank", "TORCH_DISTRIBUTED_DEBUG=DETAIL"
"""Words for who waits for a process that failed."""


def test_a_difference_is_an_error_on_all(tmp_path):
    """One test of all, since the processes start once."""
    first, second = run(every_refusal, 2, tmp_path)
    for name, fault in FAULTS.items():
        for errors in (first, second):
            missing = [word for word in fault.words if word not in errors[name]]
            assert not missing, f"{name}: {missing} not in {errors[name] or 'no error'}"
    for name in WAITING:
        assert [word for word in WHERE_TO_LOOK if word not in first[name]] == [], first[name]
        assert "rank 1" in second[name] and "timeout" not in second[name], second[name]
