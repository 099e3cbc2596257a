"""Dual-balancing multi-task learning (DB-MTL)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxjd.base import Jacobian, JacobianWeighting, PyTree, require_num_tasks, weight_dtype
from jaxjd.checks import check_length, check_range, check_state
from jaxjd.linalg.algebra import count_tasks
from jaxjd.linalg.sharded import mark_like
from jaxjd.weightings._losses import read_losses
from jaxjd.weightings._rows import paired_leaves, row_norms, scale_rows, zero_rows


class DBMTLState(NamedTuple):
    """The state of `db_mtl`.

    Attributes:
      count: The number of calls, shape ``()``, int32.
      weights: The weights of the tracked gradients in the last call, shape ``(m,)``, ones at first.
      tracked: The tracked gradients of the log losses: a pytree like the parameters whose leaves
        have shape ``(m, *param.shape)``, zeros at first; at least float32.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> state = jaxjd.weightings.db_mtl().init(2, {"w": jnp.zeros(3)})
      >>> print(state.weights, state.tracked["w"].shape)
      [1. 1.] (2, 3)
    """

    count: jax.Array
    weights: jax.Array
    tracked: PyTree


def db_mtl(beta: float = 0.9, beta_sigma: float = 0.0) -> JacobianWeighting:
    r"""DB-MTL: gradients of the log losses, tracked, and all made as long as the longest.

    At call :math:`t = 1, 2, \dots`, with :math:`h_i = \nabla \log L_i = g_i / L_i`:

    .. math:: \hat g_i \leftarrow h_i + \frac{\beta}{t^{\sigma}} (\hat g_i - h_i), \qquad
              \alpha_i = \frac{\max_k \|\hat g_k\|}{\|\hat g_i\|}, \qquad
              d = \sum_i \alpha_i \hat g_i

    From Lin et al., "Dual-Balancing for Multi-Task Learning" (2023,
    https://arxiv.org/abs/2308.12029). The logarithm balances the losses, and :math:`\alpha` the
    gradients. The update of the paper combines the tracked gradients, which is what `jaxjd.db_mtl`
    does; a weighting can only weigh the rows of the Jacobian, so this one returns
    :math:`\alpha_i / L_i`, and `jaxjd.weighted` of it makes the update
    :math:`\sum_i \alpha_i h_i`. The average starts at zero and is not corrected for it, so with
    ``beta_sigma=0`` the first update is ``1 - beta`` times that without tracking. Memory is one
    Jacobian.

    Args:
      beta: The weight :math:`\beta` of the past in the average, in [0, 1); 0 does not track.
      beta_sigma: How fast it decays, non-negative.

    Returns:
      A `JacobianWeighting` with state `DBMTLState`. Its `update` needs the extra argument
      ``losses=``, one positive number per task as a vector or a pytree in the order of the tasks.
      A loss or gradient of zero has no weight; a negative loss has no logarithm and gives NaN.

    Raises:
      ValueError: If an argument is out of range; in `init`, without `num_tasks` or `params`; in
        `update`, without losses or if the Jacobian or the losses do not fit the state.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> weighting = jaxjd.weightings.db_mtl()
      >>> jacobian = jnp.array([[3.0, 0.0], [0.0, 4.0]])
      >>> state = weighting.init(2, jnp.zeros(2))
      >>> weights, state = weighting.update(jacobian, state, losses=jnp.array([1.0, 2.0]))
      >>> print(jnp.round(weights, 4))  # h has the lengths 3 and 2
      [1.   0.75]
    """
    check_range("beta", beta, at_least=0, below=1)
    check_range("beta_sigma", beta_sigma, at_least=0)

    def init(num_tasks: int, params: PyTree | None = None) -> DBMTLState:
        m = require_num_tasks(num_tasks, "db_mtl")
        return DBMTLState(
            count=jnp.zeros((), jnp.int32),
            weights=jnp.ones((m,), weight_dtype(params)),
            tracked=zero_rows(params, m, "db_mtl"),
        )

    def update(
        stat: Jacobian, state: DBMTLState, **extra_args: Any
    ) -> tuple[jax.Array, DBMTLState]:
        check_state("`db_mtl`", state, DBMTLState)
        m = count_tasks(stat)
        if m is None:
            return state.weights, state
        check_length("state.weights", state.weights.shape[0], m)
        dtype = weight_dtype(stat)
        count = jnp.asarray(optax.safe_increment(state.count))
        losses = read_losses(extra_args, "db_mtl", m, dtype)
        inverse = jnp.where(losses == 0, 0, 1 / jnp.where(losses == 0, 1, losses))
        inverse = jnp.where(losses < 0, jnp.nan, inverse)
        decay = count.astype(dtype) ** -jnp.asarray(beta_sigma, dtype)
        past = jnp.asarray(beta, dtype) * decay
        tracked = []
        for leaf, row in paired_leaves(stat, state.tracked, "db_mtl"):
            new = scale_rows(inverse, leaf)
            tracked.append(new + past.astype(row.dtype) * (row - new))
        norms = row_norms(mark_like(tracked, stat)).astype(dtype)
        weights = jnp.where(norms == 0, 0, jnp.max(norms) / jnp.where(norms == 0, 1, norms))
        next_state = DBMTLState(
            count=count,
            weights=weights.astype(state.weights.dtype),
            tracked=jax.tree.unflatten(jax.tree.structure(state.tracked), tracked),
        )
        return weights * inverse, next_state

    return JacobianWeighting(init, update)
