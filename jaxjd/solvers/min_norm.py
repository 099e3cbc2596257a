"""The point of smallest norm in the convex hull of the rows of a Jacobian."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxjd.checks import check_square
from jaxjd.solvers.nonnegative_qp import nonnegative_qp
from jaxjd.solvers.scaling import unit_diagonal


def min_norm_weights(G: jax.Array) -> jax.Array:  # noqa: N803
    r"""Computes the weights of the minimum-norm point of the convex hull of the rows, exactly.

    .. math:: w = \arg\min_{w \in \Delta} w^\top G w

    Its direction :math:`d = J^\top w` satisfies :math:`\langle g_i, d \rangle \ge \|d\|^2` for
    every row (Désidéri, "Multiple-gradient descent algorithm", 2012). With :math:`z = w / \|d\|^2`
    these conditions are those of :math:`\min_{z \ge 0} \tfrac12 z^\top G z - 1^\top z`, which is
    solved on the unit-diagonal form of `G` and normalized to sum to one. At a Pareto-stationary
    point, where the hull holds zero, the result is a convex combination close to zero.

    Args:
      G: The Gramian, shape ``(m, m)``. It may be singular. Zero rows share all the weight, since
        the smallest norm is then zero.

    Returns:
      Non-negative weights that sum to one, shape ``(m,)``, in the dtype of `G`. Differentiable
      where the support is locally constant.

    Raises:
      ValueError: If `G` is not a floating point square matrix.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> w = jaxjd.linalg.min_norm_weights(jnp.array([[18.0, -22.0], [-22.0, 38.0]]))
      >>> print(jnp.round(w, 4))
      [0.6 0.4]
    """
    check_square("G", G)
    return min_norm_weights_of(G, jnp.ones((G.shape[0],), bool))


def min_norm_weights_of(gramian: jax.Array, counts: jax.Array) -> jax.Array:
    """`min_norm_weights` of the rows that count; the others are infinitely long and get zero.

    Args:
      gramian: Shape ``(m, m)``.
      counts: Which rows count, shape ``(m,)``, bool. One has to.

    Returns:
      The weights, shape ``(m,)``.
    """
    both = counts[:, None] & counts[None, :]
    unit = unit_diagonal(jnp.where(both, gramian, 0))
    inverse = unit.inverse_lengths * unit.shortest()
    x = nonnegative_qp(unit.cosines, -inverse[None, :], inside=2)[0]
    z = x * inverse
    total = jnp.sum(z)
    weights = z / jnp.where(total > 0, total, 1)
    zero_rows = counts & ~unit.nonzero
    shared = zero_rows / jnp.maximum(jnp.sum(zero_rows), 1).astype(gramian.dtype)
    weights = jnp.where(jnp.any(zero_rows), shared, weights)
    return jnp.where(jnp.isfinite(total), weights, jnp.nan).astype(gramian.dtype)
