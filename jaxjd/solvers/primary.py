"""The smallest change of a direction that meets constraints, the problem behind PCD."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxjd.solvers.nonnegative_qp import nonnegative_qp
from jaxjd.solvers.precision import matmul


def meet_constraints(cosines: jax.Array, slack: jax.Array) -> tuple[jax.Array, jax.Array]:
    r"""Solves :math:`\min_{x \ge 0} \tfrac12 x^\top C x + s^\top x`, which may be unbounded.

    Args:
      cosines: `C`, of the constraints' unit rows, shape ``(m, m)``.
      slack: By how much the direction meets each constraint before, `s`, shape ``(m,)``.

    Returns:
      The coefficients `x` of the change in the unit rows, and whether a direction exists that meets
      all constraints, shape ``()``.
    """
    x = nonnegative_qp(cosines, slack[None, :])[0]
    # Without a solution x grows along a combination of rows that is zero to rounding, and what is
    # left of the constraints tells, unless it drowns in rounding.
    eps = jnp.finfo(cosines.dtype).eps
    total, change = jnp.sum(x), matmul(cosines, x)
    tolerance = jnp.maximum(jnp.sqrt(eps) * jnp.max(jnp.abs(slack)), 4 * eps * total)
    met = jnp.min(change + slack) >= -tolerance
    return x, met & (matmul(x, change) >= 4 * eps * jnp.square(total))
