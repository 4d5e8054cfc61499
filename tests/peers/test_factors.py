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


def evaluated(net, inputs, targets, likelihood, estimator, noise=None):
    model, params = lrkfac.from_module(net)
    layers = lrkfac.find_layers(model, params, inputs, strict=True)
    samples = {} if noise is None else {"samples": len(noise)}
    evaluate = lrkfac.evaluator(model, likelihood, layers, estimator, **samples)
    return layers, evaluate(params, inputs, targets, noise=noise), params


def our_factors(layers, evaluation, treatment="expand"):
    """``{layer name: (A, B)}``."""
    inputs_of, gradients, scale, _ = evaluation.statistics
    factors = {x.name: factors_of(x, inputs_of[x.name], gradients[x.name], scale, treatment) for x in layers}
    return {name: (both.input.dense(), both.output.dense()) for name, both in factors.items()}


def our_state(layers, evaluation, params, structure):
    tx = lrkfac.precondition_by_fisher(layers, structure)
    return tx.update(evaluation.grads, tx.init(params), params, evaluation=evaluation)[1].factors


def check_blocks(operator_of, net, data, layers, blocks, loss, **options):
    """Places the blocks of the layers' joint matrices among all parameters, and compares."""
    curvlinops = pytest.importorskip("curvlinops", reason="the extra 'peers' is not installed")
    sizes = [p.numel() for p in net.parameters()]
    numbers = torch.arange(sum(sizes)).split(sizes)
    numbers = {name: x.reshape(p.shape) for x, (name, p) in zip(numbers, net.named_parameters(), strict=True)}
    expected = torch.zeros(sum(sizes), sum(sizes), dtype=torch.float64)
    for layer in layers:
        place = layer_matrix(layer, [numbers[p.path] for p in layers.parameters]).joined().flatten()
        expected[place[:, None], place[None]] = blocks[layer.name]
    options |= {"separate_weight_and_bias": False, "check_deterministic": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        operator = getattr(curvlinops, operator_of)(net, loss, list(net.parameters()), [data], **options)
        actual = operator @ torch.eye(sum(sizes), dtype=torch.float64)
    assert (actual - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("net_name", NETS)
@pytest.mark.parametrize("loss_name", LOSSES)
@pytest.mark.parametrize("estimator, theirs", ESTIMATORS)
@pytest.mark.parametrize("treatment", ["expand", "reduce"])
def test_blocks_equal_those_of_curvlinops(net_name, loss_name, estimator, theirs, treatment, monkeypatch):
    curvlinops = pytest.importorskip("curvlinops", reason="the extra 'peers' is not installed")
    net, inputs, targets = make(net_name, loss_name)
    likelihood, loss, _, (of_hessian, of_gradients) = LOSSES[loss_name]
    noise, options, labels = None, {"fisher_type": theirs, "kfac_approx": treatment}, iter(())
    if estimator == "mc":
        noise, outputs = torch.rand(SAMPLES, len(inputs), 4, dtype=torch.float64), net(inputs).detach()
        drawn = [likelihood.sample(outputs, u) for u in noise]
        labels = iter([outputs + (y - outputs) / 2**0.5 for y in drawn] if loss_name == "gaussian" else drawn)
        monkeypatch.setattr(curvlinops.KFACLinearOperator, "draw_label", lambda self, output: next(labels))
        options["mc_samples"] = SAMPLES
    layers, evaluation, _ = evaluated(net, inputs, targets, likelihood, estimator, noise)
    scale = {"empirical": of_gradients, "forward_only": 1.0}.get(estimator, of_hessian)
    blocks = {name: scale * torch.kron(b, a) for name, (a, b) in our_factors(layers, evaluation, treatment).items()}
    check_blocks("KFACLinearOperator", net, (inputs, targets), layers, blocks, loss, **options)
    assert not list(labels), "all samples were taken"


@pytest.mark.parametrize("loss_name", LOSSES)
@pytest.mark.parametrize("estimator, theirs", [("exact", "type-2"), ("empirical", "empirical")])
@pytest.mark.parametrize(
    "treatment, net_name", [*(("expand", name) for name in NETS), ("reduce", "linear"), ("reduce", "sequence")]
)
def test_corrected_blocks_equal_those_of_curvlinops(net_name, loss_name, estimator, theirs, treatment):
    """Among equal eigenvalues a basis is arbitrary: the mean patches of a convolution often have the eigenvalue 0
    several times where the patches have not.
    """
    net, inputs, targets = make(net_name, loss_name)
    likelihood, loss, _, (of_hessian, of_gradients) = LOSSES[loss_name]
    layers, evaluation, params = evaluated(net, inputs, targets, likelihood, estimator)
    dense, scale = lrkfac.structures.dense(), of_gradients if estimator == "empirical" else of_hessian
    structure = lrkfac.structures.kronecker(dense, dense, treatment, corrected=True)
    factors = our_state(layers, evaluation, params, structure)
    blocks = {name: scale * state.average.to_dense() for name, state in factors.items()}
    options = {"fisher_type": theirs, "kfac_approx": treatment}
    check_blocks("EKFACLinearOperator", net, (inputs, targets), layers, blocks, loss, **options)


def with_asdl(net, inputs, targets, kind, shape, **options):
    """Gives the modules of the net their Fisher matrices."""
    asdl = pytest.importorskip("asdl", reason="the extra 'peers' is not installed")
    options |= {"loss_type": asdl.LOSS_CROSS_ENTROPY, "data_size": len(inputs)}
    maker = asdl.get_fisher_maker(net, asdl.FisherConfig(kind, [getattr(asdl, shape)], **options))
    maker.setup_loss_call(nn.functional.cross_entropy, maker.setup_model_call(net, inputs), targets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        maker.forward_and_backward()


each_kind = pytest.mark.parametrize("estimator, theirs", [("exact", "fisher_exact"), ("empirical", "fisher_emp")])


@pytest.mark.parametrize("net_name", ["linear", "undilated"])
@each_kind
def test_factors_equal_those_of_asdl(net_name, estimator, theirs):
    net, inputs, targets = make(net_name, "categorical")
    layers, evaluation, _ = evaluated(net, inputs, targets, lrkfac.categorical(), estimator)
    with_asdl(net, inputs, targets, theirs, "SHAPE_KRON")
    for name, (a, b) in our_factors(layers, evaluation).items():
        kron = net[int(name)].fisher.kron
        product = torch.kron(kron.B, kron.A)
        a = a[:-1, :-1] if layers[name].bias is not None else a
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
@each_kind
def test_unit_wise_blocks_equal_those_of_asdl(name, estimator, theirs):
    """In evaluation mode: in training mode a BatchNorm mixes examples."""
    torch.manual_seed(0)
    make_net, shape = NORMALISED[name]
    net, inputs, targets = make_net().double().eval(), torch.randn(shape).double(), torch.randint(4, shape[:1])
    with torch.no_grad():
        for x in (net[1].weight, net[1].bias, *net[1].buffers()):
            if x.is_floating_point():
                x.copy_(torch.rand_like(x) + 0.5)
    layers, evaluation, params = evaluated(net, inputs, targets, lrkfac.categorical(), estimator)
    actual = our_state(layers, evaluation, params, lrkfac.structures.unit_wise())["1"].block.matrix
    with_asdl(net, inputs, targets, theirs, "SHAPE_UNIT_WISE", ignore_modules=[nn.Linear, nn.Conv2d])
    expected = net[1].fisher.unit.data
    assert actual.shape == expected.shape and (actual - expected).norm() <= 1e-6 * expected.norm()
