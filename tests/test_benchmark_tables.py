"""The benchmark tables: each command runs at a tiny size and counts what it says; the state is as small as promised."""

import functools
import json
import sys
from functools import partial

import pytest
import torch

import lrkfac
from benchmarks import (
    adaptive_structures,
    convolutions,
    depth,
    memory,
    memory_steps,
    physics,
    quality,
    refresh,
    spectra,
    step,
    transformer,
)
from benchmarks import compile as compiling
from benchmarks.common import held_bytes
from benchmarks.depth import dispatched, per_layer
from benchmarks.floors import Cost, Rates, cost
from benchmarks.libraries import LIBRARIES
from benchmarks.networks import Work, gpt, perceptron
from benchmarks.ratios import Functional
from benchmarks.resnet18 import ResNet18
from lrkfac.core.base.profiling import profiled
from lrkfac.core.curvature.factors import DenseState

CPU = torch.device("cpu")


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs a benchmark and returns what it wrote and printed."""

    def run(module, arguments):
        monkeypatch.setattr(sys, "argv", ["benchmark", "--threads", "1", "--output", str(tmp_path), *arguments.split()])
        module.main()
        (path,) = tmp_path.glob("*.json")
        assert path.with_suffix(".png").stat().st_size > 1000
        return json.loads(path.read_text()), capsys.readouterr().out

    return run


def check_ratios(one, sizes):
    rows = [row for row in one["rows"] if "mean ratio" in row]
    assert {row["step"] for row in rows} >= sizes
    for row in rows:
        assert sorted((row["ratio"], row["mean ratio"], row["refresh ratio"]))[1] == row["mean ratio"] > 0
        # What a library reads is not known, so that its steps have no floor.
        assert (row["floor"] is None) == (row["step"] in LIBRARIES)
        if row["floor"] is not None:
            assert 0 < row["floor"] < row["refresh floor"] and row["mean floor"] <= row["refresh floor"]


@pytest.mark.slow
def test_the_table_of_steps(command):
    content, out = command(step, "--widths 12 16 --ranks 2 3 --repeats 2 --batch-size 4 --variants --dense-up-to 12")
    small, large = content["measured"]
    check_ratios(small, {"rank 2", "rank 3", "rank 2, gradients formed", "dense K-FAC"})
    assert "dense K-FAC" not in {row["step"] for row in large["rows"]}
    assert small["capture ratio"] > 0 and "empirical statistics / plain gradient" in out


@pytest.mark.slow
def test_the_tables_of_networks(command, monkeypatch, tmp_path):
    def tiny(batch_size, device):
        images = torch.randn(batch_size, 3, 8, 8)
        return Work(ResNet18(10, (4, 4, 8, 8)), images, torch.randint(10, (batch_size,)))

    options = "--batch-sizes 2 --ranks 2 --repeats 2"
    monkeypatch.setattr(convolutions, "resnet18", tiny)
    check_ratios(command(convolutions, options)[0]["measured"][0], {"rank 2", "dense K-FAC"})
    (tmp_path / "convolutions_eager_cpu.json").unlink()
    monkeypatch.setattr(transformer, "gpt", partial(gpt, width=8, heads=2, blocks=1, context=4))
    compiled = []  # that steps are one graph is for their own tests
    monkeypatch.setattr(torch, "compile", lambda function, **options: (function, compiled.append(options))[0])
    check_ratios(command(transformer, f"{options} --no-dense --compile")[0]["measured"][0], {"rank 2"})
    assert compiled and all(options["fullgraph"] for options in compiled)


@pytest.mark.slow
def test_the_table_of_systems_and_the_spectrum(command, monkeypatch):
    def tiny(batch_size, device):
        images = torch.randn(batch_size, 3, 8, 8)
        return Work(ResNet18(10, (4, 4, 8, 8)), images, torch.randint(10, (batch_size,)))

    monkeypatch.setattr(spectra, "resnet18", tiny)
    options = "--steps 2 --examples 20 --rank 2 --most 15 --dampings 1 --images 2 --lanczos 3"
    content, out = command(spectra, options)
    plain, ours = content["systems"]
    assert plain["reached"][0] > ours["reached"][0] > 0 and plain["products"] == 15
    found = content["spectrum"]
    assert len(found["nodes"][0]) == found["products"] == 3 and sum(found["weights"][0]) == pytest.approx(1, abs=1e-5)
    assert "rank 2, damping 1" in out and f"trace {found['trace']:.4g}" in out


def test_gpt_is_causal():
    work = gpt(2, CPU, width=8, heads=2, blocks=2, context=5)
    changed = work.inputs.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 256
    same, other = work.module(work.inputs), work.module(changed)
    torch.testing.assert_close(same[:, :3], other[:, :3])
    assert not torch.allclose(same[:, 3:], other[:, 3:]) and torch.equal(work.inputs[:, 1:], work.targets[:, :-1])


@pytest.mark.slow
def test_the_table_of_refreshes(command):
    limits = "--dense-up-to 24 --eigen-up-to 16"
    content, _ = command(refresh, f"--widths 16 24 32 --rank 2 --repeats 2 --batch-size 8 {limits}")
    compared = [set(one["ratios"]) for one in content["widths"]]
    assert compared == [{refresh.CHOLESKY, refresh.EIGEN}, {refresh.CHOLESKY}, set()]
    assert all(floor > 0 for one in content["widths"] for floor in one["floors"].values())


@pytest.mark.slow
def test_the_operations_of_a_refresh_do_not_depend_on_depth(command):
    content, _ = command(depth, "--depths 2 6 --width 8 --rank 2 --repeats 2 --batch-size 4")
    assert content["growth"] <= depth.LIMIT
    first, last = (one["operations"] for one in content["depths"])
    assert first["SGD"] < last["SGD"] < last["step"] < last["refresh step"]
    assert per_layer([1, 2, 3], [5.0, 7.0, 9.0]) == pytest.approx(2)


@pytest.mark.slow
def test_the_table_of_quality(command):
    content, _ = command(quality, "--steps 3 --refreshes 2 --ranks 1 32 --damping 0.1")
    rows = {(row["rank"], row["name"]): row for row in content["measured"][0]["rows"]}
    assert {rank for rank, _ in rows} == {0, 1, 32, 129}
    for name in (quality.OURS, quality.BEST):
        errors = [rows[rank, name]["error"] for rank in (1, 32, 129)]
        assert errors[0] > errors[1] > 10 * errors[2] and errors[2] < 1e-6
        assert rows[32, name]["angle"] < rows[0, quality.PLAIN]["angle"]


def test_the_rows_of_a_network_are_its_derivatives():
    params, points = physics.initial((2, 5, 4, 1), 0), torch.rand(3, 2, dtype=torch.float64)

    def network(params, points):
        for weight in params[:-1]:
            points = torch.tanh(torch.nn.functional.linear(points, weight[:, :-1], weight[:, -1]))
        return torch.nn.functional.linear(points, params[-1][:, :-1], params[-1][:, -1])

    u = lrkfac.derivatives(network, second=[[(0, 0), (1, 1)]])(params, points)
    expected = torch.cat([u.value[:, None], u.gradient.mT, u.second.mT], dim=1)
    torch.testing.assert_close(physics.taylor(params, points), expected)


def test_the_table_of_physics(command):
    content, out = command(physics, "--networks 2-64-1 --seconds 0.2 --points 20 --border 8")
    assert [run["method"] for run in content["runs"]] == list(physics.RATES)
    for run in content["runs"]:
        assert run["seconds"][-1] >= 0.2 and run["loss"][-1] <= run["loss"][0] and 0 < run["error"][-1] < 10
        assert f"{run['error'][-1]:.1e}" in out


@pytest.mark.slow
def test_the_table_of_structures(tmp_path, monkeypatch, capsys):
    arguments = "--problem regression --steps 3 --rank 2 --seeds 0 1 --threads 1 --structure dense".split()
    for more in (["best of the rank"], ["exactly damped"]):  # added to what is there
        monkeypatch.setattr(sys, "argv", ["benchmark", "--output", str(tmp_path), *arguments, *more])
        adaptive_structures.main()
    (path,) = tmp_path.glob("*.json")
    measured = json.loads(path.read_text())["measured"]
    assert len({(row["structure"], row["seed"]) for row in measured}) == len(measured) == 6
    assert all(len(row["loss"]) == len(row["steps"]) == 3 for row in measured)
    assert "exactly damped, rank 2, seed 1" in capsys.readouterr().out


@pytest.mark.parametrize("diagonal", [False, True])
def test_the_best_of_a_rank(diagonal):
    """Of a matrix of its form it is the matrix; trace or diagonal are kept."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(8, 2, generator=generator, dtype=torch.float64)).Q
    rest = torch.rand(8, generator=generator).double() if diagonal else torch.ones(8).double()
    matrix = 9 * vectors @ vectors.mT + torch.diag(rest)
    best = adaptive_structures.BestOfRank(2, diagonal)
    found = best.operator(DenseState(matrix, torch.tensor(1))).matrix
    torch.testing.assert_close(found, matrix, rtol=0, atol=0.5 if diagonal else 1e-12)
    torch.testing.assert_close(found.diagonal().sum(), matrix.diagonal().sum(), rtol=0, atol=1e-9)
    if diagonal:
        torch.testing.assert_close(found.diagonal(), matrix.diagonal())


# Memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width, rank", [(20, 1), (41, 3), (90, 9), (64, 32), (12, 9)])
def test_a_layer_holds_at_most_the_promised_numbers(width, rank):
    counted = memory_steps.state_numbers(width, rank, batch_size=2)
    assert 2 * rank * width < counted["numbers"] <= counted["promise"]


@pytest.mark.slow
def test_the_tables_of_memory(command, monkeypatch):
    def here(method, width, limit=0, **options):
        return {"method": method, "width": width, **memory_steps.child(method, width, limit=0, **options)}

    monkeypatch.setattr(memory_steps, "in_child", here)
    options = "--parts steps largest --widths 24 --dense-up-to 24 --batch-size 4 --rank 2 --largest 16 24"
    content, _ = command(memory, options)
    rows = {row["method"]: row for row in content["steps"]}
    assert all(row["finite"] and row["peak"] >= 0 and row["floor"] > 0 for row in content["steps"])
    parameters = rows[memory_steps.SGD]["parameters"]
    assert rows[memory_steps.SGD]["state"] == rows[memory_steps.IN_PLACE]["state"] == parameters
    assert parameters < rows[memory_steps.LOW_RANK]["state"] < rows[memory_steps.DENSE]["state"]
    assert [row["completes"] for row in content["largest"]] == [True] * 4


@pytest.mark.slow
def test_what_needs_too_much_memory_does_not_complete():
    options = {"batch_size": 2, "rank": 2, "device": "cpu", "threads": 1}
    assert memory_steps.in_child(memory_steps.IN_PLACE, 6144, limit=2**28, **options) is None


# What is counted ---------------------------------------------------------------------------------------


def test_costs_are_those_of_known_operations():
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    assert cost(lambda: a @ b, (a, b), again=a) == Cost(2 * 3 * 4 * 5, 4 * (12 + 20 + 12 + 15))
    assert cost(lambda: (a, a[0]), a).bytes == 48  # nothing new is written
    s = torch.eye(6)
    for operation, matrix, operations in (
        (torch.linalg.cholesky, s, 6**3 / 3),
        (torch.cholesky_inverse, s, 2 * 6**3 / 3),
        (torch.linalg.eigh, s, 9 * 6**3),
        # Householder vectors, 2 m n² - 2/3 n³, and as many again for Q.
        (torch.linalg.qr, torch.ones(2, 8, 3), 2 * 2 * (2 * 72 - 18)),
    ):
        assert cost(partial(operation, matrix), ()).operations == pytest.approx(operations)
    assert Cost(10, 30).floor(Rates(5, 10)) == 3


def test_shared_memory_is_held_once():
    x = torch.zeros(6)
    assert held_bytes((x, x[:2], x.expand(3, 6))) == 24
    assert held_bytes({"a": x, "b": torch.zeros(2)}, beside=[x]) == 8
    assert memory_steps.unique_numbers((x, x, torch.ones(()).expand(5))) == 7


def test_operations_are_counted_within_ranges():
    def work():
        x = torch.ones(3) + 1
        with profiled("refresh"):
            x = (x * 2).view(3, 1)
            with profiled("inverse"):
                x = x + 1
        return x - 1

    count = dispatched(work)
    assert (count.total, dict(count.within)) == (5, {"lrkfac.refresh": 2, "lrkfac.inverse": 1})


def test_steps_start_from_the_same_parameters_and_change_nothing():
    work = perceptron(8, 4, CPU)
    before = [p.clone() for p in work.module.parameters()]
    ours = Functional(work).low_rank(2)
    first, _, second = ours.plain()[0], ours.refresh(), ours.plain()[0]
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(map(torch.equal, before, work.module.parameters()))


@pytest.mark.slow
@pytest.mark.parametrize("way, graphs", [("eager", 0), ("plain steps alone", 1), ("evaluate alone", 2)])
def test_each_way_of_compiling_takes_steps_and_is_counted(way, graphs, monkeypatch):
    """Traced alone; the C++ compiler takes minutes."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    found = compiling.measured(way, "low_rank_kfac", depth=2, width=8, batch_size=4, rank=2, repeats=2)
    assert found["graphs"] == graphs and all(ratio > 0 for ratio in found["ratios"].values())
    assert found["seconds"]["plain"] > (0.1 if graphs else 0) and len(compiling.row(found)) == 11
