"""Layers: how inputs and the cotangents at the output make the gradient of a parameter."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from jaxjd.linalg.costs import Sizes
from jaxjd.linalg.products import product, row_products
from jaxjd.linalg.sharded import vary, varying_axes


class Factors(Protocol):
    """What a layer reads of a factored leaf."""

    inputs: jax.Array
    cotangents: jax.Array
    per_task: bool


class Layer:
    """A layer that multiplies its inputs by a matrix: the common case.

    All arrays are canonical: inputs have axes ``(*batch, *rows, *inputs)``, cotangents
    ``(*batch, *rows, *outputs)`` and gradients ``(*batch, *inputs, *outputs)``, before `restore`.
    A task axis comes first.

    Args:
      batch: The number of axes that inputs, cotangents and parameter share.
      rows: The number of axes that are summed over.
      restore: Brings a canonical gradient into the shape and dtype of the parameter; linear, and it
        keeps inner products.
      key: What tells layers apart whose canonical arrays differ in their meaning; hashable.

    Attributes:
      has_columns: Whether the gradient has the inputs' last axis, entry for entry.
    """

    has_columns = True

    def __init__(
        self,
        batch: int,
        rows: int,
        restore: Callable[[jax.Array], jax.Array],
        key: Hashable = None,
    ) -> None:
        self.batch = batch
        self.rows = rows
        self.restore = restore
        self.key = (type(self), batch, rows, key)

    def like(self, other: Layer) -> bool:
        """Whether canonical arrays of the two layers have the same meaning."""
        return self.key == other.key

    def sizes(self, inputs: jax.Array, cotangents: jax.Array, per_task: bool) -> Sizes:
        """The sizes of a leaf; the arrays may be shapes."""
        start = 1 + self.batch
        end = start + self.rows
        return Sizes(
            tasks=cotangents.shape[0],
            batch=math.prod(cotangents.shape[1:start]),
            rows=math.prod(cotangents.shape[start:end]),
            inputs=self.input_size(inputs.shape[end - (not per_task) :]),
            outputs=math.prod(cotangents.shape[end:]),
            itemsize=max(4, cotangents.dtype.itemsize),
            per_task=per_task,
        )

    def input_size(self, shape: tuple[int, ...]) -> int:
        """The parameter's size along the inputs, whose axes after the rows have `shape`."""
        return math.prod(shape)

    def gramian(self, leaf: Factors, dtype: Any) -> jax.Array:
        """Inner products of the rows of one leaf."""
        return self.cross_gramian(leaf, leaf, dtype)

    def cross_gramian(self, leaf_1: Factors, leaf_2: Factors, dtype: Any) -> jax.Array:
        r"""Inner products, :math:`\sum_{rr'} (a_r \cdot a'_{r'}) (b_{ir} \cdot b'_{jr'})`."""
        batch, rows = self.batch, self.rows
        b_1, b_2 = leaf_1.cotangents.astype(dtype), leaf_2.cotangents.astype(dtype)
        if leaf_1.per_task:
            # (*batch, m, *rows, m', *rows')
            kernel = self.kernel(leaf_1.inputs, leaf_2.inputs, dtype, tasks=1)
            outputs = range(1 + batch + rows, b_1.ndim)
            kernel = kernel * product(b_1, b_2, contract=outputs, batch=range(1, 1 + batch))
            second = batch + 1 + rows
            others = [axis for axis in range(kernel.ndim) if axis not in (batch, second)]
            return jnp.sum(kernel, axis=others)
        kernel = self.kernel(leaf_1.inputs, leaf_2.inputs, dtype, tasks=0)
        if kernel.size <= b_2[0].size:
            # A kernel for each task: then no cotangents are transposed.
            kernels = jnp.broadcast_to(kernel, (b_2.shape[0], *kernel.shape))
            second = tuple(range(1 + batch + rows, 1 + batch + 2 * rows))
            contract, shared = tuple(range(1 + batch, 1 + batch + rows)), tuple(range(1 + batch))
            moved = lax.dot_general(
                kernels,
                b_2,
                ((second, contract), (shared, shared)),
                precision=lax.Precision.HIGHEST,
                preferred_element_type=dtype,
            )
            return product(b_1, moved, contract=range(1, b_1.ndim), dtype=dtype)
        # Rows before tasks: then each product is one matrix product per entry of the batch.
        tasks_last = [*range(1, 1 + batch + rows), 0, *range(1 + batch + rows, b_1.ndim)]
        b_1, b_2 = b_1.transpose(tasks_last), b_2.transpose(tasks_last)
        moved = lax.dot_general(
            kernel,
            b_2,
            (
                (
                    tuple(range(batch + rows, batch + 2 * rows)),
                    tuple(range(batch, batch + rows)),
                ),
                (tuple(range(batch)), tuple(range(batch))),
            ),
            precision=lax.Precision.HIGHEST,
            preferred_element_type=dtype,
        )
        outputs = range(batch + rows + 1, b_1.ndim)
        pairs = product(b_1, moved, contract=outputs, batch=range(batch + rows), dtype=dtype)
        return jnp.sum(pairs, axis=tuple(range(batch + rows)))

    def gramian_by_columns(self, leaf: Factors, dtype: Any) -> jax.Array:
        """The same from rows that are written out, where every task has inputs of its own.

        A stretch of the inputs' last axis at a time: the rows that are there at once have no more
        entries than the factors.
        """
        sizes = self.sizes(leaf.inputs, leaf.cotangents, per_task=True)
        each = sizes.tasks * sizes.batch * sizes.outputs
        most = max(sizes.factor_entries // max(each, 1), 8)
        chunk = max(n for n in range(1, sizes.inputs + 1) if sizes.inputs % n == 0 and n <= most)
        start = 1 + self.batch
        end = start + self.rows

        def part_of(inputs: jax.Array) -> jax.Array:
            contract, batch = range(start, end), range(start)
            rows = product(inputs, leaf.cotangents, contract=contract, batch=batch)
            return row_products(rows, rows, dtype)

        split = (*leaf.inputs.shape[:end], sizes.inputs // chunk, chunk)
        parts = jnp.moveaxis(leaf.inputs.reshape(split), end, 0)
        if chunk == sizes.inputs:
            return part_of(parts[0])
        axes = varying_axes(leaf.inputs) | varying_axes(leaf.cotangents)
        total = vary(jnp.zeros((sizes.tasks, sizes.tasks), dtype), sorted(axes))
        return lax.scan(lambda total, part: (total + part_of(part), None), total, parts)[0]

    def squared_norms(self, inputs: jax.Array, cotangents: jax.Array, dtype: Any) -> jax.Array:
        """The squared lengths of the rows of tasks with inputs of their own, shape ``(m,)``."""
        start = 1 + self.batch
        end = start + self.rows
        inputs = self.expand(inputs)

        def inner(array: jax.Array) -> jax.Array:
            if math.prod(cotangents.shape[start:end]) == 1:  # |a^T b| = |a| |b|.
                axes = range(start, array.ndim)
                return jnp.sum(jnp.square(array.astype(dtype)), axis=tuple(axes))
            contract, batch = range(end, array.ndim), range(start)
            return product(array, array, contract=contract, batch=batch, dtype=dtype)

        pairs = inner(inputs) * inner(cotangents)
        return jnp.sum(pairs, axis=tuple(range(1, pairs.ndim)))

    def kernel(self, a_1: jax.Array, a_2: jax.Array, dtype: Any, tasks: int) -> jax.Array:
        """Inner products of inputs, shape ``(*batch, [m,] *rows, [m',] *rows')``."""
        a_1, a_2 = self.expand(a_1), self.expand(a_2)
        start = tasks + self.batch
        return product(
            a_1,
            a_2,
            contract=range(start + self.rows, a_1.ndim),
            batch=range(tasks, start),
            dtype=dtype,
        )

    def expand(self, inputs: jax.Array) -> jax.Array:
        """The inputs as they are multiplied by the matrix."""
        return inputs

    def pull(self, inputs: jax.Array, cotangent: jax.Array, summed: int = 0) -> jax.Array:
        """The gradient, in the parameter's shape; the first `summed` axes are rows, too."""
        start = summed + self.batch
        gradient = product(
            self.expand(inputs),
            cotangent,
            contract=(*range(summed), *range(start, start + self.rows)),
            batch=range(summed, start),
        )
        return self.restore(gradient)

    def pull_all(self, inputs: jax.Array, cotangents: jax.Array) -> jax.Array:
        """The gradients of all tasks from the same inputs."""
        return jax.vmap(lambda cotangent: self.pull(inputs, cotangent))(cotangents)

    def pull_each(self, inputs: jax.Array, cotangents: jax.Array) -> jax.Array:
        """The gradients of all tasks, each from inputs of its own."""
        return jax.vmap(self.pull)(inputs, cotangents)


class ConvolutionLayer(Layer):
    """A convolution: every output position multiplies a patch of the inputs by the kernel.

    Inputs end in ``(*spatial, channels)`` before they are cut into patches. That takes the kernel's
    size times the memory of the inputs, so it is done for some examples at a time. Groups of
    channels are an axis of `batch`. The canonical gradient ends in ``(patch, channels, outputs)``.

    Args:
      batch: As for `Layer`.
      rows: As for `Layer`; the last ones are the spatial axes.
      restore: As for `Layer`.
      kernel_shape: The kernel's spatial shape.
      strides: The strides of the window.
      padding: Low and high padding of every spatial axis.
      input_dilation: The dilation of the inputs.
      kernel_dilation: The dilation of the kernel.
      key: As for `Layer`.
    """

    has_columns = False
    # Patches of this many bytes stay close to the processor; on an accelerator it is still enough
    # work for one product.
    _PATCH_BYTES = 2**23

    def __init__(
        self,
        batch: int,
        rows: int,
        restore: Callable[[jax.Array], jax.Array],
        *,
        kernel_shape: Sequence[int],
        strides: Sequence[int],
        padding: Sequence[tuple[int, int]],
        input_dilation: Sequence[int],
        kernel_dilation: Sequence[int],
        key: Hashable = None,
    ) -> None:
        window = (
            tuple(kernel_shape),
            tuple(strides),
            tuple(tuple(pair) for pair in padding),
            tuple(input_dilation),
            tuple(kernel_dilation),
        )
        super().__init__(batch, rows, restore, (window, key))
        self.window = window

    def input_size(self, shape: tuple[int, ...]) -> int:
        """The number of entries of a patch."""
        return math.prod(self.window[0]) * math.prod(shape)

    def expand(self, inputs: jax.Array) -> jax.Array:
        """Cuts the inputs into patches, ``(..., *spatial, patch, channels)``."""
        kernel_shape, strides, padding, input_dilation, kernel_dilation = self.window
        leading = inputs.ndim - len(kernel_shape) - 1
        config = [
            (low, high, dilation - 1)
            for (low, high), dilation in zip(padding, input_dilation, strict=True)
        ]
        zero = jnp.zeros((), inputs.dtype)
        inputs = lax.pad(inputs, zero, [(0, 0, 0)] * leading + config + [(0, 0, 0)])
        patches = []
        for place in itertools.product(*map(range, kernel_shape)):
            part = inputs
            for axis, offset in enumerate(place):
                reach = (kernel_shape[axis] - 1) * kernel_dilation[axis]
                start = offset * kernel_dilation[axis]
                stop = inputs.shape[leading + axis] - reach + start
                part = lax.slice_in_dim(part, start, stop, strides[axis], axis=leading + axis)
            patches.append(part)
        return jnp.stack(patches, axis=-2)

    def _chunk(self, inputs: jax.Array, axis: int) -> int:
        """How many elements of an axis to cut into patches at once; it divides the axis."""
        size = inputs.shape[axis]
        each = inputs.size // max(size, 1) * math.prod(self.window[0]) * inputs.dtype.itemsize
        most = max(1, self._PATCH_BYTES // max(each, 1))
        return max(part for part in range(1, size + 1) if size % part == 0 and part <= most)

    def pull(self, inputs: jax.Array, cotangent: jax.Array, summed: int = 0) -> jax.Array:
        """The gradient, summed over a few examples at a time."""
        plain = super().pull
        axis = 0 if summed else self.batch
        size, chunk = inputs.shape[axis], self._chunk(inputs, axis)
        if chunk == size:
            return plain(inputs, cotangent, summed)

        def parts(array: jax.Array) -> jax.Array:
            split = (*array.shape[:axis], size // chunk, chunk, *array.shape[axis + 1 :])
            return jnp.moveaxis(array.reshape(split), axis, 0)

        def part_of(part: tuple[jax.Array, jax.Array]) -> jax.Array:
            return plain(part[0], part[1], summed)

        stacked = (parts(inputs), parts(cotangent))
        like = jax.eval_shape(part_of, jax.tree.map(lambda array: array[0], stacked))
        total = jnp.zeros(like.shape, like.dtype)
        return lax.scan(lambda total, part: (total + part_of(part), None), total, stacked)[0]

    def pull_each(self, inputs: jax.Array, cotangents: jax.Array) -> jax.Array:
        """The gradients of all tasks, a few of them at a time."""
        plain = super().pull
        chunk = self._chunk(inputs, 0)
        if chunk == inputs.shape[0]:
            return jax.vmap(plain)(inputs, cotangents)
        return lax.map(lambda pair: plain(*pair), (inputs, cotangents), batch_size=chunk)

    def squared_norms(self, inputs: jax.Array, cotangents: jax.Array, dtype: Any) -> jax.Array:
        """The squared lengths of the rows, a few of them at a time."""
        plain = super().squared_norms
        size, chunk = inputs.shape[0], self._chunk(inputs, 0)
        if chunk == size:
            return plain(inputs, cotangents, dtype)

        def cut(array: jax.Array) -> jax.Array:
            return array.reshape(size // chunk, chunk, *array.shape[1:])

        parts = (cut(inputs), cut(cotangents))
        return lax.map(lambda pair: plain(pair[0], pair[1], dtype), parts).ravel()


class EmbeddingLayer(Layer):
    """A table whose rows are looked up: the inputs are indices, with zero cotangents if invalid.

    Args:
      rows: As for `Layer`; there are no other axes of the inputs.
      restore: As for `Layer`; the canonical gradient has shape ``(size, *outputs)``.
      size: The number of rows of the table.
      key: As for `Layer`.
    """

    has_columns = False

    def __init__(
        self,
        rows: int,
        restore: Callable[[jax.Array], jax.Array],
        *,
        size: int,
        key: Hashable = None,
    ) -> None:
        super().__init__(0, rows, restore, (size, key))
        self.size = size

    def sizes(self, inputs: jax.Array, cotangents: jax.Array, per_task: bool) -> Sizes:
        """The sizes of a leaf."""
        return super().sizes(inputs, cotangents, per_task)._replace(lookup=True)

    def input_size(self, shape: tuple[int, ...]) -> int:
        """The number of rows of the table."""
        return self.size

    def gramian(self, leaf: Factors, dtype: Any) -> jax.Array:
        """Inner products of the rows of one leaf."""
        if leaf.per_task:
            return super().gramian(leaf, dtype)
        # Cotangents of equal indices are added up at the place of the first of them.
        indices = leaf.inputs.ravel()
        count = indices.size
        places = jnp.arange(count, dtype=jnp.int32)
        first = jnp.full((self.size,), count, jnp.int32).at[indices].min(places)[indices]
        cotangents = leaf.cotangents.astype(dtype)
        cotangents = cotangents.reshape(cotangents.shape[0], count, -1)
        sums = jnp.zeros_like(cotangents).at[:, first].add(cotangents)
        return row_products(sums, sums, dtype)

    def squared_norms(self, inputs: jax.Array, cotangents: jax.Array, dtype: Any) -> jax.Array:
        """The squared lengths of the rows: cotangents of equal indices are added up first."""

        def one(indices: jax.Array, cotangents: jax.Array) -> jax.Array:
            cotangents = cotangents.reshape(indices.size, *cotangents.shape[indices.ndim :])
            order = jnp.argsort(indices.ravel())
            changes = jnp.diff(indices.ravel()[order]) != 0
            places = jnp.cumsum(jnp.pad(changes, (indices.size - changes.size, 0)))
            sums = jnp.zeros(cotangents.shape, dtype).at[places]
            return jnp.sum(jnp.square(sums.add(cotangents[order].astype(dtype))))

        return jax.vmap(one)(inputs, cotangents)

    def kernel(self, a_1: jax.Array, a_2: jax.Array, dtype: Any, tasks: int) -> jax.Array:
        """Which indices are equal."""
        others, own = tuple(range(a_1.ndim, a_1.ndim + a_2.ndim)), tuple(range(a_1.ndim))
        a_1, a_2 = jnp.expand_dims(a_1, others), jnp.expand_dims(a_2, own)
        return (a_1 == a_2).astype(dtype)

    def pull(self, inputs: jax.Array, cotangent: jax.Array, summed: int = 0) -> jax.Array:
        """The gradient: cotangents added up in the rows that were looked up."""
        outputs = cotangent.shape[inputs.ndim :]
        dtype = jnp.promote_types(cotangent.dtype, jnp.float32)
        table = jnp.zeros((self.size, *outputs), dtype)
        return self.restore(table.at[inputs].add(cotangent.astype(dtype)))
