"""States that hold a number for every entry of the Jacobian."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxjd.base import Jacobian, PyTree, weight_dtype
from jaxjd.checks import path_name, type_name
from jaxjd.linalg.sharded import local_rows, sum_leaves
from jaxjd.solvers.scaling import safe_sqrt


def zero_rows(params: PyTree | None, num_tasks: int, name: str) -> PyTree:
    """Returns zeros for every entry of a Jacobian of `params`, in at least float32.

    Raises:
      ValueError: If there are no parameters.
    """
    if params is None:
        raise ValueError(f"The state of `{name}` has the parameters' structure: pass params.")

    def zeros(path: Any, param: Any) -> jax.Array:
        param = as_shaped(path, param)
        # Broadcasting keeps the sharding of the parameter in the type.
        row = jnp.zeros_like(param, dtype=jnp.promote_types(param.dtype, jnp.float32))
        return jnp.broadcast_to(row, (num_tasks, *row.shape))

    return jax.tree.map_with_path(zeros, params)


def as_shaped(path: Any, param: Any) -> Any:
    """Returns a parameter as something with a shape and a dtype.

    Raises:
      ValueError: If it is neither an array nor a number; its path is named.
    """
    if isinstance(param, (float, int)):
        return jnp.asarray(param)
    if not hasattr(param, "shape") or not hasattr(param, "dtype"):
        raise ValueError(
            f"Parameter leaf '{path_name(path)}': expected an array, found {type_name(param)}."
        )
    return param


def paired_leaves(
    jacobian: Jacobian, rows: PyTree, name: str
) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Pairs the leaves of a Jacobian, in the dtype of the state, with those of the state.

    Both are shards where the parameters are split over devices: what sums entries needs
    `sum_leaves`, and what is made of them for the algebra `mark_like`.

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
    if any(
        jnp.iscomplexobj(leaf) > jnp.iscomplexobj(state)
        for leaf, state in zip(leaves, states, strict=True)
    ):
        raise ValueError(f"The Jacobian is complex, but `{name}` was initialized with real leaves.")
    # Lazily, so that a leaf is materialized when it is its turn.
    return (
        (local_rows(leaf).astype(state.dtype), state)
        for leaf, state in zip(leaves, states, strict=True)
    )


def scale_rows(factors: jax.Array, leaf: jax.Array) -> jax.Array:
    """Multiplies every row of a leaf by a number of its own."""
    return jnp.expand_dims(factors.astype(leaf.dtype), tuple(range(1, leaf.ndim))) * leaf


def row_norms(jacobian: Jacobian) -> jax.Array:
    """Returns the lengths of the rows, shape ``(m,)``, without the Gramian's other products."""
    dtype = weight_dtype(jacobian)
    leaves = jax.tree.leaves(jacobian)
    squares = []
    for leaf in leaves:
        entries = local_rows(leaf).astype(jnp.promote_types(leaf.dtype, jnp.float32))
        axes = tuple(range(1, entries.ndim))
        square = jnp.square(entries.real)
        if jnp.iscomplexobj(entries):
            square += jnp.square(entries.imag)
        squares.append(jnp.sum(square, axis=axes).astype(dtype))
    return safe_sqrt(sum_leaves(squares, leaves))
