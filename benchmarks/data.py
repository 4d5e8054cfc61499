"""The data of the benchmarks: what packages ship, and IDX files where they were fetched (``benchmarks/get_data``)."""

from __future__ import annotations

import gzip
import math
import struct
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_diabetes
from torch import Tensor

from examples.common import TRAINING_EXAMPLES, digits
from examples.text import codes_of, text_codes

TEXT = "bible.txt"


def training_digits() -> tuple[Tensor, Tensor]:
    """Pixels ``[1500, 64]`` in [0, 1] and labels ``[1500]`` of scikit-learn's 8 x 8 digits."""
    pixels, labels = digits()
    return pixels[:TRAINING_EXAMPLES], labels[:TRAINING_EXAMPLES]


def training_images(folder: Path | None) -> tuple[Tensor, str]:
    """28 x 28 images ``[N, 784]`` in [0, 1], and what they are: those of the folder, without one digits enlarged."""
    if folder is None:
        large = enlarged(training_digits()[0])
        return large, f"{len(large)} digits of scikit-learn enlarged to 28 x 28, no --data given"
    images = pixels_of(folder, "train")
    return images, f"{len(images)} images of {folder.resolve().name}"


def labelled_images(folder: Path | None) -> tuple[Tensor, Tensor, Tensor, Tensor, str]:
    """Images as by ``training_images`` and their labels, the same for testing, and what they are."""
    if folder is None:
        pixels, labels = digits()
        n = TRAINING_EXAMPLES
        large = enlarged(pixels)
        described = f"{n} digits of scikit-learn enlarged to 28 x 28, no --data given"
        return large[:n], labels[:n], large[n:], labels[n:], described
    training, test = ((pixels_of(folder, s), read_idx(find_idx(folder, f"{s}-labels-idx1-ubyte")).long())
                      for s in ("train", "t10k"))  # fmt: skip
    return *training, *test, f"{len(training[0])} images of {folder.resolve().name}"


def enlarged(pixels: Tensor) -> Tensor:
    """8 x 8 images ``[N, 64]`` as 28 x 28 ones ``[N, 784]``."""
    large = F.interpolate(pixels.reshape(-1, 1, 8, 8), size=(28, 28), mode="bilinear", align_corners=False)
    return large.flatten(1)


def pixels_of(folder: Path, part: str) -> Tensor:
    """The 28 x 28 images ``[N, 784]`` of ``train`` or ``t10k``, in [0, 1]."""
    images = read_idx(find_idx(folder, f"{part}-images-idx3-ubyte"))
    if images.shape[1:] != (28, 28):
        raise ValueError(f"{folder}: expected images of 28 x 28 pixels, got {tuple(images.shape[1:])}")
    return images.flatten(1).float() / 255


def text(folder: Path | None) -> tuple[Tensor, str, str]:
    """A text as numbers, its characters, and what it is: that of the folder, without one Python's own reference.

    Raises:
        FileNotFoundError: If the folder has none.
    """
    if folder is None:
        return *text_codes(), "Python's reference, no --data given"
    path = folder / TEXT
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: expected {TEXT}; benchmarks/get_data {folder} --text fetches it")
    return *codes_of(path.read_text(encoding="latin-1")), f"the text of {folder.resolve().name}"


def find_idx(folder: Path, name: str) -> Path:
    """The file of that name in the folder, compressed or not.

    Raises:
        FileNotFoundError: If it is in neither form.
    """
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{folder}: expected {name} or {name}.gz; benchmarks/get_data {folder} fetches it")


def read_idx(path: Path) -> Tensor:
    """An IDX file of bytes, the format of MNIST.

    Raises:
        ValueError: If it is no such file.
    """
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path}: expected an IDX file of bytes, starting with 00 00 08, got {content[:3].hex(' ')}")
    axes = content[3]
    shape = struct.unpack(f">{axes}I", content[4 : 4 + 4 * axes])
    if len(content) != 4 + 4 * axes + math.prod(shape):
        raise ValueError(f"{path}: expected {math.prod(shape)} numbers after the header, the file is cut or too long")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=4 + 4 * axes).copy()).reshape(shape)


def diabetes() -> tuple[Tensor, Tensor]:
    """scikit-learn's diabetes data: ten inputs ``[442, 10]`` and the target ``[442, 1]``, standardised."""
    inputs, targets = (torch.tensor(x, dtype=torch.float32) for x in load_diabetes(return_X_y=True))
    return tuple((x - x.mean(0)) / x.std(0) for x in (inputs, targets[:, None]))
