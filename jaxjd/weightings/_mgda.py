"""The multiple-gradient descent algorithm (MGDA)."""

from __future__ import annotations

from typing import Any

import jax

from jaxjd.base import PyTree, Weighting, stateless
from jaxjd.checks import check_square
from jaxjd.linalg.min_norm import min_norm_weights


def mgda() -> Weighting:
    r"""MGDA: the point of smallest norm in the convex hull of the gradients.

    .. math:: w = \arg\min_{w \in \Delta} \|J^\top w\|^2

    From Désidéri, "Multiple-gradient descent algorithm (MGDA) for multiobjective optimization"
    (C. R. Math. 2012). Stateless. The point is exact: there are no `epsilon` and `max_iters`, as
    TorchJD has them for its Frank-Wolfe iteration. Short gradients get the most weight.

    Returns:
      A `Weighting`.

    Raises:
      ValueError: In `update`, if the Gramian is not an ``(m, m)`` floating point array.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> weighting = jaxjd.weightings.mgda()
      >>> weights, _ = weighting.update(jnp.array([[18.0, -22.0], [-22.0, 38.0]]), ())
      >>> print(jnp.round(weights, 4))
      [0.6 0.4]
    """

    def update(stat: jax.Array, state: PyTree, **extra_args: Any) -> tuple[jax.Array, PyTree]:
        check_square("gramian", stat)
        return min_norm_weights(stat), state

    return Weighting(stateless, update)
