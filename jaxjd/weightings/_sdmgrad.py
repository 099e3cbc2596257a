"""Stochastic direction-oriented multi-objective gradient descent (SDMGrad)."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxjd.base import (
    CrossGramianWeighting,
    PyTree,
    check_sizes,
    require_num_tasks,
    weight_dtype,
)
from jaxjd.checks import check_length, check_range, check_square, check_state, check_static_int
from jaxjd.solvers.precision import matmul
from jaxjd.solvers.scaling import safe_sqrt
from jaxjd.solvers.simplex import project_onto_simplex
from jaxjd.weightings._preference import check_preference, preference


class SDMGradState(NamedTuple):
    """The state of `sdmgrad`.

    Attributes:
      weights: The inner weights `w`, shape ``(m,)``, on the simplex, ``1 / m`` each at first.

    Example:
      >>> import jaxjd
      >>> print(jaxjd.weightings.sdmgrad().init(2).weights)
      [0.5 0.5]
    """

    weights: jax.Array


def sdmgrad(
    lr: float = 10.0,
    momentum: float = 0.5,
    n_iter: int = 20,
    lambda_: float = 0.3,
    pref_vector: PyTree | None = None,
) -> CrossGramianWeighting:
    r"""SDMGrad: the minimum-norm direction, pulled towards a preferred one, without bias.

    With :math:`A = J_1 J_2^\top` divided by the square of the mean root of its non-negative
    diagonal, it takes `n_iter` steps of stochastic gradient descent with momentum, projected onto
    the simplex, on

    .. math:: \min_{w \in \Delta} \tfrac12 \|J^\top (w + \lambda \tilde w)\|^2

    from the weights of the call before, and returns :math:`(w + \lambda \tilde w) / (1 + \lambda)`.
    From Xiao, Ban and Ji, "Direction-oriented Multi-objective Learning: Simple and Provable
    Stochastic Algorithms" (NeurIPS 2023, https://arxiv.org/abs/2305.18409). The Jacobians, and the
    batch that the weights are applied to, must be independent.

    Args:
      lr: The learning rate of the inner steps, positive.
      momentum: The momentum of the inner steps, in [0, 1). It starts anew at every call.
      n_iter: The number of inner steps, positive and static.
      lambda_: The pull :math:`\lambda` towards the preferred direction, non-negative.
      pref_vector: The preferred weights :math:`\tilde w`, shape ``(m,)`` or laid out as the losses;
        ``1 / m`` by default.

    Returns:
      A `CrossGramianWeighting` with state `SDMGradState`.

    Raises:
      ValueError: If an argument is out of range; in `init`, without `num_tasks`; in `update`, if
        `A` is not ``(m, m)`` or the state belongs to another number of tasks.

    Example:
      Three independent batches a step: two for the weights, one for the update.

      >>> import jax, jax.numpy as jnp, jaxjd
      >>> losses = lambda params, batch: (batch @ params - jnp.array([1.0, -1.0])) ** 2
      >>> params = jnp.zeros(2)
      >>> batch_1, batch_2, batch_3 = jax.random.normal(jax.random.key(0), (3, 2, 2))
      >>> weighting = jaxjd.weightings.sdmgrad(lambda_=0.3)
      >>> state = weighting.init(2, params)
      >>> jacobian_1, jacobian_2 = (jax.jacrev(losses)(params, b) for b in (batch_1, batch_2))
      >>> A = jaxjd.cross_gramian(jacobian_1, jacobian_2)
      >>> weights, state = weighting.update(A, state)
      >>> gradient = jax.grad(lambda p: weights @ losses(p, batch_3))(params)
      >>> print(gradient.shape, jnp.round(weights.sum(), 3))
      (2,) 1.0
    """
    check_range("lr", lr, above=0)
    check_range("momentum", momentum, at_least=0, below=1)
    check_range("lambda_", lambda_, at_least=0)
    n_iter = check_static_int("n_iter", n_iter, at_least=1)
    pref_vector = check_preference(pref_vector)

    def init(num_tasks: int, params: PyTree | None = None) -> SDMGradState:
        m = require_num_tasks(num_tasks, "sdmgrad")
        check_sizes(m, pref_vector=pref_vector)
        return SDMGradState(weights=jnp.full((m,), 1 / m, weight_dtype(params)))

    def update(
        stat: jax.Array, state: SDMGradState, **extra_args: Any
    ) -> tuple[jax.Array, SDMGradState]:
        m = check_square("cross-Gramian", stat)
        check_state("`sdmgrad`", state, SDMGradState)
        check_length("state.weights", state.weights.shape[0], m)
        dtype = stat.dtype
        preferred = preference(pref_vector, m, dtype)
        # Noise can make a diagonal entry of A negative; it then counts as zero.
        scale = jnp.mean(safe_sqrt(jnp.diagonal(stat)))
        normalized = stat / jnp.where(scale > 0, scale, 1) / jnp.where(scale > 0, scale, 1)
        w = _descend(
            normalized,
            state.weights.astype(dtype),
            (lambda_ * preferred).astype(dtype),
            lr,
            momentum,
            n_iter,
        )
        weights = (w + lambda_ * preferred) / (1 + lambda_)
        return weights.astype(dtype), SDMGradState(weights=w.astype(state.weights.dtype))

    return CrossGramianWeighting(init, update)


@functools.partial(jax.jit, static_argnames="n_iter")
def _descend(
    matrix: jax.Array,
    start: jax.Array,
    pull: jax.Array,
    lr: jax.Array | float,
    momentum: jax.Array | float,
    n_iter: int,
) -> jax.Array:
    """Takes the projected momentum steps from `start`."""
    dtype = matrix.dtype

    def step(_: int, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        w, velocity = carry
        velocity = momentum * velocity + matmul(matrix, w + pull)
        w = project_onto_simplex((w - lr * velocity).astype(dtype))
        return w, velocity.astype(dtype)

    w, _ = lax.fori_loop(0, n_iter, step, (start, jnp.zeros_like(start)))
    return w
