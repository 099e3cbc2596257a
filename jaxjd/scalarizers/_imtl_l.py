"""Impartial multi-task learning, loss balance (IMTL-L)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxjd.base import PyTree, Scalarizer, require_num_tasks, weight_dtype
from jaxjd.scalarizers._tasks import check_parameters, keep_state, loss_vector


def imtl_l() -> Scalarizer:
    r"""IMTL-L: brings the losses to one scale by factors that are learned with the model.

    .. math:: \sum_i \big(e^{s_i} L_i - s_i\big)

    For fixed losses the best :math:`s_i` is :math:`-\log L_i`, which makes every scaled loss 1.
    From Liu et al., "Towards Impartial Multi-task Learning" (ICLR 2021,
    https://openreview.net/forum?id=IMPnRXEWpvr), whose other half is `jaxjd.imtl_g`. The state is
    the vector :math:`s`, shape ``(m,)``, zeros at first: parameters that belong into the optimizer
    next to those of the model. `update` leaves them as they are. It is twice `uw` at :math:`-s`.
    Losses have to be positive: without bound, :math:`s_i` grows where :math:`L_i` goes to zero.

    Returns:
      A `Scalarizer` whose state is an array of shape ``(m,)``.

    Raises:
      ValueError: In `init`, without `num_tasks`; in `apply`, if a loss is not floating point or the
        state is not a vector with one entry per task.

    Example:
      >>> import jax, jax.numpy as jnp, jaxjd
      >>> scalarizer = jaxjd.scalarizers.imtl_l()
      >>> losses, scales = jnp.array([1.0, 2.0, 4.0]), scalarizer.init(3)
      >>> print(scalarizer.apply(losses, scales))
      7.0
      >>> print(jax.grad(scalarizer.apply, argnums=1)(losses, scales))
      [0. 1. 3.]
    """

    def init(num_tasks: Any = None) -> jax.Array:
        return jnp.zeros(require_num_tasks(num_tasks, "imtl_l"), weight_dtype(None))

    def apply(losses: PyTree, state: jax.Array) -> jax.Array:
        vector = loss_vector(losses)
        check_parameters(state, vector.shape[0])
        scales = state.astype(vector.dtype)
        return jnp.sum(jnp.exp(scales) * vector - scales)

    return Scalarizer(init, apply, keep_state)
