"""Random loss weighting (RLW)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from jaxjd.base import PyTree, Weighting, fresh_key, stateless
from jaxjd.checks import check_square, check_state


class RandomState(NamedTuple):
    """The state of `random`.

    Attributes:
      key: A typed PRNG key, shape ``()``; split once per call.

    Example:
      >>> import jaxjd
      >>> jaxjd.weightings.random(key=1).init(2).key.shape
      ()
    """

    key: jax.Array


def random(key: jax.Array | int = 0) -> Weighting:
    r"""RLW: new random weights at every call.

    .. math:: w = \operatorname{softmax}(z), \quad z \sim N(0, I)

    From Lin et al., "Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task
    Learning" (TMLR 2022, https://arxiv.org/abs/2111.10603).

    Args:
      key: A typed PRNG key or a seed. The same key gives the same run, in every lane of a
        `jax.vmap` too: give each the state of a weighting with a key of its own.

    Returns:
      A `Weighting` with state `RandomState`.

    Raises:
      ValueError: If `key` is neither.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> weighting = jaxjd.weightings.random(key=0)
      >>> weights, state = weighting.update(jnp.eye(3), weighting.init(3))
      >>> print(weights.shape, jnp.round(weights.sum(), 3))
      (3,) 1.0
    """
    fresh_key(key)  # Reports a bad key here, not at init.

    def init(num_tasks: Any = None, params: PyTree | None = None) -> RandomState:
        stateless(num_tasks)  # Its state does not depend on it.
        return RandomState(key=fresh_key(key))

    def update(
        stat: jax.Array, state: RandomState, **extra_args: Any
    ) -> tuple[jax.Array, RandomState]:
        m = check_square("gramian", stat)
        check_state("`random`", state, RandomState)
        key, sample_key = jax.random.split(state.key)
        weights = jax.nn.softmax(jax.random.normal(sample_key, (m,), stat.dtype))
        return weights, RandomState(key=key)

    return Weighting(init, update)
