"""Flattening: weightings of generalized Gramians."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxjd.base import (
    Certified,
    CrossGramianWeighting,
    JacobianWeighting,
    PyTree,
    Weighting,
    solve,
)
from jaxjd.checks import check_static_int, type_name


def flattening(weighting: Weighting) -> Weighting:
    r"""Applies a weighting to the generalized Gramian of a tensor of losses.

    The losses have shape ``(m1, .., mk)``, their generalized Gramian has shape
    ``(m1, .., mk, mk, .., m1)``. It is reordered to the ``(M, M)`` Gramian of the
    :math:`M = \prod m_i` losses in row-major order, and the weights are shaped back.

    Args:
      weighting: A weighting of the Gramian.

    Returns:
      A `Weighting` whose `init` takes the shape ``(m1, .., mk)`` for the number of tasks and whose
      weights have that shape. Its state is that of `weighting`.

    Raises:
      ValueError: If `weighting` does not read a Gramian; in `update`, if the shape of the
        generalized Gramian is not a palindrome.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> weighting = jaxjd.weightings.flattening(jaxjd.weightings.upgrad())
      >>> weights, _ = weighting.update(jnp.ones((2, 3, 3, 2)), weighting.init((2, 3)))
      >>> print(jnp.round(weights, 4))
      [[0.1667 0.1667 0.1667]
       [0.1667 0.1667 0.1667]]
    """
    if not isinstance(weighting, Weighting) or isinstance(
        weighting, (JacobianWeighting, CrossGramianWeighting)
    ):
        raise ValueError(
            f"`flattening` takes a weighting of the Gramian, got {type(weighting).__name__}."
        )

    def init(num_tasks: int | tuple[int, ...], params: PyTree | None = None) -> PyTree:
        shape = num_tasks if isinstance(num_tasks, tuple) else (num_tasks,)
        shape = tuple(check_static_int("num_tasks", size, at_least=1) for size in shape)
        return weighting.init(math.prod(shape), params)

    def update(stat: jax.Array, state: PyTree, **extra_args: Any) -> tuple:
        ndim = getattr(stat, "ndim", 1)
        k = ndim // 2
        if ndim == 0 or ndim % 2 or stat.shape[:k] != stat.shape[: k - 1 : -1]:
            raise ValueError(
                "A generalized Gramian must have shape (m1, .., mk, mk, .., m1), got "
                f"{type_name(stat)}."
            )
        shape = stat.shape[:k]
        size = math.prod(shape)
        order = (*range(k), *reversed(range(k, 2 * k)))
        square = jnp.transpose(stat, order).reshape(size, size)
        weights, state, certificate = solve(weighting.update, square, state, **extra_args)
        return weights.reshape(shape), state, certificate

    return Weighting(init, Certified(update))
