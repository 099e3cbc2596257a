"""Jacobian leaves of which some tasks own a part and the rest is zero.

Where a parameter reaches some of the losses only, as a head does, most of its dense leaf would be
zeros. What is not zero is kept here.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxjd.linalg.factored import FactoredLeaf
from jaxjd.linalg.opaque import OpaqueLeaf
from jaxjd.linalg.products import product
from jaxjd.linalg.sharded import local_rows


class RowsLeaf(OpaqueLeaf):
    """One leaf of a Jacobian of which only some rows are not zero.

    Args:
      tasks: The numbers of these rows, sorted.
      rows: The rows, an array or a factored leaf of shape ``(len(tasks), *param.shape)``.
      num_tasks: The number of all rows, ``m``.
    """

    __slots__ = ("rows", "tasks")

    WAY_OUT = FactoredLeaf.WAY_OUT.replace("a factored Jacobian leaf", "a leaf of some tasks")

    def __init__(self, tasks: tuple[int, ...], rows: Any, num_tasks: int) -> None:
        super().__init__((num_tasks, *rows.shape[1:]), rows.dtype)
        self.tasks = tasks
        self.rows = rows

    def with_arrays(self, rows: Any) -> RowsLeaf:
        """The same leaf with other rows."""
        return RowsLeaf(self.tasks, rows, self.shape[0])

    @property
    def arrays(self) -> list[jax.Array]:
        """What it is made of."""
        return self.rows.arrays if isinstance(self.rows, OpaqueLeaf) else [self.rows]

    def materialize(self) -> jax.Array:
        """The dense leaf, shape ``(m, *param.shape)``."""
        return scatter(local_rows(self.rows), self.tasks, self.shape[0], 0)


class BlocksLeaf(OpaqueLeaf):
    """One leaf of a Jacobian whose parameter has an axis with an entry for each task.

    Args:
      axis: The axis of the parameter.
      tasks: The task of every entry along it, -1 where it has none.
      blocks: The gradients of all tasks in one array of the parameter's shape: they do not overlap.
      num_tasks: The number of rows, ``m``.
    """

    __slots__ = ("axis", "blocks", "tasks")

    WAY_OUT = FactoredLeaf.WAY_OUT.replace("a factored Jacobian leaf", "a leaf of tasks' blocks")

    def __init__(
        self, axis: int, tasks: tuple[int, ...], blocks: jax.Array, num_tasks: int
    ) -> None:
        super().__init__((num_tasks, *blocks.shape), blocks.dtype)
        self.axis = axis
        self.tasks = tasks
        self.blocks = blocks

    def with_arrays(self, blocks: jax.Array) -> BlocksLeaf:
        """The same leaf with other gradients."""
        return BlocksLeaf(self.axis, self.tasks, blocks, self.shape[0])

    @property
    def arrays(self) -> list[jax.Array]:
        """What it is made of."""
        return [self.blocks]

    def _owned(self) -> jax.Array:
        """Which task owns which entry along the axis, shape ``(m, size)``."""
        return jnp.arange(self.shape[0])[:, None] == jnp.asarray(self.tasks, jnp.int32)[None, :]

    @property
    def _others(self) -> list[int]:
        return [axis for axis in range(self.blocks.ndim) if axis != self.axis]

    def gramian(self, dtype: Any) -> jax.Array:
        """The inner products of the rows: a diagonal matrix, shape ``(m, m)``."""
        blocks = self.blocks
        real = (blocks.real, blocks.imag) if jnp.iscomplexobj(blocks) else (blocks,)
        squares = jnp.zeros((), dtype)
        for part in real:
            squares += product(part, part, contract=self._others, batch=[self.axis], dtype=dtype)
        # Not a product with zeros: an entry that is not finite stays its own task's.
        return jnp.diag(jnp.sum(jnp.where(self._owned(), squares[None, :], 0), axis=1))

    def combine(self, weights: jax.Array) -> jax.Array:
        """The combination of the rows, shaped like the parameter."""
        dtype = jnp.result_type(jnp.float32, weights.dtype, jnp.finfo(self.dtype).dtype)
        scale = jnp.sum(jnp.where(self._owned(), weights.astype(dtype)[:, None], 0), axis=0)
        scale = jnp.expand_dims(scale, self._others)
        wide = self.blocks.astype(jnp.promote_types(self.dtype, dtype))
        return (scale * wide).astype(self.dtype)

    def materialize(self) -> jax.Array:
        """The dense leaf, shape ``(m, *param.shape)``."""
        owned = jnp.expand_dims(self._owned(), [1 + axis for axis in self._others])
        return jnp.where(owned, self.blocks[None], jnp.zeros((), self.dtype))


def scatter(array: jax.Array, places: tuple[int, ...], size: int, axis: int) -> jax.Array:
    """Puts entries along an axis to their places in a larger one of zeros."""
    if places == tuple(range(size)):
        return array
    shape = (*array.shape[:axis], size, *array.shape[axis + 1 :])
    index = (*[slice(None)] * axis, jnp.asarray(places, jnp.int32))
    return jnp.zeros(shape, array.dtype).at[index].set(array, unique_indices=True)
