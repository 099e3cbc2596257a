"""Impartial multi-task learning on the gradients (IMTL-G)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxjd.base import Certified, PyTree, Weighting, stateless
from jaxjd.checks import check_square
from jaxjd.solvers.pseudo_inverse import reaches, solve
from jaxjd.solvers.residuals import cosine_residual
from jaxjd.solvers.scaling import unit_diagonal


def imtl_g() -> Weighting:
    r"""IMTL-G: the combination whose projections onto all gradients have one length.

    .. math:: v = G^{+} \sqrt{\operatorname{diag} G}, \qquad w = \frac{v}{\sum_i v_i}

    so that :math:`\langle g_i, J^\top w \rangle / \|g_i\|` is the same for all tasks. From Liu et
    al., "Towards Impartial Multi-Task Learning" (ICLR 2021). Stateless. Weights may be negative.
    They are zero where :math:`v` or its sum vanishes to rounding, as for a zero Gramian or two
    opposite gradients. The pseudo-inverse is taken of the unit-diagonal form :math:`C`,
    :math:`v = D^{-1} C^{+} 1`: equal for a regular Gramian, and independent of the rows' lengths
    for a singular one.

    Returns:
      A `Weighting`.

    Raises:
      ValueError: In `update`, if the Gramian is not an ``(m, m)`` floating point array.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> weighting = jaxjd.weightings.imtl_g()
      >>> weights, _ = weighting.update(jnp.array([[18.0, -22.0], [-22.0, 38.0]]), ())
      >>> print(jnp.round(weights, 4))
      [0.5923 0.4077]
    """

    def update(stat: jax.Array, state: PyTree, **extra_args: Any) -> tuple:
        m = check_square("gramian", stat)
        unit = unit_diagonal(stat)
        eps = jnp.finfo(stat.dtype).eps
        ones = unit.nonzero.astype(stat.dtype)
        x = solve(unit.cosines, ones)
        # The shortest row sets the unit, so that no scale overflows.
        v = x * unit.inverse_lengths * unit.shortest()
        total = jnp.sum(v)
        defined = ~(jnp.abs(total) <= m * eps * jnp.sum(jnp.abs(v)))
        defined &= reaches(unit.cosines, x, ones)
        weights = jnp.where(defined, v / jnp.where(defined, total, 1), 0)
        return weights, state, jax.tree_util.Partial(_residual, weights, stat)

    return Weighting(stateless, Certified(update))


def _residual(weights: jax.Array, gramian: jax.Array) -> jax.Array:
    total = jnp.sum(weights)
    outside = jnp.where(jnp.any(weights != 0), jnp.abs(total - 1), 0)
    return jnp.maximum(cosine_residual(weights, gramian, jnp.ones_like(weights)), outside)
