"""The extra argument `losses` of the methods that read the values of the losses."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxjd.checks import path_name, type_name


def read_losses(
    extra_args: dict[str, Any], name: str, num_tasks: int, dtype: jnp.dtype
) -> jax.Array:
    """Returns ``extra_args["losses"]`` as a vector, in the order of the tasks.

    Args:
      extra_args: The extra arguments of `update`.
      name: The method, for the message.
      num_tasks: The number of tasks.
      dtype: The dtype of the result.

    Returns:
      Shape ``(m,)``.

    Raises:
      ValueError: If there are no losses, or they are not one real floating point number per task.
    """
    losses = extra_args.get("losses")
    if losses is None:
        raise ValueError(
            f"`{name}` reads the losses: pass `losses=` to update, a vector or a pytree with one "
            "number per task."
        )
    leaves = []
    for path, leaf in jax.tree.leaves_with_path(losses):
        if isinstance(leaf, float):
            leaf = jnp.asarray(leaf)
        if not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"`losses`, leaf '{path_name(path)}': expected real floating point numbers, found "
                f"{type_name(leaf)}."
            )
        leaves.append(jnp.ravel(leaf).astype(dtype))
    vector = jnp.concatenate(leaves) if leaves else jnp.zeros(0, dtype)
    if vector.shape[0] != num_tasks:
        raise ValueError(
            f"`losses` has {vector.shape[0]} entries, but there are {num_tasks} tasks."
        )
    return vector
