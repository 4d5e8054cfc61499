"""N processes, each with a part of the batch, train as one does with all of it: to rounding, and bit-equal ranks."""

import pytest
import torch

from tests.distributed.cases import CASES

pytestmark = pytest.mark.slow
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4}
ROUNDS = {
    "dense": 1, "unit-wise": 1, "layer-wise": 1, "full": 1, "diagonal": 1, "low rank": 2, "reduce": 2, "adaptive": 2,
    "spectral": 2, "spectral, no rate": 4, "exactly damped": 2,
    "corrected, dense": 2, "corrected": 3, "two iterations": 4,
}  # fmt: skip
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
            # Here, one process in float32 is as far off from itself in float64.
            rounded = (case.network, case.chain, case.dtype) == ("conv", "adaptive", torch.float32)
            assert found <= (1e-3 if rounded else TOLERANCES[case.dtype]), what


@each_case
def test_calls_are_few_whatever_the_depth(trained, world, case):
    """In an evaluation one, and with statistics one in each round of the structures."""
    results, _ = of_ranks(trained, world, case)
    calls = results[0]["calls"]
    assert all(result["calls"] == calls for result in results)
    in_evaluation = 1 + case.thin + (case.network == "heads")
    adaptive = case.chain == "adaptive"  # one for the model of the batch, and at a refresh one for the loss after it
    assert len(calls["step"]) == in_evaluation + adaptive
    if case.chain in ROUNDS:
        assert len(calls["refresh"]) == in_evaluation + 2 * adaptive + ROUNDS[case.chain]
    if case.chain in ("low rank", "dense") and in_evaluation == 1:
        assert len(calls["refresh"]) <= 3
    if in_evaluation == 1:
        entries = results[0]["params"].numel()
        assert calls["step"][0][1] <= case.dtype.itemsize * (entries + 4 + world)
