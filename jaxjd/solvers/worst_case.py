"""The best worst-case improvement in a ball around the mean row, the problem behind CAGrad."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxjd.solvers.nonnegative_qp import solve_from
from jaxjd.solvers.pivoting import solve_on_support
from jaxjd.solvers.precision import matmul

_MAX_STEPS = 40
_ROUNDING = 8.0  # Of a squared length that a Gramian gives, in ulps.


@jax.custom_jvp
def best_worst_case(
    cosines: jax.Array, improvement: jax.Array, inverse_lengths: jax.Array, radius: jax.Array
) -> jax.Array:
    """Finds the coefficients `x >= 0` of ``d - g_0`` in the unit rows, shape ``(m,)``."""
    return _search(cosines, improvement, inverse_lengths, radius)[0]


@best_worst_case.defjvp
def _jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    # On the support S: C_SS x_S = (mu / |g| - <g, g_0> / |g|)_S and x^T C x = radius^2, two
    # equations for dx and dmu. Where the radius is not reached, mu is at a bound and stays.
    cosines, _, inverse_lengths, radius = primals
    cosines_dot, improvement_dot, inverse_dot, radius_dot = tangents
    x, mu, reached = _search(*primals)
    along = matmul(cosines_dot, x)
    forced = mu * inverse_dot - improvement_dot - along
    slope = jnp.sum(x * inverse_lengths)
    moves = reached & (slope > 0)
    mu_dot = radius * radius_dot - jnp.sum(x * (along / 2 + forced))
    mu_dot = jnp.where(moves, mu_dot / jnp.where(moves, slope, 1), 0)
    right = inverse_lengths * mu_dot + forced
    return x, solve_on_support(cosines, x[None, :] > 0, right[None, :])[0]


@jax.jit  # So that calls outside of jit do not compile the loop anew.
def _search(
    cosines: jax.Array, improvement: jax.Array, inverse_lengths: jax.Array, radius: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    r"""Finds `x`, the worst improvement ``mu``, and whether ``d - g_0`` is as long as the radius.

    The point of ``{d : J d >= mu}`` closest to ``g_0`` is a nonnegative quadratic program. Its `x`
    bounds the optimum from above, as any ``x >= 0`` does by weak duality,

        mu <= (<g_0, e> + radius |e|) / <x, 1 / |g|>,   e = U^T x,

    and taking that bound for the next ``mu`` is Newton's method on the convex distance from above.
    """
    dtype = cosines.dtype
    eps = jnp.finfo(dtype).eps
    nonzero = ~(inverse_lengths == 0)

    def length(x: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.maximum(jnp.sum(x * matmul(x, cosines), axis=-1), 0))

    def bound(x: jax.Array) -> jax.Array:
        push = matmul(x, inverse_lengths)
        top = matmul(x, improvement) + radius * length(x)
        return jnp.where(push > 0, top / jnp.where(push > 0, push, 1), jnp.inf)

    # No row alone permits more than its own improvement and the radius.
    tops = jnp.where(
        nonzero, (improvement + radius) / jnp.where(nonzero, inverse_lengths, 1), jnp.inf
    )

    def begin(projected: jax.Array, smallest: jax.Array) -> tuple[jax.Array, jax.Array]:
        # The hull holds zero, as far as the Gramian can tell, where its smallest point is no longer
        # than rounding. A zero row is improved by nothing.
        stationary = length(smallest) <= jnp.sqrt(_ROUNDING * eps) * jnp.sum(smallest)
        within = length(projected) <= radius
        start = jnp.where(within, smallest, projected)
        mu = jnp.minimum(jnp.min(tops), bound(start))
        return mu, (stationary | ~jnp.all(nonzero)) & within

    def newton(mu: jax.Array, x: jax.Array, linear: jax.Array) -> tuple[jax.Array, jax.Array]:
        # x^T C x = x^T (C x + q) - q^T x, where complementarity makes the first term small.
        slack = matmul(x, cosines) + linear
        distance = jnp.sqrt(jnp.maximum(matmul(x, slack) - matmul(linear, x), 0))
        push = matmul(inverse_lengths, x)
        better = mu - distance * (distance - radius) / jnp.where(push > 0, push, 1)
        done = (distance <= radius * (1 + 4 * eps)) | ~(better < mu)
        return jnp.where(done, mu, better), done

    def unfinished(carry: tuple) -> jax.Array:
        count, *_, done = carry
        return ~done & (count <= _MAX_STEPS)

    # The first turn finds the projection of g_0 onto the dual cone, and the direction of the
    # hull's smallest point; the later ones are Newton's, beside a problem that zero solves. All in
    # one loop: the solver in it is most of what there is to compile.
    def turn(carry: tuple) -> tuple:
        count, mu, x, at_zero, _ = carry
        first = count == 0
        beside = jnp.where(first, -1, 1) * nonzero.astype(dtype)
        linear = jnp.stack([improvement - mu * inverse_lengths, beside])
        guess = jnp.maximum(-linear, 0)
        x, smallest = solve_from(cosines, linear, guess.at[0].set(jnp.where(first, guess[0], x)))
        start, at_zero_now = begin(x, smallest)
        better, done = newton(mu, x, linear[0])
        return (
            count + 1,
            jnp.where(first, start, better),
            x,
            jnp.where(first, at_zero_now, at_zero),
            jnp.where(first, at_zero_now, done),
        )

    zero, false = jnp.zeros_like(radius), jnp.zeros_like(radius, dtype=bool)
    start = (0, zero, jnp.zeros_like(improvement), false, false)
    _, mu, x, at_zero, _ = lax.while_loop(unfinished, turn, start)
    finite = jnp.isfinite(improvement).all() & jnp.isfinite(radius)
    return jnp.where(finite, x, jnp.nan), jnp.where(at_zero, 0, mu), ~at_zero
