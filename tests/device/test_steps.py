"""Whole chains on the device: the steps of the CPU in float64, under vmap, from checkpoints, by the optimizer."""

from functools import partial

import optree
import pytest
import torch
from torch import nn
from torch.func import vmap

import lrkfac
from lrkfac import __main__ as command
from lrkfac.structures import full, kronecker, low_rank, low_rank_plus_diagonal, unit_wise
from lrkfac.testing import check_transformation
from tests import cases
from tests.described import layers_of
from tests.device.conftest import name_of_device
from tests.device.moving import TOLERANCE, close, moved, moved_case, on_device
from tests.test_training_step import OPTIONS, RATE, chained, never_dense, noises, stepper

MLP, SHIFT, SEQUENCE = cases.LINEAR[0], cases.LINEAR[6], cases.SEQUENCE[0]
STRIDE, GROUPS = cases.CONVOLUTION[0], cases.CONVOLUTION[3]
WIDE = cases.make_case("wide", (cases.linear(16, 16), cases.tanh, cases.linear(16, 3)), (4, 16))
CORRECTED = kronecker(low_rank(2), low_rank_plus_diagonal(2), corrected=True)
EXACT = kronecker(low_rank(2), low_rank_plus_diagonal(2), exact_damping=True)
CHAINS = {
    "low rank": partial(lrkfac.low_rank_kfac, learning_rate=RATE, rank=100, **OPTIONS),
    "kept low rank": never_dense(2),
    "by power iteration": never_dense(2, method="power"),
    "dense": partial(lrkfac.kfac, learning_rate=RATE, **OPTIONS),
    "adaptive": partial(lrkfac.adaptive_low_rank_kfac, rank=2, dense_up_to=0),
    "spectral": partial(lrkfac.spectral_kfac, learning_rate=1e-4, rank=2),
    "corrected": lambda layers: chained(layers, CORRECTED),
    "exactly damped": lambda layers: chained(layers, EXACT),
    "unit-wise": lambda layers: chained(layers, unit_wise()),
    "full": lambda layers: chained(layers, full()),
    "no layers": lambda layers: lrkfac.chain(lrkfac.scale_by_adam(), lrkfac.ema_params(), lrkfac.scale(-0.01)),
    "injected": lambda layers: lrkfac.inject_hyperparams(lrkfac.low_rank_kfac)(
        layers, learning_rate=RATE, rank=2, damping=0.03
    ),
}
each_chain = pytest.mark.parametrize("chain", CHAINS)


def trained(case, make, device, dtype, steps=4, every=2, thin=False):
    """Parameters and losses of some steps, and the last state."""
    case, noise = moved_case(case, device, dtype), moved(noises(case, steps), device, dtype)
    step, init = stepper(case, make, thin=thin)
    params, state, path = case.params, init(case.params), []
    for i in range(steps):
        params, state, loss = step(params, state, case.inputs, case.targets, noise[i], i % every == 0)
        path.append((params, loss))
    return path, state


# On the CPU, where these steps are known in float64, those in float32 of some.
CASES = [SHIFT, GROUPS, WIDE] if name_of_device() == "cpu" else [MLP, SHIFT, SEQUENCE, STRIDE, GROUPS, WIDE]


@each_chain
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_steps_are_those_of_the_cpu(device, dtype, case, chain):
    found, state = trained(case, CHAINS[chain], device, dtype, thin=case is WIDE)
    expected, _ = trained(case, CHAINS[chain], "cpu", torch.float64)
    assert on_device((found, state), device)
    close(found, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("chain", ["kept low rank", "dense", "adaptive", "corrected"])
def test_laws_of_transformations(device, dtype, chain):
    case = moved_case(MLP, device, dtype)
    layers = layers_of(case)
    evaluate = lrkfac.evaluator(case.model, lrkfac.categorical(), layers, "exact")

    def evaluated(params):
        e = evaluate(params, case.inputs, case.targets)
        return e.grads, {"evaluation": e}

    check_transformation(CHAINS[chain](layers), case.params, evaluated)


@pytest.mark.parametrize("chain", ["kept low rank", "dense"])
@pytest.mark.parametrize("case", [MLP, GROUPS, WIDE], ids=lambda case: case.name)
def test_an_ensemble_under_vmap_is_one_by_one(device, dtype, case, chain):
    there, noise = moved_case(case, device, dtype), moved(noises(case, 2), device, dtype)
    step, init = stepper(there, CHAINS[chain], thin=case is WIDE)
    members = [{name: p * (1 + 0.1 * i) for name, p in there.params.items()} for i in range(2)]
    params = optree.tree_map(lambda *p: torch.stack(p), *members)
    mapped = vmap(lambda p, s, u: step(p, s, there.inputs, there.targets, u))(params, vmap(init)(params), noise)
    assert on_device(mapped, device)
    for i, member in enumerate(members):
        alone = step(member, init(member), there.inputs, there.targets, noise[i])[0]
        close({name: p[i] for name, p in mapped[0].items()}, alone, TOLERANCE[dtype])


@pytest.mark.parametrize("chain", ["kept low rank", "adaptive", "injected"])
def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(device, chain, tmp_path):
    """Written on the device or on the CPU, it loads to where parameters and state are wanted."""
    pytest.importorskip("safetensors", reason="the extra `checkpoint`")
    case = moved_case(MLP, device, torch.float32)
    step, init = stepper(case, CHAINS[chain])
    noise = moved(noises(case, 3), device, torch.float32)
    batch = lambda i: (case.inputs, case.targets, noise[i], i != 1)  # noqa: E731
    begun = step(*step(case.params, init(case.params), *batch(0))[:2], *batch(1))[:2]
    expected = step(*begun, *batch(2))
    for i, (params, state) in enumerate((begun, moved(begun, "cpu"))):
        lrkfac.checkpoint.save(tmp_path / f"{i}.safetensors", params, state)
        loaded = lrkfac.checkpoint.load(tmp_path / f"{i}.safetensors", case.params, init(case.params))
        assert on_device(loaded, device)
        found = step(*loaded, *batch(2))
        assert all(map(torch.equal, optree.tree_leaves(found), optree.tree_leaves(expected)))


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(16, 8), nn.Tanh(),
        nn.Linear(8, 3),
    )  # fmt: skip


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_the_optimizer_trains_a_module_there(device, autocast):
    net = network().to(device)
    x, y = moved((normal_images(), torch.tensor([0, 1, 2, 0, 1])), device)
    optimizer = lrkfac.LowRankKFAC(net, lrkfac.categorical(), x, lr=0.1, rank=2, damping=0.1)
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        losses = [float(optimizer.step(x, y)) for _ in range(6)]
    assert on_device((dict(net.state_dict()), optimizer.chain_state), device)
    assert losses[-1] < 0.9 * losses[0]


def normal_images():
    return torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def test_diagnostics(device):
    case = moved_case(MLP, device, torch.float32)
    layers = layers_of(case)
    evaluation = lrkfac.evaluator(case.model, lrkfac.categorical(), layers)(case.params, case.inputs, case.targets)
    tx = lrkfac.low_rank_kfac(layers, 0.1, rank=2)
    updates, state = tx.update(evaluation.grads, tx.init(case.params), case.params, evaluation=evaluation)
    assert on_device(lrkfac.diagnose(state, layers, updates=updates).metrics(), device)
    ranks = lrkfac.ranks_by_trace(state[0], layers)
    assert set(ranks) == {layer.name for layer in layers} and min(ranks.values()) >= 1
    assert on_device(lrkfac.factor_drift(state[0].factors, state[0].factors), device)


def test_the_command_finds_its_inverses_right_there(device, monkeypatch, capsys):
    monkeypatch.setattr(command, "devices", lambda: [device])
    assert command.main() == 0 and str(device) in capsys.readouterr().out
