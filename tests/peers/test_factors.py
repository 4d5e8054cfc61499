"""Dense factors and unit-wise blocks against independent libraries: curvlinops' K-FAC and ASDL's Fisher matrices.

Differences in convention, converted here and not tolerated. curvlinops orders a block's parameters as the
weight and then the bias, where a joint bias is a column of the matrix here; its loss is torch's ``MSELoss``, the
mean over examples and ``K`` outputs of the squared error, twice the Gaussian one with variance 1: hence
``2 / K`` for the Hessian and ``2² / K`` for products of gradients; it draws targets with the variance 1/2 that
belongs to it, ``1 / √2`` as far from the outputs as ours. ``BCEWithLogitsLoss`` is a mean over outputs, too. What
*reduce* averages and sums are in both the positions of each example, and outputs are ``[N, C]``.

ASDL puts the mean over positions of a convolution into ``B`` and the sum into ``A``, the other way round, has no
dilation, and leaves the bias out of ``A``. Its unit-wise blocks have the scale before the shift, as here, but it counts
the positions that a LayerNorm is applied to as examples: compared is one without positions.
"""

import warnings

import pytest
import torch
from torch import nn

import lrkfac
from lrkfac.core.curvature.covariances import kronecker_factors as factors_of
from lrkfac.core.layers.matrix import layer_matrix

pytestmark = pytest.mark.peers


class Mean(nn.Module):
    """[N, T, F] to [N, F]."""

    def forward(self, x):
        return x.mean(1)


NETS = {
    "linear": lambda: nn.Sequential(
        nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 7, bias=False), nn.Tanh(), nn.Linear(7, 4)
    ),
    "convolution": lambda: nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(3, 4, (2, 3), dilation=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(24, 4),
    ),
    "sequence": lambda: nn.Sequential(
        nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 7, bias=False), Mean(), nn.Tanh(), nn.Linear(7, 4)
    ),
    "undilated": lambda: nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(3, 4, (2, 3)), nn.ReLU(), nn.Flatten(),
        nn.Linear(64, 4),
    ),
}  # fmt: skip
INPUTS = {"linear": (9, 6), "sequence": (6, 3, 6), "convolution": (5, 2, 9, 12), "undilated": (5, 2, 9, 12)}
LOSSES = {
    "categorical": (lrkfac.categorical(), nn.CrossEntropyLoss(), lambda n: torch.randint(0, 4, (n,)), (1.0, 1.0)),
    "gaussian": (lrkfac.gaussian(), nn.MSELoss(), lambda n: torch.randn(n, 4).double(), (2 / 4, 4 / 4)),
    "bernoulli": (
        lrkfac.bernoulli(), nn.BCEWithLogitsLoss(), lambda n: torch.randint(0, 2, (n, 4)).double(), (1 / 4, 1 / 4)
    ),
}  # fmt: skip
ESTIMATORS = [("exact", "type-2"), ("mc", "mc"), ("empirical", "empirical"), ("forward_only", "forward-only")]
SAMPLES = 2


def make(name, likelihood):
    torch.manual_seed(0)
    net, inputs = NETS[name]().double(), torch.randn(INPUTS[name], dtype=torch.float64)
    return net, inputs, LOSSES[likelihood][2](inputs.shape[0])


def places(net):
    """The place of each entry of each parameter in one vector, and the length of that."""
    numbers, start = {}, 0
    for name, parameter in net.named_parameters():
        numbers[name] = torch.arange(start, start + parameter.numel()).reshape(parameter.shape)
        start += parameter.numel()
    return numbers, start


def our_factors(net, inputs, targets, likelihood, estimator, treatment="expand", noise=None):
    """``{layer name: (A, B)}``."""
    model, params = lrkfac.from_module(net)
    layers = lrkfac.find_layers(model, params, inputs, strict=True)
    samples = {} if noise is None else {"samples": len(noise)}
    evaluation = lrkfac.evaluator(model, likelihood, layers, estimator, **samples)(params, inputs, targets, noise=noise)
    inputs_of, gradients, scale = evaluation.statistics
    found = {
        layer.name: factors_of(layer, inputs_of[layer.name], gradients[layer.name], scale, treatment)
        for layer in layers
    }
    return layers, {name: (both.input.dense(), both.output.dense()) for name, both in found.items()}


@pytest.mark.parametrize("net_name", NETS)
@pytest.mark.parametrize("loss_name", LOSSES)
@pytest.mark.parametrize("estimator, theirs", ESTIMATORS)
@pytest.mark.parametrize("treatment", ["expand", "reduce"])
def test_blocks_equal_those_of_curvlinops(net_name, loss_name, estimator, theirs, treatment, monkeypatch):
    curvlinops = pytest.importorskip("curvlinops", reason="the extra 'peers' is not installed")
    net, inputs, targets = make(net_name, loss_name)
    likelihood, loss, _, (of_hessian, of_gradients) = LOSSES[loss_name]
    noise, samples = None, {}
    if estimator == "mc":
        noise, samples = torch.rand(SAMPLES, len(inputs), 4, dtype=torch.float64), {"mc_samples": SAMPLES}
        outputs = net(inputs).detach()
        drawn = [likelihood.sample(outputs, u) for u in noise]
        if loss_name == "gaussian":
            drawn = [outputs + (y - outputs) / 2**0.5 for y in drawn]
        labels = iter(drawn)
        monkeypatch.setattr(curvlinops.KFACLinearOperator, "draw_label", lambda self, output: next(labels))
    layers, factors = our_factors(net, inputs, targets, likelihood, estimator, treatment, noise)
    numbers, start = places(net)
    expected = torch.zeros(start, start, dtype=torch.float64)
    for layer in layers:
        place = layer_matrix(layer, [numbers[p.path] for p in layers.parameters]).joined().flatten()
        a, b = factors[layer.name]
        scale = {"empirical": of_gradients, "forward_only": 1.0}.get(estimator, of_hessian)
        expected[place[:, None], place[None]] = scale * torch.kron(b, a)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        operator = curvlinops.KFACLinearOperator(
            net, loss, list(net.parameters()), [(inputs, targets)],
            fisher_type=theirs, kfac_approx=treatment, separate_weight_and_bias=False, check_deterministic=False,
            **samples,
        )  # fmt: skip
        found = operator @ torch.eye(start, dtype=torch.float64)
    assert estimator != "mc" or not list(labels), "all samples were taken"
    assert (found - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("loss_name", LOSSES)
@pytest.mark.parametrize("estimator, theirs", [("exact", "type-2"), ("empirical", "empirical")])
@pytest.mark.parametrize(
    "treatment, net_name", [*(("expand", name) for name in NETS), ("reduce", "linear"), ("reduce", "sequence")]
)
def test_corrected_blocks_equal_those_of_curvlinops(net_name, loss_name, estimator, theirs, treatment):
    """Among equal eigenvalues a basis is arbitrary: the mean patches of a convolution often have the eigenvalue 0
    several times where the patches have not.
    """
    curvlinops = pytest.importorskip("curvlinops", reason="the extra 'peers' is not installed")
    net, inputs, targets = make(net_name, loss_name)
    likelihood, loss, _, (of_hessian, of_gradients) = LOSSES[loss_name]
    model, params = lrkfac.from_module(net)
    layers = lrkfac.find_layers(model, params, inputs, strict=True)
    evaluation = lrkfac.evaluator(model, likelihood, layers, estimator)(params, inputs, targets)
    structure = lrkfac.structures.kronecker(
        lrkfac.structures.dense(), lrkfac.structures.dense(), treatment, corrected=True
    )
    tx = lrkfac.precondition_by_fisher(layers, structure)
    _, state = tx.update(evaluation.grads, tx.init(params), params, evaluation=evaluation)
    numbers, start = places(net)
    scale = of_gradients if estimator == "empirical" else of_hessian
    expected = torch.zeros(start, start, dtype=torch.float64)
    for layer in layers:
        place = layer_matrix(layer, [numbers[p.path] for p in layers.parameters]).joined().flatten()
        expected[place[:, None], place[None]] = scale * state.factors[layer.name].average.to_dense()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        operator = curvlinops.EKFACLinearOperator(
            net, loss, list(net.parameters()), [(inputs, targets)], fisher_type=theirs, kfac_approx=treatment,
            separate_weight_and_bias=False, check_deterministic=False,
        )  # fmt: skip
        found = operator @ torch.eye(start, dtype=torch.float64)
    assert (found - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("net_name", ["linear", "undilated"])
@pytest.mark.parametrize("estimator, theirs", [("exact", "fisher_exact"), ("empirical", "fisher_emp")])
def test_factors_equal_those_of_asdl(net_name, estimator, theirs):
    asdl = pytest.importorskip("asdl", reason="the extra 'peers' is not installed")
    net, inputs, targets = make(net_name, "categorical")
    layers, factors = our_factors(net, inputs, targets, lrkfac.categorical(), estimator)
    config = asdl.FisherConfig(theirs, [asdl.SHAPE_KRON], loss_type=asdl.LOSS_CROSS_ENTROPY, data_size=inputs.shape[0])
    maker = asdl.get_fisher_maker(net, config)
    outputs = maker.setup_model_call(net, inputs)
    maker.setup_loss_call(nn.functional.cross_entropy, outputs, targets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        maker.forward_and_backward()
    for layer in layers:
        kron = net[int(layer.name)].fisher.kron
        a, b = factors[layer.name]
        a = a[:-1, :-1] if layer.bias is not None else a
        product = torch.kron(kron.B, kron.A)
        assert (product - torch.kron(b, a)).norm() <= 1e-6 * product.norm()


NORMALISED = {
    "BatchNorm1d": (lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 4)), (9, 6)),
    "BatchNorm2d": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4)),
        (5, 2, 4, 4),
    ),
    "LayerNorm": (lambda: nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 4)), (9, 6)),
}


@pytest.mark.parametrize("name", NORMALISED)
@pytest.mark.parametrize("estimator, theirs", [("exact", "fisher_exact"), ("empirical", "fisher_emp")])
def test_unit_wise_blocks_equal_those_of_asdl(name, estimator, theirs):
    """In evaluation mode: in training mode a BatchNorm mixes examples."""
    asdl = pytest.importorskip("asdl", reason="the extra 'peers' is not installed")
    torch.manual_seed(0)
    make_net, shape = NORMALISED[name]
    net, inputs, targets = make_net().double().eval(), torch.randn(shape).double(), torch.randint(4, shape[:1])
    with torch.no_grad():
        for x in (net[1].weight, net[1].bias, *net[1].buffers()):
            if x.is_floating_point():
                x.copy_(torch.rand_like(x) + 0.5)
    model, params = lrkfac.from_module(net)
    layers = lrkfac.find_layers(model, params, inputs, strict=True)
    evaluation = lrkfac.evaluator(model, lrkfac.categorical(), layers, estimator)(params, inputs, targets)
    tx = lrkfac.precondition_by_fisher(layers, lrkfac.structures.unit_wise())
    _, state = tx.update(evaluation.grads, tx.init(params), params, evaluation=evaluation)
    config = asdl.FisherConfig(
        theirs, [asdl.SHAPE_UNIT_WISE], loss_type=asdl.LOSS_CROSS_ENTROPY, data_size=len(inputs),
        ignore_modules=[nn.Linear, nn.Conv2d],
    )  # fmt: skip
    maker = asdl.get_fisher_maker(net, config)
    maker.setup_loss_call(nn.functional.cross_entropy, maker.setup_model_call(net, inputs), targets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        maker.forward_and_backward()
    expected = net[1].fisher.unit.data
    found = state.factors["1"].block.matrix
    assert found.shape == expected.shape and (found - expected).norm() <= 1e-6 * expected.norm()
