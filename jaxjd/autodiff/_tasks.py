"""What the engines share: which leaves are differentiated, and how tasks are pulled back."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxjd.base import PyTree
from jaxjd.checks import check_static_int, is_mutable_state, path_name, type_name


def check_differentiable(params: PyTree) -> None:
    """Checks that every leaf is a real floating point array, and none a model's mutable state.

    Raises:
      ValueError: If one is not; its path is named.
    """
    for path, leaf in jax.tree.leaves_with_path(params, is_leaf=is_mutable_state):
        if is_mutable_state(leaf):
            raise ValueError(
                f"Parameter leaf '{path_name(path)}': expected an nnx.Param, found "
                f"{type(leaf).__name__}, state of the model that would stand still. "
                "`jaxjd.integrations.nnx.value_and_jacobian` (and every other engine there) takes "
                "a whole model; by hand, split it: `nnx.split(model, nnx.Param, ...)`."
            )
        array = isinstance(leaf, (float, int)) or hasattr(leaf, "dtype")
        if not array or not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise ValueError(
                f"Parameter leaf '{path_name(path)}': expected a real floating point dtype, found "
                f"{type_name(leaf)}. Pass it as another argument of the function."
            )


def count_losses(losses: PyTree) -> int:
    """Returns the number of losses.

    Raises:
      ValueError: If a loss is not floating point or there are none.
    """
    for path, leaf in jax.tree.leaves_with_path(losses):
        if not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"Loss '{path_name(path)}': expected a floating point array, found "
                f"{type_name(leaf)}. With auxiliary output, pass has_aux=True."
            )
    m = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(losses))
    if m == 0:
        raise ValueError("The function returned no losses.")
    return m


def task_basis(losses: PyTree) -> PyTree:
    """Returns the `m` unit cotangents of the losses, stacked along a leading axis.

    Raises:
      ValueError: If a loss is not floating point or there are none.
    """
    m = count_losses(losses)
    leaves, treedef = jax.tree.flatten(losses)
    basis, offset = [], 0
    for leaf in leaves:
        size = math.prod(leaf.shape)
        block = jnp.eye(m, size, k=-offset, dtype=leaf.dtype).reshape(m, *leaf.shape)
        basis.append(vary_like(block, leaf))
        offset += size
    return jax.tree.unflatten(treedef, basis)


def vary_like(array: jax.Array, like: Any) -> jax.Array:
    """Gives a constant the varying mesh axes of another array, as `jax.shard_map` demands."""
    axes = _varying(jax.typeof(like) if isinstance(like, jax.Array) else like)
    axes -= _varying(jax.typeof(array))
    return lax.pcast(array, tuple(axes), to="varying") if axes else array


def _varying(aval: Any) -> frozenset:
    return getattr(getattr(aval, "manual_axis_type", None), "varying", frozenset())


def example_of(batch: PyTree) -> PyTree:
    """Returns the shapes of one example of a batch, with the types that `jax.shard_map` checks."""

    def one(array: Any) -> Any:
        if hasattr(array, "aval") and _varying(jax.typeof(array)):
            return jax.eval_shape(lambda array: array[0], array)
        return jax.ShapeDtypeStruct(array.shape[1:], array.dtype)

    return jax.tree.map(one, batch)


def map_in_chunks(fn: Callable[[Any], Any], stacked: PyTree, chunk_size: int | None) -> Any:
    """Maps a function over the leading axis, `chunk_size` entries at a time."""
    size = jax.tree.leaves(stacked)[0].shape[0]
    if chunk_size is None or chunk_size >= size:
        return jax.vmap(fn)(stacked)
    return lax.map(fn, stacked, batch_size=chunk_size)


def check_chunk_size(chunk_size: int | None) -> int | None:
    """Checks how many entries are mapped at a time.

    Raises:
      ValueError: If it is neither None nor a positive static int.
    """
    return None if chunk_size is None else check_static_int("chunk_size", chunk_size, at_least=1)


def vjp(fn: Callable[..., Any], *primals: Any, has_aux: bool) -> tuple[Any, Callable, Any]:
    """``jax.vjp`` that always returns auxiliary output, None without."""
    if has_aux:
        return jax.vjp(lambda *args: check_pair(fn(*args)), *primals, has_aux=True)
    return *jax.vjp(fn, *primals), None


def check_pair(found: Any) -> Any:
    """Checks that a function with auxiliary output returned it; returns what it returned.

    Raises:
      ValueError: If it is no pair.
    """
    if not isinstance(found, (tuple, list)) or len(found) != 2:
        size = f" of {len(found)}" if isinstance(found, (tuple, list)) else ""
        raise ValueError(
            "With has_aux=True the function must return a pair, its result and the auxiliary "
            f"output, found {type_name(found)}{size}."
        )
    return found


def batch_size(batch: PyTree) -> int:
    """Returns the size of the leading axis that all leaves of a batch share.

    Raises:
      ValueError: If they share none; the path of a leaf is named.
    """
    leaves = jax.tree.leaves_with_path(batch)
    if not leaves:
        raise ValueError("There is no batch: pass it after the parameters.")
    first: tuple[str, int] | None = None
    for path, leaf in leaves:
        name = path_name(path)
        if not getattr(leaf, "shape", ()) or leaf.shape[0] == 0:
            raise ValueError(
                f"Batch leaf '{name}': expected an array with a leading batch axis, found "
                f"{type_name(leaf)}."
            )
        first = first or (name, leaf.shape[0])
        if leaf.shape[0] != first[1]:
            raise ValueError(
                f"Batch leaf '{name}': expected a batch axis of size {first[1]} as in leaf "
                f"'{first[0]}', found shape {leaf.shape}."
            )
    return first[1]  # type: ignore[index]
