"""Dtypes that a device has."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import lrkfac
from lrkfac.core.base.dtypes import most_precise
from tests.compiling import traced


@pytest.mark.parametrize(
    ("device", "has_fp64"), [("cpu", True), ("cuda", True), ("mps", False), ("xpu", True), ("xpu", False)]
)
def test_the_device_is_asked_for_float64(device, has_fp64, monkeypatch):
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: SimpleNamespace(has_fp64=has_fp64))
    assert most_precise(torch.device(device)) == (torch.float64 if has_fp64 else torch.float32)


def test_it_is_a_constant_when_compiled():
    x = torch.ones(2)
    assert traced(lambda x: x.to(most_precise(x.device)))(x).dtype == torch.float64


def test_nothing_else_asks_for_the_kind_of_a_device_without_it():
    files = sorted(Path(lrkfac.__file__).parent.rglob("*.py"))
    assert [f.name for f in files if re.search(r"\"(mps|xpu)\"", f.read_text())] == ["dtypes.py"]
