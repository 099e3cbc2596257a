r"""Bound-constrained conjugate gradients for a batch of quadratic programs: matrix products only.

Solves :math:`\min_{x \ge 0} \tfrac12 x^\top C x + q^\top x` for many `q` at once by modified
proportioning with reduced gradient projections (Dostál and Schöberl, "Minimizing quadratic
functions subject to bound constraints with the rate of convergence and finite termination", Comput.
Optim. Appl. 2005). Every row does one of three things per step: a conjugate gradient step inside
its face; a projected step where that would leave the orthant; or, where the gradient at the bounds
outweighs the one in the face, a step that releases bounds. All rows share two products with `C` per
step, so a well-conditioned batch costs less than one factorization per row would.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxjd.solvers.precision import matmul, ridge, rounding_level


def descend(
    cosines: jax.Array, linear: jax.Array, start: jax.Array, max_steps: int
) -> tuple[jax.Array, jax.Array]:
    """Descends until every row is optimal to rounding, or for `max_steps` steps.

    Args:
      cosines: `C`, positive semi-definite with a unit diagonal, shape ``(m, m)``.
      linear: One `q` per row, shape ``(k, m)``.
      start: Where to start, non-negative, shape ``(k, m)``.
      max_steps: The largest number of steps.

    Returns:
      The points, shape ``(k, m)``, and which of them are optimal to rounding, shape ``(k,)``.
    """
    # With a ridge an unbounded problem ends at a large finite point.
    cosines = cosines + ridge(cosines.dtype) * jnp.eye(cosines.shape[0], dtype=cosines.dtype)
    # Below 2 / |C| a projected gradient step descends; the largest row sum bounds |C|.
    length = 1.9 / jnp.max(jnp.sum(jnp.abs(cosines), axis=1))

    def split(x: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
        free = x > 0
        return jnp.where(free, gradient, 0), jnp.where(free, 0, jnp.minimum(gradient, 0))

    def optimal(x: jax.Array, gradient: jax.Array) -> jax.Array:
        inner, outer = split(x, gradient)
        worst = jnp.max(jnp.abs(inner + outer), axis=1, keepdims=True)
        return ~(worst > rounding_level(x, linear))  # NaN has nowhere to descend to.

    def row_sum(x: jax.Array) -> jax.Array:
        return jnp.sum(x, axis=1, keepdims=True)

    def unfinished(carry: tuple) -> jax.Array:
        count, _, _, _, done = carry
        return (count < max_steps) & ~jnp.all(done)

    def step(carry: tuple) -> tuple:
        count, x, gradient, conjugate, done = carry
        inner, outer = split(x, gradient)
        reduced = jnp.minimum(x / length, inner)
        in_face = row_sum(outer * outer) <= row_sum(reduced * inner)
        direction = jnp.where(in_face, conjugate, outer)
        image = matmul(direction, cosines)
        curvature = row_sum(direction * image)
        curvature = jnp.where(curvature > 0, curvature, 1)
        best = row_sum(gradient * direction) / curvature
        down = direction > 0
        bound = jnp.where(down, x / jnp.where(down, direction, 1), jnp.inf)
        bound = jnp.min(bound, axis=1, keepdims=True)
        inside = best <= bound
        taken = jnp.minimum(best, bound)
        moved = jnp.maximum(x - taken * direction, 0)
        there = jnp.where(moved > 0, gradient - taken * image, 0)
        moved = jnp.where(inside, moved, jnp.maximum(moved - length * there, 0))
        gradient = matmul(moved, cosines) + linear
        inner, _ = split(moved, gradient)
        overlap = jnp.where(inside & in_face, row_sum(inner * image) / curvature, 0)
        conjugate = inner - overlap * direction
        x = jnp.where(done, x, moved)
        return count + 1, x, gradient, conjugate, done | optimal(moved, gradient)

    gradient = matmul(start, cosines) + linear
    inner, _ = split(start, gradient)
    carry = (0, start, gradient, inner, optimal(start, gradient))
    _, x, _, _, done = lax.while_loop(unfinished, step, carry)
    finite = jnp.isfinite(x).all(axis=1, keepdims=True)
    return jnp.where(finite, x, 0), (done & finite)[:, 0]


def conjugate_gradients(
    cosines: jax.Array, right: jax.Array, support: jax.Array, max_steps: int
) -> jax.Array:
    """Solves ``C_SS x_S = b_S`` for every row's support `S`, with zeros outside of it.

    Args:
      cosines: `C`, shape ``(m, m)``.
      right: One `b` per row, shape ``(k, m)``.
      support: Which entries may differ from zero, shape ``(k, m)``, bool.
      max_steps: The largest number of steps.

    Returns:
      The solutions, shape ``(k, m)``: to rounding where that takes at most `max_steps` steps.
    """

    def row_sum(x: jax.Array) -> jax.Array:
        return jnp.sum(x, axis=1, keepdims=True)

    residual = jnp.where(support, right, 0)
    square = row_sum(residual * residual)
    enough = square * (jnp.finfo(right.dtype).eps ** 2)

    def unfinished(carry: tuple) -> jax.Array:
        count, _, _, _, square = carry
        return (count < max_steps) & jnp.any(square > enough)

    def step(carry: tuple) -> tuple:
        count, x, residual, direction, square = carry
        image = jnp.where(support, matmul(direction, cosines), 0)
        curvature = row_sum(direction * image)
        live = (square > enough) & (curvature > 0)
        length = jnp.where(live, square / jnp.where(live, curvature, 1), 0)
        residual = residual - length * image
        after = jnp.where(live, row_sum(residual * residual), 0)
        ratio = after / jnp.where(live, square, 1)
        return count + 1, x + length * direction, residual, residual + ratio * direction, after

    start = (0, jnp.zeros_like(residual), residual, residual, square)
    return lax.while_loop(unfinished, step, start)[1]
