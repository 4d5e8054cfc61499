"""Ways in which an object travels: it arrives as another object that must do the same."""

import copy
import io
import pickle

import pytest
import torch


def _saved(x):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {"deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x)), "torch.save": _saved}
each_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
