"""What the engines share: which leaves are differentiated, and how tasks are pulled back."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxjd.autodiff._loops import looped
from jaxjd.base import PyTree
from jaxjd.checks import check_static_int, is_mutable_state, path_name, type_name


def check_differentiable(params: PyTree) -> None:
    """Checks that every leaf is a floating point array, and none a model's mutable state.

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
        array = isinstance(leaf, (float, int, complex)) or hasattr(leaf, "dtype")
        if not array or not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            raise ValueError(
                f"Parameter leaf '{path_name(path)}': expected a floating point dtype, found "
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


def as_losses(losses: PyTree) -> PyTree:
    """Makes arrays of losses that are Python numbers, as a term that is switched off is one."""
    leaves = jax.tree.leaves(losses)
    floating = [
        leaf
        for leaf in leaves
        if isinstance(leaf, float)
        or (hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating))
    ]
    if not floating or all(hasattr(leaf, "dtype") for leaf in leaves):
        return losses
    dtype = jnp.result_type(*floating)

    def as_loss(leaf: Any) -> Any:
        is_number = isinstance(leaf, (int, float)) and not isinstance(leaf, bool)
        return jnp.asarray(leaf, dtype) if is_number and not hasattr(leaf, "dtype") else leaf

    return jax.tree.map(as_loss, losses)


def map_tasks(pull_back: Callable[[PyTree], Any], losses: PyTree, chunk_size: int | None) -> Any:
    """Maps a pullback over the `m` unit cotangents of the losses, stacked along a leading axis.

    Raises:
      ValueError: If a loss is not floating point or there are none.
    """
    # Made one by one: a basis would have m * m entries.
    numbers = jnp.arange(count_losses(losses))
    return map_in_chunks(lambda task: pull_back(unit(losses, task)), numbers, chunk_size)


def unit(losses: PyTree, task: jax.Array) -> PyTree:
    """The cotangent of one task: one for its loss and zero for the others."""
    leaves, treedef = jax.tree.flatten(losses)
    found, offset = [], 0
    for leaf in leaves:
        size = math.prod(leaf.shape)
        places = jnp.arange(offset, offset + size).reshape(leaf.shape)
        found.append(vary_like((places == task).astype(leaf.dtype), leaf))
        offset += size
    return jax.tree.unflatten(treedef, found)


def spread(weights: jax.Array, losses: PyTree) -> PyTree:
    """The weights as cotangents of the losses."""
    leaves, treedef = jax.tree.flatten(losses)
    found, offset = [], 0
    for leaf in leaves:
        size = math.prod(leaf.shape)
        part = weights[offset : offset + size].reshape(leaf.shape)
        found.append(vary_like(part.astype(leaf.dtype), leaf))
        offset += size
    return jax.tree.unflatten(treedef, found)


def ones_like(losses: PyTree) -> PyTree:
    """The cotangents of the losses of their sum."""
    return jax.tree.map(lambda loss: vary_like(jnp.ones_like(loss), loss), losses)


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
    """Maps a function over the leading axis, `chunk_size` entries at a time.

    With a `chunk_size` of 1 the function is called for one entry at a time and is not batched.

    Raises:
      ValueError: If the function cannot be batched, though it runs for a single entry.
    """
    if chunk_size == 1:
        return lax.map(looped(fn), stacked)
    size = jax.tree.leaves(stacked)[0].shape[0]
    batched = functools.partial(_batched, fn)
    if chunk_size is None or chunk_size >= size:
        return batched(stacked)
    # Not lax.map(..., batch_size=...), which divides by the size of what may be empty.
    whole = size - size % chunk_size

    def cut(array: jax.Array) -> jax.Array:
        return array[:whole].reshape(whole // chunk_size, chunk_size, *array.shape[1:])

    found = lax.map(looped(batched), jax.tree.map(cut, stacked))
    found = jax.tree.map(lambda array: array.reshape(whole, *array.shape[2:]), found)
    if whole == size:
        return found
    last = batched(jax.tree.map(lambda array: array[whole:], stacked))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), found, last)


def equal_chunks(tree: PyTree, count: int, each: int) -> PyTree:
    """Cuts leading axes into chunks of one size, filled up with copies of the first entry."""

    def cut(array: jax.Array) -> jax.Array:
        copies = jnp.broadcast_to(array[:1], (count * each - array.shape[0], *array.shape[1:]))
        return jnp.concatenate([array, copies]).reshape(count, each, *array.shape[1:])

    return jax.tree.map(cut, tree)


def join_chunks(tree: PyTree, size: int) -> PyTree:
    """Undoes `equal_chunks` for leading axes of `size` entries."""

    def join(array: jax.Array) -> jax.Array:
        count, each, *rest = array.shape
        return array.reshape(count * each, *rest)[:size]

    return jax.tree.map(join, tree)


def _batched(fn: Callable[[Any], Any], stacked: PyTree) -> Any:
    try:
        return jax.vmap(fn)(stacked)
    except Exception as error:
        # Rules for batching fail in ways of their own; whether one entry runs tells them apart.
        try:
            jax.eval_shape(lambda stacked: lax.map(fn, stacked), stacked)
        except Exception:
            runs = False
        else:
            runs = True
        if not runs:
            raise
        raise ValueError(
            f"The function cannot be batched ({type(error).__name__}): pass chunk_size=1, which "
            "takes one loss at a time as jax.grad does."
        ) from error


def check_chunk_size(chunk_size: int | None) -> int | None:
    """Checks how many entries are mapped at a time.

    Raises:
      ValueError: If it is neither None nor a positive static int.
    """
    return None if chunk_size is None else check_static_int("chunk_size", chunk_size, at_least=1)


def vjp(fn: Callable[..., Any], *primals: Any, has_aux: bool) -> tuple[Any, Callable, Any]:
    """``jax.vjp`` of losses: it always returns auxiliary output, None without."""
    losses_fn = with_losses(fn, has_aux)
    if has_aux:
        return jax.vjp(losses_fn, *primals, has_aux=True)
    return *jax.vjp(losses_fn, *primals), None


def with_losses(fn: Callable[..., Any], has_aux: bool) -> Callable[..., Any]:
    """The function with losses that are arrays, and a check of the pair that it returns."""

    def losses_fn(*args: Any) -> Any:
        found = fn(*args)
        if not has_aux:
            return as_losses(found)
        losses, aux = check_pair(found)
        return as_losses(losses), aux

    return losses_fn


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
