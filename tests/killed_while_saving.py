"""Kills processes that save checkpoints, at random moments, and reads what is left.

python -m tests.killed_while_saving 200 FOLDER
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

import lrkfac

SIZE = 2**20  # numbers in each of two tensors: 8 MiB, of which most of the time goes into writing


def tree(number):
    return {"w": torch.full((SIZE,), float(number)), "number": number}


def read(path):
    """The number of the checkpoint, which is whole."""
    params, state = lrkfac.checkpoint.load(path, tree(0), (torch.zeros(SIZE),))
    assert (params["w"] == params["number"]).all() and (state[0] == params["number"]).all()
    return params["number"]


def main(kills, folder):
    torch.set_num_threads(1)
    path = Path(folder) / "run.safetensors"
    lrkfac.checkpoint.save(path, tree(0), (torch.zeros(SIZE),))
    start = time.perf_counter()
    for i in range(5):
        lrkfac.checkpoint.save(path, tree(i), (torch.full((SIZE,), float(i)),))
    seconds = (time.perf_counter() - start) / 5
    last, replaced, during = read(path), 0, 0
    for _ in range(kills):
        child = os.fork()
        if child == 0:
            number = last
            while True:
                number += 1
                lrkfac.checkpoint.save(path, tree(number), (torch.full((SIZE,), float(number)),))
        time.sleep(random.uniform(0, 4 * seconds))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        number = read(path)
        assert number >= last
        replaced += number > last
        last = number
        left = list(Path(folder).glob(".run.safetensors.*.tmp"))
        during += len(left) > 0
        for file in left:
            file.unlink()
    print(f"{kills} kills, {during} of them while a file was being written, {replaced} after one or more whole saves")
    print(f"{1000 * seconds:.1f} ms per save of {8 * SIZE} bytes; every checkpoint was readable and whole")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
