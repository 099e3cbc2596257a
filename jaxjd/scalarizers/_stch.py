"""Smooth Tchebycheff scalarization (STCH)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxjd.base import PyTree, Scalarizer, require_num_tasks, stateless, weight_dtype
from jaxjd.checks import check_length, check_range, check_state, check_static_int
from jaxjd.scalarizers._tasks import keep_state, loss_vector, nan_if_negative, optional_per_task


class STCHState(NamedTuple):
    """The state of `stch` with a warm-up.

    Attributes:
      count: The number of updates, shape ``()``, int32.
      nadir: The average losses of the warm-up so far, shape ``(m,)``, zeros at first; it stays as
        it is after the warm-up.

    Example:
      >>> import jaxjd
      >>> print(jaxjd.scalarizers.stch(mu=1.0, warmup_steps=10).init(2).nadir)
      [0. 0.]
    """

    count: jax.Array
    nadir: jax.Array


def stch(
    mu: float,
    weights: PyTree | None = None,
    reference: PyTree | None = None,
    warmup_steps: int | None = None,
) -> Scalarizer:
    r"""STCH: a smooth form of the largest weighted loss.

    .. math:: \mu \log \sum_i \exp\big(w_i (L_i - z_i) / \mu\big)

    The smaller :math:`\mu`, the closer to :math:`\max_i w_i (L_i - z_i)`. Its gradient is
    :math:`J^\top v` with :math:`v_i = w_i \operatorname{softmax}(w (L - z) / \mu)_i`. From Lin et
    al., "Smooth Tchebycheff Scalarization for Multi-Objective Optimization" (ICML 2024,
    https://arxiv.org/abs/2402.19078). Stateless.

    With `warmup_steps` it is the form of the authors' code for multi-task learning, which weighs
    losses of different scales against their nadir :math:`\bar L`, the average of the warm-up:

    .. math:: \sum_i \log L_i \;\text{ during the warm-up, then}\quad
              m \mu \log \sum_i \exp\big(\log(L_i / \bar L_i) / \mu\big)

    `update` counts the steps. (The authors warm up for whole epochs and average over the last of
    them.) Losses have to be positive then: one of exactly zero has no gradient and does not count,
    a negative one gives NaN. A nadir of zero gives no scale, and the task counts with the ratio 1.

    Args:
      mu: The smoothing :math:`\mu`, positive, in the unit of the losses (with a warm-up: without
        unit).
      weights: The preferences :math:`w`, shape ``(m,)`` or laid out as the losses; ``1 / m`` each
        by default. Not with a warm-up.
      reference: The ideal point :math:`z`, laid out in the same way; zeros by default. Not with a
        warm-up.
      warmup_steps: The number of steps of the warm-up, positive and static.

    Returns:
      A `Scalarizer`, with state `STCHState` if it has a warm-up.

    Raises:
      ValueError: If an argument is out of range, or `weights` or `reference` comes with
        `warmup_steps`; in `init`, without `num_tasks` if there is a warm-up; in `apply`, if
        `weights` or `reference` has not one number per task; in `apply` and `update`, if a loss is
        not floating point or the state belongs to another number of tasks.

    Example:
      >>> import jax, jax.numpy as jnp, jaxjd
      >>> scalarizer = jaxjd.scalarizers.stch(mu=0.1)
      >>> losses, state = jnp.array([1.0, 2.0]), scalarizer.init(2)
      >>> print(round(float(scalarizer.apply(losses, state)), 4))  # the largest is 2 / 2
      1.0007
      >>> print(jnp.round(jax.grad(scalarizer.apply)(losses, state), 4))
      [0.0033 0.4967]

      With a warm-up of one step, the second loss has not fallen since:

      >>> scalarizer = jaxjd.scalarizers.stch(mu=0.5, warmup_steps=1)
      >>> state = scalarizer.update(losses, scalarizer.init(2))
      >>> print(jnp.round(jax.grad(scalarizer.apply)(jnp.array([0.5, 2.0]), state), 4))
      [0.8 0.8]
    """
    check_range("mu", mu, above=0)
    if warmup_steps is not None:
        for name, value in (("weights", weights), ("reference", reference)):
            if value is not None:
                raise ValueError(f"`{name}` has no place in the form with `warmup_steps`.")
        return _with_warmup(mu, check_static_int("warmup_steps", warmup_steps, at_least=1))
    preference = optional_per_task("weights", weights)
    ideal = optional_per_task("reference", reference)

    def apply(losses: PyTree, state: PyTree) -> jax.Array:
        vector = loss_vector(losses)
        dtype = vector.dtype
        if ideal is not None:
            vector = vector - ideal.vector(losses, dtype)
        if preference is None:
            weighted = vector / vector.shape[0]
        else:
            weighted = preference.vector(losses, dtype) * vector
        return _smooth_maximum(weighted, jnp.asarray(mu, dtype))

    return Scalarizer(stateless, apply, keep_state)


def _with_warmup(mu: jax.typing.ArrayLike, warmup_steps: int) -> Scalarizer:
    """The form of the authors' code for multi-task learning."""

    def init(num_tasks: Any = None) -> STCHState:
        m = require_num_tasks(num_tasks, "stch")
        return STCHState(jnp.zeros((), jnp.int32), jnp.zeros(m, weight_dtype(None)))

    def apply(losses: PyTree, state: STCHState) -> jax.Array:
        vector = nan_if_negative(loss_vector(losses))
        m, dtype = vector.shape[0], vector.dtype
        check_state("`stch`", state, STCHState)
        check_length("state.nadir", state.nadir.shape[0], m)
        positive = vector != 0
        logs = jnp.log(jnp.where(positive, vector, 1))
        nadir = state.nadir.astype(dtype)
        nadir = jnp.where(nadir != 0, nadir, lax.stop_gradient(jnp.where(positive, vector, 1)))
        # With no loss left but zeros there is nothing to weigh; all of them stay, as constants.
        counts = positive | ~jnp.any(positive)
        smooth = m * _smooth_maximum(logs - jnp.log(nadir), jnp.asarray(mu, dtype), counts)
        return jnp.where(state.count < warmup_steps, jnp.sum(logs), smooth)

    def update(losses: PyTree, state: STCHState, **extra_args: Any) -> STCHState:
        check_state("`stch`", state, STCHState)
        vector = loss_vector(losses).astype(state.nadir.dtype)
        check_length("state.nadir", state.nadir.shape[0], vector.shape[0])
        count = jnp.asarray(optax.safe_increment(state.count))
        average = (state.nadir + (vector - state.nadir) / count).astype(state.nadir.dtype)
        return STCHState(count, jnp.where(count <= warmup_steps, average, state.nadir))

    return Scalarizer(init, apply, update)


def _smooth_maximum(values: jax.Array, mu: jax.Array, where: jax.Array | bool = True) -> jax.Array:
    """``mu log sum exp(values / mu)``, which neither overflows nor loses the largest value."""
    lowest = lax.stop_gradient(jnp.min(values))
    largest = lax.stop_gradient(jnp.max(jnp.where(where, values, lowest)))
    gaps = values - largest
    # A compiler may fuse this with how the values came about, and round the largest one's gap to
    # what is not zero; over a small `mu` that would be a lot.
    top = jnp.arange(values.size) == jnp.argmax(jnp.where(where, values, lowest))
    gaps = gaps - lax.stop_gradient(jnp.where(top, gaps, jnp.maximum(gaps, 0)))
    # What underflows is left out before the division, which could overflow.
    counts = where & (gaps > mu * jnp.log(jnp.finfo(values.dtype).tiny))
    terms = jnp.where(counts, jnp.exp(jnp.where(counts, gaps, 0) / mu), 0)
    return largest + mu * jnp.log(jnp.sum(terms))
