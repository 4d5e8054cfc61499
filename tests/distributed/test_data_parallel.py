"""N processes, each with a part of the batch, train as one does with all of it: to rounding, and bit-equal ranks."""

import pytest
import torch

from tests.distributed.cases import CASES, Case

# One start of processes serves all tests of this file.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("data parallel")]
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4}
EACH = [pytest.param(world, case, id=f"{world}: {case}") for world, cases in CASES.items() for case in cases]
each_case = pytest.mark.parametrize(("world", "case"), EACH)


def of_ranks(trained, world, case):
    """The results of all ranks, without errors, and those of one process alone."""
    results = [result[str(case)] for result in trained(world)]
    errors = [f"rank {rank}: {result['error']}" for rank, result in enumerate(results) if "error" in result]
    assert not errors, "\n".join(errors)
    (alone,) = [result["alone"] for result in results if "alone" in result]
    assert "error" not in alone, alone["error"]
    return results, alone


def difference(found, expected):
    """Relative to the largest number."""
    assert found.isfinite().all() and expected.isfinite().all()
    return ((found - expected).abs().max() / expected.abs().max()).item()


@each_case
def test_processes_train_as_one_does(trained, world, case):
    results, alone = of_ranks(trained, world, case)
    for result in results[1:]:
        assert torch.equal(result["params"], results[0]["params"]) and torch.equal(
            result["losses"], results[0]["losses"]
        )
    for what in ("params", "losses"):
        found = difference(results[0][what], alone[what])
        if case.network == "conv, train":  # mean and variance are those of the examples of each process
            assert found > 1e-3
        else:
            assert found <= TOLERANCES[case.dtype], what


@each_case
def test_a_refresh_step_takes_few_calls(trained, world, case):
    """One for the evaluation and two for factors."""
    results, _ = of_ranks(trained, world, case)
    assert len({str(result["calls"]) for result in results}) == 1
    calls = results[0]["calls"]
    steps = {name: len(of_step) for name, of_step in calls.items()}
    assert steps == expected_calls(case), calls


def expected_calls(case: Case) -> dict[str, int]:
    raise NotImplementedError
