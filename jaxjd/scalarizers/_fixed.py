"""Combinations whose weights do not look at the losses: mean, sum and constants."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxjd.base import PyTree, Scalarizer, stateless
from jaxjd.scalarizers._tasks import keep_state, loss_vector, per_task


def mean() -> Scalarizer:
    r"""The mean of the losses: :math:`\frac{1}{m} \sum_i L_i`.

    Stateless.

    Returns:
      A `Scalarizer`.

    Raises:
      ValueError: In `apply`, if a loss is not floating point.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> scalarizer = jaxjd.scalarizers.mean()
      >>> print(scalarizer.apply(jnp.array([1.0, 2.0, 6.0]), scalarizer.init(3)))
      3.0
    """

    def apply(losses: PyTree, state: PyTree) -> jax.Array:
        return jnp.mean(loss_vector(losses))

    return Scalarizer(stateless, apply, keep_state)


def sum() -> Scalarizer:  # noqa: A001
    r"""The sum of the losses: :math:`\sum_i L_i`.

    Stateless.

    Returns:
      A `Scalarizer`.

    Raises:
      ValueError: In `apply`, if a loss is not floating point.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> scalarizer = jaxjd.scalarizers.sum()
      >>> print(scalarizer.apply(jnp.array([1.0, 2.0, 6.0]), scalarizer.init(3)))
      9.0
    """

    def apply(losses: PyTree, state: PyTree) -> jax.Array:
        return jnp.sum(loss_vector(losses))

    return Scalarizer(stateless, apply, keep_state)


def constant(weights: PyTree) -> Scalarizer:
    r"""The sum of the losses with given weights: :math:`\sum_i w_i L_i`.

    Stateless.

    Args:
      weights: One number per task, shape ``(m,)`` or laid out as the losses.

    Returns:
      A `Scalarizer`.

    Raises:
      ValueError: If `weights` holds anything but real numbers; in `apply`, if there is not one per
        task, or a loss is not floating point.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> scalarizer = jaxjd.scalarizers.constant({"easy": 1.0, "hard": 10.0})
      >>> losses = {"easy": jnp.array(2.0), "hard": jnp.array(0.5)}
      >>> print(scalarizer.apply(losses, scalarizer.init(2)))
      7.0
    """
    weights = per_task("weights", weights)

    def apply(losses: PyTree, state: PyTree) -> jax.Array:
        vector = loss_vector(losses)
        return jnp.sum(weights.vector(losses, vector.dtype) * vector)

    return Scalarizer(stateless, apply, keep_state)
