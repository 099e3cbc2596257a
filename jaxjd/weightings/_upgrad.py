"""UPGrad and DualProj: projections onto the dual cone of the rows."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxjd.base import Certified, PyTree, Weighting, stateless_with
from jaxjd.checks import check_square, type_name
from jaxjd.solvers.dual_cone import (
    DualConeProjector,
    exact_projector,
    projection_certificate,
    regularized_projector,
)
from jaxjd.weightings._preference import check_preference, preference


def upgrad(
    pref_vector: PyTree | None = None, projector: DualConeProjector | None = None
) -> Weighting:
    r"""UPGrad: projects every task's gradient onto the dual cone, then sums.

    .. math:: J^\top w = \sum_i p_i \, \pi_J(g_i), \quad
              \pi_J(x) = \arg\min_{J d \ge 0} \|d - x\|^2

    The update conflicts with no task, is linear under scaling of the rows, and ends only at
    Pareto-stationary points. From Quinton and Rey, "Jacobian Descent for Multi-Objective
    Optimization" (2024, https://arxiv.org/abs/2406.16232). Stateless. Projections are exact, where
    TorchJD regularizes; `jaxjd.linalg.regularized_projector` gives TorchJD's numbers.

    Args:
      pref_vector: The weights :math:`p` of the projected gradients, shape ``(m,)`` or laid out as
        the losses; ``1 / m`` each by default.
      projector: How to project, `jaxjd.linalg.exact_projector` by default.

    Returns:
      A `Weighting`.

    Raises:
      ValueError: If `pref_vector` is not a vector or `projector` no function; in `update`, if
        `pref_vector` has not one entry per task.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> weighting = jaxjd.weightings.upgrad()
      >>> weights, _ = weighting.update(jnp.array([[18.0, -22.0], [-22.0, 38.0]]), ())
      >>> print(jnp.round(weights, 4))  # 10/9 and 15/19
      [1.1111 0.7895]
    """
    pref_vector = check_preference(pref_vector)
    project = _projector(projector)

    def update(stat: jax.Array, state: PyTree, **extra_args: Any) -> tuple:
        m = check_square("gramian", stat)
        rows = jnp.diag(preference(pref_vector, m, stat.dtype))
        projected = _project(project, rows, stat)
        certificate = projection_certificate(project, projected, rows, stat)
        return jnp.sum(projected, axis=0), state, certificate

    return Weighting(stateless_with(pref_vector=pref_vector), Certified(update))


def dualproj(
    pref_vector: PyTree | None = None, projector: DualConeProjector | None = None
) -> Weighting:
    r"""DualProj: projects the weighted sum of the gradients onto the dual cone.

    .. math:: J^\top w = \pi_J\Big(\sum_i p_i g_i\Big), \quad
              \pi_J(x) = \arg\min_{J d \ge 0} \|d - x\|^2

    The update closest to the mean gradient that conflicts with no task. From Lopez-Paz and Ranzato,
    "Gradient Episodic Memory for Continual Learning" (NeurIPS 2017,
    https://arxiv.org/abs/1706.08840). Stateless and exact.

    Args:
      pref_vector: The weights :math:`p`, shape ``(m,)`` or laid out as the losses; ``1 / m`` each
        by default.
      projector: How to project, `jaxjd.linalg.exact_projector` by default.

    Returns:
      A `Weighting`.

    Raises:
      ValueError: If `pref_vector` is not a vector or `projector` no function; in `update`, if
        `pref_vector` has not one entry per task.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> weighting = jaxjd.weightings.dualproj()
      >>> weights, _ = weighting.update(jnp.array([[18.0, -22.0], [-22.0, 38.0]]), ())
      >>> print(jnp.round(weights, 4))  # 11/18 and 1/2
      [0.6111 0.5   ]
    """
    pref_vector = check_preference(pref_vector)
    project = _projector(projector)

    def update(stat: jax.Array, state: PyTree, **extra_args: Any) -> tuple:
        m = check_square("gramian", stat)
        row = preference(pref_vector, m, stat.dtype)
        projected = _project(project, row, stat)
        return projected, state, projection_certificate(project, projected, row, stat)

    return Weighting(stateless_with(pref_vector=pref_vector), Certified(update))


def _projector(projector: DualConeProjector | None) -> DualConeProjector:
    if projector is None:
        return exact_projector()
    if not callable(projector) or projector in (exact_projector, regularized_projector):
        raise ValueError(
            "`projector` must be a function of (U, G), as `jaxjd.linalg.exact_projector()` returns "
            f"one, got {projector!r}."
        )
    return projector


def _project(projector: DualConeProjector, U: jax.Array, G: jax.Array) -> jax.Array:  # noqa: N803
    V = projector(U, G)  # noqa: N806
    if getattr(V, "shape", None) != U.shape:
        raise ValueError(
            f"`projector` must return weights of the shape {U.shape} of U, got {type_name(V)}."
        )
    return V
