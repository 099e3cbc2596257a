"""Multi-objective gradient with double sampling (MoDo)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxjd.base import (
    Certified,
    CrossGramianWeighting,
    PyTree,
    require_num_tasks,
    weight_dtype,
)
from jaxjd.checks import check_length, check_range, check_square, check_state
from jaxjd.solvers.precision import matmul
from jaxjd.solvers.residuals import simplex_residual
from jaxjd.solvers.simplex import project_onto_simplex


class MoDoState(NamedTuple):
    """The state of `modo`.

    Attributes:
      weights: The weights, shape ``(m,)``, on the simplex, ``1 / m`` each at first.

    Example:
      >>> import jaxjd
      >>> print(jaxjd.weightings.modo().init(2).weights)
      [0.5 0.5]
    """

    weights: jax.Array


def modo(gamma: float = 0.1, rho: float = 0.1) -> CrossGramianWeighting:
    r"""MoDo: one projected gradient step on the weights per call, unbiased by two batches.

    .. math:: w \leftarrow \operatorname{Proj}_\Delta\big(w - \gamma (A w + \rho w)\big),
              \quad A = J_1 J_2^\top

    From Chen et al., "Three-Way Trade-Off in Multi-Objective Learning: Optimization, Generalization
    and Conflict-Avoidance" (NeurIPS 2023, https://arxiv.org/abs/2305.20057). The two Jacobians must
    come from independent batches; with one batch twice the estimate is biased. The step is not
    normalized: `gamma` must fit the squared scale of the gradients.

    Args:
      gamma: The step size of the weights, positive.
      rho: The coefficient of the quadratic regularization of the weights, non-negative.

    Returns:
      A `CrossGramianWeighting` with state `MoDoState`.

    Raises:
      ValueError: If an argument is out of range; in `init`, without `num_tasks`; in `update`, if
        `A` is not ``(m, m)`` or the state belongs to another number of tasks.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> weighting = jaxjd.weightings.modo(gamma=0.1, rho=0.0)
      >>> A = jnp.array([[1.0, 0.0], [0.0, 3.0]])
      >>> weights, state = weighting.update(A, weighting.init(2))
      >>> print(weights)
      [0.55 0.45]
    """
    check_range("gamma", gamma, above=0)
    check_range("rho", rho, at_least=0)

    def init(num_tasks: int, params: PyTree | None = None) -> MoDoState:
        m = require_num_tasks(num_tasks, "modo")
        return MoDoState(weights=jnp.full((m,), 1 / m, weight_dtype(params)))

    def update(stat: jax.Array, state: MoDoState, **extra_args: Any) -> tuple:
        m = check_square("cross-Gramian", stat)
        check_state("`modo`", state, MoDoState)
        check_length("state.weights", state.weights.shape[0], m)
        w = state.weights.astype(stat.dtype)
        step_size, pull = jnp.asarray(gamma, stat.dtype), jnp.asarray(rho, stat.dtype)
        moved = w - step_size * (matmul(stat, w) + pull * w)
        w = project_onto_simplex(moved)
        certificate = jax.tree_util.Partial(simplex_residual, w, moved)
        state = MoDoState(weights=w.astype(state.weights.dtype))
        return w.astype(stat.dtype), state, certificate

    return CrossGramianWeighting(init, Certified(update))
