"""Conflict-averse gradient descent (CAGrad)."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxjd.base import Certified, PyTree, Weighting, stateless
from jaxjd.checks import check_range, check_square
from jaxjd.solvers.precision import matmul
from jaxjd.solvers.residuals import worst_case_residual
from jaxjd.solvers.scaling import safe_sqrt, unit_diagonal
from jaxjd.solvers.worst_case import best_worst_case

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
        radius = size * safe_sqrt(matmul(mean, improvement))
        inverse = unit.inverse_lengths * scale
        x = best_worst_case(unit.cosines, improvement, inverse, radius)
        weights = ((1 / m + x * inverse) / shrink).astype(stat.dtype)
        certificate = jax.tree_util.Partial(worst_case_residual, weights * shrink, stat, size)
        return weights, state, certificate

    return Weighting(stateless, Certified(update))
