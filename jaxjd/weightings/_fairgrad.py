"""FairGrad: fair resource allocation among the tasks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxjd.base import Certified, PyTree, Weighting, stateless
from jaxjd.checks import check_range, check_square
from jaxjd.solvers.fairness import fair_weights
from jaxjd.solvers.residuals import fairness_residual


def fairgrad(alpha: float) -> Weighting:
    r"""FairGrad: the :math:`\alpha`-fair division of the improvement among the tasks.

    .. math:: G w = w^{-1/\alpha}, \quad w \ge 0

    which is the optimum of a strictly convex function and solved by damped Newton steps. From Ban
    and Ji, "Fair Resource Allocation in Multi-Task Learning" (ICML 2024,
    https://arxiv.org/abs/2402.15638). Stateless. ``alpha=0`` gives the mean, ``alpha=1`` the
    direction of `nash_mtl`, a large `alpha` tends to equal improvements. A zero row, which no
    finite weight could improve, gets the weight zero.

    Args:
      alpha: The fairness, non-negative.

    Returns:
      A `Weighting`.

    Raises:
      ValueError: If `alpha` is negative; in `update`, if the Gramian is not ``(m, m)``.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> weighting = jaxjd.weightings.fairgrad(alpha=1.0)
      >>> weights, _ = weighting.update(jnp.array([[18.0, -22.0], [-22.0, 38.0]]), ())
      >>> print(jnp.round(weights, 4))
      [0.5915 0.4071]
    """
    check_range("alpha", alpha, at_least=0)

    def update(stat: jax.Array, state: PyTree, **extra_args: Any) -> tuple:
        m = check_square("gramian", stat)
        fairness = jnp.asarray(alpha, stat.dtype)
        positive = fairness > 0
        weights = fair_weights(stat, 1 / jnp.where(positive, fairness, 1))
        weights = jnp.where(positive, weights, 1 / m).astype(stat.dtype)
        return weights, state, jax.tree_util.Partial(_residual, weights, stat, fairness)

    return Weighting(stateless, Certified(update))


def _residual(weights: jax.Array, gramian: jax.Array, alpha: jax.Array) -> jax.Array:
    positive = alpha > 0
    residual = fairness_residual(weights, gramian, 1 / jnp.where(positive, alpha, 1))
    return jnp.where(positive, residual, jnp.max(jnp.abs(weights.size * weights - 1)))
