"""Processes of a group, as far as one process shows them; see tests/distributed for several."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from lrkfac.core.base.collectives import register
from lrkfac.core.base.processes import Among, Processes, _chunks, counted, processes_of
from lrkfac.core.base.replicas import check_replicas, check_same, fingerprints


@pytest.fixture
def world(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@given(st.lists(st.integers(0, 40), max_size=8), st.integers(1, 17))
def test_chunks_hold_every_entry_once_in_order(sizes, limit):
    chunks = list(_chunks(sizes, limit))
    assert all(sum(last - first for _, first, last in chunk) <= limit for chunk in chunks)
    assert len(chunks) <= sum(sizes) // limit + 1
    entries = [(i, entry) for chunk in chunks for i, first, last in chunk for entry in range(first, last)]
    assert entries == [(i, entry) for i, size in enumerate(sizes) for entry in range(size)]
    assert {i for chunk in chunks for i, _, _ in chunk} == set(range(len(sizes)))


def test_alone_nothing_is_called(world):
    processes = processes_of(world)
    assert (processes.rank, processes.size) == (0, 1)
    x = torch.ones(2)
    with counted() as calls:
        assert processes.sum([x])[0] is x
        assert processes.gather(x[None], 3).tolist() == [[1, 1], [0, 0], [0, 0]]
        assert processes.exchange("message") == ["message"]
        check_replicas({"x": x}, world)
    assert calls == []


def test_meshes_with_one_axis_are_taken(world):
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,), mesh_dim_names=("data",))
    assert processes_of(mesh).size == 1
    two = dist.device_mesh.init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicate", "shard"))
    with pytest.raises(ValueError, match=r"group: expected a mesh with one axis.*'replicate', 'shard'"):
        processes_of(two)


def test_processes_travel_by_name(world):
    processes = processes_of(world)
    for again in (copy.deepcopy(processes), pickle.loads(pickle.dumps(processes))):
        assert again == processes
        assert register.group(again.name) is world
    with pytest.raises(RuntimeError, match="expected the group 'of another process' to be known"):
        Processes("of another process", 0, 2).sum([torch.ones(1)])


def test_what_is_no_group_is_refused(world):
    for wrong in (1, "gloo", object(), torch.ones(2)):
        with pytest.raises(TypeError, match=r"group: expected a torch\.distributed process group"):
            processes_of(wrong)
    with pytest.raises(
        ValueError, match="group: expected a group of which this process is one, got one without rank 0"
    ):
        processes_of(dist.GroupMember.NON_GROUP_MEMBER)


def test_shares_are_parts_of_the_examples():
    among = Among(Processes("alone", 0, 1), torch.tensor(3.0), torch.tensor(12.0))
    assert among.share == 0.25
    assert among._replace(size=torch.tensor(0.0), total=torch.tensor(0.0)).share == 0


def test_the_first_difference_is_named_with_its_ranks():
    same = {"a": "1", "b": "2"}
    check_same("settings", [same] * 4)
    with pytest.raises(ValueError, match=r"settings: .*all 4 ranks, 'b' differs: rank 0 has 2, rank 2 has 3; "):
        check_same("settings", [same, same, {"a": "1", "b": "3"}, same])
    with pytest.raises(ValueError, match=r"'c' differs: rank 0 has nothing, rank 1 has 1, .* and 1 more ranks differ"):
        check_same("settings", [same, *[{**same, "c": "1"}] * 4])


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.complex64, torch.bool]
)
def test_fingerprints_see_every_bit_and_place(dtype):
    x = torch.arange(6).reshape(2, 3).to(dtype)
    tree = {"x": x, "step": 3}
    assert fingerprints(tree) == fingerprints({"x": x.clone(), "step": 3})
    assert fingerprints(tree) != fingerprints({"x": x.flip(0), "step": 3}) or dtype == torch.bool
    assert fingerprints(tree) != fingerprints({"x": x.reshape(3, 2), "step": 3})
    assert fingerprints(tree) != fingerprints({"x": x, "step": 4})
    if dtype.is_floating_point:
        moved = x.clone()
        moved[1, 2] = torch.nextafter(moved[1, 2], moved[1, 2] + 1)
        assert fingerprints(tree) != fingerprints({"x": moved, "step": 3})
        assert fingerprints({"x": 0 * x}) != fingerprints({"x": -0.0 * x})  # bit for bit
