"""Nash-MTL: the tasks bargain about the update."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxjd.base import Certified, PyTree, Weighting, require_num_tasks, weight_dtype
from jaxjd.checks import check_length, check_range, check_square, check_state, check_static_int
from jaxjd.solvers.fairness import fair_weights
from jaxjd.solvers.precision import matmul
from jaxjd.solvers.residuals import fairness_residual
from jaxjd.solvers.scaling import safe_sqrt


class NashMTLState(NamedTuple):
    """The state of `nash_mtl` with ``update_weights_every > 1``; otherwise it has none.

    Attributes:
      count: The number of calls, shape ``()``, int32.
      weights: The solution of the last bargaining problem, before the limit on the norm, shape
        ``(m,)``.

    Example:
      >>> import jaxjd
      >>> jaxjd.weightings.nash_mtl(update_weights_every=2).init(3).weights.shape
      (3,)
    """

    count: jax.Array
    weights: jax.Array


def nash_mtl(max_norm: float = 1.0, update_weights_every: int = 1) -> Weighting:
    r"""Nash-MTL: the Nash bargaining solution, where every task gains alike.

    .. math:: G w = 1 / w, \quad w > 0

    which is the optimum of the strictly convex :math:`\tfrac12 w^\top G w - \sum_i \log w_i`. From
    Navon et al., "Multi-Task Learning as a Bargaining Game" (ICML 2022,
    https://arxiv.org/abs/2202.01017). Solved exactly by damped Newton steps, so there are no
    `optim_niter` and no dependence on the calls before; `n_tasks` is known from the Gramian. The
    solution's norm is :math:`\sqrt m` whatever the scale of the gradients. A zero row gets the
    weight zero.

    Args:
      max_norm: The largest norm of the update, non-negative; 0 for no limit.
      update_weights_every: The problem is solved every this many calls, positive and static; the
        weights are used again in between.

    Returns:
      A `Weighting`, with state `NashMTLState` if ``update_weights_every > 1``.

    Raises:
      ValueError: If an argument is out of range; in `update`, if the Gramian is not ``(m, m)``.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> weighting = jaxjd.weightings.nash_mtl(max_norm=0.0)
      >>> weights, _ = weighting.update(jnp.array([[18.0, -22.0], [-22.0, 38.0]]), ())
      >>> print(jnp.round(weights, 4))
      [0.5915 0.4071]
    """
    check_range("max_norm", max_norm, at_least=0)
    every = check_static_int("update_weights_every", update_weights_every, at_least=1)

    def init(num_tasks: Any = None, params: PyTree | None = None) -> PyTree:
        if every == 1:
            return ()
        m = require_num_tasks(num_tasks, "nash_mtl")
        return NashMTLState(jnp.zeros((), jnp.int32), jnp.zeros((m,), weight_dtype(params)))

    def update(stat: jax.Array, state: PyTree, **extra_args: Any) -> tuple:
        m = check_square("gramian", stat)
        solved = jnp.asarray(True)
        if every == 1:
            weights = fair_weights(stat, 1.0)
        else:
            check_state("`nash_mtl`", state, NashMTLState)
            check_length("state.weights", state.weights.shape[0], m)
            solved = state.count % every == 0
            weights = lax.cond(
                solved,
                lambda: fair_weights(stat, 1.0),
                lambda: state.weights.astype(stat.dtype),
            )
            state = NashMTLState(
                count=jnp.asarray(optax.safe_increment(state.count)),
                weights=weights.astype(state.weights.dtype),
            )
        norm = safe_sqrt(matmul(weights, matmul(stat, weights)))
        limit = jnp.asarray(max_norm, stat.dtype)
        clipped = (limit > 0) & (norm > limit)
        factor = jnp.where(clipped, limit / jnp.where(clipped, norm, 1), 1)
        answer = (weights * factor).astype(stat.dtype)
        return answer, state, jax.tree_util.Partial(_residual, answer, factor, stat, solved)

    return Weighting(init, Certified(update))


def _residual(
    answer: jax.Array, factor: jax.Array, gramian: jax.Array, solved: jax.Array
) -> jax.Array:
    residual = fairness_residual(answer / factor, gramian, 1.0)
    return jnp.where(solved, residual, -1)
