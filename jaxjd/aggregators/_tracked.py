"""Aggregators that combine the gradients that they track, not those of the call: MoCo and DB-MTL.

Their weightings keep the tracked gradients and their weights in the state; what is left to do here
is to combine the two.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxjd import weightings
from jaxjd.aggregators._weighted import check_logged, check_num_tasks
from jaxjd.base import (
    Aggregator,
    AggregatorState,
    Certified,
    Jacobian,
    JacobianWeighting,
    PyTree,
    require_num_tasks,
    solve,
)
from jaxjd.checks import check_state
from jaxjd.linalg.algebra import combine, count_tasks

__all__ = ["db_mtl", "moco"]


def db_mtl(
    beta: float = 0.9, beta_sigma: float = 0.0, *, num_tasks: int | None = None
) -> Aggregator:
    r"""DB-MTL: gradients of the log losses, tracked, and all made as long as the longest.

    `update` needs ``losses=``, one positive number per task as a vector or a pytree. The formulas
    are those of `jaxjd.weightings.db_mtl` (Lin et al., 2023). The update combines the tracked
    gradients, as in the paper, and so does not equal that of `jaxjd.weighted` of the weighting,
    which combines the gradients of the call with the same weights. The state holds one Jacobian.

    Args:
      beta: The weight of the past in the average of the gradients, in [0, 1).
      beta_sigma: How fast it decays, non-negative.
      num_tasks: The number of tasks ``m``, required: the state depends on it.

    Returns:
      An `Aggregator` with state `AggregatorState`, whose `weights` are those of the tracked
      gradients.

    Raises:
      ValueError: If an argument is out of range or `num_tasks` is missing; in `update`, if the
        Jacobian is malformed, or without losses.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> aggregator = jaxjd.db_mtl(beta=0.5, num_tasks=2)
      >>> jacobian, losses = jnp.array([[3.0, 0.0], [0.0, 4.0]]), jnp.array([1.0, 2.0])
      >>> state = aggregator.init(jnp.zeros(2))
      >>> update, state = aggregator.update(jacobian, state, losses=losses)
      >>> print(update, state.weights)  # half of the gradients, 3 and 4 / 2, is tracked so far
      [1.5 1.5] [1.  1.5]
    """
    return _tracked(weightings.db_mtl(beta, beta_sigma), num_tasks, "db_mtl")


def moco(
    beta: float = 0.5,
    beta_sigma: float = 0.5,
    gamma: float = 0.1,
    gamma_sigma: float = 0.5,
    rho: float = 0.0,
    projection: Literal["softmax", "simplex"] = "softmax",
    max_norm: float = 0.0,
    *,
    num_tasks: int | None = None,
) -> Aggregator:
    r"""MoCo: tracks every gradient with a moving average, and weighs what it tracks.

    `update` takes the optional ``losses=``, one number per task as a vector or a pytree, for
    gradients that are normalized to the lengths of the losses. The formulas are those of
    `jaxjd.weightings.moco` (Fernando et al., ICLR 2023). The update combines the tracked gradients,
    as in the paper, and so does not equal that of `jaxjd.weighted` of the weighting, which combines
    the gradients of the call with the same weights. The state holds one Jacobian.

    Args:
      beta: The rate of the tracking, in (0, 1].
      beta_sigma: How fast that rate decays, non-negative.
      gamma: The step size of the weights, positive.
      gamma_sigma: How fast that step size decays, non-negative.
      rho: The regularization of the weights, non-negative.
      projection: ``"simplex"`` for the paper's Euclidean projection, ``"softmax"`` for LibMTL's.
      max_norm: The largest norm of a tracked gradient, and so of the update; 0 for no limit.
      num_tasks: The number of tasks ``m``, required: the state depends on it.

    Returns:
      An `Aggregator` with state `AggregatorState`, whose `weights` are those of the tracked
      gradients.

    Raises:
      ValueError: If an argument is out of range or `num_tasks` is missing; in `update`, if the
        Jacobian or the losses are malformed.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> aggregator = jaxjd.moco(projection="simplex", num_tasks=2)
      >>> jacobian = jnp.array([[1.0, 0.0], [0.0, 2.0]])
      >>> update, state = aggregator.update(jacobian, aggregator.init(jnp.zeros(2)))
      >>> print(update, state.weights)  # half of the gradients is tracked so far
      [0.259375 0.48125 ] [0.51875 0.48125]
    """
    weighting = weightings.moco(beta, beta_sigma, gamma, gamma_sigma, rho, projection, max_norm)
    return _tracked(weighting, num_tasks, "moco")


def _tracked(weighting: JacobianWeighting, num_tasks: int | None, name: str) -> Aggregator:
    """An aggregator that combines the field `tracked` of a state with its field `weights`."""
    num_tasks = require_num_tasks(num_tasks, name)

    def init(params: PyTree) -> AggregatorState:
        inner = weighting.init(num_tasks, params)
        return AggregatorState(weights=jnp.zeros_like(inner.weights), weighting=inner)

    def update(
        updates: Jacobian, state: AggregatorState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple:
        m = count_tasks(updates, params)
        if m is None:
            return updates, state, None
        check_num_tasks(m, num_tasks)
        check_state(f"`{name}`", state, AggregatorState)
        check_logged(state.weights, (m,))
        _, inner, certificate = solve(weighting.update, updates, state.weighting, **extra_args)
        # The state has the structure of the parameters, and the Jacobian may have another one with
        # the same leaves (see `leaf_names`).
        rows = jax.tree.unflatten(jax.tree.structure(updates), jax.tree.leaves(inner.tracked))
        combined = combine(inner.weights, rows)
        combined = jax.tree.map(lambda leaf, new: new.astype(leaf.dtype), updates, combined)
        next_state = AggregatorState(weights=inner.weights, weighting=inner)
        return combined, next_state, certificate

    return Aggregator(init, Certified(update))  # type: ignore[arg-type]
