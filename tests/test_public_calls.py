"""Bad calls of all that is public: each ends in a documented exception that names the argument."""

import inspect
import re
import signal
import sys
import traceback
from contextlib import contextmanager

import optree
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import nn

import lrkfac
from tests import public_curvature, public_diagnostics, public_inference, public_optimizer  # noqa: F401
from tests.public import BY_SHORT_NAME
from tests.public_calls import FLAT, LAYERS, SAVED, VALID, P
from tests.public_transformations import base, documentation

pytest.importorskip("safetensors", reason="the extra `checkpoint`")
ACCEPTED = (ValueError, TypeError, NotImplementedError, KeyError, FileNotFoundError, ImportError)


@pytest.fixture(scope="module", autouse=True)
def saved():
    lrkfac.checkpoint.save(SAVED, P, (FLAT,), LAYERS)


@contextmanager
def limited(seconds):
    """A hang is an error, too."""

    def stop(*_):
        raise AssertionError(f"no answer within {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def tensors(tree):
    leaves = optree.tree_leaves(tree, is_leaf=lambda x: isinstance(x, nn.Module))
    of_modules = [x.state_dict() for x in leaves if isinstance(x, nn.Module)]
    return [x for x in optree.tree_leaves((leaves, of_modules)) if isinstance(x, torch.Tensor)]


def refused(name, arguments, argument):
    call = VALID[name]
    given = tensors([arguments, call.arguments])
    before = [x.clone() for x in given]
    try:
        with limited(60):
            result = call.function(**arguments)
    except ACCEPTED as error:
        told = f"{type(error).__name__}: {error}\n{''.join(traceback.format_tb(error.__traceback__)[-3:])}"
        assert not isinstance(error, TypeCheckError), f"seen by the type checker of the tests alone: {told}"
        assert re.search(rf"\b{argument}\b", str(error)), f"{argument!r} is not named: {told}"
        kinds = [kind.__name__ for kind in type(error).__mro__]
        assert any(f"{kind}:" in documentation(name) or f"``{kind}``" in documentation(name) for kind in kinds), told
    else:
        pytest.fail(f"no error, but {type(result).__name__}: {str(result)[:200]}")
    given = [x for x in zip(given, before, strict=True) if x[0].device.type != "meta" and not x[0].isnan().any()]
    assert all(torch.equal(x, y) for x, y in given), "an argument has changed"


ARGUMENTS = [(name, argument) for name, call in VALID.items() for argument, x in call.bad.items() if not x.is_empty]


@settings(max_examples=1000 if settings().max_examples >= 50 else 300, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_bad_calls(data):
    name, argument = data.draw(st.sampled_from(ARGUMENTS))
    call = VALID[name]
    refused(name, {**call.arguments, argument: data.draw(call.bad[argument])}, argument)


@pytest.mark.parametrize("name", VALID)
def test_the_calls_of_the_table_are_valid(name):
    call = VALID[name]
    if inspect.isclass(base(name)) and "." not in name and not call.bad:
        return
    before = [x.clone() for x in tensors(call.arguments)]
    with torch.random.fork_rng(devices=[]):
        call.function(**call.arguments)
    if not name.startswith("LowRankKFAC."):
        assert all(torch.equal(x, y) for x, y in zip(tensors(call.arguments), before, strict=True))


@pytest.mark.parametrize("name", BY_SHORT_NAME)
def test_every_public_argument_is_in_the_table(name):
    """Add a new public name, or a new argument, to tests/public_calls.py or tests/public_transformations.py."""
    found = inspect.signature(BY_SHORT_NAME[name]).parameters.values()
    is_container = inspect.isclass(BY_SHORT_NAME[name]) and not VALID[name].bad
    assert is_container or set(VALID[name].bad) == {p.name for p in found if p.kind is not p.VAR_KEYWORD}


def test_missing_extras(monkeypatch):
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("save", "load"):
        with pytest.raises(ImportError, match="safetensors: checkpoints need it"):
            VALID[name].function(**VALID[name].arguments)
