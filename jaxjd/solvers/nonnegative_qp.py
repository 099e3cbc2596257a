r"""Exact convex quadratic programs over the nonnegative orthant, batched over the linear term.

.. math:: x^* = \arg\min_{x \ge 0} \tfrac12 x^\top C x + q^\top x

is the problem behind the projection onto the dual cone, the minimum-norm point, CAGrad and PCD. Its
optimality conditions are ``x >= 0``, ``y = C x + q >= 0`` and ``x_i y_i = 0``, so a solution is
known once its support is. The number of variables chooses the way while tracing:
`jaxjd.solvers.closed_form` for up to three, `jaxjd.solvers.sweeps` for up to eight, or sixteen
where there are one or two problems. With more there are two stages:

* `jaxjd.solvers.gradient_projection` needs matrix products only, and is done after some ten steps
  where `C` is well-conditioned, as for gradients of many parameters it mostly is;
* `jaxjd.solvers.pivoting` goes on with the rows that are not, by factorizations.

The solution on the support is polished to the last digits. The shapes are static, nothing leaves
the device, and all problems of a batch share each step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxjd.solvers import closed_form
from jaxjd.solvers.gradient_projection import conjugate_gradients, descend
from jaxjd.solvers.loops import unless
from jaxjd.solvers.pivoting import search, solve_on_support, support_solver
from jaxjd.solvers.precision import matmul, power_of_two
from jaxjd.solvers.sweeps import solve_by_support

_FEW = 8  # Variables. With more, and many problems at once, products cost less than sweeps.
_FEW_ALONE = 16  # With one problem or two: each costs m^2 operations per variable.
_DESCENT_STEPS = 60
_POLISHING_STEPS = 30
_LARGE = 2.0  # Relative to the linear term.
_CHUNK_ELEMENTS = 1 << 25  # Elements of the stacked (k, m, m) systems that may exist at once.


def nonnegative_qp(cosines: jax.Array, linear: jax.Array, *, inside: int = 4) -> jax.Array:
    """Solves a batch of quadratic programs over the nonnegative orthant.

    Args:
      cosines: A positive semi-definite matrix `C` with a unit diagonal, shape ``(m, m)``. It may be
        singular; then `linear` should lie in the range of `C` for a bounded problem. An unbounded
        one gives a large finite `x`, close to a multiple of a direction of recession.
      linear: One linear term per row, shape ``(k, m)``.
      inside: By how many ulps of `x` to aim to the inside of ``y >= 0``.

    Returns:
      The solutions, shape ``(k, m)``. Differentiable in both modes with respect to both arguments
      where the support is locally constant. Non-finite input gives non-finite output.
    """
    k, m = linear.shape
    rows = max(1, _CHUNK_ELEMENTS // (m * m))
    if k <= rows:
        return _solve(inside, cosines, linear)
    return lax.map(lambda q: _solve(inside, cosines, q[None])[0], linear, batch_size=rows)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _solve(inside: int, cosines: jax.Array, linear: jax.Array) -> jax.Array:
    return solve_from(cosines, linear, jnp.maximum(-linear, 0), inside=inside)


@_solve.defjvp
def _solve_jvp(inside: int, primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    # On the support S: C_SS x_S = -q_S, so C_SS dx_S = -(dq + dC x)_S; zero elsewhere.
    cosines, linear = primals
    cosines_dot, linear_dot = tangents
    x = _solve(inside, cosines, linear)
    return x, solve_on_support(cosines, x > 0, -(linear_dot + matmul(x, cosines_dot)))


def approximate(
    cosines: jax.Array, linear: jax.Array, start: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns solutions without the polish, and which of them took no factorization."""
    x, easy = descend(cosines, linear, start, _DESCENT_STEPS)
    # A point that far away is (next to) a direction of recession: factorizations find it better.
    easy = easy & (jnp.max(x, axis=1) <= _LARGE)

    def factorize(x: jax.Array, solved: jax.Array) -> jax.Array:
        return search(cosines, linear, x, ~solved)[0]

    return unless(easy, factorize, x), easy


def rough_solutions(cosines: jax.Array, linear: jax.Array) -> jax.Array:
    """The solutions of `nonnegative_qp` up to a ridge, in a smaller program; without derivatives.

    The minimum is off by the square of their error, so that it is as good as that of exact ones.

    Args:
      cosines: `C`, shape ``(m, m)``.
      linear: One linear term per row, of size one, shape ``(k, m)``.

    Returns:
      The solutions, shape ``(k, m)``.
    """
    cosines, linear = jax.lax.stop_gradient((cosines, linear))
    start = jnp.maximum(-linear, 0)
    few = cosines.shape[0] <= _FEW
    return (solve_by_support if few else approximate)(cosines, linear, start)[0]


# Under jit, so that calls outside of jit do not compile the loops anew.
@functools.partial(jax.jit, static_argnames="inside")
def solve_from(
    cosines: jax.Array, linear: jax.Array, start: jax.Array, *, inside: int = 4
) -> jax.Array:
    """`nonnegative_qp` from a guess, for solvers that call it in a loop; without derivatives.

    Args:
      cosines: `C`, shape ``(m, m)``.
      linear: One linear term per row, shape ``(k, m)``.
      start: A guess, non-negative, shape ``(k, m)``.
      inside: As there.

    Returns:
      The solutions, shape ``(k, m)``.
    """
    # In units of a power of two next to the largest entry: exact, and no square underflows.
    unit = power_of_two(jnp.max(jnp.abs(linear), axis=1, keepdims=True))
    linear, start = linear / unit, start / unit
    m = cosines.shape[0]
    if m <= closed_form.MOST:
        x = closed_form.solve_columns(cosines, linear, inside)
    elif m <= (_FEW_ALONE if linear.shape[0] <= 2 else _FEW):
        found, solve = solve_by_support(cosines, linear, start)
        x = _polish(cosines, linear, found, solve, inside)
    else:
        x = _solve_many(cosines, linear, start, inside)
    # NaN never compares, so it has to be put back.
    finite = jnp.isfinite(linear).all(axis=1, keepdims=True) & jnp.isfinite(cosines).all()
    return jnp.where(finite, x * unit, jnp.nan)


def _solve_many(cosines: jax.Array, linear: jax.Array, start: jax.Array, inside: int) -> jax.Array:
    # From far away nothing would be found: rounding is relative to the point.
    near = jnp.max(start, axis=1, keepdims=True) <= 1
    found, easy = approximate(cosines, linear, jnp.where(near, start, jnp.maximum(-linear, 0)))
    support = found > 0
    x = _polish(
        cosines,
        linear,
        found,
        lambda b: conjugate_gradients(cosines, b, support, _POLISHING_STEPS),
        inside,
    )

    def factorize(x: jax.Array, easy: jax.Array) -> jax.Array:
        solve = support_solver(cosines, x > 0, refinements=3)
        return jnp.where(easy[:, None], x, _polish(cosines, linear, x, solve, inside))

    return unless(easy, factorize, jnp.where(easy[:, None], x, found))


def _polish(
    cosines: jax.Array,
    linear: jax.Array,
    x: jax.Array,
    solve: Callable[[jax.Array], jax.Array],
    inside: int,
) -> jax.Array:
    """Solves once more on the known support by `solve`, as exactly as the dtype allows.

    The optimality conditions hold with equality on the support, so rounding makes about half of
    them fail by an ulp; for an aggregated gradient that is a tiny conflict. Aiming a few ulps to
    the inside turns the error to the harmless side. Each candidate is taken only where it does what
    it should: in a (nearly) singular problem there may be no inside.
    """
    scale = jnp.linalg.norm(x, axis=1, keepdims=True)
    margin = inside * jnp.finfo(x.dtype).eps * scale
    # The two corrections are small, so their relative errors are harmless.
    residual = -linear - matmul(x, cosines)
    solution, nudge = x + solve(residual), solve(jnp.broadcast_to(margin, x.shape))
    candidates = jnp.stack([solution, solution + nudge])
    steps = jnp.stack([solution - x, 10 * nudge])
    gradients = matmul(candidates, cosines) + linear[None]
    limit = jnp.maximum(jnp.max(residual, axis=1, keepdims=True), margin)
    # A step that is large or leaves a worse conflict is not rounding.
    excess = jnp.maximum(-gradients - limit[None], jnp.abs(steps) - 0.1 * scale[None])
    good = jnp.all((candidates >= 0) & (excess <= 0), axis=2, keepdims=True)
    return jnp.where(good[1], candidates[1], jnp.where(good[0], solution, x))
