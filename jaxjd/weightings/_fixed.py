"""Weights that do not look at the gradients: mean, sum and constants."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxjd.base import PyTree, Weighting, stateless, stateless_with
from jaxjd.checks import as_vector, check_length, check_square


def mean() -> Weighting:
    r"""Weights every task equally: :math:`w_i = 1 / m`.

    With it an aggregated step is the step of plain training on the mean of the losses. Stateless.

    Returns:
      A `Weighting`.

    Raises:
      ValueError: In `update`, if the Gramian is not an ``(m, m)`` floating point array.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> weighting = jaxjd.weightings.mean()
      >>> print(weighting.update(jnp.eye(2), weighting.init(2))[0])
      [0.5 0.5]
    """

    def update(stat: jax.Array, state: PyTree, **extra_args: Any) -> tuple[jax.Array, PyTree]:
        m = check_square("gramian", stat)
        return jnp.full((m,), 1 / m, stat.dtype), state

    return Weighting(stateless, update)


def sum() -> Weighting:  # noqa: A001
    r"""Weights every task by one: :math:`w_i = 1`.

    Stateless.

    Returns:
      A `Weighting`.

    Raises:
      ValueError: In `update`, if the Gramian is not an ``(m, m)`` floating point array.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> weighting = jaxjd.weightings.sum()
      >>> print(weighting.update(jnp.eye(2), weighting.init(2))[0])
      [1. 1.]
    """

    def update(stat: jax.Array, state: PyTree, **extra_args: Any) -> tuple[jax.Array, PyTree]:
        return jnp.ones((check_square("gramian", stat),), stat.dtype), state

    return Weighting(stateless, update)


def constant(weights: PyTree) -> Weighting:
    r"""Weights the tasks by given numbers: :math:`w` is `weights`.

    Stateless.

    Args:
      weights: One number per task, shape ``(m,)`` or laid out as the losses.

    Returns:
      A `Weighting`.

    Raises:
      ValueError: If `weights` is not a vector, or, in `init` and `update`, has not one entry per
        task.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> weighting = jaxjd.weightings.constant([1.0, 2.0])
      >>> print(weighting.update(jnp.eye(2), weighting.init(2))[0])
      [1. 2.]
    """
    weights = as_vector("weights", weights)

    def update(stat: jax.Array, state: PyTree, **extra_args: Any) -> tuple[jax.Array, PyTree]:
        m = check_square("gramian", stat)
        check_length("weights", weights.shape[0], m)
        # Zeros made here belong to the mesh of the call, wherever `weights` was made.
        return jnp.zeros((m,), stat.dtype) + weights.astype(stat.dtype), state

    return Weighting(stateless_with(weights=weights), update)
