"""Answers with a certificate."""

from __future__ import annotations

from typing import NamedTuple

import jax

from jaxjd.solvers.dual_cone import project_onto_dual_cone
from jaxjd.solvers.min_norm import min_norm_weights
from jaxjd.solvers.residuals import dual_cone_residual, min_norm_residual, simplex_residual
from jaxjd.solvers.simplex import project_onto_simplex


class Solution(NamedTuple):
    """What a solver found, and how well it meets the conditions of the problem.

    Attributes:
      x: The answer.
      residual: By how much the answer misses the conditions that make it the answer, for unit rows
        and in units of the problem's largest term: one number per problem, of the dtype of `x`. 0
        is exact; a modest multiple of the dtype's epsilon is solved; above its square root the
        answer is wrong. NaN for non-finite input.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> solution = jaxjd.linalg.solve_min_norm(jnp.array([[18.0, -22.0], [-22.0, 38.0]]))
      >>> print(jnp.round(solution.x, 4), bool(solution.residual < 1e-6))
      [0.6 0.4] True
    """

    x: jax.Array
    residual: jax.Array


def solve_dual_cone(U: jax.Array, G: jax.Array) -> Solution:  # noqa: N803
    """`project_onto_dual_cone` with its certificate, `dual_cone_residual`.

    Args:
      U: Weights to project, shape ``(..., m)``.
      G: The Gramian, shape ``(m, m)``.

    Returns:
      A `Solution`: `x` is shaped like `U`, `residual` has shape ``(...)``.

    Raises:
      ValueError: If the shapes or dtypes do not fit.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> G = jnp.array([[18.0, -22.0], [-22.0, 38.0]])
      >>> V, residual = jaxjd.linalg.solve_dual_cone(jnp.eye(2) / 2, G)
      >>> print(jnp.round(V.sum(axis=0), 4), residual.shape)
      [1.1111 0.7895] (2,)
    """
    V = project_onto_dual_cone(U, G)  # noqa: N806
    return Solution(x=V, residual=dual_cone_residual(V, U, G))


def solve_min_norm(G: jax.Array) -> Solution:  # noqa: N803
    """`min_norm_weights` with its certificate, `min_norm_residual`.

    Args:
      G: The Gramian, shape ``(m, m)``.

    Returns:
      A `Solution`: `x` has shape ``(m,)``, `residual` shape ``()``.

    Raises:
      ValueError: If `G` is not a floating point square matrix.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> w, residual = jaxjd.linalg.solve_min_norm(jnp.diag(jnp.array([1.0, 3.0])))
      >>> print(jnp.round(w, 4), bool(residual < 1e-6))
      [0.75 0.25] True
    """
    w = min_norm_weights(G)
    return Solution(x=w, residual=min_norm_residual(w, G))


def solve_simplex(x: jax.Array) -> Solution:
    """`project_onto_simplex` with its certificate, `simplex_residual`.

    Args:
      x: Vectors to project, shape ``(..., m)``, floating point.

    Returns:
      A `Solution`: its `x` is shaped like the argument, `residual` has shape ``(...)``.

    Raises:
      ValueError: If `x` is not a floating point array with a last axis of at least one entry.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> w, residual = jaxjd.linalg.solve_simplex(jnp.array([0.5, 0.1, 0.1]))
      >>> print(w, bool(residual < 1e-6))
      [0.6 0.2 0.2] True
    """
    w = project_onto_simplex(x)
    return Solution(x=w, residual=simplex_residual(w, x))
