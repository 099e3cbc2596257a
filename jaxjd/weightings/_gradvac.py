"""Gradient Vaccine (GradVac)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxjd.base import PyTree, Weighting, fresh_key, require_num_tasks, weight_dtype
from jaxjd.checks import check_length, check_range, check_square, check_state
from jaxjd.solvers.scaling import safe_sqrt, unit_diagonal
from jaxjd.weightings._pcgrad import random_orders


class GradVacState(NamedTuple):
    """The state of `gradvac`.

    Attributes:
      key: A typed PRNG key, shape ``()``; split once per call.
      target: The moving average of the cosines between tasks, shape ``(m, m)``, zeros at first.

    Example:
      >>> import jaxjd
      >>> jaxjd.weightings.gradvac().init(3).target.shape
      (3, 3)
    """

    key: jax.Array
    target: jax.Array


def gradvac(beta: float = 0.5, eps: float = 1e-8, key: jax.Array | int = 0) -> Weighting:
    r"""GradVac: pulls every pair of gradients up to the cosine that the pair has had so far.

    For every task :math:`i`, starting from :math:`c = g_i`, and for all other :math:`j` in a random
    order, with :math:`\phi = \cos(c, g_j)` and the target :math:`\hat\phi_{ij}`:

    .. math:: c \leftarrow c + \frac{\|c\| \big(\hat\phi_{ij} \sqrt{1 - \phi^2} -
              \phi \sqrt{1 - \hat\phi_{ij}^2}\big)}{\|g_j\| \sqrt{1 - \hat\phi_{ij}^2}} g_j
              \quad \text{if } \phi < \hat\phi_{ij}, \qquad
              \hat\phi_{ij} \leftarrow (1 - \beta) \hat\phi_{ij} + \beta \phi

    The update is the sum of the results. From Wang et al., "Gradient Vaccine: Investigating and
    Improving Multi-task Optimization in Massively Multilingual Models" (ICLR 2021,
    https://arxiv.org/abs/2010.05874). The targets start at zero, so the first call is that of
    `pcgrad`. The paper keeps targets per group of parameters: see `jaxjd.grouped`.

    Args:
      beta: The rate of the moving average, in [0, 1].
      eps: Added to the cosine-like factor of the denominator (for unit rows, so that it does not
        depend on the gradients' scale), non-negative.
      key: A typed PRNG key or a seed. The same key gives the same run, in every lane of a
        `jax.vmap` too: give each the state of a weighting with a key of its own.

    Returns:
      A `Weighting` with state `GradVacState`.

    Raises:
      ValueError: If an argument is out of range; in `init`, without `num_tasks`; in `update`, if
        the state belongs to another number of tasks.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> weighting = jaxjd.weightings.gradvac()
      >>> G = jnp.array([[18.0, -22.0], [-22.0, 38.0]])
      >>> weights, state = weighting.update(G, weighting.init(2))
      >>> print(jnp.round(weights, 4))
      [2.2222 1.5789]
      >>> print(jnp.round(state.target[0, 1], 4))  # half of the cosine
      -0.4206
    """
    check_range("beta", beta, at_least=0, at_most=1)
    check_range("eps", eps, at_least=0)
    fresh_key(key)

    def init(num_tasks: int, params: PyTree | None = None) -> GradVacState:
        m = require_num_tasks(num_tasks, "gradvac")
        return GradVacState(key=fresh_key(key), target=jnp.zeros((m, m), weight_dtype(params)))

    def update(
        stat: jax.Array, state: GradVacState, **extra_args: Any
    ) -> tuple[jax.Array, GradVacState]:
        m = check_square("gramian", stat)
        check_state("`gradvac`", state, GradVacState)
        check_length("state.target", state.target.shape[0], m)
        key, order_key = jax.random.split(state.key)
        target = state.target.astype(stat.dtype)
        rate, small = jnp.asarray(beta, stat.dtype), jnp.asarray(eps, stat.dtype)
        weights, target = vaccinate(stat, target, random_orders(order_key, m), rate, small)
        return weights, GradVacState(key=key, target=target.astype(state.target.dtype))

    return Weighting(init, update)


@jax.jit  # So that calls outside of jit do not compile the loop anew.
def vaccinate(
    gramian: jax.Array,
    target: jax.Array,
    orders: jax.Array,
    beta: jax.typing.ArrayLike,
    eps: jax.typing.ArrayLike,
) -> tuple[jax.Array, jax.Array]:
    """Returns GradVac's weights and next targets for given orders.

    Args:
      gramian: Shape ``(m, m)``.
      target: The targets, shape ``(m, m)``.
      orders: Row `i` is the order in which task `i` meets the tasks, shape ``(m, m)``; its meeting
        with itself is skipped.
      beta: The rate of the moving average.
      eps: Added to the denominator, for unit rows.

    Returns:
      The weights, shape ``(m,)``, and the targets after the call, shape ``(m, m)``.
    """
    m = gramian.shape[0]
    dtype = gramian.dtype
    unit = unit_diagonal(gramian)
    tasks = jnp.arange(m)
    # A target of exactly 1 would ask for an infinite multiple of g_j.
    largest = 1 - 4 * jnp.finfo(dtype).eps

    def sine(cosine: jax.Array) -> jax.Array:
        return safe_sqrt(1 - cosine * cosine)

    def meet(carry: tuple, others: jax.Array) -> tuple[tuple, None]:
        # Row i holds the coefficients of c_i and the products <c_i, g_k>, g_k of unit length.
        coefficients, products, target = carry
        length = safe_sqrt(jnp.sum(coefficients * products, axis=1))
        product = products[tasks, others]
        cosine = jnp.where(length > 0, product / jnp.where(length > 0, length, 1), 0)
        wanted = target[tasks, others]
        reachable = jnp.clip(wanted, -largest, largest)
        step = length * (reachable * sine(cosine) - cosine * sine(reachable))
        step = step / (sine(reachable) + eps)
        other = others != tasks
        step = jnp.where(other & (cosine < wanted) & unit.nonzero[others], step, 0)
        coefficients = coefficients.at[tasks, others].add(step)
        products = products + step[:, None] * unit.cosines[others]
        average = jnp.where(other, (1 - beta) * wanted + beta * cosine, wanted)
        target = target.at[tasks, others].set(average.astype(dtype))
        return (coefficients, products, target), None

    start = (jnp.diag(unit.lengths), unit.lengths[:, None] * unit.cosines, target)
    start = jax.tree.map(lambda x: x.astype(dtype), start)
    (coefficients, _, target), _ = lax.scan(meet, start, orders.T)
    weights = jnp.sum(coefficients, axis=0) * unit.inverse_lengths
    return jnp.where(unit.nonzero, weights, 1), target
