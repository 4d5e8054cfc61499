"""The benchmark of many processes: bytes from shapes, the model of time, and the command."""

import json
import sys

import pytest

from benchmarks import distributed
from benchmarks.distributed_model import NETWORKS, WAYS, Machine, Shape, low_rank_numbers, perceptron, resnet50


def test_shapes_are_those_of_the_networks():
    kernels = sum(d_in * d_out for d_in, d_out in resnet50().layers)
    assert kernels == 25_502_912 + 1000 and len(resnet50().layers) == 54  # torchvision's, without BatchNorm's
    assert low_rank_numbers(Shape(100, 50), 6) == 10 * 150 + 2 * 100 + 50 + 1
    assert low_rank_numbers(Shape(3, 50), 6) == 3 * 3 + 10 * 50 + 9 + 100 + 50 + 1
    assert perceptron(8, 2).dense() == 4 * 2 * (81 + 64) and perceptron(8, 2).gradient() == 4 * 2 * 72


def test_the_model_gives_the_promised_times():
    """24 blocks of width 2048 on 1024 GPUs, in milliseconds."""
    network, machine = NETWORKS[2], Machine()
    found = [1e3 * machine.seconds(way.bytes(network, 32), way.calls(network), 1024) for way in WAYS]
    assert found == pytest.approx([6.7, 8.3, 93, 845], rel=0.01)
    assert 1e3 * machine.seconds(network.gradient(), 1, 1024) == pytest.approx(241, rel=0.01)
    assert machine.seconds(1e9, 0, 8) == pytest.approx(2 * 7 / 8 / 300) and machine.seconds(1e9, 3, 1) == 0


@pytest.mark.slow
def test_counted_bytes_are_those_of_the_formula(tmp_path, monkeypatch, capsys):
    options = f"--threads 1 --processes 2 --widths 24 --rank 4 --output {tmp_path}"
    monkeypatch.setattr(sys, "argv", ["benchmark", *options.split()])
    distributed.main()
    content = json.loads((tmp_path / "distributed_cpu.json").read_text())
    (one,) = content["counted"]
    assert one["bytes"]["dense"] == one["formula"]["dense"]
    assert one["formula"]["low rank"] <= one["bytes"]["low rank"] <= 1.1 * one["formula"]["low rank"]
    assert one["calls"] == {"gradient": 1, "low rank": 2, "dense": 1}
    assert "Assumed, not measured" in capsys.readouterr().out
