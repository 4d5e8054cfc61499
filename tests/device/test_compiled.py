"""Compiled steps and CUDA graphs on the device equal the eager steps there; a plain step never waits for the device."""

from contextlib import contextmanager
from functools import partial

import optree
import pytest
import torch

from tests.compiling import traced
from tests.device.moving import TOLERANCE, close, moved, moved_case
from tests.device.test_steps import CHAINS, GROUPS, MLP, WIDE
from tests.test_training_step import noises, stepper


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what the compilers of devices have to say, such as of precision
@pytest.mark.parametrize(("case", "chain"), [(MLP, "kept low rank"), (GROUPS, "dense")], ids=["low rank", "dense"])
def test_a_compiled_step_equals_the_eager_one(device, case, chain):
    """On the CPU traced alone: what compiles for it is tested in ``tests/test_compiled_step.py``."""
    dtype = torch.float32
    torch.compiler.reset()
    there, noise = moved_case(case, device, dtype), moved(noises(case, 3), device, dtype)
    step, init = stepper(there, CHAINS[chain])
    compile = traced if device.type == "cpu" else partial(torch.compile, fullgraph=True)
    compiled, (params, state) = compile(step), (there.params, init(there.params))
    for i, statistics in enumerate((True, False, True)):
        batch = (params, state, there.inputs, there.targets, noise[i], statistics)
        expected, found = step(*batch), compiled(*batch)
        close(found[0::2], expected[0::2], TOLERANCE[dtype])
        params, state, _ = expected


def begun(case, chain, device):
    """``plain(params, state, noise)``, the arguments after two steps, and the step, which refreshes first."""
    case, noise = moved_case(case, device, torch.float32), moved(noises(case, 1), device, torch.float32)
    step, init = stepper(case, CHAINS[chain], thin=case.inputs.shape[-1] == 16)

    def plain(params, state):
        return step(params, state, case.inputs, case.targets, noise[0], False)

    params, state, _ = step(case.params, init(case.params), case.inputs, case.targets, noise[0], True)
    return plain, plain(params, state)[:2]


@contextmanager
def waiting_is_an_error():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


prototype = pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
each = pytest.mark.parametrize(
    ("case", "chain"),
    [
        (MLP, "kept low rank"),
        (WIDE, "kept low rank"),
        (GROUPS, "dense"),
        (MLP, "adaptive"),
        (MLP, "corrected"),
        (MLP, "spectral"),
    ],
    ids=["low rank", "gradients by rows", "dense, groups", "adaptive", "corrected", "spectral"],
)


@pytest.fixture
def cuda(device):
    if device.type != "cuda":
        pytest.skip(f"{device}: waits and graphs are those of CUDA")
    return device


@prototype
@each
def test_a_plain_step_does_not_wait_for_the_device(cuda, case, chain):
    plain, arguments = begun(case, chain, cuda)
    with waiting_is_an_error():
        plain(*arguments)


@prototype
def test_waits_are_seen(cuda):
    x = torch.ones(3, device=cuda)
    with waiting_is_an_error(), pytest.raises(RuntimeError, match="synchronizing"):
        x.sum().item()


@each
def test_a_plain_step_in_a_graph_equals_the_eager_one(cuda, case, chain):
    """Captured at some parameters and replayed at others."""
    plain, arguments = begun(case, chain, cuda)
    inputs = optree.tree_map(torch.clone, arguments)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries allocate their workspaces before the capture
        for _ in range(3):
            plain(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = plain(*inputs)
    for i in range(3):
        moved_on = optree.tree_map(lambda x, i=i: x * (1 + 0.01 * i) if x.is_floating_point() else x, arguments[0])
        optree.tree_map(torch.Tensor.copy_, inputs, (moved_on, arguments[1]))
        graph.replay()
        close(outputs, plain(moved_on, arguments[1]), 1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_plain_step_compiled_to_a_graph_equals_the_eager_one(cuda):
    plain, arguments = begun(MLP, "kept low rank", cuda)
    compiled = torch.compile(plain, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):  # it warms up, captures, and replays
        torch.compiler.cudagraph_mark_step_begin()
        found = optree.tree_map(torch.clone, compiled(*arguments))
        close(found, plain(*arguments), TOLERANCE[torch.float32])
        arguments = found[:2]
