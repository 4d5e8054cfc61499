"""``check_likelihood`` passes what is right and names each way of being wrong."""

from dataclasses import replace

import pytest
import torch

from lrkfac import Likelihood, Weights, bernoulli, categorical, joint, poisson
from lrkfac.testing import check_likelihood
from tests.core.likelihoods.test_protocol import FAMILIES, problem

OUTPUTS = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TARGETS = torch.rand(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
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


B, P = bernoulli(), poisson()
ROOT, SUM, WITHOUT = B.square_root, B.negative_log_likelihood, replace(B, product=None)
WEIGHT = lambda value, hessian=None: {"weights": lambda f, y: Weights(value(f, y), (hessian or value)(f, y))}  # noqa: E731
WRONG = [
    (
        B,
        {"sample": lambda f, u: (u < f.sigmoid() + 0.05).double()},
        "sample: the gradient .* should have mean 0, but has [0-9]",
    ),
    (B, {"sample": lambda f, u: B.sample(f, u[:, :1].expand(f.shape))}, r"E\[g gᵀ\] = S Sᵀ.*sample:"),
    (B, {"sample": lambda f, u: B.sample(f, torch.rand_like(f))}, "sample: equal outputs and noise give equal targets"),
    (B, {"sample": lambda f, u: B.sample(f, u)[:, :2]}, "sample: targets of the shape of these"),
    (P, {"sample": lambda f, u: f.exp() + torch.where(u < 0.5, -1.0, 1.0) * f.exp()}, "sample: .* wrong covariance"),
    (WITHOUT, {"square_root": lambda f, z: 1.1 * ROOT(f, z)}, "square_root: S Sᵀ is not the Hessian"),
    (WITHOUT, {"square_root": lambda f, z: ROOT(f, z) + 1e-3}, "square_root: linear"),
    (WITHOUT, {"square_root": lambda f, z: ROOT(f, z.flip(0))}, "square_root: acts on each"),
    (WITHOUT, {"square_root": lambda f, z: z[:, :2]}, r"square_root: of the shape of outp.* \(3, 2\)"),
    (LAPLACE, {"square_root": lambda f, z: 1.5 * z}, "square_root, sample and negative_log_likelihood disagree"),
    (B, {"product": lambda f, t: f.sigmoid() * t}, "product: H tangent = S Sᵀ tangent"),
    (B, {"residual": lambda f, score: score}, "residual: S coefficients = score"),
    (B, {"negative_log_likelihood": lambda f, y: SUM(f, y).mean()}, r"one .* for each of 3 terms, got the shape \(\)"),
    (B, {"negative_log_likelihood": lambda f, y: SUM(f, y) + f.mean()}, "depend on outputs of their own alone"),
    (
        B,
        {"negative_log_likelihood": P.negative_log_likelihood},
        "sample: the gradient .* should have mean 0, but has [0-9]",
    ),
    (B, {"negative_log_likelihood": lambda f, y: SUM(f, y) / 0}, "loss: a finite number"),
    (B, {"check": categorical().check}, "check: takes these targets: categorical: expected targets"),
    (B, {"check": lambda f, y: None}, "check: takes targets of twice as many examples"),
    (B, WEIGHT(lambda f, y: y[:, 0] - 2), "weights: mean is nonnegative, got -"),
    (B, WEIGHT(lambda f, y: f[:, 0].exp()), "weights: do not depend on the values of outputs"),
    (B, WEIGHT(lambda f, y: y), "weights: one mean for each term"),
    (B, WEIGHT(lambda f, y: y[:, 0], lambda f, y: y[:, 1]), "weights: mean and hessian are equal"),
]


@pytest.mark.parametrize(("likelihood", "changes", "message"), WRONG, ids=[message for *_, message in WRONG])
def test_what_is_wrong_is_named(likelihood, changes, message):
    wrong = replace(likelihood, **changes)
    for arguments in (wrong, OUTPUTS, TARGETS), (joint([B, wrong]), [OUTPUTS] * 2, [TARGETS] * 2):
        with pytest.raises(AssertionError, match=f"(?s)law broken: .*{message}"):
            check_likelihood(*arguments, seed=1)
