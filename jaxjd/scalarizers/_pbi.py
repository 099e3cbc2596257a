"""Penalty-based boundary intersection (PBI)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxjd.base import PyTree, Scalarizer, stateless
from jaxjd.checks import check_range
from jaxjd.scalarizers._tasks import (
    keep_state,
    loss_vector,
    norm,
    optional_per_task,
    per_task,
    unit_vector,
)


def pbi(theta: float, weights: PyTree, reference: PyTree | None = None) -> Scalarizer:
    r"""PBI: the way along a preferred ray plus a penalty for the distance from it.

    .. math:: d_1 + \theta d_2, \quad d_1 = u^\top (L - z), \quad
              d_2 = \|L - z - d_1 u\|, \quad u = w / \|w\|

    From Zhang and Li, "MOEA/D: A Multiobjective Evolutionary Algorithm Based on Decomposition"
    (IEEE Transactions on Evolutionary Computation 2007, https://doi.org/10.1109/TEVC.2007.892759).
    The distance has no derivative on the ray itself: there, up to rounding relative to
    :math:`\|L - z\|`, it counts as zero with the gradient zero. Stateless.

    Args:
      theta: The penalty :math:`\theta`, non-negative.
      weights: The direction :math:`w` of the ray, shape ``(m,)`` or laid out as the losses.
      reference: The ray's start :math:`z`, an ideal point, laid out in the same way; zeros by
        default.

    Returns:
      A `Scalarizer`.

    Raises:
      ValueError: If `theta` is negative, or `weights` or `reference` holds anything but real
        numbers; in `apply`, if one of them has not one number per task, or a loss is not floating
        point.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> scalarizer = jaxjd.scalarizers.pbi(theta=1.0, weights=[1.0, 1.0])
      >>> loss = scalarizer.apply(jnp.array([2.0, 0.0]), scalarizer.init(2))
      >>> print(round(float(loss), 4))  # sqrt(2) along the ray, sqrt(2) away from it
      2.8284
    """
    check_range("theta", theta, at_least=0)
    weights = per_task("weights", weights)
    reference = optional_per_task("reference", reference)

    def apply(losses: PyTree, state: PyTree) -> jax.Array:
        vector = loss_vector(losses)
        dtype = vector.dtype
        direction = unit_vector(weights.vector(losses, dtype))
        if reference is not None:
            vector = vector - reference.vector(losses, dtype)
        along = jnp.sum(vector * direction)
        away = vector - along * direction
        # On the ray what is left is rounding, whose direction means nothing.
        rounding = (vector.shape[0] + 4) * jnp.finfo(dtype).eps * norm(vector)
        on_ray = norm(away) <= rounding
        return along + jnp.asarray(theta, dtype) * norm(jnp.where(on_ray, 0, away))

    return Scalarizer(stateless, apply, keep_state)
