"""Random loss weighting (RLW)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxjd.base import PyTree, Scalarizer, fresh_key
from jaxjd.checks import check_state
from jaxjd.scalarizers._tasks import loss_vector


class RandomState(NamedTuple):
    """The state of `random`.

    Attributes:
      key: A typed PRNG key, shape ``()``; split once per update.

    Example:
      >>> import jaxjd
      >>> jaxjd.scalarizers.random(key=1).init(2).key.shape
      ()
    """

    key: jax.Array


def random(key: jax.Array | int = 0) -> Scalarizer:
    r"""RLW: a weighted sum with new random weights after every update.

    .. math:: \sum_i w_i L_i, \quad w = \operatorname{softmax}(z), \quad z \sim N(0, I)

    From Lin et al., "Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task
    Learning" (TMLR 2022, https://arxiv.org/abs/2111.10603). `apply` draws from the key of the
    state, so it gives the same weights until `update` splits the key.

    Args:
      key: A typed PRNG key or a seed. The same key gives the same run, in every lane of a
        `jax.vmap` too: give each the state of a scalarizer with a key of its own.

    Returns:
      A `Scalarizer` with state `RandomState`.

    Raises:
      ValueError: If `key` is neither; in `apply`, if a loss is not floating point.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> scalarizer = jaxjd.scalarizers.random(key=0)
      >>> losses, state = jnp.array([1.0, 2.0]), scalarizer.init(2)
      >>> bool(1 < scalarizer.apply(losses, state) < 2)
      True
      >>> next_state = scalarizer.update(losses, state)
      >>> bool(scalarizer.apply(losses, state) == scalarizer.apply(losses, next_state))
      False
    """
    fresh_key(key)  # Reports a bad key here, not at init.

    def init(num_tasks: Any = None) -> RandomState:
        return RandomState(key=fresh_key(key))

    def apply(losses: PyTree, state: RandomState) -> jax.Array:
        vector = loss_vector(losses)
        check_state("`random`", state, RandomState)
        _, sample_key = jax.random.split(state.key)
        weights = jax.nn.softmax(jax.random.normal(sample_key, vector.shape, vector.dtype))
        return jnp.sum(weights * vector)

    def update(losses: PyTree, state: RandomState, **extra_args: Any) -> RandomState:
        check_state("`random`", state, RandomState)
        next_key, _ = jax.random.split(state.key)
        return RandomState(key=next_key)

    return Scalarizer(init, apply, update)
