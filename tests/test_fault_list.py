"""Faults are found by their text: one that is not there any more shows nothing."""

import sys
from pathlib import Path

import pytest

import lrkfac

FOLDER = Path(__file__).parents[1] / ".ci" / "faults"


@pytest.mark.skipif(not FOLDER.exists(), reason="the list is no part of the source distribution")
def test_each_fault_has_its_place_and_its_tests(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    import fault_list

    faults = fault_list.faults_of(FOLDER / "faults.toml")
    places = {fault.id: fault_list.place(fault, Path(lrkfac.__file__).parent) for fault in faults}
    assert len(faults) >= 100 and {name: x for name, x in places.items() if isinstance(x, str)} == {}
    files = {test.split()[0] for fault in faults for test in fault.tests}
    assert [file for file in files if not (FOLDER.parents[1] / file).exists()] == []
