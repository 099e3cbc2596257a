"""How far from Pareto-stationary a point is."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxjd.base import Gramian
from jaxjd.checks import check_square
from jaxjd.solvers.min_norm import min_norm_weights
from jaxjd.solvers.precision import matmul
from jaxjd.solvers.scaling import safe_sqrt, unit_diagonal


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


def stationarity_gaps(gramian: Gramian) -> tuple[jax.Array, jax.Array]:
    """Returns the absolute and the relative gap, by one solver on both problems."""
    scaled, scale = _in_units_of_the_longest(gramian)
    gaps = jax.vmap(_shortest)(jnp.stack([scaled, _unit_rows(gramian)]))
    return scale * gaps[0], gaps[1]


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
