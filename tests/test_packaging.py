"""``python -m lrkfac``, and what a user's typed code meets; wheel and sdist: ``.ci/wheel``."""

import re
import subprocess
import sys
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
    assert re.search(r"all inverses are right, \d+\.\d s\n$", out)


def test_a_wrong_inverse_is_told(monkeypatch, capsys):
    monkeypatch.setattr(check, "sherman_morrison", lambda operator: operator)
    assert check.main() == 1
    assert "2 inverses are wrong" in capsys.readouterr().out


def test_typed_code_runs():
    params, loss = typed_user.trained(3)
    assert set(params) == {"w", "v"} and loss.isfinite()
    net = torch.nn.Sequential(torch.nn.Linear(4, 3))
    assert typed_user.trained_module(net, torch.randn(6, 4), torch.randint(0, 3, (6,))).isfinite()
    assert typed_user.own_transformation(2.0).update({"w": torch.ones(2)}, ())[0]["w"].tolist() == [2, 2]
    operator = lrkfac.linalg.LowRankPlusDiagonal(torch.eye(3), torch.ones(3), torch.ones(3))
    torch.testing.assert_close(typed_user.inverted(operator), torch.eye(3) / 2.1)
    assert Path(lrkfac.__file__).with_name("py.typed").exists() and lrkfac.__version__.count(".") == 2
