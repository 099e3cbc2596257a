"""Dynamic weight average (DWA)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxjd.base import PyTree, Scalarizer, require_num_tasks, weight_dtype
from jaxjd.checks import check_length, check_range, check_state, check_static_int
from jaxjd.scalarizers._tasks import loss_vector


class DWAState(NamedTuple):
    """The state of `dwa`.

    Attributes:
      step: The number of steps of the current epoch so far, shape ``()``, int32.
      epoch: The number of complete epochs, shape ``()``, int32.
      current: The average losses of the current epoch so far, shape ``(m,)``, zeros at its start.
      previous: The average losses of the last complete epoch, shape ``(m,)``, zeros at first.
      older: Those of the epoch before it, shape ``(m,)``, zeros at first.

    Example:
      >>> import jaxjd
      >>> print(jaxjd.scalarizers.dwa().init(2).current)
      [0. 0.]
    """

    step: jax.Array
    epoch: jax.Array
    current: jax.Array
    previous: jax.Array
    older: jax.Array


def dwa(temperature: float = 2.0, steps_per_epoch: int = 1) -> Scalarizer:
    r"""DWA: more weight for the losses that fell least over the last two epochs.

    With the average losses :math:`\bar L(t)` of epoch :math:`t`, in epoch :math:`t`:

    .. math:: \sum_i w_i L_i, \quad
              w = m \operatorname{softmax}\Big(\frac{1}{T} \,
              \frac{\bar L(t - 1)}{\bar L(t - 2)}\Big)

    and :math:`w = 1` in the first two epochs. From Liu, Johns and Davison, "End-to-End Multi-Task
    Learning with Attention" (CVPR 2019, https://arxiv.org/abs/1803.10704). `update` is called with
    the losses of each step; after `steps_per_epoch` of them the epoch is complete and the averages
    move on. An average of exactly zero says nothing about the rate: that task's ratio counts as 1.
    The losses are expected to keep their sign.

    Args:
      temperature: The temperature :math:`T`, positive: the larger, the more uniform the weights.
      steps_per_epoch: The number of steps of an epoch, positive and static.

    Returns:
      A `Scalarizer` with state `DWAState`.

    Raises:
      ValueError: If an argument is out of range; in `init`, without `num_tasks`; in `apply` and
        `update`, if a loss is not floating point or the state belongs to another number of tasks.

    Example:
      The second loss has quadrupled:

      >>> import jax.numpy as jnp, jaxjd
      >>> scalarizer = jaxjd.scalarizers.dwa()
      >>> state = scalarizer.init(2)
      >>> for losses in jnp.array([[1.0, 1.0], [1.0, 4.0]]):
      ...     state = scalarizer.update(losses, state)
      >>> print([round(float(scalarizer.apply(e, state)), 4) for e in jnp.eye(2)])
      [0.3649, 1.6351]
    """
    check_range("temperature", temperature, above=0)
    steps_per_epoch = check_static_int("steps_per_epoch", steps_per_epoch, at_least=1)

    def init(num_tasks: Any = None) -> DWAState:
        m = require_num_tasks(num_tasks, "dwa")
        counts = [jnp.zeros((), jnp.int32) for _ in range(2)]
        # Three buffers, so that a state may be donated.
        return DWAState(*counts, *(jnp.zeros(m, weight_dtype(None)) for _ in range(3)))

    def apply(losses: PyTree, state: DWAState) -> jax.Array:
        vector = loss_vector(losses)
        m = vector.shape[0]
        check_state("`dwa`", state, DWAState)
        check_length("state.previous", state.previous.shape[0], m)
        weights = m * jax.nn.softmax(_rates(state, temperature))
        weights = jnp.where(state.epoch < 2, 1, weights).astype(vector.dtype)
        return jnp.sum(weights * vector)

    def update(losses: PyTree, state: DWAState, **extra_args: Any) -> DWAState:
        vector = loss_vector(losses)
        check_state("`dwa`", state, DWAState)
        check_length("state.current", state.current.shape[0], vector.shape[0])
        step = state.step + 1
        current = state.current + (vector.astype(state.current.dtype) - state.current) / step
        current = current.astype(state.current.dtype)
        complete = step == steps_per_epoch
        return DWAState(
            step=jnp.where(complete, 0, step),
            epoch=jnp.where(complete, optax.safe_increment(state.epoch), state.epoch),
            current=jnp.where(complete, 0, current),
            previous=jnp.where(complete, current, state.previous),
            older=jnp.where(complete, state.previous, state.older),
        )

    return Scalarizer(init, apply, update)


def _rates(state: DWAState, temperature: jax.typing.ArrayLike) -> jax.Array:
    """The ratios of the last two averages over the temperature."""
    dtype = state.older.dtype
    known = (state.older != 0) & (state.previous != 0)
    rates = jnp.where(known, state.previous / jnp.where(known, state.older, 1), 1)
    rates = rates / jnp.asarray(temperature, dtype)
    # A ratio that overflows takes all the weight; infinity would make it NaN.
    largest = jnp.finfo(dtype).max
    return jnp.clip(rates, -largest, largest)
