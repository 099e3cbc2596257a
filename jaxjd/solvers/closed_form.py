r"""Nonnegative quadratic programs of up to three variables, in straight-line arithmetic.

Either the last variable of :math:`\min_{x \ge 0} \tfrac12 x^\top C x + q^\top x` is zero, or its
gradient is, which eliminates it. So a program of `m` variables is two of `m - 1`, and one of a
single variable is a comparison. No loop, no factorization and no reduction is in it: every entry is
an array of its own, one number per program, so that all of it is a few loops over the programs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxjd.solvers.precision import ridge

MOST = 3  # Variables.

Column = jax.Array  # One number per program, or one for all of them.
Matrix = list[list[jax.Array]]


def solve_columns(cosines: jax.Array, linear: jax.Array, inside: int) -> jax.Array:
    """Solves a batch of programs.

    Args:
      cosines: `C`, positive semi-definite with a unit diagonal, shape ``(m, m)``.
      linear: One `q` per row, with entries of at most order one, shape ``(k, m)``.
      inside: By how many ulps of `x` to aim to the inside of ``C x + q >= 0``.

    Returns:
      The solutions, shape ``(k, m)``.
    """
    m = cosines.shape[0]
    q = [linear[:, i] for i in range(m)]
    plain = [[cosines[i, j] for j in range(m)] for i in range(m)]
    # With a ridge an unbounded problem has a large finite solution.
    extra = ridge(cosines.dtype)
    ridged = [[plain[i][j] + extra * (i == j) for j in range(m)] for i in range(m)]
    level = (
        16
        * jnp.finfo(cosines.dtype).eps
        * functools.reduce(jnp.maximum, [jnp.abs(entry) for entry in q])
    )
    x = _solve(ridged, q, level)
    # Stacked, so that the compiler does not write the first part into every use of it.
    x = list(lax.optimization_barrier(jnp.stack(x)))
    return jnp.stack(_polish(plain, ridged, q, x, inside), axis=1)


def _solve(matrix: Matrix, q: list[Column], level: Column) -> list[Column]:
    if not q:
        return []
    *rest, last = range(len(q))
    pivot, row, right = matrix[last][last], matrix[last], q[last]
    without = _solve([matrix[i][:last] for i in rest], q[:last], level)
    zero = right + _dot(row, without) >= -level
    # Rounding may leave less of a singular matrix than its ridge.
    least = ridge(right.dtype) / 2
    reduced = [[matrix[i][j] - row[i] * (row[j] / pivot) for j in rest] for i in rest]
    for i in rest:
        reduced[i][i] = jnp.maximum(reduced[i][i], least)
    others = _solve(reduced, [q[i] - row[i] * (right / pivot) for i in rest], level)
    value = jnp.maximum(-(right + _dot(row, others)) / pivot, 0)
    return [
        *(jnp.where(zero, a, b) for a, b in zip(without, others, strict=True)),
        jnp.where(zero, 0, value),
    ]


def _polish(
    plain: Matrix, ridged: Matrix, q: list[Column], x: list[Column], inside: int
) -> list[Column]:
    """What `jaxjd.solvers.nonnegative_qp` does to a batch, for columns."""
    indices = range(len(q))
    solve = _eliminate(ridged, [x[i] > 0 for i in indices])
    residual = [-(q[i] + _dot(plain[i], x)) for i in indices]
    scale = jnp.sqrt(_dot(x, x))
    margin = inside * jnp.finfo(scale.dtype).eps * scale
    limit = functools.reduce(jnp.maximum, residual, margin)
    change, nudge = solve(residual), solve([margin for _ in indices])

    def fits(y: list[Column], step: list[Column]) -> Column:
        excess = []
        for i in indices:
            slack = q[i] + _dot(plain[i], y)
            excess += [-y[i], -slack - limit, jnp.abs(step[i]) - 0.1 * scale]
        return functools.reduce(jnp.maximum, excess) <= 0

    solution = [x[i] + change[i] for i in indices]
    nudged = [solution[i] + nudge[i] for i in indices]
    best, second = fits(nudged, [10 * step for step in nudge]), fits(solution, change)
    return [jnp.where(best, nudged[i], jnp.where(second, solution[i], x[i])) for i in indices]


def _eliminate(matrix: Matrix, inside: list[Column]) -> Callable[[list[Column]], list[Column]]:
    """Solves on supports by elimination, written out, with zeros outside of them."""
    indices = range(len(inside))
    factors, pivots = {}, []
    least = ridge(matrix[0][0].dtype) / 2
    for i in indices:
        for j in range(i + 1):
            entry = jnp.where(inside[i] & inside[j], matrix[i][j], float(i == j))
            for n in range(j):
                entry = entry - factors[i, n] * factors[j, n] * pivots[n]
            if i == j:
                pivots.append(jnp.maximum(entry, least))
            else:
                factors[i, j] = entry / pivots[j]

    def solve(right: list[Column]) -> list[Column]:
        x = [jnp.where(inside[i], right[i], 0) for i in indices]
        for i in indices:
            for n in range(i):
                x[i] = x[i] - factors[i, n] * x[n]
        x = [entry / pivot for entry, pivot in zip(x, pivots, strict=True)]
        for i in reversed(indices):
            for n in range(i + 1, len(inside)):
                x[i] = x[i] - factors[n, i] * x[n]
        return x

    return solve


def _dot(row: list[jax.Array], x: list[Column]) -> Column:
    terms = [a * b for a, b in zip(row, x, strict=False)]
    return sum(terms[1:], terms[0]) if terms else jnp.zeros((), row[0].dtype)
