"""Conflict-averse gradient descent (CAGrad)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxjd.base import PyTree, Weighting, stateless
from jaxjd.checks import check_range, check_square
from jaxjd.linalg.nonnegative_qp import nonnegative_qp
from jaxjd.linalg.precision import matmul
from jaxjd.linalg.scaling import unit_diagonal

_MAX_STEPS = 40


def cagrad(c: float) -> Weighting:
    r"""CAGrad: the best worst-case improvement within a ball around the mean gradient.

    .. math:: d = \arg\max_{\|d - g_0\| \le c \|g_0\|} \min_i \langle g_i, d \rangle
              = g_0 + \frac{c \|g_0\|}{\|g_w\|} g_w, \qquad
              g_w = J^\top \arg\min_{w \in \Delta} g_0^\top J^\top w + c \|g_0\| \|J^\top w\|

    with the mean gradient :math:`g_0`. From Liu et al., "Conflict-Averse Gradient Descent for
    Multi-task Learning" (NeurIPS 2021, https://arxiv.org/abs/2110.14048). Stateless and exact: the
    worst improvement :math:`\mu` is found by Newton's method on the convex distance from
    :math:`g_0` to :math:`\{d : J d \ge \mu\}`, so there is no `norm_eps`. The update is not
    rescaled. Where no direction in the ball improves the worst task, for example at a
    Pareto-stationary point with :math:`c \ge 1`, `d` is the closest point to :math:`g_0` that
    worsens none.

    Args:
      c: The radius of the ball in units of :math:`\|g_0\|`, non-negative. 0 gives the mean.

    Returns:
      A `Weighting`.

    Raises:
      ValueError: If `c` is negative; in `update`, if the Gramian is not ``(m, m)``.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> weighting = jaxjd.weightings.cagrad(c=0.5)
      >>> weights, _ = weighting.update(jnp.array([[18.0, -22.0], [-22.0, 38.0]]), ())
      >>> print(jnp.round(weights, 4))
      [0.7041 0.5   ]
    """
    check_range("c", c, at_least=0)

    def update(stat: jax.Array, state: PyTree, **extra_args: Any) -> tuple[jax.Array, PyTree]:
        m = check_square("gramian", stat)
        unit = unit_diagonal(stat)
        longest = jnp.max(unit.lengths)
        scale = jnp.where(longest > 0, longest, 1)
        mean = unit.lengths / scale / m
        improvement = matmul(unit.cosines, mean)  # <g_i, g_0> / |g_i|
        radius = jnp.asarray(c, stat.dtype) * jnp.sqrt(jnp.maximum(matmul(mean, improvement), 0))
        inverse = unit.inverse_lengths * scale
        x = _best_worst_case(unit.cosines, improvement, inverse, unit.nonzero, radius)
        return (1 / m + x * inverse).astype(stat.dtype), state

    return Weighting(stateless, update)


@jax.jit  # So that calls outside of jit do not compile the loop anew.
def _best_worst_case(
    cosines: jax.Array,
    improvement: jax.Array,
    inverse_lengths: jax.Array,
    nonzero: jax.Array,
    radius: jax.Array,
) -> jax.Array:
    r"""Finds the coefficients `x >= 0` of ``d - g_0`` in the unit rows.

    For a worst improvement ``mu``, the point of ``{d : J d >= mu}`` closest to ``g_0`` is a
    nonnegative quadratic program; its distance is convex and increasing in ``mu``. The solution is
    where the distance meets the radius.
    """
    dtype = cosines.dtype
    eps = jnp.finfo(dtype).eps

    def closest(mu: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        x = nonnegative_qp(cosines, (improvement - mu * inverse_lengths)[None, :])[0]
        # Beyond the largest feasible mu, x runs off along a null direction of C: count it too.
        distance = jnp.sqrt(jnp.maximum(matmul(x, matmul(cosines, x)), 0) + 8 * eps * matmul(x, x))
        slope = matmul(x, inverse_lengths) / jnp.where(distance > 0, distance, 1)
        return x, distance, slope

    ratios = jnp.where(nonzero, improvement / jnp.where(nonzero, inverse_lengths, 1), jnp.inf)
    reach = radius / jnp.where(nonzero, inverse_lengths, 1)
    low = jnp.min(ratios)
    high = jnp.min(jnp.where(nonzero, ratios + reach, jnp.inf))
    # A zero row improves by zero whatever is done, so no more can be promised.
    any_zero = jnp.any(~nonzero)
    low = jnp.where(any_zero, jnp.minimum(low, 0), low)
    high = jnp.where(any_zero, jnp.minimum(high, 0), high)

    def unfinished(carry):
        count, _, _, _, _, done = carry
        return ~done & (count < _MAX_STEPS)

    def newton(carry):
        count, mu, low, high, _, _ = carry
        x, distance, slope = closest(mu)
        excess = distance - radius
        low = jnp.where(excess <= 0, mu, low)
        high = jnp.where(excess > 0, mu, high)
        proposal = mu - excess / jnp.where(slope > 0, slope, 1)
        inside = (slope > 0) & (proposal >= low) & (proposal <= high)
        proposal = jnp.where(inside, proposal, (low + high) / 2)
        close = jnp.abs(excess) <= 4 * eps * radius
        capped = (excess <= 0) & (mu >= high)
        stuck = high - low <= 2 * eps * jnp.maximum(jnp.abs(low), jnp.abs(high))
        done = close | capped | stuck | ~jnp.isfinite(distance)
        return count + 1, proposal.astype(dtype), low, high, x, done

    start = (0, high, low, high, jnp.zeros_like(improvement), ~jnp.isfinite(high))
    _, _, _, _, x, _ = lax.while_loop(unfinished, newton, start)
    finite = jnp.isfinite(improvement).all() & jnp.isfinite(radius)
    return jnp.where(finite, x, jnp.nan)
