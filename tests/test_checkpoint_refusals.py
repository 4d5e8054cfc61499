"""``load`` reads nothing but a fitting checkpoint, and unpickles nothing."""

import json
import os
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
from lrkfac.checkpoint import from_state_dict, state_dict
from tests.test_checkpoint import Run

save_file = pytest.importorskip("safetensors.torch", reason="the extra `checkpoint`").save_file


def saved(tmp_path, run=None, with_layers=True):
    run = run or Run().train(2)
    path = tmp_path / "run.safetensors"
    lrkfac.checkpoint.save(path, run.params, run.state, run.layers if with_layers else None)
    return path


def load(path, run, with_layers=True):
    return lrkfac.checkpoint.load(path, run.params, run.state, run.layers if with_layers else None)


OTHERS = {
    "a wider model": ({"widths": (5, 8, 9, 8, 3)}, r"params: expected '1\.0\.bias'.*shape \(9,\), got .*\(8,\)"),
    "a deeper model": ({"widths": (5, 8, 8, 8, 8, 3)}, r"params: .* of another tree: missing \['4\.0\.bias'"),
    "another dtype": ({"dtype": torch.float64}, r"params: expected '0\.0\.bias'.*float64.*, got .*float32"),
    "another chain": ({"chain": "adaptive"}, r"state: .*missing .*unexpected"),
    "other factors": ({"chain": "dense"}, r"state: .*missing .*unexpected"),
}


@pytest.mark.parametrize(("options", "match"), OTHERS.values(), ids=OTHERS.keys())
def test_of_another_run(options, match, tmp_path):
    path, other = saved(tmp_path), Run(**options)
    with pytest.raises(ValueError, match=match):
        load(path, other, with_layers=False)
    assert load(path, Run())[0].keys() == Run().params.keys()


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
    path = saved(tmp_path)
    with pytest.raises(ValueError, match=r"layers: expected \['1\.0', 'linear'.*\[9, 8\].*, got \['1\.0'.*\[8, 8\]"):
        load(path, Run(widths=(5, 8, 9, 8, 3)))
    with pytest.raises(ValueError, match="layers: the file has none"):
        load(saved(tmp_path, with_layers=False), Run())
    with pytest.raises(TypeError, match=r"layers: expected what find_layers\(\) returned, got list"):
        lrkfac.checkpoint.save(tmp_path / "x", {}, (), [])


def rewritten(path, change, dtype=None):
    """The file with another description beside its tensors."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).to(dtype) for name in file.keys()}
        description = json.loads(file.metadata()["lrkfac"])
    save_file(tensors, path, metadata={"lrkfac": json.dumps(change(description))})


VERSIONS = {
    "a later minor version": ({"version": "0.2.0"}, "got one of lrkfac 0.2.0 in format 2"),
    "a later major version": ({"version": "1.1.0"}, "got one of lrkfac 1.1.0 in format 2"),
    "another format": ({"format": 1}, "in format 1"),
    "none": ({"version": None}, "got one of lrkfac None"),
}


@pytest.mark.parametrize(("change", "match"), VERSIONS.values(), ids=VERSIONS.keys())
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


@pytest.mark.parametrize("write", FILES.values(), ids=FILES.keys())
def test_other_files(write, tmp_path):
    path = saved(tmp_path)
    write(path)
    with pytest.raises(ValueError, match=r"path: expected a file that.* damaged"):
        load(path, Run())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    lrkfac.checkpoint.save(folder / "x", {"w": torch.ones(3, 2)}, (torch.ones(2), 7))
    return folder, (folder / "x").read_bytes()


@given(share=st.floats(0, 1, exclude_max=True))
def test_a_part_of_a_file(whole, share):
    folder, content = whole
    (folder / "part").write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match="damaged"):
        lrkfac.checkpoint.load(folder / "part", {"w": torch.ones(3, 2)}, (torch.ones(2), 7))


@given(place=st.integers(8, 10**6), value=st.integers(0, 255))
def test_a_damaged_description(whole, place, value):
    """It is refused as a ``ValueError``, whatever has changed, or describes the same."""
    folder, content = whole
    length = int.from_bytes(content[:8], "little")
    place = 8 + (place - 8) % length
    (folder / "damaged").write_bytes(content[:place] + bytes([value]) + content[place + 1 :])
    try:
        params, state = lrkfac.checkpoint.load(folder / "damaged", {"w": torch.ones(3, 2)}, (torch.ones(2), 7))
    except ValueError as error:
        assert str(error)
    else:
        assert params["w"].shape == (3, 2) and state[0].shape == (2,) and params["w"].dtype == state[0].dtype


@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_damaged_numbers(whole, place, bit):
    """A bit that is another in any tensor is seen."""
    folder, content = whole
    start = 8 + int.from_bytes(content[:8], "little")
    place = start + place % (len(content) - start)
    (folder / "bits").write_bytes(content[:place] + bytes([content[place] ^ (1 << bit)]) + content[place + 1 :])
    with pytest.raises(ValueError, match=r"damaged .*numbers of .* are not those that were written"):
        lrkfac.checkpoint.load(folder / "bits", {"w": torch.ones(3, 2)}, (torch.ones(2), 7))


def test_no_file_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none", Run())
    with pytest.raises(FileNotFoundError, match="path: expected a file in a folder that exists"):
        lrkfac.checkpoint.save(tmp_path / "none" / "x", {}, ())


@pytest.mark.parametrize("leaf", [object(), 1j, b"x", torch.nn.Linear(1, 1)], ids=lambda x: type(x).__name__)
def test_other_leaves(leaf, tmp_path):
    for refused in (
        lambda: lrkfac.checkpoint.save(tmp_path / "x", {"w": leaf}, ()),
        lambda: lrkfac.checkpoint.load(tmp_path / "x", {"w": leaf}, ()),
        lambda: state_dict({"w": leaf}),
    ):
        with pytest.raises(TypeError, match=f"(tree|params): expected 'w' .*{type(leaf).__name__}"):
            refused()
    assert os.listdir(tmp_path) == []


def test_other_flat_dictionaries():
    like = (torch.ones(3), {"step": 1})
    with pytest.raises(ValueError, match=r"state_dict: .*missing \['1.step'\], unexpected \['2'\]"):
        from_state_dict(like, {"0": torch.ones(3), "2": 1})
    with pytest.raises(ValueError, match=r"state_dict: expected '0' to be torch\.float32 .*\(3,\), got .*\(2,\)"):
        from_state_dict(like, {"0": torch.ones(2), "1.step": 1})
    with pytest.raises(ValueError, match=r"state_dict: expected '1\.step' to be of type int, got of type float"):
        from_state_dict(like, {"0": torch.ones(3), "1.step": 1.0})
    with pytest.raises(TypeError, match="state_dict: expected what"):
        from_state_dict(like, [torch.ones(3)])


def test_without_the_extra(tmp_path):
    code = (
        "import sys; sys.modules['safetensors'] = None\n"
        "import lrkfac\n"
        "for call in (lrkfac.checkpoint.save, lrkfac.checkpoint.load):\n"
        "    try: call('x', {}, ())\n"
        "    except ImportError as error: print(error)"
    )
    root = Path(lrkfac.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    message = "safetensors: checkpoints need it, and it is not installed; python -m pip install 'lrkfac[checkpoint]'\n"
    assert done.stdout == 2 * message
