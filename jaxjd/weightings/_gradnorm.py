"""Gradient normalization (GradNorm)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxjd.base import PyTree, Weighting, require_num_tasks, weight_dtype
from jaxjd.checks import check_length, check_range, check_square, check_state
from jaxjd.solvers.scaling import safe_sqrt
from jaxjd.weightings._losses import read_losses


class GradNormState(NamedTuple):
    """The state of `gradnorm`.

    Attributes:
      count: The number of calls, shape ``()``, int32.
      logits: What the weights are ``m`` times the softmax of, shape ``(m,)``, zeros at first.
      initial_losses: The losses of the first call, shape ``(m,)``, zeros before it.

    Example:
      >>> import jaxjd
      >>> print(jaxjd.weightings.gradnorm().init(2).logits)
      [0. 0.]
    """

    count: jax.Array
    logits: jax.Array
    initial_losses: jax.Array


def gradnorm(alpha: float = 1.5, lr: float = 0.025) -> Weighting:
    r"""GradNorm: learns weights with which tasks that lag behind have longer gradients.

    With the weighted norms :math:`G_i = w_i \|g_i\|`, their mean :math:`\bar G` and the relative
    inverse training rates :math:`r_i`, after the weights of the call have been read off it takes
    one gradient step, of size `lr`, in the logits of the weights, on

    .. math:: \frac{1}{\bar G} \sum_i \big| G_i - \bar G \, r_i^\alpha \big|, \qquad
              r_i = \frac{L_i / L_i^{(0)}}{\frac1m \sum_j L_j / L_j^{(0)}}, \qquad
              w = m \operatorname{softmax}(s)

    in which :math:`\bar G` and :math:`r` count as constants: with
    :math:`c_i = \operatorname{sign}(G_i - \bar G r_i^\alpha) \, G_i / \bar G` the step is
    :math:`s_i \leftarrow s_i - \eta \, (c_i - \frac{w_i}{m} \sum_j c_j)`. From Chen et al.,
    "GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep Multitask Networks"
    (ICML 2018, https://arxiv.org/abs/1711.02257). The paper learns the weights themselves with Adam
    and scales them back to the sum :math:`m`; logits keep them positive, and the division by
    :math:`\bar G` makes the step independent of the scale of the gradients, as Adam does. The paper
    takes the gradients with respect to the last shared layer only.

    Args:
      alpha: The strength :math:`\alpha` of the pull towards a common training rate, non-negative;
        0 makes all weighted gradients equally long.
      lr: The step size :math:`\eta` of the logits, positive.

    Returns:
      A `Weighting` with state `GradNormState`; the weights sum to ``m``, and those of the first
      call are ones. Its `update` needs the extra argument ``losses=``, one number per task as a
      vector or a pytree in the order of the tasks. The first positive loss of a task
      is its :math:`L^{(0)}`. Losses are meant to be positive: a negative one counts as zero, and a
      task that has had no positive loss counts as unchanged.

    Raises:
      ValueError: If an argument is out of range; in `init`, without `num_tasks`; in `update`,
        without losses or if the state belongs to another number of tasks.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> weighting = jaxjd.weightings.gradnorm(lr=0.1)
      >>> gramian, losses = jnp.diag(jnp.array([1.0, 9.0])), jnp.array([1.0, 1.0])
      >>> weights, state = weighting.update(gramian, weighting.init(2), losses=losses)
      >>> print(weights)
      [1. 1.]
      >>> weights, state = weighting.update(gramian, state, losses=losses)
      >>> print(jnp.round(weights, 4))  # the second gradient is longer
      [1.0997 0.9003]
    """
    check_range("alpha", alpha, at_least=0)
    check_range("lr", lr, above=0)

    def init(num_tasks: int, params: PyTree | None = None) -> GradNormState:
        m = require_num_tasks(num_tasks, "gradnorm")
        dtype = weight_dtype(params)
        return GradNormState(
            count=jnp.zeros((), jnp.int32),
            logits=jnp.zeros((m,), dtype),
            initial_losses=jnp.zeros((m,), dtype),
        )

    def update(
        stat: jax.Array, state: GradNormState, **extra_args: Any
    ) -> tuple[jax.Array, GradNormState]:
        m = check_square("gramian", stat)
        check_state("`gradnorm`", state, GradNormState)
        check_length("state.logits", state.logits.shape[0], m)
        dtype = stat.dtype
        losses = read_losses(extra_args, "gradnorm", m, dtype)
        # A task may be missing, with a loss of zero: its first positive loss is its initial one.
        initial = state.initial_losses.astype(dtype)
        initial = jnp.where(initial <= 0, losses, initial)
        known = ~(initial <= 0)
        ratios = jnp.where(known, jnp.maximum(losses, 0) / jnp.where(known, initial, 1), 1)
        average = jnp.mean(ratios)
        rates = jnp.where(average == 0, 1, ratios / jnp.where(average == 0, 1, average))

        logits = state.logits.astype(dtype)
        weights = m * jax.nn.softmax(logits)
        norms = weights * safe_sqrt(jnp.diagonal(stat))
        mean = jnp.mean(norms)
        relative = norms / jnp.where(mean == 0, 1, mean)
        # A sign has no derivative, and a power of a rate of zero may have an infinite one.
        signs = lax.stop_gradient(jnp.sign(relative - rates ** jnp.asarray(alpha, dtype)))
        slope = signs * relative
        slope = slope - weights / m * jnp.sum(slope)
        logits = logits - jnp.asarray(lr, dtype) * slope
        next_state = GradNormState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            logits=logits.astype(state.logits.dtype),
            initial_losses=initial.astype(state.initial_losses.dtype),
        )
        weights = jnp.where(jnp.isfinite(mean), weights, jnp.nan)
        return weights, next_state

    return Weighting(init, update)
