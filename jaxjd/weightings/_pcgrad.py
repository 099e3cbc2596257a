"""Projecting conflicting gradients (PCGrad)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxjd.base import PyTree, Weighting, fresh_key, stateless
from jaxjd.checks import check_square, check_state
from jaxjd.solvers.scaling import unit_diagonal


class PCGradState(NamedTuple):
    """The state of `pcgrad`.

    Attributes:
      key: A typed PRNG key, shape ``()``; split once per call.

    Example:
      >>> import jaxjd
      >>> jaxjd.weightings.pcgrad(key=1).init(2).key.shape
      ()
    """

    key: jax.Array


def random_orders(key: jax.Array, num_tasks: int) -> jax.Array:
    """Draws one order of all tasks for every task, shape ``(m, m)``, integer."""
    return jnp.argsort(jax.random.uniform(key, (num_tasks, num_tasks)), axis=1)


def pcgrad(key: jax.Array | int = 0) -> Weighting:
    r"""PCGrad: removes from every gradient its conflicts with the others, one after another.

    For every task :math:`i`, starting from :math:`c = g_i`, and for all other :math:`j` in a random
    order:

    .. math:: c \leftarrow c - \frac{\min(\langle c, g_j \rangle, 0)}{\|g_j\|^2} g_j

    The update is the sum of the results. From Yu et al., "Gradient Surgery for Multi-Task Learning"
    (NeurIPS 2020, https://arxiv.org/abs/2001.06782). Every task draws its own order, as in the
    paper. With two tasks the order does not matter and the update is that of `upgrad`, times two.

    Args:
      key: A typed PRNG key or a seed. The same key gives the same run, in every lane of a
        `jax.vmap` too: give each the state of a weighting with a key of its own.

    Returns:
      A `Weighting` with state `PCGradState`.

    Raises:
      ValueError: If `key` is neither; in `update`, if the Gramian is not ``(m, m)``.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> weighting = jaxjd.weightings.pcgrad()
      >>> G = jnp.array([[18.0, -22.0], [-22.0, 38.0]])
      >>> weights, state = weighting.update(G, weighting.init(2))
      >>> print(jnp.round(weights, 4))  # 20/9 and 30/19
      [2.2222 1.5789]
    """
    fresh_key(key)

    def init(num_tasks: Any = None, params: PyTree | None = None) -> PCGradState:
        stateless(num_tasks)  # Its state does not depend on it.
        return PCGradState(key=fresh_key(key))

    def update(
        stat: jax.Array, state: PCGradState, **extra_args: Any
    ) -> tuple[jax.Array, PCGradState]:
        m = check_square("gramian", stat)
        check_state("`pcgrad`", state, PCGradState)
        key, order_key = jax.random.split(state.key)
        return project_conflicts(stat, random_orders(order_key, m)), PCGradState(key=key)

    return Weighting(init, update)


@jax.jit  # So that calls outside of jit do not compile the loop anew.
def project_conflicts(gramian: jax.Array, orders: jax.Array) -> jax.Array:
    """Returns PCGrad's weights for given orders.

    Args:
      gramian: Shape ``(m, m)``.
      orders: Row `i` is the order in which task `i` meets the tasks, shape ``(m, m)``; its meeting
        with itself is skipped.

    Returns:
      The weights, shape ``(m,)``.
    """
    m = gramian.shape[0]
    # In units of the rows' lengths each projection divides by one, whatever the scales.
    unit = unit_diagonal(gramian)
    tasks = jnp.arange(m)

    def meet(carry: tuple, others: jax.Array) -> tuple[tuple, None]:
        coefficients, products = carry
        product = products[tasks, others]
        step = jnp.where((others != tasks) & unit.nonzero[others], jnp.minimum(product, 0), 0)
        coefficients = coefficients.at[tasks, others].add(-step)
        products = products - step[:, None] * unit.cosines[others]
        return (coefficients, products), None

    start = (jnp.diag(unit.lengths), unit.lengths[:, None] * unit.cosines)
    (coefficients, _), _ = lax.scan(meet, start, orders.T)
    # A zero row changes nothing; it keeps the weight that the others start with.
    return jnp.where(unit.nonzero, jnp.sum(coefficients, axis=0) * unit.inverse_lengths, 1)
