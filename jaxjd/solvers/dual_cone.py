"""Projection of weighted rows onto the dual cone of the rows of a Jacobian."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxjd.base import Certificate
from jaxjd.checks import check_length, check_range, check_square, is_real, type_name
from jaxjd.solvers.nonnegative_qp import nonnegative_qp
from jaxjd.solvers.precision import matmul
from jaxjd.solvers.residuals import dual_cone_residual
from jaxjd.solvers.scaling import unit_diagonal


class DualConeProjector(Protocol):
    """A function ``projector(U, G) -> V`` that projects onto the dual cone.

    For every row `u` of `U`, shape ``(..., m)``, the row `v` of `V` holds the weights of the
    projection of ``J^T u`` onto ``{d : J d >= 0}``, given only the Gramian ``G = J J^T``, shape
    ``(m, m)``.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxjd.linalg import DualConeProjector, exact_projector
      >>> projector: DualConeProjector = exact_projector()
      >>> print(projector(jnp.array([0.5, 0.5]), jnp.array([[1.0, 0.0], [0.0, 1.0]])))
      [0.5 0.5]
    """

    def __call__(self, U: jax.Array, G: jax.Array) -> jax.Array:  # noqa: N803
        """Returns the weights of the projections, shaped like `U`."""
        ...


def project_onto_dual_cone(U: jax.Array, G: jax.Array) -> jax.Array:  # noqa: N803
    r"""Projects weighted rows onto the dual cone of the rows, exactly.

    For every row :math:`u` of `U` it solves

    .. math:: v = \arg\min_{v' \ge u} v'^\top G v',

    so that :math:`J^\top v` is the point of :math:`\{d : J d \ge 0\}` closest to
    :math:`J^\top u` (Quinton and Rey, "Jacobian Descent for Multi-Objective Optimization", 2024).

    The dual cone does not depend on the rows' lengths: the problem is solved for unit rows and
    scaled back, so the result is as exact for badly scaled rows as for others. All rows of `U` are
    solved in one batch. Differentiable where the set of active constraints is locally constant.

    Args:
      U: Weights to project, shape ``(..., m)``.
      G: The Gramian, shape ``(m, m)``. It may be singular. A zero row keeps its weight.

    Returns:
      The projected weights, shaped like `U`, in the dtype of `G`.

    Raises:
      ValueError: If the shapes or dtypes do not fit.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> G = jnp.array([[18.0, -22.0], [-22.0, 38.0]])
      >>> V = jaxjd.linalg.project_onto_dual_cone(jnp.eye(2) / 2, G)
      >>> print(jnp.round(V.sum(axis=0), 4))  # UPGrad's weights, 10/9 and 15/19.
      [1.1111 0.7895]
    """
    U, m = _check(U, G)  # noqa: N806
    unit = unit_diagonal(G)
    scaled = U.reshape(-1, m) * unit.lengths[None, :]
    # v = u + x with x >= 0 turns v >= u into a sign constraint.
    x = nonnegative_qp(unit.cosines, matmul(scaled, unit.cosines))
    return U + (x * unit.inverse_lengths[None, :]).reshape(U.shape)


def exact_projector() -> DualConeProjector:
    """Returns the exact projector, `project_onto_dual_cone`; the default everywhere.

    Returns:
      A `DualConeProjector`.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> weighting = jaxjd.weightings.dualproj(projector=jaxjd.linalg.exact_projector())
      >>> weights, _ = weighting.update(jnp.array([[18.0, -22.0], [-22.0, 38.0]]), ())
      >>> print(jnp.round(weights, 4))
      [0.6111 0.5   ]
    """
    return project_onto_dual_cone


def regularized_projector(norm_eps: float = 1e-4, reg_eps: float = 1e-4) -> DualConeProjector:
    r"""Returns the projector of TorchJD's problem, solved exactly.

    It replaces the Gramian by :math:`G' = G / \operatorname{tr}(G) + \epsilon_{reg} I`, or by
    :math:`\epsilon_{reg} I` where :math:`\operatorname{tr}(G) < \epsilon_{norm}`. The result
    depends on the lengths of the rows and on their common scale, and may conflict with short rows;
    it is here for comparisons with TorchJD.

    Args:
      norm_eps: The trace below which the Gramian counts as zero, non-negative.
      reg_eps: The multiple of the identity to add, relative to the trace, non-negative.

    Returns:
      A `DualConeProjector`.

    Raises:
      ValueError: If an argument is negative.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> weighting = jaxjd.weightings.upgrad(projector=jaxjd.linalg.regularized_projector())
      >>> weights, _ = weighting.update(jnp.array([[18.0, -22.0], [-22.0, 38.0]]), ())
      >>> print(jnp.round(weights, 3))
      [1.111 0.789]
    """
    check_range("norm_eps", norm_eps, at_least=0)
    check_range("reg_eps", reg_eps, at_least=0)

    return _Regularized(norm_eps, reg_eps)


@dataclasses.dataclass(frozen=True, eq=False)
class _Regularized:
    norm_eps: Any
    reg_eps: Any

    def __call__(self, U: jax.Array, G: jax.Array) -> jax.Array:  # noqa: N803
        U, _ = _check(U, G)  # noqa: N806
        return project_onto_dual_cone(U, self.problem(G))

    def problem(self, G: jax.Array) -> jax.Array:  # noqa: N803
        """The Gramian of the problem that is solved exactly."""
        trace = jnp.trace(G)
        known = trace >= self.norm_eps
        normalized = jnp.where(known, G / jnp.where(known & (trace > 0), trace, 1), 0)
        regularized = normalized + self.reg_eps * jnp.eye(G.shape[0], dtype=G.dtype)
        return regularized.astype(G.dtype)


def projection_certificate(
    projector: DualConeProjector, projected: jax.Array, rows: jax.Array, gramian: jax.Array
) -> Certificate:
    """The certificate of a projection; None for a projector whose problem is not known."""
    if projector is not project_onto_dual_cone:
        if not isinstance(projector, _Regularized):
            return None
        gramian = projector.problem(gramian)
    return jax.tree_util.Partial(dual_cone_residual, projected, rows, gramian)


def _check(U: jax.Array, G: jax.Array) -> tuple[jax.Array, int]:  # noqa: N803
    m = check_square("G", G)
    if getattr(U, "ndim", 0) == 0:
        raise ValueError(f"`U` must have shape (..., m), got {type_name(U)}.")
    if not is_real(U.dtype):
        raise ValueError(f"`U` must be real numbers, got {type_name(U)}.")
    check_length("U", U.shape[-1], m)
    return U.astype(G.dtype), m
