"""The problems of ``time_to_loss`` and the methods that train them: each builds, takes steps, and is judged."""

import dataclasses
import functools
import json
import struct
from unittest import mock

import pytest
import torch

import lrkfac
from benchmarks import problems
from benchmarks.data import TEXT, labelled_images, text
from benchmarks.methods import GRID_SIZE, METHODS
from benchmarks.muon import Muon
from benchmarks.problems import PROBLEMS
from benchmarks.runs import Run, train
from benchmarks.trainers import Functional, Leaves, Setup

CPU = torch.device("cpu")


@functools.cache
def setup(name):
    with mock.patch.multiple(problems, GPT_CONTEXT=8, GPT_WIDTH=16, GPT_BLOCKS=1):  # as slow as the others, else
        problem = PROBLEMS[name](None, "relu")
    params = problem.init(0)
    layers = lrkfac.find_layers(problem.model, params, problem.argument(problem.inputs[:2]), strict=True)
    return problem, Setup(problem, params, layers, 0, 3, 4, 2, False)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_every_method_takes_three_steps_on_every_problem(name, method):
    if METHODS[method].missing:
        pytest.skip(METHODS[method].missing)
    if (name, method) == ("deep_autoencoder", "muon"):
        pytest.skip("bfloat16 products of this width take a minute on some CPUs; the digits autoencoder is alike")
    problem, start = setup(name)
    # The loss of few examples, or of few windows of the text: that of all takes longer than the steps.
    problem = dataclasses.replace(problem, inputs=problem.inputs[:64], targets=problem.targets[:64], evaluated=1)
    run = Run(method, {}, 0)
    trainer = METHODS[method].make(start, METHODS[method].settings)
    assert sum(train(problem, trainer, run, min(16, problem.batch_size), 3, 3, CPU)) == 3
    assert run.steps == [0, 1, 2, 3] and not run.diverged
    assert run.loss[0] == pytest.approx(problem.loss(problem.init(0)), rel=1e-4)
    assert run.loss[0] not in (run.loss[3], problem.loss(problem.init(1)))
    assert len(run.accuracy) == (4 if name == "fashion_cnn" else 0)
    assert run.state_bytes > 0 and run.seconds == sorted(run.seconds)


def test_an_epoch_sees_every_example_once_in_an_order_of_its_seed():
    problem, _ = setup("digits_classifier")
    epochs = [problem.batches(500, seed) for seed in (0, 0, 1)]
    first, again, other = (torch.cat([next(batches) for _ in range(3)]) for batches in epochs)
    assert torch.equal(first.sort().values, torch.arange(1500))
    assert torch.equal(first, again) and not torch.equal(first, other)
    with pytest.raises(ValueError, match="at most 1500 examples, got 1501"):
        next(problem.batches(1501, 0))


def test_grids_are_equal():
    for method in METHODS.values():
        assert len(method.grid) == (1 if method.ours else GRID_SIZE)
        assert len({json.dumps(settings) for settings in method.grid}) == len(method.grid)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch._prims_common.check:FutureWarning")  # torch's own aten.diagonal
@pytest.mark.parametrize("method", ["low_rank_kfac", "adam"])
def test_every_way_of_training_takes_the_same_steps(method, monkeypatch):
    """Of a chain, or of an optimizer and the chain that equals it; after warming up, and traced."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    problem, start = setup("digits_classifier")
    make, compiled = METHODS[method].make, dataclasses.replace(start, compiled=True)
    settings = {"learning_rate": 0.01} if method == "adam" else {}
    trainers = [make(start, settings), make(compiled, settings)]
    trainers[1].warm_up(problem.inputs[:32], problem.targets[:32])
    if method == "adam":
        trainers.append(Functional(start, lrkfac.chain(lrkfac.scale_by_adam(), lrkfac.scale_by_learning_rate(0.01))))
    for trainer in trainers:
        for batch, _ in zip(problem.batches(32, 0), range(3), strict=False):
            trainer.step(problem.inputs[batch], problem.targets[batch])
        for name, expected in trainers[0].params().items():
            torch.testing.assert_close(trainer.params()[name], expected, rtol=1e-4, atol=1e-4)  # of steps of 1e-2


def test_buffers_travel_and_judge_in_evaluation_mode():
    problem, start = setup("fashion_cnn")
    before = {name: x.clone() for name, x in problem.buffers.items()}
    sgd = lrkfac.chain(lrkfac.scale_by_learning_rate(0.1))
    trainers = [Functional(start, sgd), Leaves(start, lambda leaves: [torch.optim.SGD(leaves.values(), lr=0.1)])]
    module = problems.with_batch_norm()
    module.load_state_dict({**start.params, **before})
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for batch, _ in zip(problem.batches(64, 0), range(3), strict=False):
        inputs, targets = problem.inputs[batch], problem.targets[batch]
        for trainer in trainers:
            trainer.step(inputs, targets)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module(inputs), targets).backward()
        optimizer.step()
    module.eval()
    expected = (module(problem.test_inputs).argmax(1) == problem.test_targets).float().mean().item()
    for trainer in trainers:
        judged = trainer.params(), trainer.buffers()
        for name, x in judged[1].items():
            torch.testing.assert_close(x, module.get_buffer(name), rtol=1e-4, atol=1e-5)
        assert problem.accuracy(*judged) == pytest.approx(expected, abs=0.01)
        assert problem.loss(*judged) != pytest.approx(problem.loss(trainer.params()), rel=1e-3)
    assert all(torch.equal(x, before[name]) for name, x in problem.buffers.items())


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_muon_in_float32_is_torchs(shape):
    if METHODS["muon"].missing:
        pytest.skip(METHODS["muon"].missing)
    gradients = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0))
    trained = []
    for make in (Muon, functools.partial(torch.optim.Muon, weight_decay=0.0)):
        x = torch.zeros(shape, requires_grad=True)
        optimizer = make([x], lr=0.1)
        for gradient in gradients:
            x.grad = gradient.clone()
            optimizer.step()
        trained.append(x.detach())
    torch.testing.assert_close(*trained, rtol=0, atol=0.01)  # five steps of 0.1, in bfloat16
    assert trained[0].abs().max() > 0.2


def test_labels_and_text_are_read_from_files(tmp_path):
    inputs, labels, test_inputs, test_labels, _ = labelled_images(None)
    assert (len(inputs), len(labels), len(test_inputs), len(test_labels)) == (1500, 1500, 297, 297)
    for part, number in (("train", 3), ("t10k", 2)):
        header = b"\x00\x00\x08\x03" + struct.pack(">3I", number, 28, 28)
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(header + bytes([51] * number * 784))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(
            b"\x00\x00\x08\x01" + struct.pack(">I", number) + bytes(range(number))
        )
    inputs, labels, test_inputs, test_labels, described = labelled_images(tmp_path)
    assert labels.tolist() == [0, 1, 2] and test_labels.tolist() == [0, 1] and "3 images" in described
    assert inputs.shape == (3, 784) and test_inputs.shape == (2, 784) and (inputs == 0.2).all()
    with pytest.raises(FileNotFoundError, match=r"expected bible\.txt; benchmarks/get_data .* --text"):
        text(tmp_path)
    (tmp_path / TEXT).write_text("abcab\xe9", encoding="latin-1")
    codes, kinds, _ = text(tmp_path)
    assert codes.tolist() == [0, 1, 2, 0, 1, 3] and kinds == "abc?"
