"""The laws of likelihoods: all parts belong to one distribution."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import grad, jacrev, jvp, vmap

from lrkfac.core.base.types import Tree
from lrkfac.core.likelihoods.joint import Joint
from lrkfac.core.likelihoods.protocol import Likelihood
from lrkfac.testing.laws import check_close, check_law, float64
from lrkfac.testing.strategies import generator_of, gradients

STANDARD_ERRORS = 6.0


def check_likelihood(
    likelihood: Likelihood | Joint, outputs: Tree, targets: Tree, samples: int = 50_000, seed: int = 0
) -> None:
    """Check the laws of a likelihood at some outputs.

    * ``check`` takes these targets, and none of another batch size;
    * there is one negative log-likelihood for each term, which depends on the outputs of this term alone;
    * weights are nonnegative, one for each term, and equal (``mean`` and ``hessian``) unless there is a
      ``weighted_loss``, whose terms are not checked; the loss is finite;
    * ``square_root`` is linear, term by term, and ``product`` is ``S Sᵀ``; ``S`` of the ``residual`` of a score is the
      score;
    * ``sample`` depends on nothing but its arguments, and over draws the gradient of the negative log-likelihood
      has mean 0 and second moment ``S Sᵀ``, each within six standard errors.

    Examples:
        >>> import torch
        >>> from lrkfac import poisson
        >>> check_likelihood(poisson(), torch.zeros(2, 3).double(), torch.ones(2, 3).double(), samples=1000)

    Args:
        likelihood: The likelihood, of one head or several.
        outputs: Outputs for a few examples, on a moderate scale (every target should turn up among the samples);
            float64.
        targets: Targets that fit them.
        samples: The number of draws, all at once.
        seed: The seed of the draws.

    Raises:
        AssertionError: Says which law is broken, and by how much.
    """
    if isinstance(likelihood, Joint):
        of_heads = likelihood.leaves(outputs, "outputs"), likelihood.leaves(targets, "targets")
        for i, one in enumerate(zip(likelihood.heads, *of_heads, strict=True)):
            check_likelihood(*one, samples, seed + i)
        return
    _check_targets(likelihood, outputs, targets)
    _check_weights(likelihood, outputs, targets)
    _check_root(likelihood, outputs)
    noise = torch.rand(samples, *outputs.shape, generator=generator_of(seed), dtype=torch.float64).to(outputs)
    many = outputs.expand(samples, *outputs.shape).flatten(0, 1)
    drawn = likelihood.sample(many, noise.flatten(0, 1))
    again = likelihood.sample(many, noise.flatten(0, 1))
    check_law(
        torch.equal(drawn, again), "sample: equal outputs and noise give equal targets; noise is its only randomness"
    )
    check_law(
        drawn.shape == (len(many), *targets.shape[1:]), f"sample: targets of the shape of these, got {drawn.shape}"
    )
    _check_terms(likelihood, outputs, likelihood.sample(outputs, noise[0]))
    _check_moments(likelihood, outputs, many, drawn)
    _check_residual(likelihood, outputs, likelihood.sample(outputs, noise[0]))


def _check_targets(likelihood: Likelihood, outputs: Tensor, targets: Tensor) -> None:
    if likelihood.check is not None:
        try:
            likelihood.check(outputs, targets)
        except (ValueError, TypeError) as error:
            raise AssertionError(f"law broken: check: takes these targets: {error}") from error
        try:
            likelihood.check(outputs, torch.cat([targets, targets]))
        except (ValueError, TypeError):
            return
        check_law(False, "check: takes targets of twice as many examples as there are outputs of")


def _check_weights(likelihood: Likelihood, outputs: Tensor, targets: Tensor) -> None:
    if likelihood.weights is not None:
        for name, weight in zip(("mean", "hessian"), likelihood.weights(outputs, targets), strict=True):
            check_law(
                weight.numel() == likelihood.terms(outputs), f"weights: one {name} for each term, got {weight.shape}"
            )
            check_law((weight >= 0).all(), f"weights: {name} is nonnegative, got {weight.min():.2e}")
        weights, other = likelihood.weights(outputs, targets), likelihood.weights(outputs + 1, targets)
        same = torch.equal(weights.mean, other.mean) and torch.equal(weights.hessian, other.hessian)
        check_law(same, "weights: do not depend on the values of outputs")
        if likelihood.weighted_loss is None:
            check_law(torch.equal(*weights), "weights: mean and hessian are equal where there is no weighted_loss")
    try:
        loss = likelihood.loss(outputs, targets)
    except ValueError as error:
        raise AssertionError(f"law broken: negative_log_likelihood: one number for each term: {error}") from error
    check_law(loss.ndim == 0 and bool(loss.isfinite()), f"loss: a finite number at these targets, got {loss}")


def _check_root(likelihood: Likelihood, outputs: Tensor) -> None:
    x, y = gradients(outputs, 1), gradients(outputs, 2)

    def root(z: Tensor) -> Tensor:
        return likelihood.square_root(outputs, z)

    tolerance = 1e4 * torch.finfo(outputs.dtype).eps
    check_law(root(x).shape == outputs.shape, f"square_root: of the shape of outputs, got {tuple(root(x).shape)}")
    check_close(root(2 * x - 3 * y), 2 * root(x) - 3 * root(y), tolerance, "square_root: linear in coefficients")
    if likelihood.product is not None:
        by_root = likelihood.hessian_product(outputs, x)
        S = _blocks(likelihood, outputs)
        expected = torch.einsum("nij,nkj,nk->ni", S, S, float64(x).flatten(1)).reshape(x.shape)
        check_close(by_root, expected, tolerance, "product: H tangent = S Sᵀ tangent")
    alone = torch.zeros_like(x)
    alone[0] = x[0]
    others = root(alone)[1:]
    check_law(not others.any(), "square_root: acts on each term alone")


def _check_residual(likelihood: Likelihood, outputs: Tensor, targets: Tensor) -> None:
    if likelihood.residual is None:
        return
    score = 3 * grad(lambda f: likelihood.negative_log_likelihood(f, targets).sum())(outputs)
    found = likelihood.square_root(outputs, likelihood.residual(outputs, score))
    tolerance = 1e4 * torch.finfo(outputs.dtype).eps
    check_close(found, score, tolerance, "residual: S coefficients = score")


def _check_terms(likelihood: Likelihood, outputs: Tensor, targets: Tensor) -> None:
    nll = likelihood.negative_log_likelihood(outputs, targets)
    terms = likelihood.terms(outputs)
    check_law(nll.numel() == terms, f"negative_log_likelihood: one for each of {terms} terms, got {tuple(nll.shape)}")
    jacobian = jacrev(lambda f: likelihood.negative_log_likelihood(f, targets).flatten())(outputs).flatten(1)
    coupled = (jacobian.abs() @ jacobian.abs().mT).fill_diagonal_(0)
    check_law(
        not coupled.any(),
        "negative_log_likelihood: terms depend on outputs of their own alone, as event_axes says; it must not average",
    )


def _check_moments(likelihood: Likelihood, outputs: Tensor, many: Tensor, drawn: Tensor) -> None:
    samples = many.shape[0] // outputs.shape[0]

    def total(f: Tensor) -> Tensor:
        return likelihood.negative_log_likelihood(f, drawn).sum()

    g = float64(grad(total)(many)).reshape(samples, outputs.shape[0], -1)
    # What is too rare to turn up may weigh this much.
    rare = 20 / samples * g.abs().max()
    mean, error = g.mean(0), g.std(0) / samples**0.5
    excess = (mean.abs() - STANDARD_ERRORS * error - rare).max()
    check_law(
        excess <= 0,
        "sample: the gradient of negative_log_likelihood at drawn targets should have mean 0, but has "
        f"{mean.abs().max():.3g} ({excess:.2g} more than chance explains)",
    )
    S = _blocks(likelihood, outputs)
    root = torch.einsum("nij,nkj->nik", S, S)
    second, fourth = (torch.einsum("kni,knj->nij", x, x) / samples for x in (g, g.square()))
    allowed = STANDARD_ERRORS * ((fourth - second.square()).clamp(min=0) / samples).sqrt() + rare * g.abs().max()
    off = ((second - root).abs() - allowed).max()
    if off <= 0:
        return
    # The mean Hessian says which of the two is wrong; it is no law, for it may not exist (absolute errors).
    units = torch.eye(S.shape[1], dtype=many.dtype, device=many.device).reshape(-1, 1, *many.shape[1:])
    curvature = vmap(lambda unit: jvp(grad(total), (many,), (unit.expand(many.shape),))[1])(units)
    hessian = float64(curvature).reshape(len(units), samples, outputs.shape[0], -1).mean(1).permute(1, 0, 2)
    norm = root.norm() + second.norm()
    if (hessian - root).norm() < 0.02 * norm:
        blame = (
            "sample: the gradients at drawn targets have a wrong covariance; square_root agrees with the mean Hessian"
        )
    elif (hessian - second).norm() < 0.02 * norm:
        blame = "square_root: S Sᵀ is not the Hessian, with which the covariance of gradients at drawn targets agrees"
    else:
        blame = "square_root, sample and negative_log_likelihood disagree pairwise"
    raise AssertionError(
        f"law broken: E[g gᵀ] = S Sᵀ for gradients g at drawn targets: {blame}; largest difference "
        f"{(second - root).abs().max():.2e} ({off:.2e} more than chance explains)"
    )


def _blocks(likelihood: Likelihood, outputs: Tensor) -> Tensor:
    """Return ``S`` of every example, ``[N, D, D]``, with all its outputs in one axis; in float64 on the CPU."""
    entries = outputs[0].numel()
    units = torch.eye(entries, dtype=outputs.dtype, device=outputs.device).reshape(entries, 1, *outputs.shape[1:])
    columns = vmap(lambda unit: likelihood.square_root(outputs, unit.expand(outputs.shape)))(units)
    return float64(columns).flatten(2).permute(1, 2, 0)
