r"""The search for the support of a nonnegative quadratic program, by factorizations.

The solution of :math:`\min_{x \ge 0} \tfrac12 x^\top C x + q^\top x` is known once its support
is, so this is a search for the support with one Cholesky factorization per candidate. Two rules
choose the next candidate:

* block principal pivoting (Kim and Park, "Fast nonnegative matrix factorization: an active-set-like
  method and comparisons", SIAM J. Sci. Comput. 2011) exchanges all violated indices at once. It
  takes a handful of steps, but may cycle when `C` is close to singular;
* an active-set method in the manner of Lawson and Hanson ("Solving Least Squares Problems", 1974)
  keeps ``x >= 0`` and lowers the objective at every step, so it cannot cycle. Problems that the
  first rule has not solved after a few steps go on with it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxjd.solvers.precision import matmul, ridge, rounding_level

_PIVOTING_STEPS = 10


def support_solver(cosines: jax.Array, support: jax.Array, refinements: int = 2):
    """Returns ``b -> C_SS^+ b_S`` for every row's support, with zeros outside of it.

    A ridge makes the factorization safe, iterative refinement against `C` itself takes it out again
    wherever `C_SS` is not singular.
    """
    mask = support.astype(cosines.dtype)
    factors = factorize(cosines, support)

    def apply(b: jax.Array) -> jax.Array:
        return cholesky_solve(factors, b * mask) * mask

    def solve(b: jax.Array) -> jax.Array:
        x = apply(b)
        for _ in range(refinements):
            x = x + apply(b - matmul(x, cosines))
        return x

    return solve


def solve_on_support(cosines: jax.Array, support: jax.Array, right: jax.Array) -> jax.Array:
    r"""Returns ``C_SS^+ b_S`` for every row's support `S`, for derivatives, shaped like `right`.

    Where `C_SS` is singular, the ridge of `support_solver` would blow up what `b` has outside of
    the range, down to its rounding errors. With the independent rows `T` of `S`, and `A` that
    combines the others of them, :math:`C_{SS} = W C_{TT} W^\top` for the stacked
    :math:`W = (I; A)`, and

    .. math:: C_{SS}^+ = W N^{-1} C_{TT}^{-1} N^{-1} W^\top, \qquad N = W^\top W = I + A^\top A.

    This is a symmetric function of `b` in every step, so forward and reverse mode agree; and it has
    no loop.
    """
    k, m = support.shape
    eye = jnp.eye(m, dtype=cosines.dtype)
    # A pivot is a row's squared distance to the span of those before it, with rounding and ridge.
    pivots = jnp.square(jnp.diagonal(factorize(cosines, support), axis1=1, axis2=2))
    base = support & ~(pivots <= 2 * m * ridge(cosines.dtype))
    combine = support_solver(cosines, base, refinements=0)
    columns = jnp.broadcast_to(cosines[:, None, :], (m, k, m))
    rest = jax.vmap(combine, out_axes=1)(columns) * (support & ~base)[:, :, None]
    factor = lax.linalg.cholesky(eye[None] + matmul(rest.mT, rest))
    spread = rest + eye[None] * base[:, :, None]

    right = matmul(right[:, None, :], spread)[:, 0]
    right = support_solver(cosines, base)(cholesky_solve(factor, right))
    return matmul(spread, cholesky_solve(factor, right)[..., None])[..., 0]


def factorize(cosines: jax.Array, support: jax.Array) -> jax.Array:
    """A Cholesky factor of ``C_SS`` with a ridge, and of the identity outside of `S`."""
    mask = support.astype(cosines.dtype)
    eye = jnp.eye(cosines.shape[0], dtype=cosines.dtype)
    systems = cosines[None] * mask[:, :, None] * mask[:, None, :]
    systems += eye[None] * jnp.where(support, ridge(cosines.dtype), 1)[:, :, None]
    return lax.linalg.cholesky(systems)


def cholesky_solve(factors: jax.Array, b: jax.Array) -> jax.Array:
    """Solves for right sides of shape ``(..., m)``, given Cholesky factors ``(..., m, m)``."""
    b = b[..., None]
    b = lax.linalg.triangular_solve(factors, b, left_side=True, lower=True)
    b = lax.linalg.triangular_solve(factors, b, left_side=True, lower=True, transpose_a=True)
    return b[..., 0]


def search(
    cosines: jax.Array, linear: jax.Array, start: jax.Array, live: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Finds the support of every live row's solution.

    Args:
      cosines: `C`, positive semi-definite with a unit diagonal, shape ``(m, m)``.
      linear: One `q` per row, shape ``(k, m)``.
      start: A guess, non-negative, shape ``(k, m)``; its support is where the search begins.
      live: Which rows to solve, shape ``(k,)``, bool; the others keep `start`.

    Returns:
      The solutions, shape ``(k, m)``, and their supports, shape ``(k, m)``, bool.
    """
    m = linear.shape[1]
    cosines = cosines + ridge(cosines.dtype) * jnp.eye(m, dtype=cosines.dtype)
    downhill = linear < -rounding_level(jnp.zeros_like(linear), linear)
    max_steps = _PIVOTING_STEPS + 10 + 4 * m

    def step(carry):
        count, x, support, live, fewest, patience = carry
        solution = support_solver(cosines, support, refinements=1)(-linear)
        gradient = matmul(solution, cosines) + linear
        tolerance = rounding_level(solution, linear)
        too_low = ~support & (gradient < -tolerance)
        negative = support & (solution < -tolerance)
        wrong = too_low | negative
        num_wrong = jnp.sum(wrong, axis=1)
        solved = num_wrong == 0
        pivoting = count < _PIVOTING_STEPS

        # Block principal pivoting: exchange all wrong indices while their number falls (or for
        # three more steps), otherwise only the last one, which ends in a finite number of steps.
        fewer = num_wrong < fewest
        every = fewer | (patience > 0)
        last = jnp.arange(m)[None, :] == (m - 1 - jnp.argmax(wrong[:, ::-1], axis=1))[:, None]
        pivoted = support ^ (wrong & (every[:, None] | last))

        # Active set: move from the feasible x towards the solution on the support, up to the first
        # bound; drop what hits it, or, at the solution, add what has a negative gradient.
        blocked = support & (solution <= 0)
        ratio = jnp.where(blocked & (x > 0), x / jnp.where(blocked, x - solution, 1), 0)
        ratio = jnp.where(blocked, ratio, 1)
        length = jnp.min(ratio, axis=1, keepdims=True)
        moved = jnp.where(support, jnp.maximum(x + length * (solution - x), 0), 0)
        hit = blocked & (ratio <= length)
        moved = jnp.where(hit, 0, moved)
        lowest = jnp.argmin(jnp.where(too_low, gradient, jnp.inf), axis=1)
        added = too_low & (fewer[:, None] | (jnp.arange(m)[None, :] == lowest[:, None]))
        inside = ~jnp.any(blocked, axis=1, keepdims=True)
        active = jnp.where(inside, support | added, support & ~hit)
        num_low = jnp.where(inside[:, 0], num_wrong, fewest)

        # The switch between the rules restarts from x = 0, where every support is feasible.
        next_support = jnp.where(pivoting, pivoted, active)
        next_x = jnp.where(pivoting, solution, moved)
        next_fewest = jnp.minimum(fewest, jnp.where(pivoting, num_wrong, num_low))
        switch = count + 1 == _PIVOTING_STEPS
        next_support = jnp.where(switch, downhill, next_support)
        next_x = jnp.where(switch, 0, next_x)
        next_fewest = jnp.where(switch, m + 1, next_fewest)
        next_patience = jnp.where(fewer, 3, jnp.maximum(patience - 1, 0))

        solved = solved & (pivoting | inside[:, 0])
        keep = live & ~solved
        x = jnp.where(keep[:, None], next_x, jnp.where(live[:, None], solution, x))
        support = jnp.where(keep[:, None], next_support, support)
        return (
            count + 1,
            x,
            support,
            keep,
            jnp.where(keep, next_fewest, fewest),
            jnp.where(keep, next_patience, patience),
        )

    def unsolved(carry):
        count, _, _, live, _, _ = carry
        return jnp.any(live) & (count < max_steps)

    # Made like the data: inside of `shard_map` a carry differs between devices from the start.
    fewest, patience = (jnp.full_like(live, n, dtype=int) for n in (m + 1, 3))
    carry = (0, start, start > 0, live, fewest, patience)
    _, x, support, _, _, _ = lax.while_loop(unsolved, step, carry)
    return jnp.maximum(x, 0), support
