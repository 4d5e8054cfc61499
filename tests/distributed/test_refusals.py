"""What processes do differently is an error on each of them that says so; none waits for another for ever."""

import pytest

from tests.distributed.processes import run
from tests.distributed.refusals import FAULTS, WAITING, every_refusal

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """The errors of two processes, by fault."""
    return run(every_refusal, 2, tmp_path_factory.mktemp("refusals"))


@pytest.mark.parametrize("name", FAULTS)
def test_a_difference_is_an_error_on_all(refused, name):
    for errors in refused:
        for word in FAULTS[name].words:
            assert word in errors[name], errors[name] or "no error"


@pytest.mark.parametrize("name", WAITING)
def test_who_waits_for_a_process_that_failed_is_told_where_to_look(refused, name):
    for word in ("rank 0 of 2", "timeout of the group", "error on another rank", "TORCH_DISTRIBUTED_DEBUG=DETAIL"):
        assert word in refused[0][name]
    assert "rank 1" in refused[1][name] and "timeout" not in refused[1][name]
