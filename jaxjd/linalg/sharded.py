"""Jacobian leaves of which every device of a mesh axis holds a shard.

Inside `jax.shard_map` and `jax.pmap` a device sees its shard of a sharded parameter only, so that
the inner products of the rows have to be summed over the devices. A `ShardedLeaf` knows over which
mesh axes; it is opaque, so that nothing takes the norm of a shard for that of the row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxjd.base import Jacobian, PyTree
from jaxjd.checks import path_name
from jaxjd.linalg.opaque import OpaqueLeaf


class ShardedLeaf(OpaqueLeaf):
    """One leaf of a Jacobian, split over the devices of some mesh axes.

    Args:
      local: The shard of this device, an array or a factored leaf of shape
        ``(m, *param.shape)`` with the local shape of the parameter.
      axes: The names of the mesh axes over which the parameter is split.
    """

    __slots__ = ("axes", "local")

    WAY_OUT = (
        "a Jacobian leaf split over devices; only jaxjd.gramian, cross_gramian, combine and "
        "aggregators read it: do arithmetic before jaxjd.sharding.sharded marks it"
    )

    def __init__(self, local: Any, axes: tuple[str, ...]) -> None:
        super().__init__(local.shape, local.dtype)
        self.local = local
        self.axes = tuple(sorted(axes))  # One order, so that there is one sum for the same axes.


def shard_axes(leaf: Any) -> tuple[str, ...]:
    """The mesh axes that a leaf is marked as split over."""
    return leaf.axes if isinstance(leaf, ShardedLeaf) else ()


def local_part(leaf: Any) -> Any:
    """The leaf without its mark: an array or a factored leaf."""
    return leaf.local if isinstance(leaf, ShardedLeaf) else leaf


def local_rows(leaf: Any) -> jax.Array:
    """What this device holds of a leaf, as an array.

    For what treats every entry on its own; what sums entries needs `sum_leaves`.
    """
    leaf = local_part(leaf)
    return leaf.materialize() if isinstance(leaf, OpaqueLeaf) else jnp.asarray(leaf)


def num_shards(leaf: Any) -> int:
    """The number of devices that a leaf is split over."""
    return lax.axis_size(shard_axes(leaf)) if shard_axes(leaf) else 1


def mark_like(arrays: Sequence[jax.Array], jacobian: Jacobian) -> list[Any]:
    """Marks arrays as split in the way of a Jacobian's leaves."""
    leaves = jax.tree.leaves(jacobian)
    return [
        ShardedLeaf(array, shard_axes(leaf)) if shard_axes(leaf) else array
        for array, leaf in zip(arrays, leaves, strict=True)
    ]


def sum_leaves(values: Iterable[jax.Array], leaves: Iterable[Any]) -> jax.Array:
    """Sums one value per leaf over the leaves, and over the devices that each is split over.

    There is one sum over devices for all leaves that are split over the same axes.
    """
    totals: dict[tuple[str, ...], jax.Array] = {}
    for value, leaf in zip(values, leaves, strict=True):
        axes = shard_axes(leaf)
        totals[axes] = totals[axes] + value if axes in totals else value
    parts = [lax.psum(vary(total, axes), axes) if axes else total for axes, total in totals.items()]
    result = parts[0]
    for part in parts[1:]:
        result = result + part
    return result


def is_checked(axis: str) -> bool:
    """Whether types tell what varies over a mesh axis: inside `jax.shard_map(check_vma=True)`."""
    return axis in varying_axes(lax.axis_index(axis))


def varying_axes(array: Any) -> frozenset[str]:
    """The mesh axes over which the type of an array says that it differs between devices."""
    aval = jax.typeof(array)
    return getattr(getattr(aval, "manual_axis_type", None), "varying", frozenset())


def vary(array: Any, axes: Sequence[str]) -> Any:
    """Lets the type of an array say that it differs between devices, where types say so."""
    found = varying_axes(array)
    missing = tuple(axis for axis in axes if axis not in found and is_checked(axis))
    return lax.pcast(array, missing, to="varying") if missing else array


def refuse_sharded(jacobian: PyTree, what: str) -> None:
    """Checks that no leaf is split over devices.

    Raises:
      ValueError: If one is; its path is named.
    """
    for path, leaf in jax.tree.leaves_with_path(jacobian):
        if shard_axes(leaf):
            raise ValueError(
                f"Jacobian leaf '{path_name(path)}' is split over the mesh axes {leaf.axes}, and "
                f"{what} needs whole rows: use jax.jit with NamedSharding instead of "
                "jax.shard_map, an aggregator of the Gramian, or do it before "
                "jaxjd.sharding.sharded marks the shards."
            )
