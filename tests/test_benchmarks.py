"""The benchmarks: every problem builds, every method trains, results survive, files of images are read."""

import dataclasses
import functools
import gzip
import json
import math
import struct
import sys

import numpy as np
import pytest
import torch

import lrkfac
from benchmarks import time_to_loss
from benchmarks.alive import alive_at_peak
from benchmarks.common import interleaved, median_ratios, peak_bytes, write_json
from benchmarks.data import read_idx, training_images
from benchmarks.methods import GRID_SIZE, METHODS
from benchmarks.problems import PROBLEMS
from benchmarks.robustness import trained
from benchmarks.runs import Results, Run, train
from benchmarks.time_to_loss_report import Line, draw, lines, table
from benchmarks.trainers import Functional, Setup

CPU = torch.device("cpu")

each_problem = pytest.mark.parametrize("name", PROBLEMS)


@functools.cache
def setup(name, refresh=2):
    problem = PROBLEMS[name](None, "relu")
    params = problem.init(0)
    layers = lrkfac.find_layers(problem.model, params, problem.inputs[:2], strict=True)
    return problem, Setup(problem, params, layers, 0, 3, 4, refresh, False)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@each_problem
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
    assert run.loss[3] != run.loss[0]
    assert run.state_bytes > 0 and run.seconds == sorted(run.seconds)


@pytest.mark.slow
@each_problem
def test_starts_and_batches_depend_on_the_seed_alone(name):
    problem, _ = setup(name)
    for seed, same in ((0, True), (1, False)):
        assert torch.equal(next(problem.batches(16, 0)), next(problem.batches(16, seed))) is same
        assert (problem.loss(problem.init(0)) == problem.loss(problem.init(seed))) is same


def test_an_epoch_sees_every_example_once():
    problem, _ = setup("digits_classifier")
    batches = problem.batches(500, 0)
    assert torch.equal(torch.cat([next(batches) for _ in range(3)]).sort().values, torch.arange(1500))
    with pytest.raises(ValueError, match="at most 1500 examples, got 1501"):
        next(problem.batches(1501, 0))


def test_grids_are_equal():
    for method in METHODS.values():
        assert len(method.grid) == (1 if method.ours else GRID_SIZE)
        assert len({json.dumps(settings) for settings in method.grid}) == len(method.grid)


def test_both_kinds_of_trainers_compute_the_same_steps():
    problem, start = setup("digits_cnn")
    leaves = METHODS["adam"].make(start, {"learning_rate": 0.01})
    tx = lrkfac.chain(lrkfac.scale_by_adam(), lrkfac.scale_by_learning_rate(0.01))
    functional = Functional(start, tx)
    for trainer in (leaves, functional):
        for batch, _ in zip(problem.batches(32, 0), range(3), strict=False):
            trainer.step(problem.inputs[batch], problem.targets[batch])
    for name, leaf in leaves.params().items():
        torch.testing.assert_close(leaf, functional.params()[name], rtol=0, atol=1e-4)  # of steps of 1e-2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch._prims_common.check:FutureWarning")  # torch's own aten.diagonal
def test_compiled_steps_are_the_same(monkeypatch):
    """Traced as a whole; what the C++ compiler makes of it is for the tests of the steps themselves."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    problem, start = setup("digits_classifier")
    for method, settings in (("low_rank_kfac", {}), ("adam", {"learning_rate": 0.01})):
        losses = []
        for compiled in (False, True):
            run = Run(method, settings, 0)
            trainer = METHODS[method].make(dataclasses.replace(start, compiled=compiled), settings)
            list(train(problem, trainer, run, 64, 3, 3, CPU))
            losses.append(run.loss)
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_warming_up_changes_nothing():
    problem, start = setup("regression")
    for method, settings in (("low_rank_kfac", {}), ("sgd", METHODS["sgd"].settings)):
        params = []
        for warm in (False, True):
            trainer = METHODS[method].make(start, settings)
            if warm:
                trainer.warm_up(problem.inputs, problem.targets)
            trainer.step(problem.inputs, problem.targets)
            params.append(trainer.params())
        assert all(torch.equal(params[0][name], params[1][name]) for name in params[0])


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


# Data and measurement ----------------------------------------------------------------------------------


@pytest.mark.parametrize("compressed", [False, True])
def test_images_are_read_from_idx_files(tmp_path, compressed):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    content = b"\x00\x00\x08\x03" + struct.pack(">3I", *pixels.shape) + pixels.tobytes()
    path = tmp_path / ("train-images-idx3-ubyte" + ".gz" * compressed)
    path.write_bytes(gzip.compress(content) if compressed else content)
    images, described = training_images(tmp_path)
    torch.testing.assert_close(images, torch.tensor(pixels).flatten(1).float() / 255)
    assert described.startswith("5 images")
    for wrong, words in (content[:-1], "cut or too long"), (b"PK\x03\x04", "starting with 00 00 08, got 50 4b 03"):
        (tmp_path / "wrong").write_bytes(wrong)
        with pytest.raises(ValueError, match=words):
            read_idx(tmp_path / "wrong")


def test_missing_images_are_named_and_without_a_folder_digits_are_enlarged(tmp_path):
    with pytest.raises(FileNotFoundError, match="train-images-idx3-ubyte"):
        training_images(tmp_path)
    images, described = training_images(None)
    assert images.shape == (1500, 784) and "enlarged" in described
    assert images.min() >= 0 and images.max() <= 1


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
    assert all(len(of_name) == 3 for of_name in seconds.values())
    assert median_ratios({"a": [1.0, 2.0, 4.0], "b": [2.0, 4.0, 4.0]}, "a") == {"a": 1.0, "b": 2.0}


def test_json_is_written_whole(tmp_path):
    content = {"list": [{"numbers": list(range(100)), "text": "é"}, {}], "empty": [], "nested": {"a": [1.5, None]}}
    write_json(tmp_path / "new" / "x.json", content)
    assert json.loads((tmp_path / "new" / "x.json").read_text()) == content
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.json"]


def test_a_run_of_the_robustness_benchmark_lowers_the_loss():
    run = trained(seed=1, rank=1, batch_size=16, damping=1.0, refresh=2, steps=6)
    assert run["finite"] and run["losses"][-1] < run["losses"][0] and len(run["losses"]) == 7
    assert (run["seed"], run["rank"], run["batch size"], run["damping"], run["refresh"]) == (1, 1, 16, 1.0, 2)
