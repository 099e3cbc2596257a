"""Sums of Jacobian leaves over devices, dense or by the rows of their factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxjd.linalg.costs import Cost, Sizes, dense_cost, factored_cost
from jaxjd.linalg.factored import FactoredLeaf
from jaxjd.linalg.layers import ConvolutionLayer
from jaxjd.linalg.owned import BlocksLeaf, RowsLeaf
from jaxjd.linalg.sharded import is_checked, local_rows, vary

# What sending one byte to another device costs in floating point operations: links between
# accelerators are about ten times slower than their memory.
FLOPS_PER_SENT_BYTE = 100


def reduced_bytes(entries: int, devices: int, itemsize: int) -> int:
    """The bytes that a device sends in a ring all-reduce."""
    return 2 * (devices - 1) * entries * itemsize // devices


def gathered_bytes(size: int, devices: int) -> int:
    """The bytes that a device sends in a ring all-gather, where each has `size` bytes."""
    return (devices - 1) * size


def prefers_rows(sizes: Sizes, factor_bytes: int, devices: int) -> bool:
    """Whether gathering the factors' rows is cheaper than reducing the dense leaf.

    Args:
      sizes: The sizes of the leaf on one device.
      factor_bytes: The bytes of its two factors on one device.
      devices: The number of devices.
    """
    entries = sizes.tasks * sizes.entries
    dense = dense_cost(sizes).plus(_sent(reduced_bytes(entries, devices, sizes.itemsize)))
    together = sizes._replace(rows=devices * sizes.rows)
    rows = factored_cost(together).plus(_sent(gathered_bytes(factor_bytes, devices)))
    return rows.total < dense.total


def _sent(count: int) -> Cost:
    return Cost(FLOPS_PER_SENT_BYTE * count, 0)


def mean_leaf(leaf: Any, axes: tuple[str, ...], count: int) -> Any:
    """Sums a leaf over the devices of some axes and divides by a number."""
    if isinstance(leaf, RowsLeaf):
        return leaf.with_arrays(mean_leaf(leaf.rows, axes, count))
    if isinstance(leaf, BlocksLeaf):
        return leaf.with_arrays(mean_leaf(leaf.blocks, axes, count))
    if isinstance(leaf, FactoredLeaf):
        if not axes:
            return _with_factors(leaf, leaf.inputs, leaf.cotangents / count)
        axis = _row_axis(leaf)
        factor_bytes = leaf.inputs.nbytes + leaf.cotangents.nbytes
        if axis is not None and prefers_rows(leaf.sizes, factor_bytes, lax.axis_size(axes)):
            inputs = gather(leaf.inputs, axes, axis - (not leaf.per_task))
            cotangents = gather(leaf.cotangents, axes, axis)
            return _with_factors(leaf, inputs, cotangents / count)
        leaf = leaf.materialize()
    leaf = jnp.asarray(leaf)
    # In float32 or better: rounding a sum of many devices' numbers only once.
    wide = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
    total = lax.psum(vary(wide, axes), axes) if axes else wide
    return (total / count).astype(leaf.dtype)


def gather_leaf(leaf: Any, axes: tuple[str, ...]) -> Any:
    """Puts the rows of all devices' leaves one below the other."""
    if isinstance(leaf, FactoredLeaf):
        if leaf.per_task:
            return _with_factors(leaf, gather(leaf.inputs, axes), gather(leaf.cotangents, axes))
        leaf = leaf.materialize()
    return gather(local_rows(leaf), axes)


def gather(array: jax.Array, axes: tuple[str, ...], axis: int = 0) -> jax.Array:
    """Concatenates the arrays of all devices, in the order of the devices."""
    array = vary(array, axes)
    to = "invarying" if all(is_checked(name) for name in axes) else "varying"
    return lax.all_gather(array, axes, axis=axis, tiled=True, to=to)


def _row_axis(leaf: FactoredLeaf) -> int | None:
    """The axis of the cotangents along which rows can be added; None if there is none."""
    layer = leaf.layer
    spatial = len(layer.window[0]) if isinstance(layer, ConvolutionLayer) else 0
    return 1 + layer.batch if layer.rows > spatial else None


def _with_factors(leaf: FactoredLeaf, inputs: jax.Array, cotangents: jax.Array) -> FactoredLeaf:
    shape: Sequence[int] = (cotangents.shape[0], *leaf.shape[1:])
    return FactoredLeaf(leaf.layer, inputs, cotangents, tuple(shape), leaf.dtype, leaf.per_task)
