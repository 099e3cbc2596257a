"""States that hold a number for every entry of the Jacobian."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxjd.base import Jacobian, PyTree, weight_dtype
from jaxjd.linalg.algebra import materialize


def zero_rows(params: PyTree | None, num_tasks: int, name: str) -> PyTree:
    """Returns zeros for every entry of a Jacobian of `params`, in at least float32.

    Raises:
      ValueError: If there are no parameters.
    """
    if params is None:
        raise ValueError(f"The state of `{name}` has the parameters' structure: pass params.")

    def zeros(param: Any) -> jax.Array:
        # Broadcasting keeps the sharding of the parameter in the type.
        row = jnp.zeros_like(param, dtype=jnp.promote_types(param.dtype, jnp.float32))
        return jnp.broadcast_to(row, (num_tasks, *row.shape))

    return jax.tree.map(zeros, params)


def paired_leaves(
    jacobian: Jacobian, rows: PyTree, name: str
) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Pairs the leaves of a Jacobian, in the dtype of the state, with those of the state.

    Raises:
      ValueError: If they do not have the same shapes.
    """
    leaves, states = jax.tree.leaves(jacobian), jax.tree.leaves(rows)
    if [leaf.shape for leaf in leaves] != [state.shape for state in states]:
        raise ValueError(
            f"The Jacobian does not have the leaves that `{name}` was initialized with: "
            f"expected shapes {[state.shape for state in states]}, "
            f"found {[leaf.shape for leaf in leaves]}."
        )
    # Lazily, so that a leaf is materialized when it is its turn.
    return (
        (materialize(leaf).astype(state.dtype), state)
        for leaf, state in zip(leaves, states, strict=True)
    )


def scale_rows(factors: jax.Array, leaf: jax.Array) -> jax.Array:
    """Multiplies every row of a leaf by a number of its own."""
    return jnp.expand_dims(factors.astype(leaf.dtype), tuple(range(1, leaf.ndim))) * leaf


def row_norms(jacobian: Jacobian) -> jax.Array:
    """Returns the lengths of the rows, shape ``(m,)``, without the Gramian's other products."""
    dtype = weight_dtype(jacobian)
    squares = jnp.zeros((), dtype)
    for leaf in jax.tree.leaves(jacobian):
        entries = materialize(leaf).astype(jnp.promote_types(leaf.dtype, jnp.float32))
        axes = tuple(range(1, entries.ndim))
        squares = squares + jnp.sum(jnp.square(entries), axis=axes).astype(dtype)
    return jnp.sqrt(squares)
