"""Checkpoints of several processes: written by four, read by two and by one, bit for bit."""

import optree
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import lrkfac
from lrkfac.checkpoint import from_state_dict, load, save, state_dict
from lrkfac.structures import dense, kronecker, low_rank
from tests.distributed.processes import run

pytest.importorskip("safetensors", reason="the extra `checkpoint`")
# Torch warns that there is no process group: it is one process that reads what several wrote.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]
STEPS = 4
X, Y = torch.linspace(-2, 2, 54).sin().reshape(9, 6), torch.arange(9) % 3


def chain_of(layers):
    """With numbers, tensors with and without axes, and states within states."""
    return lrkfac.chain(
        lrkfac.precondition_by_fisher(layers, kronecker(low_rank(2), dense()), damping=0.1),
        lrkfac.clip_by_kl(0.01, 0.1),
        lrkfac.trace(0.9),
        lrkfac.scale_by_learning_rate(lrkfac.schedules.warmup_cosine_decay_schedule(0.0, 0.1, 2, 20)),
    )


class Run:
    """A training by functions, and one by ``LowRankKFAC``; both draw labels from torch's generator."""

    def __init__(self, seed):
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3))
        self.model, self.params = lrkfac.from_module(self.net)
        self.layers = lrkfac.find_layers(self.model, self.params, X)
        self.evaluate = lrkfac.evaluator(self.model, lrkfac.categorical(), self.layers)
        self.tx = chain_of(self.layers)
        self.state = self.tx.init(self.params)
        self.optimizer = lrkfac.LowRankKFAC(self.net, lrkfac.categorical(), X[:1], lr=0.1, rank=2, statistics_every=3)

    def step(self, number):
        for _ in range(number):
            evaluation = self.evaluate(self.params, X, Y)
            updates, self.state = self.tx.update(evaluation.grads, self.state, self.params, evaluation=evaluation)
            self.params = lrkfac.apply_updates(self.params, updates)
            self.optimizer.step(X, Y)
        return self

    def saved(self):
        """What one dictionary of a distributed checkpoint holds of it."""
        return {
            "params": self.params,
            "state": state_dict(self.state),
            "net": self.net.state_dict(),
            "optimizer": get_optimizer_state_dict(self.net, self.optimizer),
            "generator": torch.get_rng_state(),
        }

    def read(self, folder):
        read = self.saved() | {"params": optree.tree_map(torch.zeros_like, self.params)}
        dcp.load(read, checkpoint_id=folder / "distributed")
        self.params, self.state = read["params"], from_state_dict(self.state, read["state"])
        self.net.load_state_dict(read["net"])
        set_optimizer_state_dict(self.net, self.optimizer, read["optimizer"])
        torch.set_rng_state(read["generator"])
        return self

    def leaves(self):
        """Everything that a step changes, by name."""
        return state_dict(self.saved())


def written(folder):
    """Write in the middle of a training; its state there and at its end."""
    training = Run(0).step(STEPS)
    dcp.save(training.saved(), checkpoint_id=folder / "distributed")
    if dist.get_rank() == 0:
        save(folder / "run.safetensors", training.params, training.state, training.layers)
    return training.leaves(), training.step(STEPS).leaves()


def resumed(folder):
    """Read into a training that began elsewhere; its state then and at its end, and what the file of one rank says."""
    training, other = Run(1), Run(2)
    params, state = load(folder / "run.safetensors", other.params, other.state, other.layers)
    middle = training.read(folder).leaves()
    return middle, training.step(STEPS).leaves(), state_dict({"params": params, "state": state_dict(state)})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The folder, and the results of the four processes that wrote it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    return folder, run(written, 4, folder / "four", folder)


def equal(one, other):
    assert one.keys() == other.keys()
    for name, x in one.items():
        assert torch.equal(x, other[name]) if isinstance(x, torch.Tensor) else x == other[name], name


@pytest.mark.parametrize("world", [2, 1])
def test_written_by_four_processes_and_read_by_fewer(checkpoint, world):
    """What is read is what was written, and training goes on as if it had not stopped, on each process."""
    folder, results = checkpoint
    middle, end = results[0]
    for of_rank in results[1:]:
        for one, other in zip(of_rank, results[0], strict=True):
            equal(one, other)
    read = run(resumed, world, folder / f"to{world}", folder) if world > 1 else [resumed(folder)]
    for found_middle, found_end, of_file in read:
        equal(found_middle, middle)
        equal(found_end, end)
        equal(of_file, {name: middle[name] for name in of_file})


def test_processes_share_in_writing(checkpoint):
    """Equal tensors are written by one process, and not all by the same."""
    places = dcp.FileSystemReader(checkpoint[0] / "distributed").read_metadata().storage_data
    assert len({place.relative_path for place in places.values()}) == 4
    assert len({index.fqn for index in places}) == len(places)
