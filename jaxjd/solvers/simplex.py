"""Projection onto the probability simplex."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxjd.checks import type_name


def project_onto_simplex(x: jax.Array) -> jax.Array:
    r"""Computes the Euclidean projection onto the probability simplex.

    .. math:: \arg\min_{w \in \Delta} \|w - x\|^2 = \max(x - \tau, 0), \quad
              \textstyle\sum_i \max(x_i - \tau, 0) = 1

    The threshold comes from one sort (Held, Wolfe and Crowder, "Validation of subgradient
    optimization", 1974).

    Args:
      x: Vectors to project, shape ``(..., m)``, floating point.

    Returns:
      Non-negative vectors that sum to one, shaped like `x`.

    Raises:
      ValueError: If `x` is not a floating point array with a last axis of at least one entry.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> print(jaxjd.linalg.project_onto_simplex(jnp.array([0.5, 0.1, 0.1])))
      [0.6 0.2 0.2]
    """
    if getattr(x, "ndim", 0) == 0 or x.shape[-1] == 0 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"`x` must be floating point with shape (..., m), got {type_name(x)}.")
    # Shifting by the largest entry leaves the projection unchanged and keeps every digit of it.
    x = x - jnp.max(x, axis=-1, keepdims=True)
    descending = -jnp.sort(-x, axis=-1)
    count = jnp.arange(1, x.shape[-1] + 1, dtype=x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
    thresholds = (jnp.cumsum(descending, axis=-1) - 1) / count
    support = jnp.sum(descending > thresholds, axis=-1, keepdims=True)
    threshold = jnp.take_along_axis(thresholds, jnp.maximum(support, 1) - 1, axis=-1)
    return jnp.maximum(x - threshold, 0)
