"""What a layer makes of an input that all examples share: one row for each example, or no layer at all."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import hessian, jacrev

import lrkfac
from lrkfac import evaluator, find_layers, precondition_by_fisher
from lrkfac.structures import layer_wise
from tests.tensors import close, normal

N, POSITIONS = 3, 4


SHARED = normal(1, POSITIONS, 3, seed=1)
SHARED_OF_3 = normal(1, 3, 3, seed=2)
V = normal(2, 3, seed=3)
HEADS = {
    "linear": ((3, 3), lambda w: F.linear(SHARED, w)),
    "conv1d, uneven": ((3, 3, 2), lambda w: F.conv1d(SHARED.mT, w, padding="same").mT),
    "conv_transpose1d": ((3, 3, 3), lambda w: F.conv_transpose1d(SHARED.mT, w, padding=1).mT),
    "embedding": ((2, 3), lambda w: F.embedding(torch.tensor([[0, 1, 1, 0]]), w)),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_leading_axis_of_one_stands_for_all_examples(name):
    """Gradients and exact blocks are those by autograd."""
    shape, operation = HEADS[name]
    x, y, params = normal(N, POSITIONS, 3), normal(N, POSITIONS, 2, seed=4), {"w": normal(*shape, seed=5)}
    model = lambda p, x: torch.tanh(x + operation(p["w"])) @ V.T  # noqa: E731
    layers = find_layers(model, params, x, strict=True)
    e = evaluator(model, lrkfac.gaussian(), layers, "exact")(params, x, y)
    tx = precondition_by_fisher(layers, layer_wise(), damping=0.1, decay=0.0)
    found, _ = tx.update(e.grads, tx.init(params), params, evaluation=e)
    outputs = lambda w: model({"w": w.reshape(shape)}, x)  # noqa: E731
    loss = lambda f: (f - y).square().sum() / (2 * N)  # noqa: E731
    w = params["w"].flatten()
    J, gradient = jacrev(outputs)(w).flatten(0, -2), jacrev(lambda w: loss(outputs(w)))(w)
    block = J.mT @ hessian(loss)(outputs(w)).reshape(len(J), len(J)) @ J
    close(e.grads["w"].flatten(), gradient)
    close(found["w"].flatten(), torch.linalg.solve(block + 0.1 * torch.eye(len(w), dtype=w.dtype), gradient), 1e-7)


NO_AXIS = {
    "linear": lambda p, x: F.linear(SHARED_OF_3[0, 0], p["w"]),
    "matrix": lambda p, x: torch.diagonal(F.linear(SHARED_OF_3[0], p["w"])),
    "scale": lambda p, x: p["s"] * torch.ones(1, dtype=torch.float64),
    "shift": lambda p, x: torch.ones(1, dtype=torch.float64) + p["s"],
}


@pytest.mark.parametrize("name", NO_AXIS)
@pytest.mark.parametrize("n", [1, 3, 5])
def test_without_an_axis_for_the_batch_there_are_no_rows_of_examples(name, n):
    """Also where the batch is by chance as long as another axis."""
    params, x = {"s": normal(1), "w": normal(3, 3), "v": normal(2, 3)}, normal(n, 3)
    layers = find_layers(lambda p, x: F.linear(x * NO_AXIS[name](p, x), p["v"]), params, x)
    assert [layer.name for layer in layers] == ["v"]


ROW = normal(1, 3)


def test_what_cannot_be_repeated_in_another_batch_is_refused():
    """A model that takes the row otherwise for more examples than find_layers tries."""
    params, x = {"w": normal(3, 3)}, normal(8, 3)

    def model(p, x):
        c = F.linear(ROW, p["w"])
        return x * c if len(x) < 7 else torch.cat([x, c])

    layers = find_layers(model, params, x[:5])
    with pytest.raises(ValueError, match=r"weights \['w'\] are applied to one row for all examples"):
        evaluator(model, lrkfac.gaussian(), layers)(params, x, normal(9, 3))


TAKEN_TOGETHER = {
    "weight": lambda c, x: F.linear(x, c),
    "norm": lambda c, x: x * (c / c.norm()),
    "sum": lambda c, x: x * c.sum(0),
    "mean": lambda c, x: x * c.mean(0),
    "first": lambda c, x: x * c[0],
    "attention": lambda c, x: (x @ c.mT).softmax(1) * x,
    "repeated": lambda c, x: x * c.repeat(len(x), 1),
}


@pytest.mark.parametrize("use", TAKEN_TOGETHER.values(), ids=TAKEN_TOGETHER.keys())
def test_a_row_that_is_not_taken_row_by_row_is_uncovered(use):
    """Copies of it would change the outputs, or act on other examples: loss and gradient are those of autograd."""
    params, x, y = {"w": normal(3, 3), "v": normal(2, 3)}, normal(N, 3), torch.arange(N) % 2
    params["v"] = params["v"][:, :1] if use is TAKEN_TOGETHER["weight"] else params["v"]
    model = lambda p, x: F.linear(use(F.linear(ROW, p["w"]), x), p["v"])  # noqa: E731
    layers = find_layers(model, params, x)
    assert "what all examples share" in dict((p.path, reason) for p, reason in layers.uncovered)["w"]
    e = evaluator(model, lrkfac.categorical(), layers)(params, x, y)
    loss = lambda p: F.cross_entropy(model(p, x), y)  # noqa: E731
    torch.testing.assert_close((e.loss, e.grads), (loss(params), torch.func.grad(loss)(params)))
