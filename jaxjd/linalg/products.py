"""Products in full precision, summed in float32 at least."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# XLA's product of a few long rows is 1.5 to 4 times faster on CPUs by stretches that fit the cache.
_CACHED = 2**15


def product(
    a: jax.Array, b: jax.Array, *, contract: Any, batch: Any = (), dtype: Any = None
) -> jax.Array:
    """Contracts the same axes of two arrays, in full precision and at least float32."""
    dtype = jnp.result_type(jnp.float32, a, b) if dtype is None else dtype
    # Not left to the product: XLA's CPU backend lacks some of bfloat16 with a float32 result.
    a, b = a.astype(dtype), b.astype(dtype)
    contract, batch = tuple(contract), tuple(batch)
    return lax.dot_general(
        a,
        b,
        ((contract, contract), (batch, batch)),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=dtype,
    ).astype(dtype)


def row_products(
    rows_1: jax.Array, rows_2: jax.Array, dtype: Any, out_sharding: Any = None
) -> jax.Array:
    """The inner products of the rows of two arrays, shape ``(m1, m2)``.

    Long rows are taken in stretches on CPUs. The same array twice lets XLA see the symmetry.
    On an Explicit mesh the sharding of the result is needed.
    """
    arrays = (rows_1,) if rows_1 is rows_2 else (rows_1, rows_2)
    stretch = _stretch(arrays)
    # Of rows that devices share, a stretch would be one device's.
    if stretch is None or out_sharding is not None or jax.device_count() > 1:
        return _whole(*arrays, dtype=dtype, out_sharding=out_sharding)
    return lax.platform_dependent(
        *arrays,
        cpu=functools.partial(in_stretches, stretch, dtype=dtype),
        default=functools.partial(_whole, dtype=dtype),
    )


def _stretch(arrays: Sequence[jax.Array]) -> int | None:
    """How many entries of each row are taken at a time; None for all of them."""
    most = max(map(len, arrays))
    stretch = max(_CACHED >> (most - 1).bit_length(), 256)
    size = math.prod(arrays[0].shape[1:])
    return None if most * size < 128 * _CACHED or size < 2 * stretch else stretch


def in_stretches(stretch: int, *arrays: jax.Array, dtype: Any) -> jax.Array:
    """The inner products of rows, summed over stretches of their entries."""
    size = math.prod(arrays[0].shape[1:])
    rows = [array.reshape(len(array), size) for array in arrays]

    def part(start: Any, length: int) -> jax.Array:
        parts = (lax.dynamic_slice_in_dim(array, start, length, 1) for array in rows)
        return _whole(*parts, dtype=dtype)

    # The shorter one comes first, and not zeros: so the sum has the products' varying mesh axes.
    first = size % stretch or stretch
    starts = jnp.arange(first, size, stretch)
    total = part(0, first)
    return lax.scan(lambda total, start: (total + part(start, stretch), None), total, starts)[0]


def _whole(*arrays: jax.Array, dtype: Any, out_sharding: Any = None) -> jax.Array:
    first, last = arrays[0], arrays[-1]
    if first.dtype != last.dtype:
        first, last = first.astype(dtype), last.astype(dtype)
    axes = tuple(range(1, first.ndim))
    return lax.dot_general(
        first,
        last,
        ((axes, axes), ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=dtype,
        out_sharding=out_sharding,
    ).astype(dtype)
