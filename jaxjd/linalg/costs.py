"""What a leaf of a Jacobian costs, dense and factored, from static shapes."""

from __future__ import annotations

from typing import NamedTuple

# What moving one byte costs in floating point operations, on CPUs, GPUs and TPUs alike.
FLOPS_PER_BYTE = 10


class Sizes(NamedTuple):
    """The sizes that decide how a leaf is kept and how its Gramian is taken.

    Attributes:
      tasks: The number of tasks.
      batch: The product of the axes that inputs, cotangents and parameter share.
      rows: The product of the axes that are summed over.
      inputs: The size of the parameter along the layer's inputs.
      outputs: Its size along the layer's outputs.
      itemsize: Bytes per number.
      per_task: Whether every task has inputs of its own.
      lookup: Whether the inputs are indices.
    """

    tasks: int
    batch: int
    rows: int
    inputs: int
    outputs: int
    itemsize: int
    per_task: bool = False
    lookup: bool = False

    @property
    def entries(self) -> int:
        """The number of entries of the parameter."""
        return self.batch * self.inputs * self.outputs

    @property
    def factor_entries(self) -> int:
        """The number of entries of the two factors."""
        inputs = self.batch * self.rows * (1 if self.lookup else self.inputs)
        cotangents = self.tasks * self.batch * self.rows * self.outputs
        return inputs * (self.tasks if self.per_task else 1) + cotangents


class Cost(NamedTuple):
    """Floating point operations and bytes read or written.

    Attributes:
      flops: Floating point operations; a multiplication with an addition counts as two.
      bytes: Bytes of the arrays that are written and read again.
    """

    flops: int
    bytes: int

    @property
    def total(self) -> int:
        """The cost as a number of floating point operations."""
        return self.flops + FLOPS_PER_BYTE * self.bytes

    def plus(self, other: Cost) -> Cost:
        """The cost of both."""
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


def kernel_cost(sizes: Sizes) -> Cost:
    """The cost of a Gramian from the inner products of inputs and of cotangents."""
    m, s, n, p, q, width, per_task, lookup = sizes
    if lookup and not per_task:  # Rows of equal indices are added up first.
        return Cost(2 * m * n * q + 2 * m * m * n * q, 4 * m * n * q * width)
    if lookup:
        p = 1
    if per_task:
        pairs = s * (m * n) ** 2
        return Cost(2 * pairs * (p + q + 1), 4 * pairs * width)
    cotangents = s * m * n * q
    return Cost(
        2 * s * n * n * p + 2 * n * cotangents + 2 * m * cotangents,
        (3 * cotangents + 2 * s * n * n) * width,
    )


def materialize_cost(sizes: Sizes) -> Cost:
    """The cost of writing the leaf as a dense array."""
    m, s, n, p, q, width, _, lookup = sizes
    flops = 2 * m * n * q if lookup else 2 * s * m * n * p * q
    return Cost(flops, m * sizes.entries * width)


def dense_gramian_cost(sizes: Sizes) -> Cost:
    """The cost of the Gramian of a dense leaf."""
    m = sizes.tasks
    return Cost(2 * m * m * sizes.entries, m * sizes.entries * sizes.itemsize)


def dense_cost(sizes: Sizes) -> Cost:
    """The cost of a dense leaf, its Gramian and a combination of its rows."""
    combination = Cost(
        2 * sizes.tasks * sizes.entries, sizes.tasks * sizes.entries * sizes.itemsize
    )
    return materialize_cost(sizes).plus(dense_gramian_cost(sizes)).plus(combination)


def factored_cost(sizes: Sizes) -> Cost:
    """The cost of the Gramian of a factored leaf and a combination of its rows."""
    m, s, n, p, q, width, per_task, lookup = sizes
    product = 0 if lookup else 2 * s * n * p * q * (m if per_task else 1)
    combination = Cost(product + 2 * s * m * n * q, s * m * n * q * width)
    return combination.plus(min(gramian_costs(sizes), key=lambda cost: cost.total))


def prefers_factors(sizes: Sizes) -> bool:
    """Whether factors are cheaper than a dense leaf, or the memory of that is out of proportion.

    Where every task has inputs of its own, dense rows save one product of the three that a plain
    step takes, which is not worth more memory than that of the factors.
    """
    if sizes.per_task and sizes.tasks * sizes.entries > sizes.factor_entries:
        return True
    return factored_cost(sizes).total < dense_cost(sizes).total


def gramian_costs(sizes: Sizes) -> tuple[Cost, Cost]:
    """The costs of a factored leaf's Gramian from its factors, and from a transient dense leaf."""
    transient = materialize_cost(sizes).plus(dense_gramian_cost(sizes))
    return kernel_cost(sizes), transient
