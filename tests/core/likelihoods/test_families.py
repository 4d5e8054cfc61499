"""The families: loss, samples and Hessian belong to one distribution."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, vjp, vmap

from lrkfac import Likelihood, bernoulli, categorical, gaussian, poisson
from lrkfac.testing import gradients, seeds
from tests import reference

# Poisson counts from log-rates, one term an entry: a likelihood of one's own, without a product.
own = Likelihood(
    "own",
    lambda outputs, targets: outputs.exp() - targets * outputs,
    lambda outputs, noise: (noise < outputs.exp()).to(outputs.dtype),
    lambda outputs, coefficients: (outputs / 2).exp() * coefficients,
    event_axes=(),
)
LIKELIHOODS = {
    "categorical": categorical(),
    "gaussian": gaussian(0.25),
    "bernoulli": bernoulli(),
    "poisson": poisson(),
    "own": own,
    "gaussian of a tensor": gaussian(torch.tensor(0.25)),
    "categorical without product": replace(categorical(), product=None),
    "bernoulli without product": replace(bernoulli(), product=None),
}
OPTIONS = {"gaussian": {"variance": 0.25}}
GIVEN = ("categorical", "gaussian", "bernoulli")


@st.composite
def batches(draw, names=tuple(LIKELIHOODS), dtype=torch.float64):
    """A likelihood by name, outputs ``[N, ...]`` on several scales, and targets that fit."""
    name, shape = draw(st.sampled_from(names)), draw(st.sampled_from([(4, 1), (3, 5), (2, 3, 4), (6,)]))
    if name.startswith("categorical") and len(shape) == 1:
        shape = (*shape, 3)
    generator = torch.Generator().manual_seed(draw(seeds))
    outputs = draw(st.sampled_from([0.1, 1.0, 5.0])) * torch.randn(shape, generator=generator).to(dtype)
    if name.startswith("categorical"):
        integer = draw(st.sampled_from([torch.int64, torch.int32, torch.uint8]))
        targets = torch.randint(shape[-1], shape[:-1], generator=generator).to(integer)
    else:
        targets = torch.rand(shape, generator=generator).to(dtype)
    return name, outputs, targets


def close(found, expected, tolerance=1e-10):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def dense_hessian(name, outputs):
    """Of the sum of the terms, [*, *] with all entries of the outputs in one axis."""
    return torch.block_diag(*reference.output_hessian(name, outputs, **OPTIONS.get(name, {})))


@given(batches(GIVEN))
def test_loss_is_that_of_the_reference(batch):
    name, outputs, targets = batch
    likelihood, options = LIKELIHOODS[name], OPTIONS.get(name, {})
    found = likelihood.negative_log_likelihood(outputs, targets)
    expected = reference.negative_log_likelihood(
        name, outputs, targets.long() if name == "categorical" else targets, **options
    )
    close(found.flatten(), expected)
    assert likelihood.terms(outputs) == len(expected)
    single = likelihood.negative_log_likelihood(outputs.float(), targets)
    close(single.flatten(), expected.float(), 1e-5)
    likelihood.check(outputs, targets)


@given(batches(GIVEN))
def test_hessian_is_that_of_the_reference(batch):
    name, outputs, _ = batch
    tangent = gradients(outputs)
    expected = dense_hessian(name, outputs) @ tangent.flatten()
    close(LIKELIHOODS[name].hessian_product(outputs, tangent).flatten(), expected)
    single = LIKELIHOODS[name].hessian_product(outputs.float(), tangent.float()).flatten()
    assert (single - expected).norm() <= 1e-5 * tangent.norm() * (1 + expected.norm())


@given(batches())
def test_hessian_product_is_that_of_autograd_and_of_the_root(batch):
    """``H t`` three ways: by differentiating the loss twice, by ``S Sᵀ t``, and as given."""
    name, outputs, targets = batch
    likelihood, tangent = LIKELIHOODS[name], gradients(outputs)
    gradient = grad(lambda f: likelihood.negative_log_likelihood(f, targets).sum())
    expected = vjp(gradient, outputs)[1](tangent)[0]
    close(likelihood.hessian_product(outputs, tangent), expected)
    root = lambda z: likelihood.square_root(outputs, z)  # noqa: E731
    close(root(vjp(root, torch.zeros_like(outputs))[1](tangent)[0]), expected)


@given(batches())
def test_root_is_linear_and_acts_on_each_term_alone(batch):
    name, outputs, _ = batch
    likelihood, x, y = LIKELIHOODS[name], gradients(outputs, 1), gradients(outputs, 2)
    root = lambda z: likelihood.square_root(outputs, z)  # noqa: E731
    close(root(2 * x - 3 * y), 2 * root(x) - 3 * root(y))
    first = torch.zeros_like(x)
    first[0] = x[0]
    close(root(first)[0], root(x)[0])
    assert not root(first)[1:].any()


SAMPLED = {
    "categorical": torch.tensor([0.5, -1.0, 1.5, 0.0]),
    "gaussian": torch.tensor([0.3, -2.0]),
    "bernoulli": torch.tensor([0.4, -1.5, 0.0]),
}


@pytest.mark.parametrize("name", GIVEN)
def test_expectation_over_samples(name):
    """Gradients at sampled targets have mean zero and covariance ``H``, within five standard errors."""
    count, likelihood = 100_000, LIKELIHOODS[name]
    outputs = SAMPLED[name].double().expand(count, -1)
    noise = torch.rand(outputs.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets = likelihood.sample(outputs, noise)
    likelihood.check(outputs, targets)
    g = grad(lambda f: likelihood.negative_log_likelihood(f, targets).sum())(outputs)
    assert (g.mean(0).abs() <= 5 * g.std(0) / count**0.5).all()
    products = g[:, :, None] * g[:, None, :]
    hessian = reference.output_hessian(name, outputs[:1], **OPTIONS.get(name, {}))[0]
    assert ((products.mean(0) - hessian).abs() <= 5 * products.std(0) / count**0.5 + 1e-12).all()


def test_samples_are_quantiles():
    """Where a target is one number, noise ``u`` gives the ``u``-quantile, of labels from the upper end."""
    u = (torch.arange(1000, dtype=torch.float64) + 0.5)[:, None] / 1000
    outputs = torch.full_like(u, -0.7)
    normal = torch.distributions.Normal(outputs, 0.5)
    close(gaussian(0.25).sample(outputs, u), normal.icdf(u))
    labels = bernoulli().sample(outputs, u)
    assert labels.unique().tolist() == [0, 1]
    assert abs(labels.mean() - outputs[0].sigmoid()) <= 1 / 1000


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", GIVEN)
def test_extremes_stay_finite(name, dtype):
    """Noise at both ends of [0, 1), and logits where probabilities are 0 or 1 to rounding."""
    likelihood = LIKELIHOODS[name]
    wide = torch.promote_types(dtype, torch.float32)
    outputs = torch.tensor([[0.0, 0.0], [200.0, -200.0], [-1e4, 1e4]], dtype=dtype)
    for u in (0.0, 0.5, 1 - torch.finfo(wide).eps):
        targets = likelihood.sample(outputs, torch.full(outputs.shape, u, dtype=wide))
        likelihood.check(outputs, targets)
        assert targets.isfinite().all()
        nll = likelihood.negative_log_likelihood(outputs, targets)
        assert nll.isfinite().all() and nll.dtype == wide
    for method in (likelihood.hessian_product, likelihood.square_root):
        result = method(outputs, torch.ones_like(outputs))
        assert result.isfinite().all() and result.dtype == dtype


OUTPUTS = torch.zeros(4, 3)
REFUSED = {
    "class numbers as floats": (categorical(), OUTPUTS, torch.zeros(4), TypeError, "class numbers.*float32"),
    "class numbers as bools": (categorical(), OUTPUTS, torch.zeros(4).bool(), TypeError, "bool"),
    "one-hot": (categorical(), OUTPUTS, OUTPUTS.long(), ValueError, r"targets of shape \(4,\), got \(4, 3\)"),
    "other batch": (categorical(), OUTPUTS, torch.zeros(5).long(), ValueError, r"shape \(4,\), got \(5,\)"),
    "one term per position": (
        categorical(), OUTPUTS[None], torch.zeros(1).long(), ValueError, r"shape \(1, 4\), got \(1,\)"),
    "no classes": (categorical(), OUTPUTS[0], torch.zeros(3).long(), ValueError, r"outputs \[N, C\].*\(3,\)"),
    "integers": (gaussian(), OUTPUTS, OUTPUTS.long(), TypeError, "gaussian: expected float.*int64"),
    "no broadcast": (gaussian(), OUTPUTS, OUTPUTS[:, :1], ValueError, r"shape \(4, 3\), got \(4, 1\)"),
    "no column": (gaussian(), OUTPUTS[:, 0], OUTPUTS[:, :1], ValueError, r"shape \(4,\), got \(4, 1\)"),
    "integer labels": (bernoulli(), OUTPUTS, OUTPUTS.int(), TypeError, "bernoulli: expected float.*int32"),
    "no such axis": (categorical(2), OUTPUTS, torch.zeros(4).long(), ValueError, "axis 2, of more axes"),
    "the batch": (categorical(-2), OUTPUTS, torch.zeros(3).long(), ValueError, "axis -2, of more axes"),
    "classes in front": (
        categorical(1), OUTPUTS[None], torch.zeros(1, 4).long(), ValueError, r"shape \(1, 3\), got \(1, 4\)"),
    "too few weights": (
        categorical(class_weights=[1, 2]), OUTPUTS, torch.zeros(4).long(), ValueError,
        r"class_weights: expected one for each of 3 classes \(axis -1 of .*\(4, 3\)\), got 2"),
    "counts as bools": (poisson(), OUTPUTS, OUTPUTS.bool(), TypeError, "poisson: expected targets .*bool"),
    "counts of another shape": (poisson(), OUTPUTS, OUTPUTS[:2], ValueError, r"\(4, 3\), got \(2, 3\)"),
    "labels of another shape": (bernoulli(), OUTPUTS, OUTPUTS[:2], ValueError, r"\(4, 3\), got \(2, 3\)"),
}  # fmt: skip


@pytest.mark.parametrize(("likelihood", "outputs", "targets", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_targets_that_do_not_fit(likelihood, outputs, targets, error, message):
    with pytest.raises(error, match=message):
        likelihood.check(outputs, targets)


def test_labels_may_be_bools():
    targets = OUTPUTS.bool()
    bernoulli().check(OUTPUTS, targets)
    close(
        bernoulli().negative_log_likelihood(OUTPUTS, targets),
        bernoulli().negative_log_likelihood(OUTPUTS, targets.float()),
    )


@given(batches())
def test_everything_works_under_vmap(batch):
    name, outputs, targets = batch
    likelihood, both = LIKELIHOODS[name], torch.stack([outputs, outputs + 1])
    noise = gradients(both).sigmoid()
    for function, args in (
        (lambda f, _: likelihood.negative_log_likelihood(f, targets), (both, both)),
        (likelihood.sample, (both, noise)),
        (likelihood.hessian_product, (both, noise)),
        (likelihood.square_root, (both, noise)),
    ):
        mapped = vmap(function)(*args)
        torch.testing.assert_close(mapped[1], function(args[0][1], args[1][1]))
