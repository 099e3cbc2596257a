"""Conflict-averse gradient descent (CAGrad)."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from jaxjd.base import Certified, PyTree, Weighting, stateless
from jaxjd.checks import check_range, check_square
from jaxjd.linalg.nonnegative_qp import solve_from
from jaxjd.linalg.pivoting import support_solver
from jaxjd.linalg.precision import matmul
from jaxjd.linalg.residuals import worst_case_residual
from jaxjd.linalg.scaling import unit_diagonal

_MAX_STEPS = 40
_RESCALE = ("none", "square", "linear")


def cagrad(c: float, rescale: Literal["none", "square", "linear"] = "none") -> Weighting:
    r"""CAGrad: the best worst-case improvement within a ball around the mean gradient.

    .. math:: d = \arg\max_{\|d - g_0\| \le c \|g_0\|} \min_i \langle g_i, d \rangle
              = g_0 + \frac{c \|g_0\|}{\|g_w\|} g_w, \qquad
              g_w = J^\top \arg\min_{w \in \Delta} g_0^\top J^\top w + c \|g_0\| \|J^\top w\|

    with the mean gradient :math:`g_0`. From Liu et al., "Conflict-Averse Gradient Descent for
    Multi-task Learning" (NeurIPS 2021, https://arxiv.org/abs/2110.14048). Stateless and exact: the
    worst improvement :math:`\mu` is found by Newton's method on the convex distance from
    :math:`g_0` to :math:`\{d : J d \ge \mu\}`, so there is no `norm_eps`. Where no direction in the
    ball improves the worst task, for example at a Pareto-stationary point with :math:`c \ge 1`, `d`
    is the closest point to :math:`g_0` that worsens none.

    Args:
      c: The radius of the ball in units of :math:`\|g_0\|`, non-negative. 0 gives the mean.
      rescale: What the authors' code divides the update by: nothing (``"none"``, as in the paper),
        :math:`1 + c^2` (``"square"``, its default) or :math:`1 + c` (``"linear"``, its two-task
        example).

    Returns:
      A `Weighting`.

    Raises:
      ValueError: If `c` is negative or `rescale` none of the three; in `update`, if the Gramian is
        not ``(m, m)``.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> weighting = jaxjd.weightings.cagrad(c=0.5)
      >>> weights, _ = weighting.update(jnp.array([[18.0, -22.0], [-22.0, 38.0]]), ())
      >>> print(jnp.round(weights, 4))
      [0.7041 0.5   ]
    """
    check_range("c", c, at_least=0)
    if rescale not in _RESCALE:
        raise ValueError(f"`rescale` must be one of {_RESCALE}, got {rescale!r}.")

    def update(stat: jax.Array, state: PyTree, **extra_args: Any) -> tuple:
        m = check_square("gramian", stat)
        unit = unit_diagonal(stat)
        longest = jnp.max(unit.lengths)
        scale = jnp.where(longest > 0, longest, 1)
        mean = unit.lengths / scale / m
        improvement = matmul(unit.cosines, mean)  # <g_i, g_0> / |g_i|
        size = jnp.asarray(c, stat.dtype)
        shrink = (1, 1 + size * size, 1 + size)[_RESCALE.index(rescale)]
        radius = size * jnp.sqrt(jnp.maximum(matmul(mean, improvement), 0))
        inverse = unit.inverse_lengths * scale
        x = _best_worst_case(unit.cosines, improvement, inverse, radius)
        weights = ((1 / m + x * inverse) / shrink).astype(stat.dtype)
        certificate = jax.tree_util.Partial(worst_case_residual, weights * shrink, stat, size)
        return weights, state, certificate

    return Weighting(stateless, Certified(update))


@jax.custom_jvp
def _best_worst_case(
    cosines: jax.Array, improvement: jax.Array, inverse_lengths: jax.Array, radius: jax.Array
) -> jax.Array:
    """Finds the coefficients `x >= 0` of ``d - g_0`` in the unit rows, shape ``(m,)``."""
    return _search(cosines, improvement, inverse_lengths, radius)[0]


@_best_worst_case.defjvp
def _best_worst_case_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    # On the support S: C_SS x_S = (mu / |g| - <g, g_0> / |g|)_S and x^T C x = radius^2, two
    # equations for dx and dmu. Where the radius is not reached, mu is at a bound and stays.
    cosines, _, inverse_lengths, radius = primals
    cosines_dot, improvement_dot, inverse_dot, radius_dot = tangents
    x, mu, reached = _search(*primals)
    solve = support_solver(cosines, x[None, :] > 0)
    along = matmul(cosines_dot, x)
    forced = mu * inverse_dot - improvement_dot - along
    slope = jnp.sum(x * inverse_lengths)
    moves = reached & (slope > 0)
    mu_dot = radius * radius_dot - jnp.sum(x * (along / 2 + forced))
    mu_dot = jnp.where(moves, mu_dot / jnp.where(moves, slope, 1), 0)
    return x, solve((inverse_lengths * mu_dot + forced)[None, :])[0]


@jax.jit  # So that calls outside of jit do not compile the loop anew.
def _search(
    cosines: jax.Array, improvement: jax.Array, inverse_lengths: jax.Array, radius: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    r"""Finds `x`, the worst improvement ``mu``, and whether ``d - g_0`` is as long as the radius.

    For a worst improvement ``mu``, the point of ``{d : J d >= mu}`` closest to ``g_0`` is a
    nonnegative quadratic program; its distance is convex and increasing in ``mu``. The solution is
    where the distance meets the radius.
    """
    dtype = cosines.dtype
    eps = jnp.finfo(dtype).eps
    nonzero = ~(inverse_lengths == 0)

    def closest(mu: jax.Array, start: jax.Array) -> jax.Array:
        linear = improvement - mu * inverse_lengths
        return solve_from(cosines, linear[None, :], start[None, :])[0]

    def squares_of(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        # Beyond the largest feasible mu, x runs off along a null direction of C: count it too.
        return jnp.maximum(matmul(x, matmul(cosines, x)), 0), 8 * eps * matmul(x, x)

    def is_vague(square: jax.Array, unseen: jax.Array) -> jax.Array:
        return unseen > 1e-2 * square

    def slope_of(x: jax.Array, distance: jax.Array) -> jax.Array:
        return matmul(x, inverse_lengths) / jnp.where(distance > 0, distance, 1)

    ratios = jnp.where(nonzero, improvement / jnp.where(nonzero, inverse_lengths, 1), jnp.inf)
    reach = radius / jnp.where(nonzero, inverse_lengths, 1)
    lowest = jnp.min(ratios)
    highest = jnp.min(jnp.where(nonzero, ratios + reach, jnp.inf))
    # A zero row improves by zero whatever is done, so no more can be promised.
    any_zero = jnp.any(~nonzero)
    lowest = jnp.where(any_zero, jnp.minimum(lowest, 0), lowest)
    highest = jnp.where(any_zero, jnp.minimum(highest, 0), highest)

    def unfinished(carry: tuple) -> jax.Array:
        count, *_, done = carry
        return ~done & (count < _MAX_STEPS)

    def newton(carry: tuple) -> tuple:
        count, mu, low, high, x, last_mu, last_distance, _ = carry
        x = closest(mu, x)
        square, unseen = squares_of(x)
        distance = jnp.sqrt(square + unseen)
        slope = slope_of(x, distance)
        excess = distance - radius
        # The slope does not know of what is counted in addition. Where that is much of the
        # distance, the secant does; from above it never steps beyond a root of a convex function.
        vague = is_vague(square, unseen)
        secant = (last_distance - distance) / jnp.where(last_mu > mu, last_mu - mu, 1)
        slope = jnp.where(vague & (last_mu > mu), jnp.minimum(slope, secant), slope)
        low = jnp.where(excess <= 0, mu, low)
        high = jnp.where(excess > 0, mu, high)
        proposal = mu - excess / jnp.where(slope > 0, slope, 1)
        inside = (slope > 0) & (proposal >= low) & (proposal <= high)
        proposal = jnp.where(inside, proposal, (low + high) / 2)
        close = jnp.abs(excess) <= 4 * eps * radius
        capped = (excess <= 0) & (mu >= high)
        stuck = high - low <= 2 * eps * jnp.maximum(jnp.abs(low), jnp.abs(high))
        # Then the solution is at zero (see below), and need not be approached any closer.
        zero = vague & (mu > 0) & (jnp.abs(excess) <= 0.1 * radius)
        done = close | capped | stuck | zero | ~jnp.isfinite(distance)
        proposal = jnp.where(done, mu, proposal).astype(dtype)
        return count + 1, proposal, low, high, x, mu, distance, done

    nothing = jnp.zeros_like(improvement)
    none_yet = jnp.full_like(highest, -jnp.inf)
    infinite = ~jnp.isfinite(highest)
    start = (0, highest, lowest, highest, nothing, none_yet, none_yet, infinite)
    _, mu, _, _, x, *_ = lax.while_loop(unfinished, newton, start)

    # What was counted in addition is taken out by one step more. Where it is most of the distance,
    # no mu > 0 is feasible: the hull of the rows holds zero, and the largest one is 0.
    square, unseen = squares_of(x)
    stationary = (mu > 0) & is_vague(square, unseen)
    distance = jnp.sqrt(square)
    slope = slope_of(x, distance)
    step = (radius - distance) / jnp.where(slope > 0, slope, 1)
    better = jnp.where(stationary, 0, mu + jnp.where(slope > 0, step, 0))
    corrected = closest(better, x)
    miss, new_miss = (jnp.abs(d - radius) for d in (distance, jnp.sqrt(squares_of(corrected)[0])))
    accepted = stationary | (new_miss < miss)
    x = jnp.where(accepted, corrected, x)
    mu = jnp.where(accepted, better, mu)
    miss = jnp.where(accepted, new_miss, miss)
    reached = ~stationary & (miss <= jnp.sqrt(eps) * radius)
    finite = jnp.isfinite(improvement).all() & jnp.isfinite(radius)
    return jnp.where(finite, x, jnp.nan), mu, reached
