"""The benchmarks: results survive, commands run, files of images are read, figures are measured as they say."""

import gzip
import json
import math
import struct
import sys

import numpy as np
import optree
import pytest
import torch

from benchmarks import kfac_jax, settings, time_to_loss
from benchmarks.alive import alive_at_peak
from benchmarks.common import interleaved, median_ratios, peak_bytes, write_json
from benchmarks.data import read_idx, training_images
from benchmarks.kfac_jax_in_torch import framework, sgd
from benchmarks.kfac_jax_report import rows_of
from benchmarks.kfac_jax_rounds import Rounds, network
from benchmarks.methods import GRID_SIZE
from benchmarks.problems import PROBLEMS
from benchmarks.robustness import trained
from benchmarks.runs import Results, Run
from benchmarks.time_to_loss_report import Line, draw, lines, table

CPU = torch.device("cpu")


# Results -----------------------------------------------------------------------------------------------


def curve(method, settings, seed, loss, diverged=False):
    steps = [10 * i for i in range(len(loss))]
    return Run(method, settings, seed, 0, 8, steps, [step / 100 for step in steps], loss, diverged)


def test_results_survive_and_are_replaced_by_key(tmp_path):
    def saved(loss, command, settings):
        results = Results(tmp_path / "results.json")
        runs = [curve("sgd", settings, seed, [3.0, loss]) for seed in (0, 1)]
        runs[1].accuracy = [0.1, 0.9]  # the first has no test examples
        results.add(runs, {"command": command})
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


def test_the_table_shows_accuracy_on_test_examples(tmp_path):
    problem = PROBLEMS["digits_classifier"](None, "relu")
    results = Results(tmp_path / "results.json")
    runs = [curve("sgd", {}, seed, [3.0, 1.0]) for seed in range(3)]
    results.add(runs, {})
    headings = [column.header for column in table(problem, results).columns]
    for run, share in zip(runs, (0.7, 0.9, 0.8), strict=True):
        run.accuracy = [0.1, share]
    (added,) = [column for column in table(problem, results).columns if column.header not in headings]
    assert added.header.split() == ["test", "accuracy"] and list(added.cells) == ["0.8000"]


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

    first, _ = main("--grid --only 7 2")
    assert len(first.runs) == 2 * 3  # two ranks
    first, _ = main("--grid")
    assert len(first.runs) == GRID_SIZE * 3
    second, out = main("adam --seeds 2")
    assert "rank 1" in out and "rank 4" in out
    assert len(second.runs) == len(first.runs) + 3 + 2  # the second seed of three, and two of Adam
    assert all(second.runs[key].loss == run.loss for key, run in first.runs.items())
    assert {line.label: len(line.runs) for line in lines(second)}["SGD, Nesterov momentum"] == 2
    assert path.with_suffix(".png").stat().st_size > 1000
    assert table(PROBLEMS["regression"](None, "relu"), second).row_count == 4


def test_changes_of_one_setting_are_compared(tmp_path, monkeypatch, capsys):
    for arguments in ("--change 0 3", "--change 3 --seed 0"):  # the second replaces a run
        command = f"settings --problem digits_classifier --steps 4 {arguments} --output {tmp_path}"
        monkeypatch.setattr(sys, "argv", command.split())
        settings.main()
    first, second = json.loads((tmp_path / "settings_cpu.json").read_text())["runs"]
    assert (first["change"], second["change"]) == ({}, {"damping": 0.1})
    assert 0 < first["loss"] != second["loss"] > 0
    out = capsys.readouterr().out
    assert "damping 0.1" in out and f"{second['loss']:.4g}" in out


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
