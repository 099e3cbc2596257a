"""Composite weights over time (CR-MOGM), a wrapper of any weighting."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxjd.base import (
    Certified,
    PyTree,
    Weighting,
    check_weighting,
    require_num_tasks,
    solve,
    weight_dtype,
)
from jaxjd.checks import as_vector, check_range, check_state, is_real, type_name


class CRMOGMState(NamedTuple):
    """The state of `cr_mogm`.

    Attributes:
      count: The number of calls, shape ``()``, int32; what a schedule is evaluated at.
      weights: The smoothed weights of the last call, shaped like the weights.
      inner: The state of the wrapped weighting.

    Example:
      >>> import jaxjd
      >>> jaxjd.weightings.cr_mogm(jaxjd.weightings.mean()).init(2).weights.shape
      (2,)
    """

    count: jax.Array
    weights: jax.Array
    inner: PyTree


def cr_mogm(
    weighting: Weighting,
    alpha: optax.ScalarOrSchedule = 0.9,
    initial_weights: PyTree | None = None,
) -> Weighting:
    r"""CR-MOGM: smooths the weights of another weighting over the calls.

    With the weights :math:`\hat\lambda_k` of the wrapped weighting at call `k`:

    .. math:: \lambda_k = \alpha_k \lambda_{k-1} + (1 - \alpha_k) \hat\lambda_k

    :math:`\lambda_0` is `initial_weights`, or :math:`\hat\lambda_1`, which makes the first output
    equal to it. From Zhou et al., "On the Convergence of Stochastic Multi-Objective Gradient
    Manipulation and Beyond" (NeurIPS 2022). Start again with a new `init`.

    Args:
      weighting: Any weighting; the result is of the same kind and reads the same statistic.
      alpha: The coefficient of the past, in [0, 1]: 0 returns the wrapped weights, 1 keeps the
        first ones. Or a schedule of the call count, from 0. The paper lets it rise as the learning
        rate falls: ``alpha = lambda k: 1 - learning_rate(k) / learning_rate(0)``.
      initial_weights: The weights :math:`\lambda_0`, shape ``(m,)`` or laid out as the losses.

    Returns:
      A weighting of the type of `weighting`, with state `CRMOGMState`.

    Raises:
      ValueError: If `weighting` is none or `alpha` is out of range; in `init`, without `num_tasks`
        or if `initial_weights` does not have one entry per task; in `update`, if the state belongs
        to another number of tasks.

    Example:
      Around a weighting of the Gramian, and around one that reads no gradient at all, with the
      paper's schedule:

      >>> import jax.numpy as jnp, optax, jaxjd
      >>> weighting = jaxjd.weightings.cr_mogm(jaxjd.weightings.upgrad(), alpha=0.5)
      >>> state = weighting.init(2)
      >>> weights, state = weighting.update(jnp.eye(2), state)
      >>> weights, state = weighting.update(jnp.array([[18.0, -22.0], [-22.0, 38.0]]), state)
      >>> print(jnp.round(weights, 4))  # halfway from [1/2, 1/2] to [10/9, 15/19]
      [0.8056 0.6447]
      >>> learning_rate = optax.exponential_decay(0.1, transition_steps=1, decay_rate=0.5)
      >>> alpha = lambda k: 1 - learning_rate(k) / learning_rate(0)
      >>> weighting = jaxjd.weightings.cr_mogm(jaxjd.weightings.mean(), alpha)
      >>> aggregator = jaxjd.weighted(weighting, num_tasks=2)
    """
    check_weighting(weighting)
    if not callable(alpha):
        check_range("alpha", alpha, at_least=0, at_most=1)
    given = initial_weights
    if initial_weights is not None:
        try:
            initial_weights = jnp.asarray(given)
        except (TypeError, ValueError) as error:
            if jax.tree_util.all_leaves([given]):
                raise ValueError(
                    f"`initial_weights` must be an array of numbers, got {given!r}."
                ) from error
            initial_weights = as_vector("initial_weights", given)
        if not is_real(initial_weights.dtype):
            raise ValueError(
                f"`initial_weights` must hold real numbers, got {type_name(initial_weights)}."
            )

    def init(num_tasks: Any, params: PyTree | None = None) -> CRMOGMState:
        if isinstance(num_tasks, tuple):  # The weights of `flattening` have a shape.
            shape = num_tasks
        else:
            shape = (require_num_tasks(num_tasks, "cr_mogm"),)
        dtype = weight_dtype(params)
        start = jnp.zeros(shape, dtype)
        if initial_weights is not None:
            wanted = initial_weights
            if len(shape) == 1 and not jax.tree_util.all_leaves([given]):
                wanted = as_vector("initial_weights", given)
            if wanted.shape != shape:
                raise ValueError(f"`initial_weights` must have shape {shape}, got {wanted.shape}.")
            start = jnp.array(wanted, dtype)
        return CRMOGMState(
            count=jnp.zeros((), jnp.int32), weights=start, inner=weighting.init(num_tasks, params)
        )

    def update(stat: Any, state: CRMOGMState, **extra_args: Any) -> tuple:
        check_state("`cr_mogm`", state, CRMOGMState)
        new, inner, certificate = solve(weighting.update, stat, state.inner, **extra_args)
        if new.shape != state.weights.shape:
            raise ValueError(
                f"The state of `cr_mogm` holds weights of shape {state.weights.shape}, but there "
                f"are now weights of shape {new.shape}: call `init` again."
            )
        coefficient = jnp.asarray(alpha(state.count) if callable(alpha) else alpha, new.dtype)
        if coefficient.shape != ():
            raise ValueError(f"`alpha` must be a scalar, got {type_name(coefficient)}.")
        smoothed = coefficient * state.weights.astype(new.dtype) + (1 - coefficient) * new
        if initial_weights is None:
            smoothed = jnp.where(state.count == 0, new, smoothed)
        next_state = CRMOGMState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            weights=smoothed.astype(state.weights.dtype),
            inner=inner,
        )
        return smoothed.astype(new.dtype), next_state, certificate

    return type(weighting)(init, Certified(update))
