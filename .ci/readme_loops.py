"""Runs the loops of the README as a user meets them: out of the metadata of the package that is installed.

The block of Python, and the block of changes as it was (with Adam) and as it becomes (with LowRankKFAC).
"""

import re
import sys
from importlib.metadata import metadata
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import lrkfac

assert Path(lrkfac.__file__).is_relative_to(sys.prefix), f"expected the package within {sys.prefix}: {lrkfac.__file__}"
readme = str(metadata("lrkfac").get_payload())
(functional,) = re.findall(r"^```python\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
(changes,) = re.findall(r"^```\n(- .*?)^```", readme, re.DOTALL | re.MULTILINE)

torch.manual_seed(0)
names: dict[str, object] = {}
exec(functional, names)
print(f"functional loop: {len(names['batches'])} steps, loss {float(names['evaluation'].loss):.3f} nats")

for mark, name in {"-": "Adam", "+": "LowRankKFAC"}.items():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    inputs, labels = torch.randn(20, 6), torch.arange(20) % 3
    before = float(F.cross_entropy(net(inputs), labels).detach())
    code = "\n".join(line[2:] for line in changes.splitlines() if line[0] in (" ", mark))
    names = {"torch": torch, "F": F, "lrkfac": lrkfac, "net": net, "example": inputs[:1]}
    exec(code, {**names, "loader": [(inputs, labels)] * 20})
    after = float(F.cross_entropy(net(inputs), labels).detach())
    print(f"{name}: loss {before:.3f} nats before, {after:.3f} after 20 steps")
    assert after < before, name
