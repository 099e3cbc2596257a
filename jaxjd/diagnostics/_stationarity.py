"""How far from Pareto-stationary a point is."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp

from jaxjd.base import Gramian
from jaxjd.checks import check_square
from jaxjd.solvers.min_norm import min_norm_weights
from jaxjd.solvers.nonnegative_qp import rough_solutions
from jaxjd.solvers.precision import matmul
from jaxjd.solvers.scaling import UnitDiagonal, safe_sqrt, unit_diagonal

# Rows, for which all supports are tried.
_FEW = 3


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


def stationarity_gaps(unit: UnitDiagonal) -> jax.Array:
    """Returns the absolute and the relative gap, shape ``(2,)``, by one small program.

    In units of the shortest row the lengths are ``1 / d_i``, and the least of
    ``sqrt(x^T C x) / d^T x`` over all ``x >= 0`` is the gap. It is at the solution of
    ``min x^T C x / 2 - d^T x``; near it the length is more by the square of the error of `x` only,
    so that the last digits of `x` do not matter.
    """
    # A zero row has no coordinate, and is the shortest combination.
    largest = jnp.max(unit.inverse_lengths)
    largest = jnp.where(largest > 0, largest, 1)
    d = jnp.stack([unit.inverse_lengths / largest, unit.nonzero.astype(unit.lengths.dtype)])
    constants = jax.lax.stop_gradient((unit.cosines, d))
    x, otherwise = (_by_all_supports if d.shape[1] <= _FEW else _by_a_solver)(*constants)
    total = jnp.sum(d[None] * x, axis=2)
    found = jnp.sum(x * _times(x, unit.cosines), axis=2) / jnp.square(
        jnp.where(total > 0, total, 1)
    )
    # Comparisons with NaN are false.
    gaps = safe_sqrt(jnp.min(jnp.where(total <= 0, otherwise, found), axis=0))
    return gaps / jnp.stack([largest, jnp.ones_like(largest)])


def _by_all_supports(cosines: jax.Array, d: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Points of which one is the solution, ``(s, 2, m)``, and what counts where one is zero.

    The solutions on all supports by Cramer's rule, up to a factor, without what is negative.
    """
    m = d.shape[1]
    masks = [mask for mask in itertools.product((0.0, 1.0), repeat=m) if 0 < sum(mask) < _FEW]
    supports = jnp.array(masks, d.dtype)[:, None, :]
    # Of one row ``d_i``, of two ``d_i - C_ij d_j``.
    x = supports * (2 * d[None] - _times(supports * d[None], cosines))
    if m == _FEW:
        twice = jnp.tile(cosines, (2, 2))
        adjugate = twice[1:4, 1:4] * twice[2:5, 2:5] - twice[1:4, 2:5] * twice[2:5, 1:4]
        x = jnp.concatenate([x, _times(d, adjugate)[None]])
    sizes = [sum(mask) for mask in masks] + [_FEW] * (m == _FEW)
    # A row without a length; two that are parallel have nothing to add to one.
    otherwise = jnp.array([0 if size == 1 else jnp.inf for size in sizes], d.dtype)
    return jnp.maximum(x, 0), otherwise[:, None]


def _by_a_solver(cosines: jax.Array, d: jax.Array) -> tuple[jax.Array, jax.Array]:
    known = jnp.all(d > 0) & jnp.all(jnp.isfinite(cosines))
    # Where a row is zero the solution is none, and infinities are none either.
    x = jnp.where(known, rough_solutions(cosines, -d), 0)
    otherwise = jnp.where(jnp.all(jnp.isfinite(cosines)), 0, jnp.nan)
    return x[None], otherwise


def _times(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """A product with a symmetric matrix; of few rows without a call, which ends a fusion."""
    if matrix.shape[0] > _FEW:
        return matmul(x, matrix)
    rows = matrix.reshape((matrix.shape[0], *(1,) * (x.ndim - 1), -1))
    terms = [x[..., i : i + 1] * row for i, row in enumerate(rows)]
    return sum(terms[1:], terms[0])


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
