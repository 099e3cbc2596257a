r"""The search for the support of a nonnegative quadratic program, by sweeps of a small matrix.

The solution of :math:`\min_{x \ge 0} \tfrac12 x^\top C x + q^\top x` is known once its support
is. An active-set method in the manner of Lawson and Hanson ("Solving Least Squares Problems", 1974)
looks for it: it keeps ``x >= 0`` and lowers the objective at every step, so it cannot cycle.

The sweep operator (Goodnight, "A tutorial on the SWEEP operator", Am. Stat. 1979) takes the
variables of a support into a matrix one at a time, each by an update of rank one. When all of them
are in, the negated inverse of their block, their solution and the gradient of the others are there
to be read. So a turn of the loop is one sweep, a few operations without a call of a library, for
all programs of a batch. A support that loses a variable starts from the matrix again: to take one
out by a sweep would keep the rounding errors of a small pivot.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxjd.solvers.precision import ridge, rounding_level


def solve_by_support(
    cosines: jax.Array, linear: jax.Array, start: jax.Array
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """Solves a batch of programs.

    Args:
      cosines: `C`, positive semi-definite with a unit diagonal, shape ``(m, m)``.
      linear: One `q` per row, shape ``(k, m)``.
      start: A guess, non-negative, shape ``(k, m)``.

    Returns:
      The solutions, shape ``(k, m)``, of the matrix with a ridge; and the solver on their supports,
      of the same matrix, for another right side of shape ``(k, m)``.
    """
    k, m = linear.shape
    # With a ridge an unbounded problem has a large finite solution.
    ridged = cosines + ridge(cosines.dtype) * jnp.eye(m, dtype=cosines.dtype)
    # Rounding may leave less of a singular matrix than its ridge.
    least = ridge(cosines.dtype) / 2

    def turn(carry: tuple) -> tuple:
        count, x, support, swept, matrix, values, fewest, done = carry
        # One more variable of the support is taken in, if one is missing.
        missing = support & ~swept
        pivot = missing & (jnp.cumsum(missing, axis=1) == 1)
        matrix, values = _sweep(matrix, values, pivot, least)
        swept = swept | pivot
        ready = jnp.all(swept == support, axis=1, keepdims=True) & ~done

        # Towards the solution on the support, up to the first bound; drop what hits it.
        blocked = support & (values <= 0)
        ratio = jnp.where(blocked, x / jnp.where(x > 0, x - values, 1), 1)
        length = jnp.min(ratio, axis=1, keepdims=True)
        inside = ~jnp.any(blocked, axis=1, keepdims=True)
        hit = blocked & (ratio <= length)
        moved = jnp.where(support & ~hit, jnp.maximum(x + length * (values - x), 0), 0)
        # At the solution: add what has a negative gradient; all, while that are ever fewer.
        gradient = jnp.where(support, 0, -values)
        low = inside & (gradient < -rounding_level(jnp.where(support, values, 0), linear))
        number = jnp.sum(low, axis=1, keepdims=True)
        lowest = gradient <= jnp.min(gradient, axis=1, keepdims=True)
        added = low & (lowest | (number < fewest))

        again = ready & ~inside
        return (
            count + 1,
            jnp.where(ready, moved, x),
            jnp.where(ready, (support & ~hit) | added, support),
            swept & ~again,
            jnp.where(again[:, :, None], ridged, matrix),
            jnp.where(again, -linear, values),
            jnp.where(ready & inside, jnp.minimum(fewest, number), fewest),
            done | (ready & inside & (number == 0)),
        )

    def unfinished(carry: tuple) -> jax.Array:
        return ~jnp.all(carry[-1]) & (carry[0] < (10 + 4 * m) * m)

    # From zero every support is feasible.
    support = (start > 0) | ((linear < 0) & ~jnp.any(start > 0, axis=1, keepdims=True))
    matrix = jnp.broadcast_to(ridged, (k, m, m))
    fewest = jnp.full((k, 1), m + 1)
    done = jnp.zeros((k, 1), bool)
    carry = (0, start, support, jnp.zeros_like(support), matrix, -linear, fewest, done)
    _, x, support, _, matrix, _, _, _ = lax.while_loop(unfinished, turn, carry)

    def solve(right: jax.Array) -> jax.Array:
        right = jnp.where(support, right, 0)
        return jnp.where(support, -jnp.sum(matrix * right[:, None, :], axis=2), 0)

    return x, solve


def _sweep(
    matrix: jax.Array, values: jax.Array, pivot: jax.Array, least: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Sweeps symmetric matrices and their right sides on one variable each, or on none.

    Args:
      matrix: Shape ``(k, m, m)``.
      values: The right sides, shape ``(k, m)``.
      pivot: One-hot, or zero for no sweep, shape ``(k, m)``, bool.
      least: The smallest pivot there can be but for rounding.

    Returns:
      The swept matrices, with the *negated* inverse in the block of what was swept, so that they
      stay symmetric; and the swept right sides.
    """
    column = jnp.sum(jnp.where(pivot[:, None, :], matrix, 0), axis=2)
    value = jnp.sum(jnp.where(pivot, values, 0), axis=1, keepdims=True)
    entry = jnp.sum(jnp.where(pivot, column, 0), axis=1, keepdims=True)
    entry = jnp.where(jnp.any(pivot, axis=1, keepdims=True), jnp.maximum(entry, least), 1)
    # With -1 at the pivot, and zeros in its row and column, one update is right for all entries.
    column = jnp.where(pivot, -1, column)
    scaled = column / entry
    rest = jnp.where(pivot[:, :, None] | pivot[:, None, :], 0, matrix)
    rest = rest - scaled[:, :, None] * column[:, None, :]
    return rest, jnp.where(pivot, 0, values) - scaled * value
