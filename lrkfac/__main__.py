"""``python -m lrkfac``: check this installation in about two seconds, and say what to do next."""

from __future__ import annotations

import platform
import sys
import time

import torch
from torch import Tensor

from lrkfac.core.base.dtypes import most_precise
from lrkfac.core.linalg.damping import inverse
from lrkfac.core.linalg.inverses import sherman_morrison
from lrkfac.core.linalg.operator_checks import to_dense
from lrkfac.core.linalg.operators import Dense, Kronecker, LowRankPlusDiagonal, Operator
from lrkfac.version import __version__

TOLERANCE = {torch.float32: 2e-4, torch.float64: 1e-11}
"""Bound of the largest entry of ``M M⁻¹ - I``; the condition numbers are about 1e2."""


NEXT = {
    "read": "README.md, docs/tutorial.md and docs/modules.md of the repository, or help(lrkfac.LowRankKFAC)",
    "train": "optimizer = lrkfac.LowRankKFAC(net, lrkfac.categorical(), x, lr=0.1); optimizer.step(x, labels)",
    "example": "python -m pip install -c constraints.txt -e '.[examples]' && python -m examples.digits_autoencoder",
}
"""What comes after the installation."""


def devices() -> list[torch.device]:
    """Return the CPU, and the accelerator of this machine if it has one."""
    available = [torch.device("cpu")]
    if torch.accelerator.is_available() and (other := torch.accelerator.current_accelerator()) is not None:
        available.append(other)
    return available


def errors(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Return the largest entry of ``M M⁻¹ - I`` for each kind of inverse."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    def low_rank(d: int, r: int) -> LowRankPlusDiagonal:
        return LowRankPlusDiagonal(normal(d, r) / d**0.5, 10 + normal(r).abs(), 0.5 + normal(d).abs())

    single, rows = low_rank(96, 8), normal(64, 32)
    pair = Kronecker(low_rank(8, 3), low_rank(12, 4))
    operators: dict[str, tuple[Operator, Operator]] = {
        "Woodbury": (single, inverse(single)),
        "Sherman-Morrison": (single, sherman_morrison(single)),
        "Cholesky": (dense := Dense(rows.mT @ rows / 64 + torch.eye(32, device=device, dtype=dtype)), inverse(dense)),
        "Kronecker": (pair, inverse(pair, 0.0)),
    }
    largest = {}
    for name, (operator, inverted) in operators.items():
        product = to_dense(operator).cpu().double() @ to_dense(inverted).cpu().double()
        largest[name] = float((product - torch.eye(len(product), dtype=torch.float64)).abs().max())
    return largest


def main() -> int:
    """Print versions, devices and errors; return 1 if an inverse is wrong, else say what is next and return 0."""
    start = time.perf_counter()
    print(f"lrkfac {__version__}, torch {torch.__version__}, Python {platform.python_version()}, {platform.platform()}")
    wrong = 0
    for device in devices():
        name = torch.get_device_module(device).get_device_name() if device.type == "cuda" else platform.machine()
        print(f"{device}: {name}")
        for dtype, tolerance in TOLERANCE.items():
            if dtype == torch.float64 != most_precise(device):
                continue
            for kind, error in errors(device, dtype).items():
                right = error <= tolerance
                wrong += not right
                print(f"  {kind:<18}{str(dtype)[6:]:<9}|M M^-1 - I| = {error:.1e}  {'right' if right else 'WRONG'}")
    summary = f"{wrong} inverses are wrong" if wrong else "all inverses are right"
    print(f"{summary}, {time.perf_counter() - start:.1f} s")
    if wrong:
        print("report these lines as an issue, and do not train on this device until it is closed")
        return 1
    for name, words in NEXT.items():
        print(f"{name:<8}{words}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
