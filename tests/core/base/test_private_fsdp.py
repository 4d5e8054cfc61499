"""What torch does not document of ``fully_shard``, as the package expects it: see ``test_private_torch.py``."""

import copy
import inspect
from pathlib import Path

import pytest
import torch
from torch import nn

from lrkfac.core.base import private_fsdp


def test_every_function_has_its_test():
    functions = inspect.getmembers(private_fsdp, inspect.isfunction)
    named = [name for name, f in functions if f.__module__ == private_fsdp.__name__]
    source = Path(__file__).read_text()
    assert named and all(f"private_fsdp.{name}(" in source for name in named)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_modules_under_fully_shard():
    """Each part of the copy has its own class and hooks, and none of ``fully_shard``."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        net = nn.Sequential(nn.Linear(3, 3), nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
        net[0].register_forward_hook(doubled_output)
        plain, x = copy.deepcopy(net), torch.randn(4, 3)
        policy, mesh = MixedPrecisionPolicy(param_dtype=torch.bfloat16), torch.distributed.init_device_mesh("cpu", (1,))
        assert private_fsdp.casts_of_fully_shard(net) is None and not private_fsdp.is_fully_sharded(net[0])
        fully_shard(net[1], mesh=mesh, mp_policy=policy)
        fully_shard(net, mesh=mesh)
        assert private_fsdp.casts_of_fully_shard(net[1]).param_dtype == torch.bfloat16
        assert all(private_fsdp.is_fully_sharded(part) for part in net.modules())
        memo = {id(p): nn.Parameter(p.detach().full_tensor()) for p in net.parameters()}
        unwrapped = private_fsdp.unwrapped_copy(net, memo)
        assert [type(part).__mro__[1:] for part in unwrapped.modules()] == [
            type(p).__mro__[1:] for p in plain.modules()
        ]
        assert not any(private_fsdp.is_fully_sharded(part) for part in unwrapped.modules())
        assert torch.equal(copy.deepcopy(unwrapped)(x), plain(x))
        assert private_fsdp.is_fully_sharded(net[0])
    finally:
        torch.distributed.destroy_process_group()


def doubled_output(module, inputs, output):
    return 2 * output
