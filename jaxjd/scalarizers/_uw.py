"""Uncertainty weighting (UW)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxjd.base import PyTree, Scalarizer, require_num_tasks, weight_dtype
from jaxjd.scalarizers._tasks import check_parameters, keep_state, loss_vector


def uw() -> Scalarizer:
    r"""UW: weights every loss by the inverse of a variance that is learned with the model.

    .. math:: \sum_i \tfrac12 \big(e^{-s_i} L_i + s_i\big)

    For fixed losses the best :math:`s_i` is :math:`\log L_i`. From Kendall, Gal and Cipolla,
    "Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and Semantics" (CVPR
    2018, https://arxiv.org/abs/1705.07115). The state is the vector of the log-variances :math:`s`,
    shape ``(m,)``, zeros at first: parameters that belong into the optimizer next to those of the
    model. `update` leaves them as they are. Losses have to be positive: without bound, :math:`s_i`
    falls where :math:`L_i` goes to zero.

    Returns:
      A `Scalarizer` whose state is an array of shape ``(m,)``.

    Raises:
      ValueError: In `init`, without `num_tasks`; in `apply`, if a loss is not floating point or the
        state is not a vector with one entry per task.

    Example:
      One optimizer for the model and the log-variances:

      >>> import jax, jax.numpy as jnp, optax, jaxjd
      >>> scalarizer = jaxjd.scalarizers.uw()
      >>> def loss_fn(params):
      ...     losses = {"near": jnp.sum((params["model"] - 1) ** 2), "far": jnp.array(9.0)}
      ...     return scalarizer.apply(losses, params["log_variances"])
      >>> params = {"model": jnp.zeros(2), "log_variances": scalarizer.init(2)}
      >>> print(loss_fn(params))
      5.5
      >>> tx = optax.adam(1e-2)
      >>> opt_state = tx.init(params)
      >>> gradients = jax.grad(loss_fn)(params)
      >>> print(gradients["log_variances"])  # (1 - L) / 2, for "far" and "near"
      [-4.  -0.5]
      >>> updates, opt_state = tx.update(gradients, opt_state, params)
      >>> params = optax.apply_updates(params, updates)
    """

    def init(num_tasks: Any = None) -> jax.Array:
        return jnp.zeros(require_num_tasks(num_tasks, "uw"), weight_dtype(None))

    def apply(losses: PyTree, state: jax.Array) -> jax.Array:
        vector = loss_vector(losses)
        check_parameters(state, vector.shape[0])
        log_variances = state.astype(vector.dtype)
        return jnp.sum(jnp.exp(-log_variances) * vector + log_variances) / 2

    return Scalarizer(init, apply, keep_state)
