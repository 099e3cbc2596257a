"""No update, for parameters that come with a Jacobian."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxjd.base import Aggregator, Jacobian, PyTree
from jaxjd.checks import path_name
from jaxjd.linalg.algebra import count_tasks


def freeze() -> Aggregator:
    r"""Leaves parameters as they are: the update is zero and shaped like the parameters.

    For a group of `jaxjd.partition` whose parameters stay fixed. ``optax.set_to_zero()`` would keep
    the task axis: added to the parameters, its zeros broadcast them to ``(m, *param.shape)``. A
    Jacobian that is frozen costs nothing if the engine is not asked for it; better still,
    differentiate with respect to the other parameters only.

    Returns:
      An `Aggregator` without state. Where `params` are given, leaves of plain gradients, shaped
      like their parameters, are accepted as well.

    Raises:
      ValueError: In `update`, if a leaf is neither a Jacobian's nor a gradient's.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> aggregator = jaxjd.partition(
      ...     {"trained": jaxjd.sum(), "frozen": jaxjd.freeze()},
      ...     {"head": "trained", "body": "frozen"},
      ... )
      >>> jacobian = {"head": jnp.ones((2, 3)), "body": jnp.ones((2, 3))}
      >>> params = {"head": jnp.zeros(3), "body": jnp.zeros(3)}
      >>> updates, _ = aggregator.update(jacobian, aggregator.init(params), params)
      >>> print(updates["head"], updates["body"])
      [2. 2. 2.] [0. 0. 0.]
    """

    def init(params: PyTree) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update(
        updates: Jacobian,
        state: optax.EmptyState,
        params: PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, optax.EmptyState]:
        del extra_args
        if params is None:
            count_tasks(updates)
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:], leaf.dtype), updates)
            return zeros, state
        leaves, treedef = jax.tree.flatten(updates)
        wanted = jax.tree.leaves(params)
        if len(leaves) != len(wanted):
            raise ValueError(
                f"The Jacobian has {len(leaves)} leaves, but the parameters have {len(wanted)}."
            )
        paths = [path for path, _ in jax.tree.leaves_with_path(updates)]
        for path, leaf, param in zip(paths, leaves, wanted, strict=True):
            shape = jnp.shape(param)
            if leaf.shape not in (shape, (*leaf.shape[:1], *shape)):
                raise ValueError(
                    f"Jacobian leaf '{path_name(path)}': expected shape (m, *{shape}) or {shape} "
                    f"for its parameter, found {leaf.shape}."
                )
        # Made from the parameters, so that they have their sharding.
        zeros = [jnp.zeros_like(p, dtype=x.dtype) for p, x in zip(wanted, leaves, strict=True)]
        return jax.tree.unflatten(treedef, zeros), state

    return Aggregator(init, update)  # type: ignore[arg-type]
