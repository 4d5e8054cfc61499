"""``python -m lrkfac``, and what a user's typed code meets; wheel and sdist: ``.ci/wheel``."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import lrkfac
from lrkfac import __main__ as check
from tests import typed_user


@pytest.mark.slow
def test_self_check():
    folder = Path(lrkfac.__file__).parents[1]
    out = subprocess.check_output([sys.executable, "-m", "lrkfac"], cwd=folder, text=True)
    assert out.startswith(f"lrkfac {lrkfac.__version__}, torch {torch.__version__}")
    assert "cpu: " in out and out.count("right\n") == 8 * len(check.devices())
    assert re.search(r"all inverses are right, \d+\.\d s\n", out)
    assert out.splitlines()[-3:] == [f"{name:<8}{words}" for name, words in check.NEXT.items()]


def test_what_comes_after_the_installation_is_there():
    """Pages, a loop that trains, and an example with the extra that it needs."""
    folder = Path(__file__).parents[1]
    pages = re.findall(r"[\w/]+\.md", check.NEXT["read"])
    assert len(pages) == 3 and all((folder / page).exists() for page in pages)
    (name,) = re.findall(r"help\(lrkfac\.(\w+)\)", check.NEXT["read"])
    assert "step(inputs, targets)" in getattr(lrkfac, name).__doc__

    net = torch.nn.Sequential(torch.nn.Linear(4, 3))
    names = {"lrkfac": lrkfac, "net": net, "x": torch.randn(12, 4), "labels": torch.arange(12) % 3}
    before = torch.nn.functional.cross_entropy(net(names["x"]), names["labels"])
    exec(check.NEXT["train"], names)
    assert torch.nn.functional.cross_entropy(net(names["x"]), names["labels"]) < before

    install, run = check.NEXT["example"].split(" && ")
    (extra,) = re.findall(r"\.\[(\w+)\]", install)
    assert extra in tomllib.loads((folder / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert (folder / "examples" / f"{run.rpartition('.')[2]}.py").exists()


def test_a_wrong_inverse_is_told(monkeypatch, capsys):
    monkeypatch.setattr(check, "sherman_morrison", lambda operator: operator)
    assert check.main() == 1
    out = capsys.readouterr().out
    assert "2 inverses are wrong" in out and out.splitlines()[-1].startswith("report these lines")
    assert not any(words in out for words in check.NEXT.values())


def test_typed_code_runs():
    params, loss = typed_user.trained(3)
    assert set(params) == {"w", "v"} and loss.isfinite()
    net = torch.nn.Sequential(torch.nn.Linear(4, 3))
    assert typed_user.trained_module(net, torch.randn(6, 4), torch.randint(0, 3, (6,))).isfinite()
    assert typed_user.own_transformation(2.0).update({"w": torch.ones(2)}, ())[0]["w"].tolist() == [2, 2]
    operator = lrkfac.linalg.LowRankPlusDiagonal(torch.eye(3), torch.ones(3), torch.ones(3))
    torch.testing.assert_close(typed_user.inverted(operator), torch.eye(3) / 2.1)
    assert Path(lrkfac.__file__).with_name("py.typed").exists() and lrkfac.__version__.count(".") == 2
