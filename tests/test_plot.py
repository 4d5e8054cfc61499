"""Pictures have the curves, labels and scales that they should; without matplotlib they say what is missing."""

import sys

import pytest
import torch

from lrkfac import diagnose, low_rank_kfac, plot, precondition_by_fisher
from lrkfac.curvature import spectral_density
from lrkfac.linalg import Diagonal
from lrkfac.structures import unit_wise
from tests.test_diagnostics import LAYERS, MLP, trained

pytest.importorskip("matplotlib")
STATES = trained(low_rank_kfac(LAYERS, 0.1, rank=2), MLP)[0][1:]
FOUND = [diagnose(state, LAYERS) for state in STATES]
MANY = FOUND[0]._replace(layers={f"layer {i}": FOUND[0].layers["0"] for i in range(60)})


@pytest.mark.parametrize("found", [FOUND[0], MANY], ids=["3 layers", "60 layers"])
@pytest.mark.parametrize("picture, label", [(plot.spectra, "eigenvalue"), (plot.captured, "captured trace [%]")])
def test_a_curve_for_each_layer_and_factor(tmp_path, found, picture, label):
    figure = picture(found)
    for axis, side in zip(figure.axes[:2], "AB", strict=True):
        assert len(axis.lines) == len(found.layers) and axis.get_xscale() == "log"
        assert axis.get_ylabel() == label and axis.get_xlabel() == "number of eigenpairs"
        for line, layer in zip(axis.lines, found.layers.values(), strict=True):
            assert len(line.get_ydata()) <= len(layer.eigenvalues[side])
            if picture is plot.captured:
                assert line.get_ydata()[-1] == pytest.approx(100 * float(layer.numbers[side]["captured"]))
    assert len(figure.legends) + (len(figure.axes) - 2) == 1  # names, or a bar of the depth
    figure.savefig(tmp_path / "picture.png")


def test_density_counts_eigenvalues(tmp_path):
    values = torch.cat([torch.logspace(-2, 0, 60), -torch.logspace(-2, -1, 30), torch.zeros(10)]).double()
    found = spectral_density(Diagonal(values), 100, 100, noise=torch.eye(100).double())
    figure = plot.density(found)
    (axis,) = figure.axes
    for line, count in zip(axis.lines, (60, 30), strict=True):
        decades = torch.as_tensor(line.get_xdata()).log10()
        assert torch.trapezoid(torch.as_tensor(line.get_ydata()), decades) == pytest.approx(count, rel=1e-2)
    assert axis.get_title() == "100 eigenvalues, 10 of them below 1e-07 of the largest"
    figure.savefig(tmp_path / "density.png")
    with pytest.raises(TypeError, match="found: expected what spectral_density"):
        plot.density(values)
    with pytest.raises(ValueError, match="found: expected some eigenvalue other than 0"):
        plot.density(found._replace(nodes=torch.zeros_like(found.nodes)))


def test_history(tmp_path):
    damping, size, share = plot.history(FOUND, [1, 2, 3, 4]).axes
    assert [len(axis.lines) for axis in (damping, size, share)] == [2, 0, 2]
    assert damping.get_yscale() == "log" and list(damping.lines[0].get_xdata()) == [1, 2, 3, 4]
    assert share.get_ylim()[1] > 100
    blocks = diagnose(trained(precondition_by_fisher(LAYERS, unit_wise()), MLP)[0][-1], LAYERS)
    plot.history([blocks]).savefig(tmp_path / "history.png")
    assert len(plot.spectra(blocks).axes) == 1


def test_refusals(monkeypatch):
    for arguments in ([[]], [FOUND, [1]]):
        with pytest.raises(ValueError, match="diagnoses: expected at least one, and as many as steps"):
            plot.history(*arguments)
    pictures = plot.spectra, plot.captured, lambda x: plot.history([x])
    for picture in pictures:
        with pytest.raises(TypeError, match="diagnosis: expected what diagnose"):
            picture(STATES[0])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for picture in pictures:
        with pytest.raises(ImportError, match=r"matplotlib: .* not installed; python -m pip install 'lrkfac\[plot\]'"):
            picture(FOUND[0])
