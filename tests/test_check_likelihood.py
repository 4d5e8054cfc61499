"""``check_likelihood`` passes what is right and names each way of being wrong."""

from dataclasses import replace

import pytest
import torch

from lrkfac import Likelihood, Weights, bernoulli, categorical, joint, poisson
from lrkfac.testing import check_likelihood
from tests.core.likelihoods.test_protocol import FAMILIES, problem

OUTPUTS = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TARGETS = torch.rand(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
CLASSES = torch.tensor([3, 0, 2])


CATEGORICAL = "categorical axis=1 ignore=-100 weights=True smoothing=0.3"


@pytest.mark.parametrize("name", [CATEGORICAL, "gaussian variances", "bernoulli", "poisson", "weighted"])
def test_families_pass(name):
    p = problem([(name, FAMILIES[name].shapes[0])], seed=0)
    check_likelihood(FAMILIES[name].likelihood, p.model(p.params, p.inputs), p.targets)


# Absolute errors: the Hessian is zero where it exists, the Fisher matrix is the identity.
LAPLACE = Likelihood(
    "laplace",
    lambda f, y: (f - y).abs().sum(1),
    lambda f, u: f - (2 * u - 1).sign() * torch.log1p(-(2 * u - 1).abs().clamp(max=1 - 1e-12)),
    lambda f, z: z,
)


def test_a_fisher_matrix_that_is_not_the_hessian_passes():
    check_likelihood(LAPLACE, OUTPUTS, TARGETS)


B, P, C = bernoulli(), poisson(), categorical()
WEIGHT = lambda value, hessian=None: lambda f, y: Weights(value(f, y), (hessian or value)(f, y))  # noqa: E731
WRONG = {
    "biased sample": (
        replace(B, sample=lambda f, u: (u < f.sigmoid() + 0.05).double()), "sample: the gradient .* has mean 0"),
    "sample of another variance": (
        replace(P, sample=lambda f, u: f.exp() + torch.where(u < 0.5, -1.0, 1.0) * f.exp()),
        "E\\[g gᵀ\\] = S Sᵀ.*sample: .* wrong covariance",
    ),
    "correlated draws": (
        replace(B, sample=lambda f, u: B.sample(f, u[:, :1].expand(f.shape))), "E\\[g gᵀ\\] = S Sᵀ.*sample:"),
    "hidden noise": (
        replace(B, sample=lambda f, u: B.sample(f, torch.rand_like(f))),
        "sample: equal outputs and noise give equal targets"),
    "root of another scale": (
        replace(B, square_root=lambda f, z: 1.1 * B.square_root(f, z), product=None),
        "E\\[g gᵀ\\] = S Sᵀ.*square_root: S Sᵀ is not the Hessian",
    ),
    "root of something else": (
        replace(LAPLACE, square_root=lambda f, z: 1.5 * z), "square_root, sample and negative_log_likelihood disagree"),
    "root that is not linear": (
        replace(B, square_root=lambda f, z: B.square_root(f, z) + 1e-3, product=None), "square_root: linear"),
    "root across terms": (
        replace(B, square_root=lambda f, z: B.square_root(f, z.flip(0)), product=None), "square_root: acts on each"),
    "root of another shape": (
        replace(B, square_root=lambda f, z: z[:, :2], product=None), r"square_root: of the shape of outp.* \(3, 2\)"),
    "product": (replace(B, product=lambda f, t: f.sigmoid() * t), "product: H tangent = S Sᵀ tangent"),
    "mean instead of one number a term": (
        replace(B, negative_log_likelihood=lambda f, y: B.negative_log_likelihood(f, y).mean()),
        "negative_log_likelihood: one number for each term.* one .* for each of 3 terms, got the shape \\(\\)",
    ),
    "terms that depend on each other": (
        replace(B, negative_log_likelihood=lambda f, y: B.negative_log_likelihood(f, y) + f.mean()),
        "negative_log_likelihood: terms depend on outputs of their own alone",
    ),
    "likelihood of another distribution": (
        replace(B, negative_log_likelihood=P.negative_log_likelihood), "sample: the gradient .* has mean 0"),
    "infinite loss": (
        replace(B, negative_log_likelihood=lambda f, y: B.negative_log_likelihood(f, y) / 0), "loss: a finite number"),
    "check that refuses its targets": (
        replace(B, check=lambda f, y: C.check(f, y)), "check: takes these targets: categorical: expected targets"),
    "sample of another shape": (
        replace(B, sample=lambda f, u: B.sample(f, u)[:, :2]), "sample: targets of the shape of these"),
    "check that takes any shape": (
        replace(B, check=lambda f, y: None), "check: takes targets of twice as many examples"),
    "negative weights": (replace(B, weights=WEIGHT(lambda f, y: y[:, 0] - 2)), "weights: mean is nonnegative, got -"),
    "weights of outputs": (
        replace(B, weights=WEIGHT(lambda f, y: f[:, 0].exp())), "weights: do not depend on the values of outputs"),
    "weights of entries": (replace(B, weights=WEIGHT(lambda f, y: y)), "weights: one mean for each term"),
    "another weight of the Hessian": (
        replace(B, weights=WEIGHT(lambda f, y: y[:, 0], lambda f, y: y[:, 1])), "weights: mean and hessian are equal"),
}  # fmt: skip


@pytest.mark.parametrize(("likelihood", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_named(likelihood, message):
    with pytest.raises(AssertionError, match=f"(?s)law broken: .*{message}"):
        check_likelihood(likelihood, OUTPUTS, TARGETS)
    with pytest.raises(AssertionError, match=f"(?s)law broken: .*{message}"):
        check_likelihood(joint([B, likelihood]), [OUTPUTS, OUTPUTS], [TARGETS, TARGETS], seed=1)
