r"""Exact convex quadratic programs over the nonnegative orthant, batched over the linear term.

.. math:: x^* = \arg\min_{x \ge 0} \tfrac12 x^\top C x + q^\top x

is the problem behind the projection onto the dual cone, the minimum-norm point and CAGrad. Its
optimality conditions are ``x >= 0``, ``y = C x + q >= 0`` and ``x_i y_i = 0``, so a solution is
known once its support is: this is a search for the support, with one Cholesky factorization per
candidate. Two rules choose the next candidate:

* block principal pivoting (Kim and Park, "Fast nonnegative matrix factorization: an active-set-like
  method and comparisons", SIAM J. Sci. Comput. 2011) exchanges all violated indices at once. It
  takes a handful of steps, but may cycle when `C` is close to singular;
* an active-set method in the manner of Lawson and Hanson ("Solving Least Squares Problems", 1974)
  keeps ``x >= 0`` and lowers the objective at every step, so it cannot cycle. Problems that the
  first rule has not solved after a few steps go on with it.

The shapes are static, nothing leaves the device, and all problems of a batch share each step.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

_PIVOTING_STEPS = 10
_CHUNK_ELEMENTS = 1 << 25  # Elements of the stacked (k, m, m) systems that may exist at once.


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """A matrix product in the full precision of the dtype on every platform."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def nonnegative_qp(cosines: jax.Array, linear: jax.Array) -> jax.Array:
    """Solves a batch of quadratic programs over the nonnegative orthant.

    Args:
      cosines: A positive semi-definite matrix `C` with a unit diagonal, shape ``(m, m)``. It may be
        singular; then `linear` should lie in the range of `C` for a bounded problem. An unbounded
        one gives a large finite `x`, close to a multiple of a direction of recession.
      linear: One linear term per row, shape ``(k, m)``.

    Returns:
      The solutions, shape ``(k, m)``. Differentiable in both modes with respect to both arguments
      where the support is locally constant. Non-finite input gives non-finite output.
    """
    k, m = linear.shape
    rows = max(1, _CHUNK_ELEMENTS // (m * m))
    if k <= rows:
        return _solve(cosines, linear)
    return lax.map(lambda q: _solve(cosines, q[None])[0], linear, batch_size=rows)


@jax.custom_jvp
def _solve(cosines: jax.Array, linear: jax.Array) -> jax.Array:
    return _polish(cosines, linear, *_search(cosines, linear))


@_solve.defjvp
def _solve_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    # On the support S: C_SS x_S = -q_S, so C_SS dx_S = -(dq + dC x)_S; zero elsewhere.
    cosines, linear = primals
    cosines_dot, linear_dot = tangents
    x = _solve(cosines, linear)
    solve = _support_solver(cosines, x > 0)
    return x, solve(-(linear_dot + matmul(x, cosines_dot)))


def _ridge(dtype: jnp.dtype) -> jax.Array:
    """Relative to the unit diagonal: keeps the factorization defined when `C` is singular."""
    return jnp.asarray(8 * jnp.finfo(dtype).eps, dtype)


def _support_solver(cosines: jax.Array, support: jax.Array, refinements: int = 2):
    """Returns ``b -> C_SS^+ b_S`` for every row's support, with zeros outside of it.

    A ridge makes the factorization safe, iterative refinement against `C` itself takes it out again
    wherever `C_SS` is not singular.
    """
    mask = support.astype(cosines.dtype)
    eye = jnp.eye(cosines.shape[0], dtype=cosines.dtype)
    systems = cosines[None] * mask[:, :, None] * mask[:, None, :]
    systems += eye[None] * jnp.where(support, _ridge(cosines.dtype), 1)[:, :, None]
    factors = lax.linalg.cholesky(systems)

    def apply(b: jax.Array) -> jax.Array:
        b = (b * mask)[..., None]
        b = lax.linalg.triangular_solve(factors, b, left_side=True, lower=True)
        b = lax.linalg.triangular_solve(factors, b, left_side=True, lower=True, transpose_a=True)
        return b[..., 0] * mask

    def solve(b: jax.Array) -> jax.Array:
        x = apply(b)
        for _ in range(refinements):
            x = x + apply(b - matmul(x, cosines))
        return x

    return solve


def _tolerance(x: jax.Array, linear: jax.Array) -> jax.Array:
    """The rounding level of ``C x + q`` per row, shape ``(k, 1)``."""
    scale = jnp.linalg.norm(x, axis=1) + jnp.max(jnp.abs(linear), axis=1)
    return (16 * jnp.finfo(x.dtype).eps * scale)[:, None]


@jax.jit  # So that calls outside of jit do not compile the loop anew.
def _search(cosines: jax.Array, linear: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Finds the support of every row's solution; returns it with the solution found on it."""
    k, m = linear.shape
    cosines = cosines + _ridge(cosines.dtype) * jnp.eye(m, dtype=cosines.dtype)
    start = linear < -_tolerance(jnp.zeros_like(linear), linear)
    max_steps = _PIVOTING_STEPS + 10 + 4 * m

    def step(carry):
        count, x, support, live, fewest, patience = carry
        solution = _support_solver(cosines, support, refinements=1)(-linear)
        gradient = matmul(solution, cosines) + linear
        tolerance = _tolerance(solution, linear)
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
        next_support = jnp.where(switch, start, next_support)
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

    carry = (
        0,
        jnp.zeros_like(linear),
        start,
        jnp.any(start, axis=1),
        jnp.full((k,), m + 1),
        jnp.full((k,), 3),
    )
    _, x, support, _, _, _ = lax.while_loop(unsolved, step, carry)
    return jnp.maximum(x, 0), support


def _polish(cosines: jax.Array, linear: jax.Array, x: jax.Array, support: jax.Array) -> jax.Array:
    """Solves once more on the known support, as exactly as the dtype allows.

    The optimality conditions hold with equality on the support, so rounding makes about half of
    them fail by an ulp; for an aggregated gradient that is a tiny conflict. Aiming a few ulps to
    the inside turns the error to the harmless side. Each candidate is taken only where it does what
    it should: in a (nearly) singular problem there may be no inside.
    """
    solve = _support_solver(cosines, support, refinements=3)
    scale = jnp.linalg.norm(x, axis=1, keepdims=True)
    margin = 4 * jnp.finfo(x.dtype).eps * scale
    solution = solve(-linear)
    candidates = jnp.stack([x, solution, solution + solve(jnp.broadcast_to(margin, x.shape))])
    changes = jnp.linalg.norm(candidates - x[None], axis=2, keepdims=True)
    gradients = matmul(candidates, cosines) + linear[None]
    worst = jnp.max(-gradients, axis=2, keepdims=True)
    valid = jnp.all(candidates >= 0, axis=2, keepdims=True)
    # A step that is large or leaves a worse conflict is not rounding.
    improved = (
        valid & (worst <= jnp.maximum(worst[:1], margin[None])) & (changes <= 0.1 * scale[None])
    )
    nudge = jnp.linalg.norm(candidates[2] - candidates[1], axis=1, keepdims=True)
    x = jnp.where(improved[1], candidates[1], x)
    x = jnp.where(improved[2] & (nudge <= 1e-2 * scale), candidates[2], x)
    # NaN never compares, so it has to be put back.
    return jnp.where(jnp.isfinite(linear).all(axis=1, keepdims=True), x, jnp.nan)
