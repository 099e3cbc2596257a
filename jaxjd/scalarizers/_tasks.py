"""What every scalarizer does to its arguments: losses of any structure become one vector."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxjd.base import PyTree, weight_dtype
from jaxjd.checks import path_name, type_name


def loss_vector(losses: PyTree) -> jax.Array:
    """Returns the losses as a vector with one entry per task, in tree order.

    Args:
      losses: Any pytree of real floating point arrays or numbers of any shape.

    Returns:
      Shape ``(m,)``, at least float32.

    Raises:
      ValueError: If a leaf is not real floating point, or there are no losses.
    """
    leaves = []
    for path, leaf in jax.tree.leaves_with_path(losses):
        array = _as_array(leaf)
        if array is None or not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(
                f"Loss '{path_name(path)}': expected a real floating point array, found "
                f"{type_name(leaf)}."
            )
        leaves.append(array)
    vector = _concatenate(leaves, weight_dtype(leaves))
    if vector.size == 0:
        raise ValueError("There are no losses to combine.")
    return vector


class PerTask(NamedTuple):
    """A hyper-parameter with one real number per task.

    Attributes:
      name: Its name, for messages.
      tree: What was given, as a pytree of arrays.
      array: What was given as one array, where it can be one.
    """

    name: str
    tree: PyTree
    array: jax.Array | None

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.tree))

    def vector(self, losses: PyTree, dtype: jnp.dtype) -> jax.Array:
        """Returns the numbers in the order of the tasks, shape ``(m,)``.

        Raises:
          ValueError: If they are neither a vector with one entry per task nor laid out as the
            losses.
        """
        leaves, treedef = jax.tree.flatten(losses)
        shapes = [jnp.shape(leaf) for leaf in leaves]
        own_leaves, own_treedef = jax.tree.flatten(self.tree)
        if treedef == own_treedef and shapes == [leaf.shape for leaf in own_leaves]:
            return _concatenate(own_leaves, dtype)
        m = sum(math.prod(shape) for shape in shapes)
        allowed = [(m,), *(shapes if jax.tree_util.treedef_is_leaf(treedef) else [])]
        if self.array is not None and self.array.shape in allowed:
            return self.array.ravel().astype(dtype)
        found = self.tree if self.array is None else self.array
        raise ValueError(
            f"`{self.name}` must have one entry per task, shape ({m},), or the structure and "
            f"shapes of the losses, {_describe(losses)}; found {_describe(found)}."
        )


def per_task(name: str, value: Any) -> PerTask:
    """Checks a hyper-parameter with one number per task; its layout is checked with the losses.

    Raises:
      ValueError: If it holds anything but real numbers.
    """
    leaves, treedef = jax.tree.flatten(value)
    arrays = [_as_array(leaf) for leaf in leaves]
    for leaf, found in zip(leaves, arrays, strict=True):
        if found is None or not jnp.issubdtype(found.dtype, jnp.number) or jnp.iscomplexobj(found):
            raise ValueError(f"`{name}` must hold real numbers, found {type_name(leaf)}.")
    if not leaves:
        raise ValueError(f"`{name}` must have one number per task, got {value!r}.")
    return PerTask(name, jax.tree.unflatten(treedef, arrays), _as_array(value))


def optional_per_task(name: str, value: Any) -> PerTask | None:
    """As `per_task`, but passes None on."""
    return None if value is None else per_task(name, value)


def check_parameters(state: Any, num_tasks: int) -> None:
    """Checks a state that is a vector of learned parameters.

    Raises:
      ValueError: If it has not one entry per task.
    """
    if getattr(state, "shape", None) != (num_tasks,):
        raise ValueError(
            f"`state` must have one entry per task, shape ({num_tasks},), got {type_name(state)}."
        )


def keep_state(losses: PyTree, state: PyTree, **extra_args: Any) -> PyTree:
    """The `update` of every scalarizer whose state no rule changes."""
    del losses, extra_args
    return state


def _as_array(value: Any) -> jax.Array | None:
    if isinstance(value, (str, bytes)):
        return None
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError):
        return None


def _describe(tree: PyTree) -> str:
    return str(jax.tree.map(type_name, tree))


def _concatenate(leaves: list[jax.Array], dtype: jnp.dtype) -> jax.Array:
    vectors = [leaf.ravel().astype(dtype) for leaf in leaves]
    return jnp.concatenate(vectors) if vectors else jnp.zeros(0, dtype)


def nan_if_negative(vector: jax.Array) -> jax.Array:
    """Makes all entries NaN, and all derivatives by them, where one is negative or not finite.

    Nothing can raise inside `jax.jit`, and a finite gradient would hide what went wrong.
    """
    valid = jnp.all((vector >= 0) & jnp.isfinite(vector))
    return vector * jnp.where(valid, 1, jnp.nan).astype(vector.dtype)


def norm(vector: jax.Array) -> jax.Array:
    """The Euclidean length without overflow or underflow; its gradient at zero is zero."""
    unit, scaled = _in_own_unit(vector)
    squares = jnp.sum(jnp.square(scaled))
    nonzero = squares != 0
    return unit * jnp.where(nonzero, jnp.sqrt(jnp.where(nonzero, squares, 1)), 0)


def unit_vector(vector: jax.Array) -> jax.Array:
    """The vector at unit length; zero stays zero."""
    _, scaled = _in_own_unit(vector)
    squares = jnp.sum(jnp.square(scaled))
    nonzero = squares != 0
    return jnp.where(nonzero, scaled / jnp.sqrt(jnp.where(nonzero, squares, 1)), 0)


def _in_own_unit(vector: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest absolute entry, and the vector in units of it."""
    # Neither a length nor a direction depends on the unit, so it is a constant to them.
    largest = lax.stop_gradient(jnp.max(jnp.abs(vector)))
    return largest, vector / jnp.where(largest != 0, largest, 1)
