"""The benchmarks: every problem builds, every method trains, results survive, files of images are read."""

import dataclasses
import functools
import gzip
import json
import math
import struct
import sys
from unittest import mock

import numpy as np
import optree
import pytest
import torch

import lrkfac
from benchmarks import kfac_jax, problems, time_to_loss
from benchmarks.alive import alive_at_peak
from benchmarks.common import interleaved, median_ratios, peak_bytes, write_json
from benchmarks.data import TEXT, labelled_images, read_idx, text, training_images
from benchmarks.kfac_jax_in_torch import framework, sgd
from benchmarks.kfac_jax_report import rows_of
from benchmarks.kfac_jax_rounds import Rounds, network
from benchmarks.methods import GRID_SIZE, METHODS
from benchmarks.muon import Muon
from benchmarks.problems import PROBLEMS
from benchmarks.robustness import trained
from benchmarks.runs import Results, Run, train
from benchmarks.time_to_loss_report import Line, draw, lines, table
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
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    trained = []
    for make in (Muon, functools.partial(torch.optim.Muon, weight_decay=0.0)):
        x = start.clone().requires_grad_()
        optimizer = make([x], lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            (x**4).sum().backward()
            optimizer.step()
        trained.append(x.detach() - start)
    torch.testing.assert_close(*trained, rtol=0, atol=0.02)  # of sums of five steps of 0.1, in bfloat16
    assert trained[0].abs().max() > 0.2


# Results -----------------------------------------------------------------------------------------------


def curve(method, settings, seed, loss, diverged=False):
    steps = [10 * i for i in range(len(loss))]
    return Run(method, settings, seed, 0, 8, steps, [step / 100 for step in steps], loss, diverged)


def test_results_survive_and_are_replaced_by_key(tmp_path):
    def saved(loss, command, settings):
        results = Results(tmp_path / "results.json")
        results.add([curve("sgd", settings, seed, [3.0, loss]) for seed in (0, 1)], {"command": command})
        results.write()
        read = Results(tmp_path / "results.json")
        assert read.runs == results.runs and read.environments == [{"command": command}]
        assert [(run.final_loss, run.environment) for run in read.runs.values()] == [(loss, 0)] * 2

    saved(2.0, "first", {"a": 1.0, "b": 2})
    saved(1.0, "second", {"b": 2, "a": 1.0})


def test_the_best_settings_have_the_least_median_among_those_with_most_seeds(tmp_path):
    results = Results(tmp_path / "results.json")
    losses = {1: [1.0, 2.0, 9.0], 2: [1.5, 1.5, 1.5], 3: [0.1]}
    runs = [curve("sgd", {"x": x}, seed, [9.0, y]) for x, many in losses.items() for seed, y in enumerate(many)]
    runs += [curve("sgd", {"x": 4}, seed, [0.5], diverged=True) for seed in range(3)]
    results.add(runs, {})
    assert {run.settings["x"] for run in results.best("sgd")} == {2}
    assert math.isinf(runs[-1].final_loss)


def test_the_target_is_reached_between_points():
    line = Line("sgd", "SGD", [curve("sgd", {}, 0, [4.0, 2.0, 1.0])])
    assert [line.reaches(x) for x in (3.0, 4.0, 0.5)] == [pytest.approx((5.0, 0.05)), (0, 0.0), (math.inf, math.inf)]


def test_a_loss_that_rounds_to_its_lower_bound_is_drawn(tmp_path):
    results = Results(tmp_path / "results.json")
    results.add([curve("sgd", {}, 0, [4.0, 1e-6, 0.0])], {})
    left, _ = draw(PROBLEMS["digits_classifier"](None, "relu"), results).axes
    assert list(left.lines[0].get_ydata()) == [4.0, 1e-6, 0.0] and left.get_yscale() == "log"


@pytest.mark.slow
def test_the_command_runs_resumes_and_reports(tmp_path, monkeypatch, capsys):
    path = tmp_path / "time_to_loss-regression-batch128-steps6-cpu.json"

    def main(arguments):
        common = f"time_to_loss --problem regression --steps 6 --points 2 --output {tmp_path} --rank 1 4 --method sgd"
        monkeypatch.setattr(sys, "argv", f"{common} low_rank_kfac {arguments}".split())
        time_to_loss.main()
        return Results(path), capsys.readouterr().out

    first, _ = main("--grid")
    assert len(first.runs) == GRID_SIZE * 3  # two ranks
    second, out = main("adam --seeds 2")
    assert "rank 1" in out and "rank 4" in out
    assert len(second.runs) == len(first.runs) + 3 + 2  # the second seed of three, and two of Adam
    assert all(second.runs[key].loss == run.loss for key, run in first.runs.items())
    assert {line.label: len(line.runs) for line in lines(second)}["SGD, Nesterov momentum"] == 2
    assert path.with_suffix(".png").stat().st_size > 1000
    assert table(PROBLEMS["regression"](None, "relu"), second).row_count == 4


# kfac-jax ----------------------------------------------------------------------------------------------


def test_ratios_are_of_the_steps_beside_and_the_first_round_is_apart():
    """Three steps a round, of which the first refreshes; the first round also compiles for a second."""
    rounds = [{"SGD": [1.0, 1.0, 2.0], "K-FAC": [x, 2.0, 4.0]} for x in (10.0, 9.0, 9.0)]
    answers = [{"seconds": one, "processors": one, "finite": {"SGD": True, "K-FAC": True}} for one in rounds]
    sgd_row, row = rows_of("torch", answers)
    assert (row["ratio"], row["refresh ratio"], row["mean ratio"], row["first"]) == (2.0, 9.0, 15 / 4, 1.0)
    assert (row["seconds"], row["refresh seconds"], sgd_row["seconds"], sgd_row["mean ratio"]) == (3.0, 9.0, 1.5, 1.0)


def test_a_round_trains_by_every_method_to_the_next_refresh():
    some = network("8", 4, CPU)
    settings = {"framework": "torch", "every": 2, "rank": 2, "device": "cpu"}
    rounds = Rounds(framework(some._replace(module=None), settings), some.batches, 2)
    for _ in range(2):
        answer = rounds.round()
        assert set(answer["seconds"]) == {"SGD", "rank 2", "rank 2, adaptive", "dense"} == set(answer["finite"])
        assert all(len(of_name) == 2 and min(of_name) > 0 for of_name in answer["seconds"].values())
        assert all(answer["finite"].values())
    for training in rounds.trainings.values():
        assert all((training.params[name] != x).any() for name, x in some.params.items())


def test_without_kfac_jax_the_command_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(kfac_jax, "MISSING", f"needs jax and kfac-jax: {kfac_jax.INSTALL}")
    monkeypatch.setattr(sys, "argv", ["kfac_jax"])
    with pytest.raises(SystemExit, match="pip install jax git"):
        kfac_jax.main()


@pytest.mark.skipif(bool(kfac_jax.MISSING), reason=kfac_jax.MISSING)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what kfac-jax imports
@pytest.mark.parametrize("size", ["8", "digits"])
def test_both_frameworks_take_the_same_step_on_the_same_batch(size):
    import jax

    from benchmarks import kfac_jax_in_jax as in_jax

    some = network(size, 4, CPU)
    some = some._replace(params=optree.tree_map(torch.Tensor.double, some.params))
    inputs, targets = next(some.batches)
    batch = (inputs.double(), targets.double() if targets.is_floating_point() else targets)
    with jax.enable_x64(True):
        found, expected = in_jax.sgd(some)(0, in_jax.arrays(batch)), sgd(some)(0, batch)
        start = in_jax.params_of(some)
    leaves = optree.tree_leaves(expected)
    for (weight, bias), (old, _), of_bias, of_weight in zip(found, start, leaves[::2], leaves[1::2], strict=True):
        np.testing.assert_allclose(weight, of_weight.mT.numpy(), rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(bias, of_bias.numpy(), rtol=1e-10, atol=1e-12)
        assert np.abs(weight - old).max() > 1e-6


@pytest.mark.slow
@pytest.mark.skipif(bool(kfac_jax.MISSING), reason=kfac_jax.MISSING)
def test_kfac_jax_is_timed_beside_ours(tmp_path, monkeypatch, capsys):
    arguments = f"kfac_jax --sizes 8 --batch-size 4 --rank 2 --every 2 --repeats 2 --output {tmp_path}"
    monkeypatch.setattr(sys, "argv", arguments.split())
    kfac_jax.main()
    monkeypatch.setattr(sys, "argv", [*arguments.split(), "--report", "--clock", "cpu"])
    kfac_jax.main()
    out = capsys.readouterr().out
    assert "diverged" not in out and out.count("dense, adaptive") == 2
    (of_size,) = json.loads((tmp_path / "kfac_jax_cpu.json").read_text())["measured"]
    rows = {(row["framework"], row["step"]): row for row in of_size["rows"]}
    assert rows["JAX", "dense"]["first"] > 1 and rows["JAX", "SGD"]["mean ratio"] == 1
    assert {("JAX", "dense, statistics in each step"), ("JAX", "dense, adaptive"), ("torch", "rank 2")} <= set(rows)


# Data and measurement ----------------------------------------------------------------------------------


@pytest.mark.parametrize("compressed", [False, True])
def test_images_are_read_from_idx_files_or_digits_are_enlarged(tmp_path, compressed):
    with pytest.raises(FileNotFoundError, match="train-images-idx3-ubyte"):
        training_images(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    content = b"\x00\x00\x08\x03" + struct.pack(">3I", *pixels.shape) + pixels.tobytes()
    path = tmp_path / ("train-images-idx3-ubyte" + ".gz" * compressed)
    path.write_bytes(gzip.compress(content) if compressed else content)
    torch.testing.assert_close(training_images(tmp_path)[0], torch.tensor(pixels).flatten(1).float() / 255)
    for wrong, words in (content[:-1], "cut or too long"), (b"PK\x03\x04", "starting with 00 00 08, got 50 4b 03"):
        (tmp_path / "wrong").write_bytes(wrong)
        with pytest.raises(ValueError, match=words):
            read_idx(tmp_path / "wrong")
    images, described = training_images(None)
    assert images.shape == (1500, 784) and "enlarged" in described and 0 <= images.min() < images.max() <= 1


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


def test_peaks_are_those_of_known_allocations():
    held = torch.ones(1000)

    def work():
        first = held + 1  # 4000 bytes
        second = torch.cat([first, first])  # 8000 more
        del first
        return second.sum() + held.sum()

    assert 12_000 <= peak_bytes(work, CPU) < 13_000
    alive = alive_at_peak(work, held)
    assert 12_000 <= alive.peak < 12_100
    assert sorted(storage.nbytes for storage in alive.at_peak) == [4000, 8000]
    assert alive.current == 0


def test_timings_are_interleaved_and_ratios_are_of_rounds():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = interleaved(functions, CPU, repeats=3, warmup=1)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"
    assert {len(of_name) for of_name in seconds.values()} == {3}
    assert median_ratios({"a": [1.0, 2.0, 4.0], "b": [2.0, 4.0, 4.0]}, "a") == {"a": 1.0, "b": 2.0}


def test_json_is_written_whole(tmp_path):
    content = {"list": [{"numbers": list(range(100)), "text": "é"}, {}], "empty": [], "nested": {"a": [1.5, None]}}
    write_json(tmp_path / "new" / "x.json", content)
    assert json.loads((tmp_path / "new" / "x.json").read_text()) == content
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.json"]


def test_a_run_of_the_robustness_benchmark_lowers_the_loss():
    run = trained(seed=1, rank=1, batch_size=16, damping=1.0, refresh=2, steps=6)
    assert run["finite"] and run["losses"][-1] < run["losses"][0] and len(run["losses"]) == 7
