"""Trainings by kfac-jax beside SGD in JAX, compiled as kfac-jax does it, of the networks of ``kfac_jax_rounds``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import kfac_jax
import optree
from torch import Tensor

from benchmarks.kfac_jax_rounds import DAMPING, MOMENTUM, RATE, SGD, Batch, Framework, Network, Training

FIXED = {"learning_rate": RATE, "momentum": MOMENTUM, "damping": DAMPING}
ADAPTIVE = {
    "use_adaptive_learning_rate": True, "use_adaptive_momentum": True, "use_adaptive_damping": True,
    "initial_damping": 1.0,
}  # fmt: skip
KEYS = 100
"""Made before the clock starts, and used again after so many steps."""


def framework(network: Network, settings: dict[str, Any]) -> Framework:
    """With kfac-jax's statistics in each step, its default, and whenever the inverses are renewed, as ours are."""
    jax.config.update("jax_platforms", settings["device"])
    every = settings["every"]
    makers: dict[str, Callable[[], Training]] = {SGD: lambda: sgd(network)}
    makers["dense, statistics in each step"] = partial(by_kfac, network, 1, every, {})
    makers["dense"] = partial(by_kfac, network, every, every, {})
    makers["dense, adaptive"] = partial(by_kfac, network, every, every, ADAPTIVE)
    return Framework(makers, {}, jax.block_until_ready, arrays, total)


def arrays(batch: Batch) -> tuple[Any, Any]:
    """Inputs and targets."""
    return _array(batch[0]), _array(batch[1])


def _array(x: Tensor) -> Any:
    return jnp.asarray(x.detach().cpu().numpy())


def params_of(network: Network) -> list[tuple[Any, Any]]:
    """Weights ``[d_in, d_out]`` and biases by layer; new arrays, since kfac-jax takes their memory for its own."""
    leaves = optree.tree_leaves(network.params)  # by name: each layer's bias, and its weight
    return [(jnp.array(_array(weight.mT)), jnp.array(_array(bias)))
            for bias, weight in zip(leaves[::2], leaves[1::2], strict=True)]  # fmt: skip


def loss_of(network: Network) -> Callable[[Any, Any], Any]:
    """``loss(params, batch)``, whose likelihood kfac-jax knows."""
    activation = {"relu": jax.nn.relu, "tanh": jnp.tanh}[network.activation]

    def loss(params: Any, batch: Any) -> Any:
        x, targets = batch
        for i, (weight, bias) in enumerate(params):
            x = x @ weight + bias
            x = activation(x) if i + 1 < len(params) else x
        if jnp.issubdtype(targets.dtype, jnp.integer):
            kfac_jax.register_softmax_cross_entropy_loss(x, targets)
            terms = -jnp.take_along_axis(jax.nn.log_softmax(x), targets[:, None], axis=1)[:, 0]
        else:
            kfac_jax.register_sigmoid_cross_entropy_loss(x, targets)
            terms = (jax.nn.softplus(x) - targets * x).sum(axis=1)
        return terms.mean()

    return loss


def sgd(network: Network) -> Training:
    """Without momentum; the new parameters take the memory of the old ones, as with kfac-jax."""
    gradient = jax.grad(loss_of(network))

    @partial(jax.jit, donate_argnums=0)
    def step(params: Any, batch: Any) -> Any:
        return jax.tree.map(lambda p, g: p - RATE * g, params, gradient(params, batch))

    return Training(lambda params, state, number, batch: (step(params, batch), state), params_of(network))


def by_kfac(network: Network, period: int, every: int, options: dict[str, Any]) -> Training:
    """Statistics every ``period`` steps, inverses every ``every``; the rest is kfac-jax's default."""
    optimizer = kfac_jax.Optimizer(
        jax.value_and_grad(loss_of(network)), l2_reg=0.0, num_burnin_steps=0, curvature_update_period=period,
        inverse_update_period=every, **options,
    )  # fmt: skip
    fixed = {} if options else {name: jnp.asarray(value) for name, value in FIXED.items()}
    params, keys = params_of(network), list(jax.random.split(jax.random.PRNGKey(0), KEYS))
    state = optimizer.init(params, keys[0], arrays(next(network.batches)))

    def step(params: Any, state: Any, number: int, batch: Any) -> tuple[Any, Any]:
        key = keys[number % KEYS]
        return optimizer.step(params, state, key, batch=batch, global_step_int=number, **fixed)[:2]

    return Training(step, params, state)


def total(params: Any) -> float:
    """The sum of all numbers."""
    return float(sum(x.sum() for x in jax.tree.leaves(params)))
