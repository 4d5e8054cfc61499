"""The one rule of normalisation: exact = expectation of Monte-Carlo = autograd's Gauss-Newton matrix.

The references are losses written in plain torch on the outputs, their Hessians by ``torch.func.hessian``, the
model's derivatives by ``jacrev``.
"""

from functools import partial
from itertools import product
from typing import Any, NamedTuple

import optree
import pytest
import torch
import torch.nn.functional as F
from torch.func import hessian, jacrev

from lrkfac import Likelihood, Weights, bernoulli, categorical, evaluator, gaussian, joint, poisson
from lrkfac.testing import gradients
from tests.described import layers_of
from tests.tensors import close

CLASSES = 3
CLASS_WEIGHTS = torch.tensor([0.3, 1.7, 0.9], dtype=torch.float64)


def half_square(outputs, targets):
    return (outputs - targets).square().sum(1) / 2


# An example counts as much as its first target says, its Hessian too.
WEIGHTED = Likelihood(
    "weighted",
    half_square,
    lambda outputs, noise: outputs + torch.where(noise < 0.5, -1.0, 1.0),
    lambda outputs, coefficients: coefficients,
    weights=lambda outputs, targets: Weights(targets[:, 0].abs(), targets[:, 0].abs()),
)


class Family(NamedTuple):
    """A likelihood, its loss in plain torch, and the shapes of outputs of one example that it takes."""

    likelihood: Any
    loss: Any
    shapes: tuple[tuple[int, ...], ...]


def cross_entropy(outputs, targets, axis=-1, ignore_index=None, **options):
    ignored = -100 if ignore_index is None else ignore_index
    return F.cross_entropy(outputs.movedim(axis, 1), targets, ignore_index=ignored, **options)


def per_example(loss):
    return lambda outputs, targets: loss(outputs, targets).reshape(len(outputs), -1).sum(1).mean()


AXES = {-1: ((CLASSES,), (2, CLASSES)), 1: ((CLASSES, 2, 1),), 2: ((2, CLASSES),), -3: ((CLASSES, 2, 1),)}


def categoricals():
    for ignore_index, weight, smoothing in product((None, -100, 1), (None, CLASS_WEIGHTS), (0.0, 0.3)):
        for axis in AXES if ignore_index == -100 and weight is not None else (-1, 1):
            name = f"categorical axis={axis} ignore={ignore_index} weights={weight is not None} smoothing={smoothing}"
            options = {"axis": axis, "ignore_index": ignore_index, "weight": weight, "label_smoothing": smoothing}
            loss = partial(cross_entropy, **options)
            yield name, Family(categorical(axis, ignore_index, weight, smoothing), loss, AXES[axis])


ANY = ((1,), (3,), (2, 3))
VARIANCES = torch.tensor([0.2, 1.0, 5.0], dtype=torch.float64)
FAMILIES = {
    **dict(categoricals()),
    "gaussian": Family(gaussian(0.25), per_example(lambda f, y: (f - y).square() / 0.5), ANY),
    "gaussian variances": Family(
        gaussian(VARIANCES), per_example(lambda f, y: (f - y).square() / (2 * VARIANCES)), ((3,), (2, 3))
    ),
    "bernoulli": Family(bernoulli(), per_example(partial(F.binary_cross_entropy_with_logits, reduction="none")), ANY),
    "poisson": Family(poisson(), per_example(partial(F.poisson_nll_loss, reduction="none")), ANY),
    "weighted": Family(
        WEIGHTED, lambda f, y: (half_square(f, y) * y[:, 0].abs()).sum() / y[:, 0].abs().sum(), ((3,),)
    ),
}  # fmt: skip


def targets_for(name, likelihood, outputs, generator):
    if not name.startswith("categorical"):
        return torch.rand(outputs.shape, generator=generator, dtype=torch.float64)
    axis = likelihood.event_axes[0] % outputs.ndim
    shape = [size for i, size in enumerate(outputs.shape) if i != axis]
    targets = torch.randint(CLASSES, shape, generator=generator)
    targets.view(-1)[0] = 0  # never ignored
    if "ignore=-100" in name:
        targets.view(-1)[1::3] = -100
    return targets


JOINT = {
    "categorical + gaussian": [("categorical axis=1 ignore=-100 weights=True smoothing=0.3", (CLASSES, 2, 1)),
                               ("gaussian variances", (2, 3))],
    "weighted + poisson + bernoulli": [("weighted", (3,)), ("poisson", (1,)), ("bernoulli", (2, 3))],
    "twice the same": [("categorical axis=-1 ignore=1 weights=True smoothing=0.0", (2, CLASSES))] * 2,
}  # fmt: skip
SHAPES = [(n, shape) for n, family in FAMILIES.items() for shape in family.shapes[-1 if n.endswith("0.0") else 0 :]]
CASES = {**{f"{n} {shape}": [(n, shape)] for n, shape in SHAPES}, **JOINT}
each_case = pytest.mark.parametrize("heads", CASES.values(), ids=CASES.keys())


class Problem(NamedTuple):
    """One or several heads on a linear layer, behind a layer that mixes positions where there are several."""

    likelihood: Any
    model: Any
    params: dict[str, torch.Tensor]
    inputs: torch.Tensor
    targets: Any
    loss: Any  # of the list of all outputs, in plain torch
    leaves: Any  # from the tree of outputs to that list


def problem(heads, seed, batch=4):
    generator, single = torch.Generator().manual_seed(seed), len(heads) == 1
    normal = partial(torch.randn, generator=generator, dtype=torch.float64)
    sizes = [torch.Size(shape).numel() for _, shape in heads]
    params = {"first.weight": normal(3, 2), "last.weight": normal(sum(sizes), 3), "last.bias": normal(sum(sizes))}
    inputs, names = normal(batch, 2), [f"head {9 - i}" for i in range(len(heads))]
    families, weights = [FAMILIES[name] for name, _ in heads], [1.0] if single else [0.5 + i for i in range(len(heads))]

    def tree(leaves):
        """Sorted by optree, in insertion order for torch."""
        return leaves[0] if single else dict(zip(names, leaves, strict=True))

    def model(p, x):
        flat = F.linear(F.linear(x, p["first.weight"]).tanh(), p["last.weight"], p["last.bias"])
        return tree([part.reshape(-1, *shape) for part, (_, shape) in zip(flat.split(sizes, 1), heads, strict=True)])

    def leaves(tree):
        return [tree] if single else [tree[name] for name in names]

    parts = zip(heads, families, leaves(model(params, inputs)), strict=True)
    targets = [targets_for(name, family.likelihood, f, generator) for (name, _), family, f in parts]

    def loss(outputs):
        return sum(w * family.loss(f, y) for w, family, f, y in zip(weights, families, outputs, targets, strict=True))

    likelihood = tree([family.likelihood for family in families])
    likelihood = likelihood if single else joint(likelihood, tree(weights))
    return Problem(likelihood, model, params, inputs, tree(targets), loss, leaves)


def evaluate(p, estimator="exact", statistics=True, noise=None, samples=1, layers=None):
    layers = layers_of(p) if layers is None else layers
    f = evaluator(p.model, p.likelihood, layers, estimator, samples)
    return f(p.params, p.inputs, p.targets, statistics, noise=noise)


def flat(tree):
    return torch.cat([x.reshape(-1) for x in tree])


def output_matrix(p):
    """The Hessian of the loss in all outputs, ``[E, E]``."""
    outputs = p.leaves(p.model(p.params, p.inputs))

    def of_flat(x):
        parts = x.split([f.numel() for f in outputs])
        return p.loss([part.reshape(f.shape) for part, f in zip(parts, outputs, strict=True)])

    return hessian(of_flat)(flat(outputs))


def gauss_newton(p):
    """``Jᵀ H J`` over all parameters in the order of ``params``."""
    jacobian = jacrev(lambda q: flat(p.leaves(p.model(q, p.inputs))))(p.params)
    J = torch.cat([j.flatten(1) for j in jacobian.values()], 1)
    return J.mT @ output_matrix(p) @ J


def output_factor(p):
    """``B`` of the first layer: the sum over examples of their blocks of ``Jᵀ H J`` in its output."""
    s = F.linear(p.inputs, p.params["first.weight"])
    rest = {**p.params, "first.weight": torch.eye(3, dtype=torch.float64)}
    J = jacrev(lambda s: flat(p.leaves(p.model(rest, s))))(s).flatten(1)
    return torch.einsum("ninj->ij", (J.mT @ output_matrix(p) @ J).unflatten(0, s.shape).unflatten(2, s.shape))


def rows(evaluation):
    """Of the first layer, ``[k, N, 3]``."""
    return evaluation.statistics.output_gradients["first"][0]


def B(evaluation):
    g = rows(evaluation).flatten(0, 1)
    return evaluation.statistics.scale * g.mT @ g


@each_case
def test_loss_gradient_products_and_statistics_are_those_of_plain_torch(heads):
    """Exact statistics are Gauss-Newton blocks; of empirical ones, ``scale * sum of g aᵀ`` is the gradient."""
    p = problem(heads, seed=1)
    loss = lambda q: p.loss(p.leaves(p.model(q, p.inputs)))  # noqa: E731
    grads, matrix = torch.func.grad(loss)(p.params), gauss_newton(p)
    u, v = gradients(p.params, 1), gradients(p.params, 2)
    x, y = both = torch.stack([flat(u.values()), flat(v.values())])
    pair = {name: torch.stack([u[name], v[name]]) for name in u}
    for estimator, statistics in (("mc", False), ("mc", True), ("exact", True), ("empirical", True)):
        found = evaluate(p, estimator, statistics)
        close((found.loss, found.loss_at(p.params), found.grads), (loss(p.params), loss(p.params), grads))
        close(flat(found.product(u)[name] for name in p.params), matrix @ x)
        close(found.quadratic(u, v), x @ matrix @ y)
        close(found.gram(pair), both @ matrix @ both.mT)
        close(p.leaves(found.outputs), p.leaves(p.model(p.params, p.inputs)), 0, 0)
        if estimator == "exact":
            close(B(found), output_factor(p))
        if estimator == "empirical":
            (a,) = found.statistics.inputs["first"]
            close(found.statistics.scale * rows(found)[0].mT @ a, grads["first.weight"])


SOME = [name for name in FAMILIES if name[-3:] != "0.0" or "ignore=-100" in name]


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "beside another"])
def test_monte_carlo_is_exact_in_expectation(name, alone):
    """The mean over 5000 copies of the batch is within six standard errors."""
    copies, shapes = 5000, FAMILIES[name].shapes
    one = problem([(name, shapes[-1])] if alone else [(name, shapes[0]), ("bernoulli", (2,))], seed=3)
    many = one._replace(
        inputs=one.inputs.repeat(copies, 1),
        targets=optree.tree_map(lambda y: y.repeat(copies, *[1] * (y.ndim - 1)), one.targets),
    )
    outputs = many.model(many.params, many.inputs)
    noise = optree.tree_map(lambda f: torch.rand(1, *f.shape, dtype=torch.float64), outputs)
    found = evaluate(many, "mc", noise=noise, layers=layers_of(one))
    close(found.statistics.scale * copies, evaluate(one).statistics.scale)
    g = rows(found)[0].unflatten(0, (copies, -1))
    each = found.statistics.scale * copies * g.mT @ g
    close(each.mean(0), B(found))
    assert ((each.mean(0) - output_factor(one)).abs() <= 6 * each.std(0) / copies**0.5 + 1e-12).all()
