"""Krum and Multi-Krum: robust selection of gradients."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxjd.base import PyTree, Weighting, stateless
from jaxjd.checks import check_square, check_static_int

_FEW = 8


def krum(n_byzantine: int, n_selected: int = 1, squared: bool = False) -> Weighting:
    r"""Krum: the mean of the gradients that are closest to their neighbours.

    The score of a gradient is the sum of its distances to the :math:`m - f - 2` others that are
    closest to it,

    .. math:: s_i = \sum_{j \in N_i} \|g_i - g_j\|,

    and the `n_selected` gradients of the lowest scores have the weight ``1 / n_selected`` each; of
    equal scores the first one counts. From Blanchard et al., "Machine Learning with Adversaries:
    Byzantine Tolerant Gradient Descent" (NeurIPS 2017, https://arxiv.org/abs/1703.02757).
    Stateless. It does not resolve conflict: it keeps wrong gradients out, as in federated learning,
    where each task is a worker.

    Args:
      n_byzantine: The number :math:`f` of gradients that may be anything, non-negative and static.
      n_selected: The number of gradients to select (Multi-Krum), positive and static.
      squared: Whether to sum squared distances, as the paper does, instead of distances, as TorchJD
        does. The selection is often, but not always, the same.

    Returns:
      A `Weighting`.

    Raises:
      ValueError: If an argument is out of range; in `update`, if there are fewer than
        ``n_byzantine + 3`` or `n_selected` tasks.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> jacobian = jnp.array([[1.0, 1.0], [1.0, 0.9], [75.0, -66.0], [1.0, 1.2]])
      >>> weighting = jaxjd.weightings.krum(n_byzantine=1, n_selected=2)
      >>> print(weighting.update(jaxjd.gramian(jacobian), ())[0])
      [0.5 0.5 0.  0. ]
    """
    n_byzantine = check_static_int("n_byzantine", n_byzantine, at_least=0)
    n_selected = check_static_int("n_selected", n_selected, at_least=1)

    def update(stat: jax.Array, state: PyTree, **extra_args: Any) -> tuple[jax.Array, PyTree]:
        m = check_square("gramian", stat)
        needed = max(n_byzantine + 3, n_selected)
        if m < needed:
            raise ValueError(
                f"krum(n_byzantine={n_byzantine}, n_selected={n_selected}) needs at least {needed} "
                f"tasks, found {m}."
            )
        squares = jnp.diagonal(stat)
        # Relative to the longest row, so that no square overflows. Rounding may make them negative.
        longest = jnp.max(squares)
        relative = stat / jnp.where(longest > 0, longest, 1)
        ends = jnp.diagonal(relative)
        distances = jnp.maximum(ends[:, None] + ends[None, :] - 2 * relative, 0)
        if not squared:
            distances = jnp.sqrt(distances)
        scores = _sum_of_smallest(distances, m - n_byzantine - 2)
        selected = jnp.argsort(scores)[:n_selected]
        weights = jnp.zeros((m,), stat.dtype).at[selected].set(1 / n_selected)
        return jnp.where(jnp.isfinite(squares).all(), weights, jnp.nan), state

    return Weighting(stateless, update)


def _sum_of_smallest(distances: jax.Array, number: int) -> jax.Array:
    """Sums the `number` smallest entries of each row outside of the diagonal."""
    m = distances.shape[0]
    others = ~jnp.eye(m, dtype=bool)
    dropped = m - 1 - number
    if dropped > _FEW:
        ordered = jnp.sort(jnp.where(others, distances, jnp.max(distances)), axis=1)
        return jnp.sum(ordered[:, :number], axis=1)
    # To take out a few largest ones is an order of magnitude faster than to sort.
    for _ in range(dropped):
        largest = jnp.argmax(jnp.where(others, distances, -1), axis=1)
        others &= jnp.arange(m)[None, :] != largest[:, None]
    return jnp.sum(jnp.where(others, distances, 0), axis=1)
