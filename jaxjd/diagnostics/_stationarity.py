"""How far from Pareto-stationary a point is."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxjd.base import Gramian
from jaxjd.checks import check_square
from jaxjd.linalg.min_norm import min_norm_weights
from jaxjd.linalg.nonnegative_qp import rough_solutions
from jaxjd.linalg.precision import matmul
from jaxjd.linalg.scaling import UnitDiagonal, safe_sqrt, unit_diagonal


def stationarity_gap(gramian: Gramian, relative: bool = False) -> jax.Array:
    r"""The length of the shortest convex combination of the gradients.

    .. math:: \min_{w \in \Delta} \|J^\top w\| = \min_{w \in \Delta} \sqrt{w^\top G w}

    It is zero exactly at Pareto-stationary points, where no direction improves all losses at once
    (Désidéri, "Multiple-gradient descent algorithm", 2012), and it is the guaranteed rate of
    improvement: along the shortest combination, every loss falls at least that fast per unit of
    length. The weights are those of `jaxjd.linalg.min_norm_weights`.

    Args:
      gramian: The Gramian `G`, shape ``(m, m)``.
      relative: Whether to scale every gradient to unit length first. The result is then between 0
        and 1 and does not change when a loss is multiplied by a positive number.

    Returns:
      A scalar in the dtype of `gramian`. A zero gradient makes it 0. As the square root of a
      difference it is rounding below about the square root of the machine epsilon: 3e-4 of the
      gradients' lengths in float32.

    Raises:
      ValueError: If `gramian` is not a floating point square matrix.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> gramian = jaxjd.gramian(jnp.array([[2.0, 0.0], [0.0, 2.0]]))
      >>> print(round(float(jaxjd.diagnostics.stationarity_gap(gramian)), 4))  # |[1, 1]|
      1.4142
      >>> print(round(float(jaxjd.diagnostics.stationarity_gap(gramian, relative=True)), 4))
      0.7071
    """
    check_square("gramian", gramian)
    if relative:
        return _shortest(_unit_rows(gramian))
    scaled, scale = _in_units_of_the_longest(gramian)
    return scale * _shortest(scaled)


def stationarity_gaps(unit: UnitDiagonal) -> tuple[jax.Array, jax.Array]:
    """Returns the absolute and the relative gap: two rows of one batch of the solver.

    For rows of the lengths `l` the weights are ``w_i = x_i / l_i``, up to a factor, where `x` is
    the solution of ``min x^T C x / 2 - sum_i x_i / l_i``; at other weights the length is more by
    the square of their error only, so that the last digits of `x` do not matter.
    """
    shortest = unit.shortest()
    inverse = jnp.stack([unit.inverse_lengths * shortest, jnp.ones_like(unit.lengths)])
    x = rough_solutions(unit.cosines, -inverse)
    total = jnp.sum(inverse * x, axis=1)
    square = jnp.sum(x * matmul(x, unit.cosines), axis=1)
    gaps = safe_sqrt(square) / jnp.where(total > 0, total, 1)
    gaps = jnp.where(jnp.all(unit.nonzero), gaps, 0)
    # Comparisons with NaN hide it.
    gaps = jnp.where(jnp.all(jnp.isfinite(unit.cosines)), gaps, jnp.nan)
    return gaps[0] * shortest, gaps[1]


def _unit_rows(gramian: Gramian) -> Gramian:
    unit = unit_diagonal(gramian)
    # A zero row stays one.
    return jnp.where(unit.nonzero[:, None] & unit.nonzero[None, :], unit.cosines, 0)


def _in_units_of_the_longest(gramian: Gramian) -> tuple[Gramian, jax.Array]:
    """So that no square underflows."""
    longest = jnp.max(unit_diagonal(gramian).lengths)
    scale = jnp.where(longest == 0, 1, longest)
    return gramian / scale / scale, scale


def _shortest(gramian: Gramian) -> jax.Array:
    weights = min_norm_weights(gramian)
    square = jnp.sum(weights * matmul(gramian, weights))
    return safe_sqrt(square)
