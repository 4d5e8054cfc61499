"""Dense references in extended precision, for what float64 itself gets wrong at large condition numbers.

``numpy.longdouble`` has 64 bits on x86; where it is float64, tests of the last digits are skipped.
"""

import numpy as np
import pytest

REAL = np.longdouble
needs_more_than_float64 = pytest.mark.skipif(np.finfo(REAL).eps > 1e-18, reason="no extended precision")


def wide(x):
    return x.detach().double().numpy().astype(REAL)


def matrix(operator):
    """The matrix of an operator of ``lrkfac.linalg``, by its formula."""
    parts = {name: x if hasattr(x, "_fields") else wide(x) for name, x in operator._asdict().items()}
    kind = type(operator).__name__
    if kind == "Diagonal":
        return np.diag(parts["diagonal"])
    if kind == "Dense":
        return parts["matrix"]
    if kind == "Kronecker":
        return np.kron(matrix(parts["output"]), matrix(parts["input"]))
    v = parts["vectors"]
    low_rank = (v * parts["values"]) @ v.T
    if kind == "LowRankPlusDiagonal":
        return low_rank + np.diag(parts["diagonal"])
    assert kind == "LowRankPlusIsotropic"
    return low_rank + parts["rest"] * (np.eye(len(v), dtype=REAL) - v @ v.T)


def cholesky(m):
    lower = np.zeros_like(m)
    for j in range(len(m)):
        lower[j, j] = np.sqrt(m[j, j] - (lower[j, :j] ** 2).sum())
        lower[j + 1 :, j] = (m[j + 1 :, j] - lower[j + 1 :, :j] @ lower[j, :j]) / lower[j, j]
    return lower


def inverse(m):
    lower, half = cholesky(m), np.zeros_like(m)
    for i in range(len(m)):
        half[i] = (np.eye(len(m), dtype=REAL)[i] - lower[i, :i] @ half[:i]) / lower[i, i]
    return half.T @ half


def logdet(m):
    return 2 * np.log(np.diag(cholesky(m))).sum()


def error(found, expected):
    """Relative, in the Frobenius norm."""
    difference = np.asarray(found).astype(REAL) - expected
    return float(np.sqrt((difference**2).sum() / (np.asarray(expected) ** 2).sum()))
