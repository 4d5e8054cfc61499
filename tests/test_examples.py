"""The examples run, if only for a few steps, and write what they say; their parts compute what they promise."""

import re

import pytest
import torch
from torch.func import hessian, jacrev, vmap

import lrkfac
from examples import (
    data_parallel,
    ensemble,
    fine_tuning,
    influence,
    language_model,
    laplace,
    physics_informed,
    training_loop,
)
from examples.text import init_transformer, text_windows, transformer
from tests.distributed.processes import torchrun

SHORT = {
    "language_model": ["--steps", "2", "--batch-size", "4", "--methods", "adam", "rank-16"],
    "ensemble": ["--steps", "6", "--members", "3"],
    "physics_informed": ["--steps", "2", "--equations", "heat"],
    "fine_tuning": ["--steps", "2"],
    "training_loop": ["--epochs", "2"],
    "laplace": ["--hidden", "2", "--structures", "rank 4"],
    "influence": ["--retrainings", "2", "--examples", "40", "--structures", "rank 4"],
}
SLOW = "language_model", "laplace", "influence"
MODULES = (language_model, ensemble, physics_informed, fine_tuning, training_loop, laplace, influence)
MODULES = {module.__name__.rpartition(".")[2]: module for module in MODULES}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in MODULES])
def test_runs(name, tmp_path, capsys):
    MODULES[name].main([*SHORT[name], "--output", str(tmp_path)])
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "wrote" in printed and ("bit for bit" in printed) == (name == "training_loop")


@pytest.mark.parametrize("name", physics_informed.EQUATIONS)
def test_solutions_solve_their_equations(name):
    equation = physics_informed.EQUATIONS[name]
    points = torch.rand(4, equation.widths[0], dtype=torch.float64)

    def u(point):
        return equation.solution(point[None])[0, 0]

    seconds = vmap(hessian(u))(points).diagonal(dim1=1, dim2=2)[:, equation.curved].sum(dim=1, keepdim=True)
    torch.testing.assert_close(equation.left(vmap(jacrev(u))(points), seconds), equation.right(points))
    inputs, _ = equation.data(0)
    params = physics_informed.initial(equation.widths, 0)
    layers = lrkfac.find_layers(equation.model, params, inputs[:5], strict=True)
    assert [layer.kind for layer in layers] == ["linear"] * (len(equation.widths) - 1) and not layers.uncovered
    on_border = inputs[inputs[:, -1] > 0, :-2]
    assert ((on_border == 0) | (on_border == 1)).any(1).all() and len(on_border) == equation.outside


def test_adapters_change_nothing_at_first_and_alone_are_trained():
    net = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).requires_grad_(False)
    x = torch.randn(4, 6)
    adapted = fine_tuning.with_adapters(net, seed=0)
    assert torch.equal(adapted(x), net(x))
    assert {n.split(".")[1] for n in lrkfac.from_module(adapted)[1]} == {"down", "up"}
    assert set(lrkfac.from_module(fine_tuning.with_trained_head(net, seed=0))[1]) == {"2.weight", "2.bias"}


def test_a_character_depends_on_those_before_it_alone():
    inputs, targets, vocabulary = text_windows(8, characters=500)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    params = init_transformer(0, vocabulary, context=8, width=8, blocks=2)
    changed = inputs.clone()
    changed[:, 5] = (changed[:, 5] + 1) % vocabulary
    before, after = transformer(params, inputs), transformer(params, changed)
    assert torch.equal(before[:, :5], after[:, :5]) and not torch.equal(before[:, 5:], after[:, 5:])


TABLE = re.compile(r"^ +\d+ +(\d\.\d+) +(\d\.\d+) +(\d+\.\d)", re.MULTILINE)


@pytest.mark.slow
def test_processes_end_with_the_table_of_one(capsys):
    data_parallel.main(["--epochs", "3"])
    alone = capsys.readouterr().out
    together = torchrun("examples.data_parallel", "--epochs", "3")
    assert "parameters of 2 processes: equal bit for bit" in together and together.count("epoch") == 1
    found, expected = (torch.tensor([[float(x) for x in row] for row in TABLE.findall(t)]) for t in (together, alone))
    assert found.shape == (3, 3)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
