"""``load`` reads nothing but a fitting checkpoint, and unpickles nothing."""

import json
import pickle
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lrkfac
from tests.test_checkpoint import run

save_file = pytest.importorskip("safetensors.torch", reason="the extra `checkpoint`").save_file


def rewritten(path, dtype=None, **changes):
    """The file with another description beside its tensors."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).to(dtype) for name in file.keys()}
        description = json.loads(file.metadata()["lrkfac"])
    save_file(tensors, path, metadata={"lrkfac": json.dumps(description | changes)})


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


NO_FILE = r"path: expected a file that.* damaged"
REFUSED = {
    "without layers": (lambda path: lrkfac.checkpoint.save(path, {}, ()), "layers: the file has none"),
    "older": (partial(rewritten, version="0.1.0"), "got one of lrkfac 0.1.0 in format 2"),
    "newer": (partial(rewritten, version="1.1.0"), "got one of lrkfac 1.1.0 in format 2"),
    "another format": (partial(rewritten, format=1), "in format 1"),
    "no version": (partial(rewritten, version=None), "got one of lrkfac None"),
    "torch.save": (lambda path: torch.save(Trap(), path), NO_FILE),
    "pickle": (lambda path: path.write_bytes(pickle.dumps(Trap())), NO_FILE),
    "another of safetensors": (lambda path: save_file({"w": torch.ones(3)}, path), NO_FILE),
    "other dtypes than described": (partial(rewritten, dtype=torch.float32), NO_FILE),
}


@pytest.mark.parametrize(("change", "words"), REFUSED.values(), ids=REFUSED)
def test_other_files(change, words, tmp_path):
    whole, path = run(), tmp_path / "run"
    lrkfac.checkpoint.save(path, *whole)
    major, minor, *_ = lrkfac.__version__.split(".")
    rewritten(path, format=2, version=f"{major}.{minor}.99")
    lrkfac.checkpoint.load(path, *whole)
    change(path)
    with pytest.raises(ValueError, match=words):
        lrkfac.checkpoint.load(path, *whole)


def test_other_layers_and_classes(tmp_path):
    """Names and shapes alone do not tell an averaged parameter from momentum."""
    lrkfac.checkpoint.save(tmp_path / "run", *run())
    with pytest.raises(ValueError, match=r"layers: .*\['l0', 'linear'.*\[7, 7\].*, got \['l0'.*\[6, 6\]"):
        lrkfac.checkpoint.load(tmp_path / "run", *run(width=7))
    params = {"w": torch.ones(3)}
    lrkfac.checkpoint.save(tmp_path / "x", params, lrkfac.trace(0.9).init(params))
    with pytest.raises(ValueError, match=r"state: .*missing"):
        lrkfac.checkpoint.load(tmp_path / "x", params, lrkfac.ema_params().init(params))
    lrkfac.checkpoint.save(tmp_path / "y", params, [torch.ones(3)])
    with pytest.raises(ValueError, match=r"state: expected .*'tuple'.* got .*'list'"):
        lrkfac.checkpoint.load(tmp_path / "y", params, (torch.ones(3),))


PARAMS, STATE = {"w": torch.ones(3, 2)}, (torch.ones(2), 7)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The file of another content, and the content of a whole one with the length of its description."""
    folder = tmp_path_factory.mktemp("whole")
    lrkfac.checkpoint.save(folder / "x", PARAMS, STATE)
    content = (folder / "x").read_bytes()
    return folder / "y", content, int.from_bytes(content[:8], "little")


@given(share=st.floats(0, 1, exclude_max=True), place=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_part_of_a_file_and_damaged_numbers(whole, share, place, bit):
    """Any bit that is another in any tensor is seen."""
    path, content, length = whole
    place = 8 + length + place % (len(content) - 8 - length)
    flipped = content[:place] + bytes([content[place] ^ (1 << bit)]) + content[place + 1 :]
    numbers = r"damaged .*numbers of .* are not those that were written"
    for damaged, words in ((content[: int(share * len(content))], "damaged"), (flipped, numbers)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=words):
            lrkfac.checkpoint.load(path, PARAMS, STATE)


@given(place=st.integers(8, 10**6), value=st.integers(0, 255))
def test_a_damaged_description(whole, place, value):
    """It is refused as a ``ValueError``, whatever has changed, or describes the same."""
    path, content, length = whole
    place = 8 + (place - 8) % length
    path.write_bytes(content[:place] + bytes([value]) + content[place + 1 :])
    try:
        params, state = lrkfac.checkpoint.load(path, PARAMS, STATE)
    except ValueError as error:
        assert str(error)
    else:
        assert params["w"].shape == (3, 2) and state[0].shape == (2,) and params["w"].dtype == state[0].dtype
