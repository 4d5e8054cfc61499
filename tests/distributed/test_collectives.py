"""Our collective operations under each transformation, on two processes: torch's own are wrong there, in silence."""

import pytest
import torch
import torch.distributed as dist
from torch.func import grad, jvp, vjp, vmap

from lrkfac.core.base.collectives import reduce_scatter
from lrkfac.core.base.exchange import Form, from_owners, to_owners
from lrkfac.core.base.processes import CHUNK, counted, processes_of

pytestmark = pytest.mark.slow

BATCH = torch.tensor([[1.0, 2.0], [3.0, 5.0]], dtype=torch.float64)


def transformed():
    """Results of each transformation of each operation; this process has ``BATCH * (rank + 1)``."""
    processes = processes_of(dist.group.WORLD)
    factor = processes.rank + 1.0
    x, batch = BATCH[0] * factor, BATCH * factor
    results = {}
    for name, f in {
        "sum": lambda x: processes.sum([x])[0],
        "gather": lambda x: processes.gather(x, 2),
        "scatter": lambda x: reduce_scatter(x[:, None], processes.name, 2, processes.rank),
    }.items():
        energy = lambda x, f=f: f(x).square().sum()  # noqa: E731
        like = torch.ones_like(f(x))
        leaf = x.clone().requires_grad_()
        energy(leaf).backward()
        results |= {
            f"{name}: values": f(x),
            f"{name}: vjp": vjp(f, x)[1](factor * like)[0],
            f"{name}: jvp": jvp(f, (x,), (x,))[1],
            f"{name}: vmap": vmap(f)(batch),
            f"{name}: vmap of another axis": vmap(f, in_dims=1, out_dims=1)(batch.mT),
            f"{name}: nothing mapped": vmap(lambda z, f=f: z * f(x).sum())(torch.ones(3, dtype=x.dtype)),
            f"{name}: nested vmap": vmap(vmap(f))(batch[None].expand(2, -1, -1)),
            f"{name}: vmap of gradients": vmap(grad(energy))(batch),
            f"{name}: jvp of a gradient": jvp(grad(energy), (x,), (x,))[1],
            f"{name}: backward": leaf.grad,
            f"{name}: compiled": torch.compile(f, fullgraph=True)(x),
            f"{name}: compiled vmap": torch.compile(vmap(f), fullgraph=True, backend="aot_eager")(batch),
        }
    return {name: x.tolist() for name, x in results.items()}


def everything():
    """What two processes do, in one start of them."""
    return {part.__name__: part() for part in (transformed, summed, padded, exchanged)}


@pytest.fixture
def of_two(once):
    """The results of each part on both processes."""
    results = once("collectives", everything, 2)
    return {name: [result[name] for result in results] for name in results[0]}


def test_values_and_derivatives_under_every_transformation(of_two):
    """With x and 2 x on two ranks, their sum is 3 x, what is gathered (x, 2 x), and a part of the sum 3 x[rank]."""
    x, batch = BATCH[0], BATCH
    for rank, results in enumerate(of_two["transformed"]):
        own = rank + 1.0
        both, both_of_batch = torch.cat([x, 2 * x]), torch.cat([batch, 2 * batch], dim=1)
        expected = {
            "sum: values": 3 * x,
            # Each rank's derivative of the sum of what all ranks compute.
            "sum: vjp": torch.full((2,), 3.0),
            "sum: jvp": 3 * x,
            "sum: vmap": 3 * batch,
            "sum: vmap of another axis": 3 * batch.mT,
            "sum: nothing mapped": 9 * torch.ones(3),
            "sum: nested vmap": 3 * batch.expand(2, -1, -1),
            "sum: vmap of gradients": 2 * 2 * 3 * batch,
            "sum: jvp of a gradient": 2 * 2 * 3 * x,
            "sum: backward": 2 * 2 * 3 * x,
            "sum: compiled": 3 * x,
            "sum: compiled vmap": 3 * batch,
            "gather: values": both,
            "gather: vjp": torch.full((2,), 3.0),
            "gather: jvp": both,
            "gather: vmap": both_of_batch,
            "gather: vmap of another axis": both_of_batch.mT,
            "gather: nothing mapped": 9 * torch.ones(3),
            "gather: nested vmap": both_of_batch.expand(2, -1, -1),
            "gather: vmap of gradients": 2 * 2 * own * batch,
            "gather: jvp of a gradient": 2 * 2 * own * x,
            "gather: backward": 2 * 2 * own * x,
            "gather: compiled": both,
            "gather: compiled vmap": both_of_batch,
            "scatter: values": 3 * x[rank : rank + 1],
            "scatter: vjp": torch.tensor([1.0, 2.0]),
            "scatter: jvp": 3 * x[rank : rank + 1],
            "scatter: vmap": 3 * batch[:, rank : rank + 1],
            "scatter: vmap of another axis": 3 * batch[:, rank : rank + 1].mT,
            "scatter: nothing mapped": 3 * x[rank] * torch.ones(3),
            "scatter: nested vmap": 3 * batch[:, rank : rank + 1].expand(2, -1, -1),
            "scatter: vmap of gradients": 2 * 3 * batch,
            "scatter: jvp of a gradient": 2 * 3 * x,
            "scatter: backward": 2 * 3 * x,
            "scatter: compiled": 3 * x[rank : rank + 1],
            "scatter: compiled vmap": 3 * batch[:, rank : rank + 1],
        }
        assert {name: x.tolist() for name, x in expected.items()} == results


def summed():
    """Sums of tensors of several dtypes, some larger than a call, and the calls that they took."""
    processes = processes_of(dist.group.WORLD)
    sizes = (3, CHUNK // 4 + 5, 0, 7)
    tensors = [torch.arange(n, dtype=torch.float32) * (processes.rank + 1) for n in sizes]
    tensors += [torch.ones(2, 3, dtype=torch.float64), torch.tensor(processes.rank)]
    with counted() as calls:
        totals = processes.sum(tensors)
    right = [torch.equal(t, torch.arange(n, dtype=torch.float32) * 3) for t, n in zip(totals, sizes, strict=False)]
    return [*right, totals[4].tolist(), totals[5].tolist()], calls


def test_sums_are_flat_and_in_chunks(of_two):
    for values, calls in of_two["summed"]:
        assert values == [True] * 4 + [[[2.0] * 3] * 2, 1]
        numbers = 3 + CHUNK // 4 + 5 + 7
        assert calls == [
            ("all_reduce", CHUNK),
            ("all_reduce", 4 * numbers - CHUNK),
            ("all_reduce", 6 * 8),
            ("all_reduce", 8),
        ]


def padded():
    processes = processes_of(dist.group.WORLD)
    return processes.gather(torch.full((processes.rank + 1, 2), 1.0 + processes.rank), 3).tolist()


def test_rows_of_different_numbers_are_gathered_with_zeros(of_two):
    one, nothing, two = [1.0, 1.0], [0.0, 0.0], [2.0, 2.0]
    assert of_two["padded"] == [[one, nothing, nothing, two, two, nothing]] * 2


OWNERS = [1, 0, 1, 1, 0]


def exchanged():
    """Tensors of several owners, some larger than a call: what all get of them, sums of them, and the calls."""
    processes = processes_of(dist.group.WORLD)
    shapes = [(2, 3), (CHUNK // 4 + 1,), (), (0, 2), (4,)]
    dtypes = [torch.float32, torch.float32, torch.float32, torch.float32, torch.int64]
    tensors = [torch.arange(torch.Size(n).numel()).reshape(n).to(t) for n, t in zip(shapes, dtypes, strict=True)]
    own = {i: x for i, x in enumerate(tensors) if OWNERS[i] == processes.rank}
    forms = [Form(*pair) for pair in zip(shapes, dtypes, strict=True)]
    with counted() as calls:
        everywhere = from_owners(own, forms, OWNERS, processes, torch.zeros(()))
        sums = to_owners([x * (processes.rank + 1) for x in tensors], OWNERS, processes)
    same = all(torch.equal(a, b) for a, b in zip(everywhere, tensors, strict=True))
    return same, sums.keys() == own.keys() and all(torch.equal(x, 3 * own[i]) for i, x in sums.items()), calls


def test_tensors_of_several_owners_travel_flat_and_in_chunks(of_two):
    largest = 4 * (CHUNK // 4 + 1)
    gathers = [("all_gather", CHUNK), ("all_gather", largest - CHUNK), ("all_gather", 4 * 8)]
    scatters = [("reduce_scatter", CHUNK), ("reduce_scatter", CHUNK), ("reduce_scatter", 8), ("reduce_scatter", 64)]
    for same, right, calls in of_two["exchanged"]:
        assert same
        assert right
        assert calls == gathers + scatters
