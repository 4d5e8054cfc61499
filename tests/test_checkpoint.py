"""Checkpoints: what comes back is what was saved, a run goes on as if it had not stopped, and nothing else loads."""

import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import optree
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import lrkfac
from lrkfac.checkpoint import from_state_dict, state_dict
from lrkfac.structures import kronecker, low_rank, low_rank_plus_diagonal
from tests.core.curvature.test_refresh import deep

safetensors = pytest.importorskip("safetensors", reason="the extra `checkpoint`")
CHAINS = {
    "low rank": lambda layers: lrkfac.low_rank_kfac(layers, 0.1, rank=2, kl_clip=1e-2),
    "dense": lambda layers: lrkfac.kfac(layers, lrkfac.schedules.warmup_cosine_decay_schedule(0.0, 0.1, 2, 20)),
    "adaptive": lambda layers: lrkfac.adaptive_low_rank_kfac(layers, rank=2, dense_up_to=0),
    "corrected": lambda layers: lrkfac.precondition_by_fisher(layers, kronecker(*[low_rank(2)] * 2, corrected=True)),
    "spectral": lambda layers: lrkfac.spectral_kfac(layers, 0.01, rank=2),
    "exact": lambda layers: lrkfac.precondition_by_fisher(
        layers, kronecker(low_rank(2), low_rank_plus_diagonal(2), exact_damping=True)
    ),
    "spectral, no rate": lambda layers: lrkfac.spectral_kfac(layers, rank=2),
    "units": lambda layers: lrkfac.precondition_by_fisher(layers, lrkfac.structures.unit_wise()),
    "wrapped": lambda layers: lrkfac.apply_if_finite(
        lrkfac.inject_hyperparams(lrkfac.low_rank_kfac)(layers, learning_rate=0.1, rank=2), 3
    ),
}


def run(chain="low rank", steps=0, begun=None, **options):
    """Parameters and number of steps, state and layers, after some steps from the start or from the first two."""
    layers, params, evaluate = deep(3, **options)  # layers of equal form are refreshed together
    tx = CHAINS[chain](layers)
    progress, state = begun or ({"params": params, "step": 0}, tx.init(params))
    for _ in range(steps):
        params, step = progress.values()
        e = evaluate(params, statistics=step % 3 == 0)
        updates, state = tx.update(e.grads, state, params, evaluation=e)
        progress = {"params": lrkfac.apply_updates(params, updates), "step": step + 1}
    return progress, state, layers


def by_save(half, new, folder):
    lrkfac.checkpoint.save(folder / "run.safetensors", *half)
    return lrkfac.checkpoint.load(folder / "run.safetensors", *new)


def by_distributed_checkpoint(half, new, folder):
    from torch.distributed import checkpoint

    saved, read = ({"progress": state_dict(x[0]), "state": state_dict(x[1])} for x in (half, new))
    checkpoint.save(saved, checkpoint_id=folder / "run")
    checkpoint.load(read, checkpoint_id=folder / "run")
    return from_state_dict(new[0], read["progress"]), from_state_dict(new[1], read["state"])


# torch warns of its own: no process group, its storage.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("chain", "way"), [*((c, by_save) for c in CHAINS), ("wrapped", by_distributed_checkpoint)])
def test_resuming_equals_not_stopping_bit_for_bit(chain, way, tmp_path):
    begun = way(run(chain, 4), run(chain), tmp_path)
    same_tree(run(chain, 4, begun)[:2], run(chain, 8)[:2])


Pair = namedtuple("Pair", ["left", "right"])
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)


@st.composite
def tensors(draw):
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    x = torch.randint(0, 2, shape).to(draw(st.sampled_from(DTYPES)))
    x = x.permute(draw(st.permutations(range(x.ndim))))
    return x.expand(3, *x.shape) if draw(st.booleans()) else x[..., :1] if x.ndim and draw(st.booleans()) else x


LEAVES = st.one_of(tensors(), st.integers(-5, 5), st.floats(allow_nan=False), st.booleans(), st.text(max_size=3))
KEYS = st.sampled_from(["a", "a.b", "b", "0", "", "a#1", "ü"])
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.dictionaries(KEYS, inner, max_size=3),
        *[st.lists(inner, max_size=3).map(kind) for kind in (list, tuple)],
        st.builds(Pair, inner, inner),
    ),
    max_leaves=8,
)


def same_tree(tree, expected):
    assert optree.tree_structure(tree) == optree.tree_structure(expected)
    for x, y in zip(optree.tree_leaves(tree), optree.tree_leaves(expected), strict=True):
        if isinstance(x, torch.Tensor):
            assert torch.equal(x, y) and x.dtype == y.dtype and x.is_contiguous() >= y.is_contiguous()
        else:
            assert type(x) is type(y) and x == y


def zeroed(x):
    return torch.zeros_like(x) if isinstance(x, torch.Tensor) else type(x)()


@given(tree=st.tuples(TREES, TREES))
@example(tree=({"a": {"b": 1}, "a.b": 2.0, "a.b#1": "3"}, ()))
def test_any_tree_comes_back(tmp_path_factory, tree):
    """From a file and from a flat dictionary."""
    path, like = tmp_path_factory.mktemp("any") / "run", optree.tree_map(zeroed, tree)
    lrkfac.checkpoint.save(path, *tree)
    same_tree(lrkfac.checkpoint.load(path, *like), tree)
    flat = state_dict(tree)
    assert len(flat) == len(optree.tree_leaves(tree))
    assert all(isinstance(x, torch.Tensor | int | float | str) for x in flat.values())
    torch.save(flat, path)
    same_tree(from_state_dict(like, torch.load(path, weights_only=True)), tree)


def test_a_flat_dictionary_is_a_copy():
    _, state, _ = run()
    kept = optree.tree_map(torch.clone, state)
    for x in state_dict(state).values():
        x.add_(1)
    assert optree.tree_all(optree.tree_map(torch.equal, state, kept))


def test_matrices_lie_in_memory_as_they_did(tmp_path):
    x = torch.randn(4, 3)
    state = {"columns": x.mT, "repeated": x[:3, :1].expand(3, 5), "part": x[1:3]}
    state["turned"] = torch.randn(2, 3, 4).permute(1, 2, 0)
    lrkfac.checkpoint.save(tmp_path / "x", {}, state)
    _, loaded = lrkfac.checkpoint.load(tmp_path / "x", {}, optree.tree_map(torch.zeros_like, state))
    strides = {"columns": (1, 3), "repeated": (1, 0), "part": (3, 1), "turned": (4, 1, 12)}
    assert {name: x.stride() for name, x in loaded.items()} == strides
    assert all(torch.equal(x, loaded[name]) for name, x in state.items())
    assert os.path.getsize(tmp_path / "x") < 2000


def test_written_then_forced_to_disk_then_renamed_then_the_folder(tmp_path, monkeypatch):
    """A failure leaves the last one."""
    calls, fsync, replace, path = [], os.fsync, os.replace, tmp_path / "x"

    def seen_fsync(number):
        is_folder = os.path.isdir(f"/proc/self/fd/{number}")
        calls.append(("folder" if is_folder else "file", os.path.exists(path)))
        fsync(number)

    def seen_replace(source, target):
        assert Path(source).parent == Path(target).parent
        calls.append("rename")
        replace(source, target)

    def fails(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(os, "replace", seen_replace)
    lrkfac.checkpoint.save(path, {"w": torch.ones(3)}, ())
    assert calls == [("file", False), "rename", ("folder", True)]
    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="no space"):
        lrkfac.checkpoint.save(path, {"w": torch.zeros(3)}, ())
    assert os.listdir(tmp_path) == ["x"]
    assert lrkfac.checkpoint.load(path, {"w": torch.zeros(3)}, ())[0]["w"].sum() == 3


@pytest.mark.slow
def test_killed_at_any_moment_the_last_good_one_is_there(tmp_path):
    command = [sys.executable, "-m", "tests.killed_while_saving", "20", str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "20 kills" in done.stdout
