"""Whether the answer is right."""

from __future__ import annotations

from typing import Any

import jax
import optax

from jaxjd.base import PyTree, Weighting, largest_residual, solve, weight_dtype
from jaxjd.checks import type_name


def solver_residual(
    weighting: Weighting | optax.GradientTransformation,
    stat: Any,
    state: PyTree = (),
    **extra_args: Any,
) -> jax.Array:
    """Solves the problem of a weighting, and returns by how much the answer misses its conditions.

    The residual is computed from the statistic and the final answer, not by the solver: see the
    pages of the methods for the conditions. They are taken for unit rows, in units of the largest
    term of the problem.

    Args:
      weighting: A weighting, or an aggregator that is made of one: by `jaxjd.weighted`, also in
        `jaxjd.grouped`, `jaxjd.partition`, `monitored`, ... (the largest of all groups).
      stat: What its `update` takes: the Gramian, or the Jacobian.
      state: Its state.
      **extra_args: Further arguments of its `update`.

    Returns:
      A scalar. 0 is exact, and a modest multiple of the dtype's epsilon is solved, unless rows are
      so nearly dependent that rounding in the Gramian is magnified; where a method has no solution,
      it is about 1. NaN for non-finite input. -1 if the method solves no problem in this call, or
      none is known, as inside of ``optax.chain``.

    Raises:
      ValueError: If `weighting` has no `update`; and what its `update` raises.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> G = jnp.array([[18.0, -22.0], [-22.0, 38.0]])
      >>> residual = jaxjd.diagnostics.solver_residual(jaxjd.weightings.upgrad(), G)
      >>> print(bool(residual < 1e-6))
      True
      >>> print(jaxjd.diagnostics.solver_residual(jaxjd.weightings.mean(), G))  # solves nothing
      -1.0
    """
    if not isinstance(weighting, (Weighting, optax.GradientTransformation)):
        raise ValueError(
            "`weighting` must be a weighting or an aggregator (a factory has to be called first), "
            f"got {type_name(weighting)}."
        )
    _, _, certificate = solve(weighting.update, stat, state, **extra_args)
    return largest_residual(certificate, weight_dtype(stat))
