"""``load`` reads nothing but a fitting checkpoint, and unpickles nothing."""

import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lrkfac
from tests.test_checkpoint import Run

save_file = pytest.importorskip("safetensors.torch", reason="the extra `checkpoint`").save_file


def saved(tmp_path):
    run = Run().train(2)
    lrkfac.checkpoint.save(tmp_path / "run", run.params, run.state, run.layers)
    return tmp_path / "run"


def load(path, run):
    return lrkfac.checkpoint.load(path, run.params, run.state, run.layers)


OTHERS = {
    "wider": ({"widths": (5, 8, 9, 8, 3)}, r"params: expected '1\.0\.bias'.*shape \(9,\), got .*\(8,\)"),
    "another dtype": ({"dtype": torch.float64}, r"params: expected '0\.0\.bias'.*float64.*, got .*float32"),
    "another chain": ({"chain": "adaptive"}, r"state: .*missing .*unexpected"),
}


@pytest.mark.parametrize(("options", "match"), OTHERS.values(), ids=OTHERS)
def test_of_another_run(options, match, tmp_path):
    path, other = saved(tmp_path), Run(**options)
    with pytest.raises(ValueError, match=match):
        lrkfac.checkpoint.load(path, other.params, other.state)


def test_other_classes(tmp_path):
    """Names and shapes alone do not tell an averaged parameter from momentum."""
    params = {"w": torch.ones(3)}
    lrkfac.checkpoint.save(tmp_path / "x", params, lrkfac.trace(0.9).init(params))
    with pytest.raises(ValueError, match=r"state: .*missing"):
        lrkfac.checkpoint.load(tmp_path / "x", params, lrkfac.ema_params().init(params))
    with pytest.raises(ValueError, match=r"state: expected .*'tuple'.* got .*'list'"):
        lrkfac.checkpoint.save(tmp_path / "y", params, [torch.ones(3)])
        lrkfac.checkpoint.load(tmp_path / "y", params, (torch.ones(3),))


def test_other_layers(tmp_path):
    with pytest.raises(ValueError, match=r"layers: expected \['1\.0', 'linear'.*\[9, 8\].*, got \['1\.0'.*\[8, 8\]"):
        load(saved(tmp_path), Run(widths=(5, 8, 9, 8, 3)))
    lrkfac.checkpoint.save(tmp_path / "x", {}, ())
    with pytest.raises(ValueError, match="layers: the file has none"):
        lrkfac.checkpoint.load(tmp_path / "x", {}, (), Run().layers)


def rewritten(path, change, dtype=None):
    """The file with another description beside its tensors."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).to(dtype) for name in file.keys()}
        description = json.loads(file.metadata()["lrkfac"])
    save_file(tensors, path, metadata={"lrkfac": json.dumps(change(description))})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"version": "0.2.0"}, "got one of lrkfac 0.2.0 in format 2"),
        ({"version": "1.1.0"}, "got one of lrkfac 1.1.0 in format 2"),
        ({"format": 1}, "in format 1"),
        ({"version": None}, "got one of lrkfac None"),
    ],
)
def test_other_versions(change, match, tmp_path):
    path = saved(tmp_path)
    rewritten(path, lambda description: description | change)
    with pytest.raises(ValueError, match=re.escape(match)):
        load(path, Run())
    major, minor, *_ = lrkfac.__version__.split(".")
    rewritten(path, lambda description: description | {"format": 2, "version": f"{major}.{minor}.99"})
    load(path, Run())


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


FILES = {
    "torch.save": lambda path: torch.save(Trap(), path),
    "pickle": lambda path: path.write_bytes(pickle.dumps(Trap())),
    "another of safetensors": lambda path: save_file({"w": torch.ones(3)}, path),
    "other dtypes than described": lambda path: rewritten(path, lambda description: description, torch.float64),
}


@pytest.mark.parametrize("write", FILES.values(), ids=FILES)
def test_other_files(write, tmp_path):
    path = saved(tmp_path)
    write(path)
    with pytest.raises(ValueError, match=r"path: expected a file that.* damaged"):
        load(path, Run())


PARAMS, STATE = {"w": torch.ones(3, 2)}, (torch.ones(2), 7)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    lrkfac.checkpoint.save(folder / "x", PARAMS, STATE)
    return folder / "y", (folder / "x").read_bytes()


@given(share=st.floats(0, 1, exclude_max=True))
def test_a_part_of_a_file(whole, share):
    path, content = whole
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match="damaged"):
        lrkfac.checkpoint.load(path, PARAMS, STATE)


@given(place=st.integers(8, 10**6), value=st.integers(0, 255))
def test_a_damaged_description(whole, place, value):
    """It is refused as a ``ValueError``, whatever has changed, or describes the same."""
    path, content = whole
    place = 8 + (place - 8) % int.from_bytes(content[:8], "little")
    path.write_bytes(content[:place] + bytes([value]) + content[place + 1 :])
    try:
        params, state = lrkfac.checkpoint.load(path, PARAMS, STATE)
    except ValueError as error:
        assert str(error)
    else:
        assert params["w"].shape == (3, 2) and state[0].shape == (2,) and params["w"].dtype == state[0].dtype


@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_damaged_numbers(whole, place, bit):
    """A bit that is another in any tensor is seen."""
    path, content = whole
    start = 8 + int.from_bytes(content[:8], "little")
    place = start + place % (len(content) - start)
    path.write_bytes(content[:place] + bytes([content[place] ^ (1 << bit)]) + content[place + 1 :])
    with pytest.raises(ValueError, match=r"damaged .*numbers of .* are not those that were written"):
        lrkfac.checkpoint.load(path, PARAMS, STATE)


@pytest.mark.slow
def test_the_package_is_imported_without_the_extra():
    code = "import sys; sys.modules['safetensors'] = None; import lrkfac"
    subprocess.run([sys.executable, "-c", code], cwd=Path(lrkfac.__file__).parents[1], check=True)
