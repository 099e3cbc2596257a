"""What rounding means to the solvers: products in full precision, and levels relative to eps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """A matrix product in the full precision of the dtype on every platform."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def ridge(dtype: jnp.dtype) -> jax.Array:
    """What to add to a unit diagonal, so that a singular matrix has a Cholesky factor."""
    return jnp.asarray(8 * jnp.finfo(dtype).eps, dtype)


def rounding_level(x: jax.Array, linear: jax.Array) -> jax.Array:
    """The rounding level of ``C x + q`` per row, for a unit-diagonal `C`, shape ``(..., 1)``."""
    scale = jnp.linalg.norm(x, axis=-1) + jnp.max(jnp.abs(linear), axis=-1)
    return (16 * jnp.finfo(x.dtype).eps * scale)[..., None]


def power_of_two(x: jax.Array) -> jax.Array:
    """A power of two somewhat above `x`, which is not negative, and 1 for zero.

    Products with it and quotients are exact. `x` is 3/8 to 3/4 of it, but for numbers that are next
    to the largest one of the dtype.
    """
    bits = jnp.finfo(x.dtype)
    found = 2 * lax.reduce_precision(jnp.minimum(x, bits.max / 8), bits.nexp, 0)
    return jnp.where(found > 0, found, 1)
