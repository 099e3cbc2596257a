"""Multi-objective gradient correction (MoCo)."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxjd.base import (
    Certified,
    Jacobian,
    JacobianWeighting,
    PyTree,
    require_num_tasks,
    weight_dtype,
)
from jaxjd.checks import check_length, check_range, check_state
from jaxjd.linalg.algebra import count_tasks, gramian
from jaxjd.linalg.sharded import mark_like
from jaxjd.solvers.precision import matmul
from jaxjd.solvers.residuals import simplex_residual
from jaxjd.solvers.simplex import project_onto_simplex
from jaxjd.weightings._losses import read_losses
from jaxjd.weightings._rows import paired_leaves, row_norms, scale_rows, zero_rows


class MoCoState(NamedTuple):
    """The state of `moco`.

    Attributes:
      count: The number of calls, shape ``()``, int32.
      weights: The weights of the tracked gradients, shape ``(m,)``, on the simplex, ``1 / m`` each
        at first.
      tracked: The tracked gradients `Y`: a pytree like the parameters whose leaves have shape
        ``(m, *param.shape)``, zeros at first; at least float32.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> state = jaxjd.weightings.moco().init(2, {"w": jnp.zeros(3)})
      >>> print(state.weights, state.tracked["w"].shape)
      [0.5 0.5] (2, 3)
    """

    count: jax.Array
    weights: jax.Array
    tracked: PyTree


def moco(
    beta: float = 0.5,
    beta_sigma: float = 0.5,
    gamma: float = 0.1,
    gamma_sigma: float = 0.5,
    rho: float = 0.0,
    projection: Literal["softmax", "simplex"] = "softmax",
    max_norm: float = 0.0,
) -> JacobianWeighting:
    r"""MoCo: tracks every gradient with a moving average, and weighs what it tracks.

    At call :math:`t = 1, 2, \dots`, with the gradients :math:`h_i = g_i`, or, if `update` gets
    the losses, :math:`h_i = L_i \, g_i / \|g_i\|`:

    .. math:: Y \leftarrow Y - \frac{\beta}{t^{\sigma_\beta}} (Y - H), \qquad
              \lambda \leftarrow \operatorname{proj}\Big(\lambda -
              \frac{\gamma}{t^{\sigma_\gamma}} (Y Y^\top + \rho I) \lambda\Big), \qquad
              d = Y^\top \lambda

    From Fernando et al., "Mitigating Gradient Bias in Multi-objective Learning: A Provably
    Convergent Approach" (ICLR 2023, https://openreview.net/forum?id=dLAYGdKTi2). The update of the
    paper combines the tracked gradients, which is what `jaxjd.moco` does; a weighting can only
    weigh the rows of the Jacobian, so this one returns :math:`\lambda_i`, or
    :math:`\lambda_i L_i / \|g_i\|` with losses, and `jaxjd.weighted` of it makes the update
    :math:`H^\top \lambda`. The step of the weights is not normalized: without losses, `gamma` must
    fit the squared scale of the gradients. Memory is one Jacobian.

    Args:
      beta: The rate :math:`\beta` of the tracking, in (0, 1].
      beta_sigma: How fast that rate decays, non-negative.
      gamma: The step size :math:`\gamma` of the weights, positive.
      gamma_sigma: How fast that step size decays, non-negative.
      rho: The regularization :math:`\rho` of the weights, non-negative.
      projection: ``"simplex"`` for the paper's Euclidean projection; ``"softmax"``, as in LibMTL,
        which pulls the weights towards uniform ones.
      max_norm: The largest norm of a tracked gradient, non-negative; 0 for no limit. Longer ones
        are projected onto the ball of that radius, as in the paper, where it is the largest norm
        that a gradient can have. The update of `jaxjd.moco` is then no longer either.

    Returns:
      A `JacobianWeighting` with state `MoCoState`. Its `update` takes the optional extra argument
      ``losses=``, one number per task as a vector or a pytree in the order of the tasks.

    Raises:
      ValueError: If an argument is out of range; in `init`, without `num_tasks` or `params`; in
        `update`, if the Jacobian or the losses do not fit the state.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> weighting = jaxjd.weightings.moco(beta=1.0, gamma=0.1, projection="simplex")
      >>> jacobian = jnp.array([[1.0, 0.0], [0.0, 2.0]])
      >>> weights, state = weighting.update(jacobian, weighting.init(2, jnp.zeros(2)))
      >>> print(jnp.round(weights, 4))  # 1/2 each, less 0.1 times (1, 4) / 2
      [0.575 0.425]
    """
    check_range("beta", beta, above=0, at_most=1)
    check_range("beta_sigma", beta_sigma, at_least=0)
    check_range("gamma", gamma, above=0)
    check_range("gamma_sigma", gamma_sigma, at_least=0)
    check_range("rho", rho, at_least=0)
    check_range("max_norm", max_norm, at_least=0)
    projections = {"softmax": jax.nn.softmax, "simplex": project_onto_simplex}
    if projection not in projections:
        raise ValueError(f"`projection` must be one of {list(projections)}, got {projection!r}.")

    def init(num_tasks: int, params: PyTree | None = None) -> MoCoState:
        m = require_num_tasks(num_tasks, "moco")
        return MoCoState(
            count=jnp.zeros((), jnp.int32),
            weights=jnp.full((m,), 1 / m, weight_dtype(params)),
            tracked=zero_rows(params, m, "moco"),
        )

    def update(stat: Jacobian, state: MoCoState, **extra_args: Any) -> tuple:
        check_state("`moco`", state, MoCoState)
        m = count_tasks(stat)
        if m is None:
            return state.weights, state, None
        check_length("state.weights", state.weights.shape[0], m)
        dtype = weight_dtype(stat)
        count = jnp.asarray(optax.safe_increment(state.count))

        def decayed(rate: jax.typing.ArrayLike, sigma: jax.typing.ArrayLike) -> jax.Array:
            return jnp.asarray(rate, dtype) * count.astype(dtype) ** -jnp.asarray(sigma, dtype)

        factors = jnp.ones((m,), dtype)
        if extra_args.get("losses") is not None:
            losses, norms = read_losses(extra_args, "moco", m, dtype), row_norms(stat)
            factors = jnp.where(norms == 0, 0, losses / jnp.where(norms == 0, 1, norms))
        rate = decayed(beta, beta_sigma)
        moved = [
            row + rate.astype(row.dtype) * (scale_rows(factors, leaf) - row)
            for leaf, row in paired_leaves(stat, state.tracked, "moco")
        ]
        if isinstance(max_norm, jax.Array) or max_norm:
            norms, limit = row_norms(mark_like(moved, stat)), jnp.asarray(max_norm, dtype)
            long = (limit > 0) & (norms > limit)
            shrink = jnp.where(long, limit / jnp.where(long, norms, 1), 1)
            moved = [scale_rows(shrink, row) for row in moved]
        tracked = jax.tree.unflatten(jax.tree.structure(state.tracked), moved)
        weights = state.weights.astype(dtype)
        products = gramian(mark_like(moved, stat)).astype(dtype)
        slope = matmul(products, weights) + jnp.asarray(rho, dtype) * weights
        stepped = weights - decayed(gamma, gamma_sigma) * slope
        weights = projections[projection](stepped)
        certificate = None
        if projection == "simplex":
            certificate = jax.tree_util.Partial(simplex_residual, weights, stepped)
        next_state = MoCoState(
            count=count, weights=weights.astype(state.weights.dtype), tracked=tracked
        )
        return weights * factors, next_state, certificate

    return JacobianWeighting(init, Certified(update))
