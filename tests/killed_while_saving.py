"""Kills processes that save checkpoints, at random moments, and reads what is left.

python -m tests.killed_while_saving 200 FOLDER
"""

import itertools
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

import lrkfac

SIZE = 2**20  # numbers in each of two tensors: 8 MiB, of which most of the time goes into writing


def save(path, number):
    full = torch.full((SIZE,), float(number))
    lrkfac.checkpoint.save(path, {"w": full, "number": number}, (full.clone(),))


def read(path):
    """The number of the checkpoint, which is whole."""
    params, state = lrkfac.checkpoint.load(path, {"w": torch.zeros(SIZE), "number": 0}, (torch.zeros(SIZE),))
    assert (params["w"] == params["number"]).all() and (state[0] == params["number"]).all()
    return params["number"]


def main(kills, folder):
    torch.set_num_threads(1)
    path = Path(folder) / "run.safetensors"
    start = time.perf_counter()
    for _ in range(5):
        save(path, 0)
    seconds = (time.perf_counter() - start) / 5
    last = read(path)
    for _ in range(kills):
        child = os.fork()
        if child == 0:
            for number in itertools.count(last + 1):
                save(path, number)
        time.sleep(random.uniform(0, 4 * seconds))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        before, last = last, read(path)
        assert last >= before
        for file in Path(folder).glob(".run.safetensors.*.tmp"):
            file.unlink()
    print(f"{kills} kills: every checkpoint was readable and whole")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
