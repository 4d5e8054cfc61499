"""The command for a GPU: all of its parts run on a CPU, those that fail are reported, and nothing outlasts its time."""

import json
import sys
import time

import pytest
import torch

from benchmarks import gpu, gpu_parts
from benchmarks.gpu_profile import covered, profiled
from benchmarks.gpu_report import Report
from benchmarks.networks import perceptron
from benchmarks.ratios import Choice

CPU = torch.device("cpu")


@pytest.mark.slow
def test_the_command_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(sys, "argv", "gpu --device cpu --small --threads 1".split())
    gpu.main()
    parts = json.loads((tmp_path / "gpu_small_cpu.json").read_text())["parts"]
    assert set(parts) == set(gpu.PARTS) and "mean_of_10" in (tmp_path / "gpu_small_cpu.txt").read_text()
    for name, part in parts.items():
        assert bool(part["tables"]) == (name != "compiled")  # takes minutes on a CPU
        assert all("not installed" in note for note in part["notes"]), part["notes"]
    rows = parts["tests"]["tables"][0]["rows"]
    assert [row[0] for row in rows] == ["device and not slow", "device and slow"]
    assert "passed" in rows[0][1] and [row[2] for row in rows] == ["0", "5"]  # pytest's code where there is none
    assert {row[0] for table in parts["adaptive"]["tables"] for row in table["rows"]} >= {"SGD", "rank 2", "adaptive"}
    assert "Profile" in capsys.readouterr().out


def report_of(path, seconds=600.0):
    return Report(path / "part.json", time.monotonic() + seconds)


def test_what_fails_is_reported_and_does_not_stop_the_others(tmp_path):
    def broken(device):
        raise RuntimeError("out of memory")

    works = {"broken": broken, "right": lambda device: perceptron(4, 3, device)}
    gpu_parts.of_each(report_of(tmp_path), CPU, works, Choice((1,), repeats=2, peaks=True), graphs=True)
    written = json.loads((tmp_path / "part.json").read_text())
    assert written["notes"] == ["broken, eager: RuntimeError: out of memory"]
    (table,) = written["tables"]
    assert table["title"] == "right" and [row[0] for row in table["rows"]] == ["SGD", "SGD, momentum", "rank 1"]
    assert all(len(row) == len(table["headings"]) for row in table["rows"])


def test_what_there_is_no_time_for_is_left_out(tmp_path):
    gpu_parts.steps(report := report_of(tmp_path, 0.0), gpu_parts.SMALL, CPU)
    assert len(report.content["notes"]) == 2 and not report.content["tables"]


def test_a_part_that_takes_too_long_is_stopped(tmp_path, monkeypatch):
    """Its process needs longer than this to begin."""
    monkeypatch.setattr(gpu, "GRACE", 0.0)
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu"])
    arguments = gpu.Namespace(device="cpu", threads=1, small=True)
    found = gpu.measured_in_child("steps", 0.2, arguments, tmp_path)
    assert found["notes"] == ["stopped after 0 s, with what there was"] and found["seconds"] < 10


def test_parts_fit_into_eight_minutes():
    assert sum(part.seconds for part in gpu.PARTS.values()) <= gpu.SECONDS <= 8 * 60 - 20


def test_profiles_count_operations_that_no_other_calls():
    x = torch.ones(4, 4)
    found = profiled(lambda: torch.nn.functional.linear(x, x).add(1), CPU)
    assert found["kernels"] == 2 and found["waits"] == found["copies"] == 0 and found["microseconds busy"] > 0
    assert {name for name, _ in found["longest"]} == {"aten::linear", "aten::add"}
    assert covered([(0, 2), (1, 3), (1, 2), (5, 6)]) == 4 and covered([]) == 0
