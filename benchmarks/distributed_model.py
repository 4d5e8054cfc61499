"""Bytes that processes exchange for each network, from the shapes of its layers, and a model of the time it takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

OVERSAMPLING = 4
"""Rows of the iteration beyond the rank."""
QUESTIONS = 6
"""Of a layer to its statistics: product, product in the basis, and trace of A; the same and the diagonal of B."""
BYTES = 4  # float32


class Shape(NamedTuple):
    """The matrix of a layer's weights; ``d_in`` counts a joint bias."""

    d_in: int
    d_out: int


class Network(NamedTuple):
    """The layers of a network."""

    name: str
    layers: Sequence[Shape]

    @property
    def shapes(self) -> int:
        """Number of different shapes."""
        return len(set(self.layers))

    def gradient(self) -> int:
        """Bytes of the gradient."""
        return BYTES * sum(d_in * d_out for d_in, d_out in self.layers)

    def low_rank(self, rank: int) -> int:
        """Bytes of a refresh of low-rank factors."""
        return BYTES * sum(low_rank_numbers(shape, rank) for shape in self.layers)

    def dense(self) -> int:
        """Bytes of a refresh of dense factors, both triangles."""
        return BYTES * sum(d_in**2 + d_out**2 for d_in, d_out in self.layers)


def low_rank_numbers(shape: Shape, rank: int) -> int:
    """``k (d_in + d_out) + 2 k² + d_out + 1``, ``k = rank + 4``: products with bases, diagonal of B, trace of A."""
    k_in, k_out = (min(rank + OVERSAMPLING, d) for d in shape)
    return k_in * shape.d_in + k_out * shape.d_out + k_in**2 + k_out**2 + shape.d_out + 1


class Machine(NamedTuple):
    """Assumptions about the network between GPUs."""

    latency: float = 5e-6  # seconds of a hop of a tree
    near: float = 300e9  # bytes per second of each GPU to those of its node
    far: float = 40e9  # bytes per second of each GPU beyond
    node: int = 8  # GPUs of a node

    def seconds(self, bytes: float, calls: int, processes: int) -> float:
        """Of all-reduces of ``bytes`` in ``calls`` that wait for one another: a ring's bandwidth, a tree's latency."""
        bandwidth = self.near if processes <= self.node else self.far
        latency = 2 * math.ceil(math.log2(processes)) * self.latency
        return 2 * bytes * (processes - 1) / processes / bandwidth + calls * latency


class Way(NamedTuple):
    """A way to do a refresh: its bytes and calls."""

    name: str
    bytes: Callable[[Network, int], int]
    calls: Callable[[Network], int]


WAYS = (
    Way("low rank, two calls", Network.low_rank, lambda network: 2),
    Way("low rank, calls by shape", Network.low_rank, lambda network: QUESTIONS * network.shapes),
    Way("low rank, calls by layer", Network.low_rank, lambda network: QUESTIONS * len(network.layers)),
    Way("dense, one call", lambda network, rank: network.dense(), lambda network: 1),
)


def perceptron(width: int, depth: int) -> Network:
    """Equal layers with biases."""
    return Network(f"{depth} x {width}", [Shape(width + 1, width)] * depth)


def resnet50() -> Network:
    """He et al. 2016 (arXiv 1512.03385): stages of bottlenecks, and 1000 classes."""
    layers, channels = [Shape(3 * 49, 64)], 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            layers += [Shape(channels, width), Shape(9 * width, width), Shape(width, 4 * width)]
            layers += [Shape(channels, 4 * width)] * (block == 0)
            channels = 4 * width
    return Network("ResNet-50", [*layers, Shape(2049, 1000)])


def gpt(blocks: int, width: int, name: str) -> Network:
    """Blocks of queries, keys, values, projection and a perceptron of four widths; without embeddings."""
    block = [Shape(width, width)] * 4 + [Shape(width, 4 * width), Shape(4 * width, width)]
    return Network(name, block * blocks)


def llama(blocks: int, width: int, hidden: int, name: str) -> Network:
    """Touvron et al. 2023 (arXiv 2302.13971): the perceptron has a gate; without embeddings."""
    block = [Shape(width, width)] * 4 + [Shape(width, hidden)] * 2 + [Shape(hidden, width)]
    return Network(name, block * blocks)


NETWORKS = (
    perceptron(1024, 3),
    resnet50(),
    gpt(24, 2048, "GPT 1.3 B, 24 x 2048"),
    llama(32, 4096, 11008, "7 B, 32 x 4096"),
)
