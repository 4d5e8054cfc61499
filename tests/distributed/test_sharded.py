"""A module under ``fully_shard`` trains as it does without; other sharded tensors are refused by name."""

import copy
import pickle
import re
import warnings

import optree
import pytest
import torch
from torch import nn
from torch.func import functional_call

import lrkfac
from lrkfac.core.base.sharding import local_parts, shard_like
from tests.distributed.processes import run, torchrun
from tests.distributed.sharded import every_training


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_sharded_parameters_train_as_whole_ones(world, tmp_path):
    """Also with parts of unequal lengths and without any rows, and the module runs with its new parameters."""
    results = run(every_training, world, tmp_path, tmp_path / "checkpoint")
    for name, first in results[0]["trainings"].items():
        of_ranks = [result["trainings"][name] for result in results]
        (alone,) = [found["alone"] for found in of_ranks if "alone" in found]
        for what, expected in alone.items():
            message = f"{name}: {what}: {{}}".format
            torch.testing.assert_close(first["sharded"][what], expected, rtol=1e-12, atol=1e-12, msg=message)
            assert all(torch.equal(found["sharded"][what], first["sharded"][what]) for found in of_ranks), name
    lengths = [result["lengths"] for result in results]
    assert len({tuple(one) for one in lengths}) > 1 and 0 in lengths[-1]
    for result in results:
        assert result["gathered"] and result["resumed"]
        if world == 4:
            assert re.match(
                r"(?s)ValueError: group: missing.*mesh with several axes.*\(2, 2\).*without \[", result["refused"]
            )
        refresh, step = result["calls"]
        assert step == ["all_gather", "all_reduce"] and refresh == step + ["all_reduce"] * 2


@pytest.mark.slow
def test_the_example_ends_as_one_process_alone():
    printed = torchrun("examples.fully_sharded", "--steps", "7")
    (difference,) = re.findall(r"largest difference of parameters: (\S+)", printed)
    part, alone = re.findall(r"bytes of parameters in a process: (\d+), alone: (\d+)", printed)[0]
    assert float(difference) < 1e-10 and int(part) * 2 == int(alone)


@pytest.fixture
def mesh(tmp_path):
    """Of one process, this one."""
    if not torch.distributed.is_available():
        pytest.skip("torch without torch.distributed")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1, 1), mesh_dim_names=("data", "model"))
    torch.distributed.destroy_process_group()


X, Y = torch.randn(8, 4, dtype=torch.float64), torch.randint(2, (8,))


def network():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def tensor_parallel(mesh):
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    return parallelize_module(network(), mesh["model"], {"0": ColwiseParallel(), "2": RowwiseParallel()})


def fully_sharded(mesh, net=None, **options):
    from torch.distributed.fsdp import fully_shard

    return fully_shard(network() if net is None else net, mesh=mesh["data"], **options)


def cast(mesh):
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return fully_sharded(mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))


def flattened(mesh):
    from torch.distributed.fsdp import FullyShardedDataParallel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has nothing to shard in one process
        return FullyShardedDataParallel(network(), device_id=torch.device("cpu"))


MODULES = {
    "parallelize_module": (tensor_parallel, r"'0.weight' is a DTensor .*tensor parallelism.*before parallelize_module"),
    "both": (
        lambda mesh: fully_sharded(mesh, tensor_parallel(mesh)),
        "'0.weight' is a DTensor .*under fully_shard alone",
    ),
    "mixed precision": (cast, "MixedPrecisionPolicy.*evaluate under torch.autocast"),
    "the older class": (flattened, "FullyShardedDataParallel over several processes"),
}


@pytest.mark.parametrize("kind", MODULES)
def test_modules_that_are_refused(kind, mesh):
    make, words = MODULES[kind]
    net = make(mesh)
    for call in (lrkfac.from_module, lambda net: lrkfac.LowRankKFAC(net, lrkfac.categorical(), X, lr=0.1)):
        with pytest.raises(ValueError, match=f"module: .*{words}"):
            call(net)


def test_sharded_tensors_are_refused_where_whole_ones_are_needed(mesh):
    """By one sentence that names argument, leaf and remedy, in the place of five errors of torch."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    model, params = lrkfac.from_module(network())
    layers = lrkfac.find_layers(model, params, X)
    evaluate, tx = lrkfac.evaluator(model, lrkfac.categorical(), layers), lrkfac.low_rank_kfac(layers, 0.1, rank=1)
    evaluation, state = evaluate(params, X, Y), tx.init(params)
    for place in (Shard(0), Replicate()):
        cut, x, y = optree.tree_map(lambda t, p=place: distribute_tensor(t, mesh["data"], [p]), (params, X, Y))
        calls = {
            "params": [
                lambda d=cut: lrkfac.find_layers(model, d, X), lambda d=cut: evaluate(d, X, Y),
                lambda d=cut: tx.init(d), lambda d=cut: evaluation.loss_at(d),
                lambda d=cut: tx.update(evaluation.grads, state, d, evaluation=evaluation),
                lambda d=cut: lrkfac.checkpoint.save("nowhere", d, (), layers),
            ],
            "inputs": [lambda d=x: lrkfac.find_layers(model, params, d), lambda d=x: evaluate(params, d, Y)],
            "targets": [lambda d=y: evaluate(params, X, d)],
            "tangent": [lambda d=cut: evaluation.product(d)],
            "updates": [lambda d=cut: tx.update(d, state, params, evaluation=evaluation),
                        lambda d=cut: lrkfac.apply_updates(params, d)],
            "evaluations": [lambda d=cut: lrkfac.merge_evaluations([evaluation, evaluation._replace(grads=d)])],
        }  # fmt: skip
        for name, of_argument in calls.items():
            for call in of_argument:
                leaf = "" if name in ("inputs", "targets") else " at '0.bias'"
                with pytest.raises(
                    TypeError, match=rf"{name}.*whole tensors, got a DTensor .*{leaf}; pass lrkfac.unshard"
                ):
                    call()


def test_the_function_of_a_sharded_module(mesh):
    """It is that of the module inside, holds none of its parameters, and copies and pickles, as the module does not."""
    plain = network()
    plain[2].bias.requires_grad_(False)
    net = fully_sharded(mesh, copy.deepcopy(plain))
    with torch.no_grad():
        net(X)  # the outermost parameters are whole afterwards
    model, params = lrkfac.from_module(net)
    whole = lrkfac.unshard(params)
    assert set(params) == set(whole) == {"0.weight", "0.bias", "2.weight"}
    assert all(type(x) is torch.Tensor and not x.requires_grad for x in whole.values())
    assert all(p.device.type == "meta" for p in model.module.parameters())
    assert type(model.module) is nn.Sequential and type(net) is not nn.Sequential
    for function in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(function(whole, X), plain(X))


def test_updates_of_sharded_parameters(mesh):
    """Each part takes its part of the update, also of a lazy one; what is cut shares memory with nothing else."""
    net = fully_sharded(mesh)
    _, params = lrkfac.from_module(net)
    whole = lrkfac.unshard(params)
    updates = optree.tree_map(torch.ones_like, whole)
    rows = torch.randn(3, 6).double(), torch.randn(3, 4).double()
    updates["0.weight"] = lrkfac.LazyMatrix(*rows, torch.float64)
    changed = torch.compile(lrkfac.apply_updates, backend="eager", fullgraph=True)(
        params, optree.tree_map(lambda x: x, lrkfac.materialize(updates))
    )
    for new in (lrkfac.apply_updates(params, updates), changed):
        for name, x in lrkfac.unshard(new).items():
            assert torch.equal(x, whole[name] + lrkfac.materialize(updates)[name])
            assert type(new[name]) is type(params[name]) and new[name].placements == params[name].placements
    assert torch.equal(local_parts(params)["0.bias"], whole["0.bias"])  # nothing has changed
    assert shard_like(params, params) == params and shard_like(whole, whole) == whole
    with pytest.raises(ValueError, match=r"updates: expected '0.weight' of shape"):
        lrkfac.apply_updates(params, {**updates, "0.weight": whole["0.weight"].T})


def test_a_model_that_computes_with_sharded_weights_is_refused_by_its_parameters(mesh):
    net = tensor_parallel(mesh)
    params = dict(net.named_parameters())
    with pytest.raises(TypeError, match=r"params: .*tensor parallelism"):
        lrkfac.find_layers(lambda p, x: functional_call(net, p, (x,)), params, X)
