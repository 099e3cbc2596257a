"""Fast adaptive multitask optimization (FAMO)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxjd.base import PyTree, Scalarizer, check_sizes, require_num_tasks, weight_dtype
from jaxjd.checks import check_length, check_range, check_state
from jaxjd.scalarizers._tasks import PerTask, loss_vector, nan_if_negative, optional_per_task


class FAMOState(NamedTuple):
    r"""The state of `famo`.

    Attributes:
      count: The number of updates, shape ``()``, int32.
      logits: The logits :math:`\xi` of the weights, shape ``(m,)``, zeros at first.
      adam: The state of ``optax.scale_by_adam`` for the logits.
      previous_losses: The losses of the last update, shape ``(m,)``, zeros at first.

    Example:
      >>> import jaxjd
      >>> print(jaxjd.scalarizers.famo().init(2).logits)
      [0. 0.]
    """

    count: jax.Array
    logits: jax.Array
    adam: optax.ScaleByAdamState
    previous_losses: jax.Array


def famo(
    min_losses: PyTree | None = None, lr: float = 0.025, weight_decay: float = 1e-3
) -> Scalarizer:
    r"""FAMO: weights for which all losses fall at about the same relative rate.

    With :math:`z = \operatorname{softmax}(\xi)` and lower bounds :math:`b` of the losses, `apply`
    returns

    .. math:: c \sum_i z_i \log(L_i - b_i), \quad
              c = \Big(\sum_i \frac{z_i}{L_i - b_i}\Big)^{-1},

    in which :math:`z` and :math:`c` are constants for the derivative: the gradient is a convex
    combination of the tasks' gradients. `update` sees how much each loss has fallen,
    :math:`\delta_i = \log(L_i^{\text{before}} - b_i) - \log(L_i^{\text{after}} - b_i)`, and takes a
    step of Adam on the logits, along :math:`z \odot (\delta - z^\top \delta)` plus the weight decay
    times :math:`\xi`. From Liu et al., "FAMO: Fast Adaptive Multitask Optimization" (NeurIPS 2023,
    https://arxiv.org/abs/2306.03792).

    There are two ways to call `update`, once after each step of the model. Use one of them.

    - ``update(after, state, previous_losses=before)``, with the losses of one batch after and
      before the step: the paper's algorithm, for one more forward pass.
    - ``update(losses, state)``, with the losses that the step was taken on: they are compared to
      those of the call before, on another batch. The first call only stores them.

    Losses have to be above their bounds: a loss exactly at its bound, before or after the step, is
    solved or missing and does not count, one below it gives NaN.

    Args:
      min_losses: The lower bounds :math:`b`, shape ``(m,)`` or laid out as the losses; zeros by
        default. TorchJD adds 1e-8 to the losses, as a bound of ``-1e-8`` does.
      lr: The learning rate of the logits, non-negative.
      weight_decay: The weight decay of the logits, non-negative, which is added to their gradient
        before Adam. The paper's algorithm has 1e-3, the authors' code 1e-5 in its experiments.

    Returns:
      A `Scalarizer` with state `FAMOState`.

    Raises:
      ValueError: If an argument is out of range or `min_losses` holds anything but real numbers; in
        `init`, without `num_tasks`; in `apply` and `update`, if a loss is not floating point, or
        the state, `min_losses` or `previous_losses` belongs to another number of tasks.

    Example:
      One step of the paper's algorithm. The first loss has fallen more, so its weight falls.

      >>> import jax, jax.numpy as jnp, jaxjd
      >>> losses_fn = lambda params: jnp.stack([(params - 1) ** 2, (params - 5) ** 2])
      >>> scalarizer = jaxjd.scalarizers.famo()
      >>> params, state = jnp.array(0.0), scalarizer.init(2)
      >>> def loss_fn(params):
      ...     losses = losses_fn(params)
      ...     return scalarizer.apply(losses, state), losses
      >>> gradient, before = jax.grad(loss_fn, has_aux=True)(params)
      >>> params = params - 0.1 * gradient
      >>> state = scalarizer.update(losses_fn(params), state, previous_losses=before)
      >>> print(jnp.round(state.logits, 4))
      [-0.025  0.025]
    """
    check_range("lr", lr, at_least=0)
    check_range("weight_decay", weight_decay, at_least=0)
    bounds = optional_per_task("min_losses", min_losses)
    adam = optax.scale_by_adam()

    def init(num_tasks: Any = None) -> FAMOState:
        m = require_num_tasks(num_tasks, "famo")
        check_sizes(m, min_losses=bounds)
        logits, losses = (jnp.zeros(m, weight_dtype(None)) for _ in range(2))
        return FAMOState(jnp.zeros((), jnp.int32), logits, adam.init(logits), losses)

    def apply(losses: PyTree, state: FAMOState) -> jax.Array:
        gaps = nan_if_negative(_gaps(losses, loss_vector(losses), bounds))
        check_state("`famo`", state, FAMOState)
        check_length("state.logits", state.logits.shape[0], gaps.shape[0])
        z = jax.nn.softmax(state.logits).astype(gaps.dtype)
        solved = gaps == 0
        safe = jnp.where(solved, 1, gaps)
        # Relative to the smallest gap, whose inverse might overflow.
        smallest = jnp.min(jnp.where(solved, jnp.max(gaps), gaps))
        total = jnp.sum(jnp.where(solved, 0, z * (smallest / safe)))
        c = jnp.where(jnp.all(solved), 0, smallest / jnp.where(jnp.all(solved), 1, total))
        return jnp.sum(lax.stop_gradient(c * z) * jnp.where(solved, 0, jnp.log(safe)))

    def update(
        losses: PyTree,
        state: FAMOState,
        *,
        previous_losses: PyTree | None = None,
        **extra_args: Any,
    ) -> FAMOState:
        vector = loss_vector(losses)
        check_state("`famo`", state, FAMOState)
        check_length("state.logits", state.logits.shape[0], vector.shape[0])
        if previous_losses is None:
            previous = state.previous_losses
        else:
            previous = loss_vector(previous_losses)
            check_length("previous_losses", previous.shape[0], vector.shape[0])
        dtype = state.logits.dtype
        after = _gaps(losses, vector.astype(dtype), bounds)
        before = _gaps(losses, previous.astype(dtype), bounds)

        fall = _log_ratio(before, after)
        counts = (before != 0) & (after != 0)
        z = jnp.where(counts, jax.nn.softmax(state.logits), 0)
        # The common part has no effect; without it, equal falls give exactly zero.
        fall = fall - jnp.max(jnp.where(counts, fall, jnp.min(fall)))
        mean = jnp.sum(z * fall) / jnp.where(jnp.any(counts), jnp.sum(z), 1)
        gradient = z * (fall - mean)
        gradient = gradient + jnp.asarray(weight_decay, dtype) * state.logits
        direction, adam_state = adam.update(gradient, state.adam)
        logits = state.logits - jnp.asarray(lr, dtype) * direction
        if previous_losses is None:
            known = state.count > 0
            logits, adam_state = jax.tree.map(
                lambda new, old: jnp.where(known, new, old),
                (logits, adam_state),
                (state.logits, state.adam),
            )
        return FAMOState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            logits=logits,
            adam=adam_state,
            previous_losses=vector.astype(dtype),
        )

    return Scalarizer(init, apply, update)


def _gaps(losses: PyTree, vector: jax.Array, bounds: PerTask | None) -> jax.Array:
    """The distances of a vector of losses from their lower bounds."""
    return vector if bounds is None else vector - bounds.vector(losses, vector.dtype)


def _log_ratio(before: jax.Array, after: jax.Array) -> jax.Array:
    """``log before - log after``, precise for almost equal numbers; 0 where one of them is 0."""
    zero = (before == 0) | (after == 0)
    before, after = jnp.where(zero, 1, before), jnp.where(zero, 1, after)
    change = before - after
    ratio = jnp.where(change > 0, jnp.log1p(change / after), -jnp.log1p(-change / before))
    return jnp.where((before < 0) | (after < 0), jnp.nan, ratio)
