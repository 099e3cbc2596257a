"""The geometric loss strategy (GLS): the geometric mean of the losses."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxjd.base import PyTree, Scalarizer, stateless
from jaxjd.scalarizers._tasks import keep_state, loss_vector, nan_if_negative


def geometric_mean() -> Scalarizer:
    r"""The geometric mean of the losses, whatever their scales.

    .. math:: \Big(\prod_i L_i\Big)^{1/m} = \exp\Big(\frac{1}{m} \sum_i \log L_i\Big)

    From Chennupati et al., "MultiNet++: Multi-Stream Feature Aggregation and Geometric Loss
    Strategy for Multi-Task Learning" (CVPR Workshops 2019, https://arxiv.org/abs/1904.08492).
    Losses have to be positive. Where one of them is exactly zero the mean is zero, and so is its
    gradient for all tasks; the one-sided derivative by that loss would be infinite. Where one is
    negative the mean and its gradient are NaN: nothing can raise inside `jax.jit`. Stateless.

    Returns:
      A `Scalarizer`.

    Raises:
      ValueError: In `apply`, if a loss is not floating point.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> scalarizer = jaxjd.scalarizers.geometric_mean()
      >>> mean = scalarizer.apply(jnp.array([1.0, 2.0, 4.0]), scalarizer.init(3))
      >>> print(round(float(mean), 4))
      2.0
    """

    def apply(losses: PyTree, state: PyTree) -> jax.Array:
        vector = nan_if_negative(loss_vector(losses))
        nonzero = vector != 0
        mean = jnp.exp(jnp.mean(jnp.log(jnp.where(nonzero, vector, 1))))
        return jnp.where(jnp.all(nonzero), mean, 0)

    return Scalarizer(stateless, apply, keep_state)
