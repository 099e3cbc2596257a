r"""The search for the support of a nonnegative quadratic program, by sweeps of a small matrix.

The solution of :math:`\min_{x \ge 0} \tfrac12 x^\top C x + q^\top x` is known once its support
is. An active-set method in the manner of Lawson and Hanson ("Solving Least Squares Problems", 1974)
looks for it: it keeps ``x >= 0`` and lowers the objective at every step, so it cannot cycle.

The sweep operator (Goodnight, "A tutorial on the SWEEP operator", Am. Stat. 1979) takes the
variables of a support into a matrix one at a time, each by an update of rank one, and out again.
When the right ones are in, the negated inverse of their block, their solution and the gradient of
the others are there to be read. So a turn of the loop is one sweep, a few operations without a call
of a library, for all programs of a batch. To take a variable out keeps the rounding errors of its
pivot: where that is small, the support is taken into the matrix anew.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxjd.solvers.precision import ridge, rounding_level

_LARGEST_INVERSE = 8.0  # Of the pivot of a variable that is taken out.


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
    # The batch of one matrix; `vmap` makes it one of many.
    x, support, inverse = (found[0] for found in _search(cosines[None], linear[None], start[None]))

    def solve(right: jax.Array) -> jax.Array:
        right = jnp.where(support, right, 0)
        return jnp.where(support, jnp.sum(inverse * right[:, None, :], axis=2), 0)

    return x, solve


@jax.custom_batching.custom_vmap
def _search(
    cosines: jax.Array, linear: jax.Array, start: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The solutions, supports and inverses for matrices ``(g, m, m)`` of `k` programs each.

    All programs are lanes of one loop. A lane that is done changes nothing, so that nothing has to
    select for it.
    """
    g, k, m = linear.shape
    linear, start = (x.reshape(g * k, m) for x in (linear, start))
    # With a ridge an unbounded problem has a large finite solution.
    ridged = cosines + ridge(cosines.dtype) * jnp.eye(m, dtype=cosines.dtype)[None]
    ridged = jnp.repeat(ridged, k, axis=0, total_repeat_length=g * k)
    # Rounding may leave less of a singular matrix than its ridge.
    least = ridge(cosines.dtype) / 2
    places = jnp.arange(m)[None, :]

    def turn(carry: tuple) -> tuple:
        count, x, support, swept, matrix, values, fewest, done = carry
        # One variable is taken in or out, the first that is not where it should be.
        first = jnp.min(jnp.where(support ^ swept, places, m), axis=1, keepdims=True)
        pivot = places == first
        column = jnp.take_along_axis(matrix, first[:, :, None], axis=1, mode="clip")[:, 0]
        entry = jnp.take_along_axis(column, first, axis=1, mode="clip")
        value = jnp.take_along_axis(values, first, axis=1, mode="clip")
        some = first < m
        out = some & jnp.take_along_axis(swept, first, axis=1, mode="clip")
        anew = out & (entry < -_LARGEST_INVERSE)
        entry = jnp.where(out, entry, jnp.maximum(entry, least))
        # With zeros in the pivot's row and column, one update is right for all entries.
        column = jnp.where(some, jnp.where(pivot, jnp.where(out, 1, -1), column), 0)
        scaled = column / entry
        values = jnp.where(anew, -linear, jnp.where(pivot, 0, values) - scaled * value)
        rest = jnp.where(pivot[:, :, None] | pivot[:, None, :], 0, matrix)
        rest = rest - scaled[:, :, None] * column[:, None, :]
        matrix = jnp.where(anew[:, :, None], ridged, rest)
        swept = (swept ^ pivot) & ~anew
        ready = ~jnp.any(swept ^ support, axis=1, keepdims=True) & ~done

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
        return (
            count + 1,
            jnp.where(ready, moved, x),
            jnp.where(ready, (support & ~hit) | added, support),
            swept,
            matrix,
            values,
            jnp.where(ready & inside, jnp.minimum(fewest, number), fewest),
            done | (ready & inside & (number == 0)),
        )

    def unfinished(carry: tuple) -> jax.Array:
        return ~jnp.all(carry[-1]) & (carry[0] < (10 + 4 * m) * m)

    # From zero every support is feasible.
    support = (start > 0) | ((linear < 0) & ~jnp.any(start > 0, axis=1, keepdims=True))
    # Made like the data: inside of `shard_map` a carry differs between devices from the start.
    fewest = jnp.full_like(linear[:, :1], m + 1, dtype=int)
    done = jnp.zeros_like(support[:, :1])
    carry = (0, start, support, jnp.zeros_like(support), ridged, -linear, fewest, done)
    _, x, support, _, matrix, _, _, _ = lax.while_loop(unfinished, turn, carry)
    return x.reshape(g, k, m), support.reshape(g, k, m), -matrix.reshape(g, k, m, m)


@_search.def_vmap
def _search_lanes(size: int, batched: list[bool], *arguments: jax.Array) -> tuple:
    lanes = [
        x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
        for x, is_batched in zip(arguments, batched, strict=True)
    ]
    found = _search(*(x.reshape(-1, *x.shape[2:]) for x in lanes))
    return tuple(x.reshape(size, -1, *x.shape[1:]) for x in found), (True,) * len(found)
