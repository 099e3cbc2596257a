"""How much the tasks' gradients conflict, with each other and with an update."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxjd.base import Gramian
from jaxjd.checks import check_square, check_weights
from jaxjd.solvers.precision import matmul
from jaxjd.solvers.scaling import unit_diagonal

# In units of the rounding of one number: what a sum of products may be off by.
_ROUNDING = 16


def cosine_matrix(gramian: Gramian) -> jax.Array:
    r"""The cosines between the tasks' gradients, :math:`C_{ij} = G_{ij} / \sqrt{G_{ii} G_{jj}}`.

    Args:
      gramian: The Gramian `G`, shape ``(m, m)``.

    Returns:
      Shape ``(m, m)``, between -1 and 1. A zero gradient has the cosine 0 with the others and 1
      with itself. NaN where a gradient is not finite.

    Raises:
      ValueError: If `gramian` is not a floating point square matrix.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> jacobian = jnp.array([[3.0, 4.0], [-3.0, 4.0], [0.0, 0.0]])
      >>> print(jnp.round(jaxjd.diagnostics.cosine_matrix(jaxjd.gramian(jacobian)), 4))
      [[1.   0.28 0.  ]
       [0.28 1.   0.  ]
       [0.   0.   1.  ]]
    """
    check_square("gramian", gramian)
    return jnp.clip(unit_diagonal(gramian).cosines, -1, 1)


def conflict_count(gramian: Gramian, weights: jax.Array | None = None) -> jax.Array:
    r"""Counts the pairs of tasks that conflict, or the tasks that an update conflicts with.

    Two tasks conflict if their gradients have a negative cosine (Yu et al., "Gradient Surgery for
    Multi-Task Learning", NeurIPS 2020, https://arxiv.org/abs/2001.06782). An update
    :math:`J^\top w` conflicts with task `i` if :math:`\langle g_i, J^\top w \rangle = (G w)_i < 0`:
    a step against it increases the loss. What rounding can explain is no conflict; methods that
    project onto the dual cone end there.

    Args:
      gramian: The Gramian `G`, shape ``(m, m)``.
      weights: The weights `w` of an update, shape ``(m,)``, or None for the pairs of tasks.

    Returns:
      A scalar in the dtype of `gramian`, so that NaN gets through: from 0 to ``m (m - 1) / 2``, or
      to ``m`` with `weights`.

    Raises:
      ValueError: If `gramian` is not a floating point square matrix, or `weights` has not one entry
        per task.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> gramian = jnp.array([[18.0, -22.0], [-22.0, 38.0]])
      >>> print(jaxjd.diagnostics.conflict_count(gramian))
      1.0
      >>> print(jaxjd.diagnostics.conflict_count(gramian, jnp.array([0.5, 0.5])))  # [-2, 8]
      1.0
    """
    m = check_square("gramian", gramian)
    eps = _ROUNDING * float(jnp.finfo(gramian.dtype).eps)
    unit = unit_diagonal(gramian)
    if weights is None:
        return _count(unit.cosines, -eps) / 2
    check_weights("weights", weights, m)
    scaled = weights.astype(gramian.dtype) * unit.lengths
    return _count(matmul(unit.cosines, scaled), -eps * jnp.sum(jnp.abs(scaled)))


def conflict_rate(gramian: Gramian, weights: jax.Array | None = None) -> jax.Array:
    """The share of the pairs of tasks that conflict, or of the tasks that an update conflicts with.

    Args:
      gramian: The Gramian, shape ``(m, m)``.
      weights: The weights of an update, shape ``(m,)``, or None for the pairs of tasks.

    Returns:
      `conflict_count` divided by ``m (m - 1) / 2``, or by ``m`` with `weights`: a scalar from 0
      to 1. A single task has no pairs, and the rate 0.

    Raises:
      ValueError: If `gramian` is not a floating point square matrix, or `weights` has not one entry
        per task.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> gramian = jaxjd.gramian(jnp.array([[1.0, 0.0], [-1.0, 1.0], [0.0, 1.0]]))
      >>> print(round(float(jaxjd.diagnostics.conflict_rate(gramian)), 4))
      0.3333
    """
    count = conflict_count(gramian, weights)
    m = gramian.shape[0]
    return count / (max(1, m * (m - 1) // 2) if weights is None else m)


def _count(products: jax.Array, below: jax.Array | float) -> jax.Array:
    """How many products are below a level, as a float that is NaN if one of them is."""
    count = jnp.sum(products < below).astype(products.dtype)
    return jnp.where(jnp.any(jnp.isnan(products)), jnp.nan, count)
