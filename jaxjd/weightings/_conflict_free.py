"""Conflict-free inverse gradients (ConFIG)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxjd.base import Certified, PyTree, Weighting, stateless_with
from jaxjd.checks import check_length, check_square
from jaxjd.solvers.precision import matmul
from jaxjd.solvers.pseudo_inverse import reaches, solve
from jaxjd.solvers.residuals import cosine_residual
from jaxjd.solvers.scaling import unit_diagonal
from jaxjd.weightings._preference import check_preference


def conflict_free(pref_vector: PyTree | None = None) -> Weighting:
    r"""ConFIG: the direction with given cosines to all gradients, as long as their projections.

    With the unit rows :math:`U = D^{-1} J`, where :math:`D` holds the lengths of the gradients:

    .. math:: u = \frac{U^{+} p}{\|U^{+} p\|}, \qquad
              J^\top w = \Big(\sum_i g_i^\top u\Big) u, \qquad w \propto D^{-1} (U U^\top)^{+} p

    The update conflicts with no task if :math:`p > 0` and the gradients are linearly independent.
    From Liu, Chu and Thuerey, "ConFIG: Towards Conflict-free Training of Physics Informed Neural
    Networks" (ICLR 2025, https://arxiv.org/abs/2408.11104). Stateless. It reads the Gramian: no
    pseudo-inverse of the Jacobian is taken. For one gradient per step, with momentum, there is
    `jaxjd.momentum_conflict_free`.

    Args:
      pref_vector: The wanted cosines :math:`p` up to a factor, shape ``(m,)`` or laid out as the
        losses; ones by default.

    Returns:
      A `Weighting`. Where no direction is defined (all rows are zero, or :math:`p` is orthogonal to
      the range of the Gramian, as for two opposite gradients) the weights are zero.

    Raises:
      ValueError: If `pref_vector` is not a vector; in `update`, if it has not one entry per task.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> jacobian = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> weighting = jaxjd.weightings.conflict_free()
      >>> weights, _ = weighting.update(jaxjd.gramian(jacobian), ())
      >>> print([round(float(x), 3) for x in jaxjd.combine(weights, jacobian)])
      [0.159, 2.071, 2.071]
    """
    pref_vector = check_preference(pref_vector)

    def update(stat: jax.Array, state: PyTree, **extra_args: Any) -> tuple:
        m = check_square("gramian", stat)
        unit = unit_diagonal(stat)
        wanted = unit.nonzero.astype(stat.dtype)
        if pref_vector is not None:
            check_length("pref_vector", pref_vector.shape[0], m)
            wanted = wanted * pref_vector.astype(stat.dtype)
        x = solve(unit.cosines, wanted)
        # U^+ p = U^T x, of squared length x^T C x; its product with g_i is that with U times D.
        products = matmul(unit.cosines, x)
        # Where x solves C x = p, p has the digits that cancel in the product.
        tolerance = float(jnp.finfo(stat.dtype).eps) ** 0.5
        missed = jnp.max(jnp.abs(products - wanted)) > tolerance * jnp.max(jnp.abs(wanted))
        products = jnp.where(missed, products, wanted)
        square = jnp.sum(x * products)
        defined = reaches(unit.cosines, x, wanted)
        factor = jnp.sum(unit.lengths * products) / jnp.where(defined, square, 1)
        weights = jnp.where(defined, factor, 0) * x * unit.inverse_lengths
        certificate = jax.tree_util.Partial(
            _residual, weights, x * unit.inverse_lengths, stat, wanted
        )
        return weights, state, certificate

    return Weighting(stateless_with(pref_vector=pref_vector), Certified(update))


def _residual(
    weights: jax.Array, direction: jax.Array, gramian: jax.Array, wanted: jax.Array
) -> jax.Array:
    """By how much the direction misses the cosines, and the weights its length.

    Weights of zero are right as well, as far as no direction has the wanted cosines.
    """
    unit = unit_diagonal(gramian)
    x, found = direction * unit.lengths, weights * unit.lengths
    products = matmul(unit.cosines, x)
    square = jnp.sum(x * products)
    some = square > 0
    factors = unit.lengths * products / jnp.where(some, square, 1)
    size = jnp.sum(jnp.abs(factors)) * jnp.max(jnp.abs(x))
    too_long = jnp.max(jnp.abs(found - jnp.sum(factors) * x)) / jnp.where(size > 0, size, 1)
    solved = jnp.maximum(cosine_residual(direction, gramian, wanted), too_long)
    none = jnp.where(jnp.any(weights != 0), solved, cosine_residual(weights, gramian, wanted))
    return jnp.where(some, jnp.minimum(solved, none), none)
