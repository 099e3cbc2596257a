r"""Nonnegative quadratic programs of few variables, by their supports.

The solution of :math:`\min_{x \ge 0} \tfrac12 x^\top C x + q^\top x` is known once its support
is. For up to three variables all supports are solved at once by Cramer's rule, and the one that
meets the optimality conditions is taken: no loop, no factorization. For more an active-set method
in the manner of Lawson and Hanson ("Solving Least Squares Problems", 1974) looks for the support:
it keeps ``x >= 0`` and lowers the objective at every step, so it cannot cycle.

A program of few variables runs in microseconds and is compiled in much more: what counts is how
few operations there are. One step does all that a row may need, and a row that is solved repeats
its last step until the others are.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxjd.solvers.pivoting import cholesky_solve, factorize
from jaxjd.solvers.precision import matmul, ridge, rounding_level

CLOSED_FORM = 3  # Variables.


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
    m = cosines.shape[0]
    # With a ridge an unbounded problem has a large finite solution.
    ridged = cosines + ridge(cosines.dtype) * jnp.eye(m, dtype=cosines.dtype)
    return (_try_all if m <= CLOSED_FORM else _active_set)(ridged, linear, start)


def _try_all(ridged: jax.Array, linear: jax.Array, _: jax.Array) -> tuple[jax.Array, Callable]:
    m = ridged.shape[0]
    # Few variables first: of equally good ones the first is taken.
    masks = sorted(itertools.product((False, True), repeat=m), key=sum)
    supports = jnp.array(masks)[:, None, :]
    right = -linear[None]
    solve = _eliminate(ridged, supports)
    x = solve(right)
    x = x + solve(right - _times(x, ridged))
    gradient = _times(x, ridged) - right
    wrong = jnp.max(jnp.where(supports, -x, -gradient), axis=2, keepdims=True)
    level = rounding_level(x, right)
    wrong = jnp.maximum(wrong - level, 0) / jnp.where(level > 0, level, 1)
    choice = jnp.argmin(wrong, axis=0)
    taken = jnp.arange(len(masks))[:, None, None] == choice[None]
    # A sum over one term each.
    x = jnp.sum(jnp.where(taken, jnp.maximum(x, 0), 0), axis=0)
    return x, _eliminate(ridged, jnp.any(taken & supports, axis=0))


def _times(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """A product with a symmetric matrix, without a call of a library, which fusion stops at."""
    rows = matrix.reshape((matrix.shape[0], *(1,) * (x.ndim - 1), -1))
    terms = [x[..., i : i + 1] * row for i, row in enumerate(rows)]
    return sum(terms[1:], terms[0])


def _eliminate(matrix: jax.Array, supports: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """Solves on supports of shape ``(..., m)`` by elimination, written out."""
    m = matrix.shape[0]
    inside = [supports[..., i] for i in range(m)]
    factors: dict[tuple[int, int], jax.Array] = {}
    pivots: list[jax.Array] = []
    for i in range(m):
        for j in range(i + 1):
            entry = jnp.where(inside[i] & inside[j], matrix[i, j], float(i == j))
            for n in range(j):
                entry = entry - factors[i, n] * factors[j, n] * pivots[n]
            if i == j:
                # Rounding may leave less of a singular matrix than its ridge.
                pivots.append(jnp.maximum(entry, ridge(matrix.dtype) / 2))
            else:
                factors[i, j] = entry / pivots[j]

    def solve(right: jax.Array) -> jax.Array:
        x = [jnp.where(inside[i], right[..., i], 0) for i in range(m)]
        for i in range(m):
            for n in range(i):
                x[i] = x[i] - factors[i, n] * x[n]
        x = [entry / pivot for entry, pivot in zip(x, pivots, strict=True)]
        for i in reversed(range(m)):
            for n in range(i + 1, m):
                x[i] = x[i] - factors[n, i] * x[n]
        return jnp.stack(x, axis=-1)

    return solve


def _active_set(
    ridged: jax.Array, linear: jax.Array, start: jax.Array
) -> tuple[jax.Array, Callable]:
    k, m = linear.shape

    def solve(factor: jax.Array, support: jax.Array, right: jax.Array) -> jax.Array:
        return cholesky_solve(factor, jnp.where(support, right, 0))

    def step(carry: tuple) -> tuple:
        count, x, support, _, _, fewest, _ = carry
        # With one more ridge: rounding makes a singular matrix indefinite.
        factor = factorize(ridged, support)
        solution = solve(factor, support, -linear)
        gradient = matmul(solution, ridged) + linear
        # Towards the solution on the support, up to the first bound; drop what hits it.
        blocked = support & (solution <= 0)
        ratio = jnp.where(blocked, x / jnp.where(x > 0, x - solution, 1), 1)
        length = jnp.min(ratio, axis=1, keepdims=True)
        inside = ~jnp.any(blocked, axis=1, keepdims=True)
        hit = blocked & (ratio <= length)
        moved = jnp.where(support & ~hit, jnp.maximum(x + length * (solution - x), 0), 0)
        # At the solution: add what has a negative gradient; all, while that are ever fewer.
        low = ~support & inside & (gradient < -rounding_level(solution, linear))
        number = jnp.sum(low, axis=1, keepdims=True)
        lowest = jnp.where(low, gradient, 0)
        lowest = lowest <= jnp.min(lowest, axis=1, keepdims=True)
        added = low & (lowest | (number < fewest))
        fewest = jnp.where(inside, jnp.minimum(fewest, number), fewest)
        x = jnp.where(inside, solution, moved)
        done = jnp.all(inside & (number == 0))
        return count + 1, x, (support & ~hit) | added, support, factor, fewest, done

    def unfinished(carry: tuple) -> jax.Array:
        return ~carry[-1] & (carry[0] < 10 + 4 * m)

    # From zero every support is feasible.
    support = (start > 0) | ((linear < 0) & ~jnp.any(start > 0, axis=1, keepdims=True))
    factor = jnp.zeros((k, m, m), ridged.dtype)
    fewest = jnp.full((k, 1), m + 1)
    carry = (0, start, support, support, factor, fewest, jnp.zeros((), bool))
    _, x, _, support, factor, _, _ = lax.while_loop(unfinished, step, carry)
    return jnp.maximum(x, 0), functools.partial(solve, factor, support)
