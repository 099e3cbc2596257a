"""Jacobian leaves that are kept as two factors.

For a kernel that is used as ``y = a @ W``, task `i`'s gradient is ``a^T b_i``, with the layer's
input `a` and the cotangent `b_i` at its output. Keeping `a` and `b` gives the Gramian without an
array of shape ``(m, *W.shape)``, and a combination of the rows without another backward pass.

A leaf is opaque on purpose: were it a registered pytree node, arithmetic over a Jacobian would act
on the two factors and be silently wrong.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
from jax import lax

from jaxjd.checks import type_name

_WAY_OUT = (
    "a factored Jacobian leaf; only jaxjd.gramian, cross_gramian, combine, materialize and "
    "aggregators read it: call jaxjd.materialize(J) first, or ask for form='dense'"
)

# What moving one byte costs in floating point operations, on CPUs, GPUs and TPUs alike.
FLOPS_PER_BYTE = 10


class Sizes(NamedTuple):
    """The sizes that decide how a leaf is kept and how its Gramian is taken.

    Attributes:
      tasks: The number of tasks.
      batch: The product of the axes that inputs, cotangents and parameter share.
      rows: The product of the axes that are summed over.
      inputs: The size of the parameter along the layer's inputs.
      outputs: Its size along the layer's outputs.
      itemsize: Bytes per number.
      per_task: Whether every task has inputs of its own.
      lookup: Whether the inputs are indices.
    """

    tasks: int
    batch: int
    rows: int
    inputs: int
    outputs: int
    itemsize: int
    per_task: bool = False
    lookup: bool = False

    @property
    def entries(self) -> int:
        return self.batch * self.inputs * self.outputs


class Cost(NamedTuple):
    """Floating point operations and bytes read or written.

    Attributes:
      flops: Floating point operations; a multiplication with an addition counts as two.
      bytes: Bytes of the arrays that are written and read again.
    """

    flops: int
    bytes: int

    @property
    def total(self) -> int:
        return self.flops + FLOPS_PER_BYTE * self.bytes

    def plus(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


def kernel_cost(sizes: Sizes) -> Cost:
    """The cost of a Gramian from the inner products of inputs and of cotangents."""
    m, s, n, p, q, width, per_task, lookup = sizes
    if lookup and not per_task:  # Rows of equal indices are added up first.
        return Cost(2 * m * n * q + 2 * m * m * n * q, 4 * m * n * q * width)
    if lookup:
        p = 1
    if per_task:
        pairs = s * (m * n) ** 2
        return Cost(2 * pairs * (p + q + 1), 4 * pairs * width)
    cotangents = s * m * n * q
    return Cost(
        2 * s * n * n * p + 2 * n * cotangents + 2 * m * cotangents,
        (3 * cotangents + 2 * s * n * n) * width,
    )


def materialize_cost(sizes: Sizes) -> Cost:
    """The cost of writing the leaf as a dense array."""
    m, s, n, p, q, width, _, lookup = sizes
    flops = 2 * m * n * q if lookup else 2 * s * m * n * p * q
    return Cost(flops, m * sizes.entries * width)


def dense_gramian_cost(sizes: Sizes) -> Cost:
    """The cost of the Gramian of a dense leaf."""
    m = sizes.tasks
    return Cost(2 * m * m * sizes.entries, m * sizes.entries * sizes.itemsize)


def dense_cost(sizes: Sizes) -> Cost:
    """The cost of a dense leaf, its Gramian and a combination of its rows."""
    combination = Cost(
        2 * sizes.tasks * sizes.entries, sizes.tasks * sizes.entries * sizes.itemsize
    )
    return materialize_cost(sizes).plus(dense_gramian_cost(sizes)).plus(combination)


def factored_cost(sizes: Sizes) -> Cost:
    """The cost of the Gramian of a factored leaf and a combination of its rows."""
    m, s, n, p, q, width, per_task, lookup = sizes
    product = 0 if lookup else 2 * s * n * p * q * (m if per_task else 1)
    combination = Cost(product + 2 * s * m * n * q, s * m * n * q * width)
    return combination.plus(min(_gramian_costs(sizes), key=lambda cost: cost.total))


def _gramian_costs(sizes: Sizes) -> tuple[Cost, Cost]:
    transient = materialize_cost(sizes).plus(dense_gramian_cost(sizes))
    return kernel_cost(sizes), transient


class _Opaque(type):
    # JAX names the class, not the object, when a function returns something that is no array.
    def __repr__(cls) -> str:
        return f"<class '{cls.__module__}.{cls.__name__}': {_WAY_OUT}>"


class FactoredLeaf(metaclass=_Opaque):
    """One leaf of a Jacobian as the inputs of a layer and the cotangents at its output.

    Args:
      layer: How inputs and cotangents make a gradient.
      inputs: The layer's inputs, canonical (see `Layer`), with a leading task axis if `per_task`.
      cotangents: One cotangent per task at the layer's output, canonical, with a leading task axis.
      shape: ``(m, *param.shape)``.
      dtype: The parameter's dtype.
      per_task: Whether every task has inputs of its own, as with one task per example.
    """

    __slots__ = ("cotangents", "dtype", "inputs", "layer", "per_task", "shape")

    def __init__(
        self,
        layer: Layer,
        inputs: jax.Array,
        cotangents: jax.Array,
        shape: tuple[int, ...],
        dtype: Any,
        per_task: bool = False,
    ) -> None:
        self.layer = layer
        self.inputs = inputs
        self.cotangents = cotangents
        self.shape = shape
        self.dtype = jnp.dtype(dtype)
        self.per_task = per_task

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def sizes(self) -> Sizes:
        return self.layer.sizes(self.inputs, self.cotangents, self.per_task)

    def gramian(self, dtype: Any) -> jax.Array:
        """The inner products of the rows, shape ``(m, m)``."""
        kernel, transient = _gramian_costs(self.sizes)
        if transient.total < kernel.total:
            rows = self.materialize()
            return product(rows, rows, contract=range(1, self.ndim), dtype=dtype)
        return self.layer.gramian(self, dtype)

    def cross_gramian(self, other: FactoredLeaf, dtype: Any) -> jax.Array | None:
        """The inner products with the rows of another leaf; None where there is no better way."""
        kernel, transient = _gramian_costs(self.sizes)
        alike = self.layer.like(other.layer) and self.per_task == other.per_task
        if not alike or transient.total < kernel.total:
            return None
        return self.layer.cross_gramian(self, other, dtype)

    def combine(self, weights: jax.Array) -> jax.Array:
        """The combination of the rows, shaped like the parameter."""
        dtype = jnp.result_type(jnp.float32, weights.dtype, self.dtype)
        cotangents = self.cotangents.astype(dtype)
        if self.per_task:
            scaled = jnp.expand_dims(weights.astype(dtype), range(1, cotangents.ndim)) * cotangents
            return self.layer.pull(self.inputs, scaled, summed=1).astype(self.dtype)
        combined = product(weights.astype(dtype), cotangents, contract=[0], dtype=dtype)
        return self.layer.pull(self.inputs, combined).astype(self.dtype)

    def materialize(self) -> jax.Array:
        """The dense leaf, shape ``(m, *param.shape)``."""
        if self.per_task:
            return self.layer.pull_each(self.inputs, self.cotangents).astype(self.dtype)
        return self.layer.pull_all(self.inputs, self.cotangents).astype(self.dtype)

    def __repr__(self) -> str:
        return f"<{type_name(self)}, {_WAY_OUT}>"

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(f"No arithmetic on {self!r}.")

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"No attribute {name!r} of {self!r}.")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refuse
    __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = _refuse
    __pow__ = __rpow__ = __matmul__ = __rmatmul__ = __neg__ = __pos__ = __abs__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = _refuse  # type: ignore[assignment]
    __array__ = __getitem__ = __iter__ = __len__ = __bool__ = __float__ = __int__ = _refuse
    __hash__ = object.__hash__


def product(
    a: jax.Array, b: jax.Array, *, contract: Any, batch: Any = (), dtype: Any = None
) -> jax.Array:
    """Contracts the same axes of two arrays, in full precision and at least float32."""
    dtype = jnp.result_type(jnp.float32, a, b) if dtype is None else dtype
    if a.dtype != b.dtype:
        a, b = a.astype(dtype), b.astype(dtype)
    contract, batch = tuple(contract), tuple(batch)
    return lax.dot_general(
        a,
        b,
        ((contract, contract), (batch, batch)),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=dtype,
    ).astype(dtype)


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
    """

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
        return math.prod(shape)

    def gramian(self, leaf: FactoredLeaf, dtype: Any) -> jax.Array:
        return self.cross_gramian(leaf, leaf, dtype)

    def cross_gramian(self, leaf_1: FactoredLeaf, leaf_2: FactoredLeaf, dtype: Any) -> jax.Array:
        r"""Inner products of rows, :math:`\sum_{rr'} (a_r \cdot a'_{r'}) (b_{ir} \cdot b'_{jr'})`."""
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
        return math.prod(self.window[0]) * math.prod(shape)

    def expand(self, inputs: jax.Array) -> jax.Array:
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
        axis = 0 if summed else self.batch
        size, chunk = inputs.shape[axis], self._chunk(inputs, axis)
        if chunk == size:
            return super().pull(inputs, cotangent, summed)

        def parts(array: jax.Array) -> jax.Array:
            split = (*array.shape[:axis], size // chunk, chunk, *array.shape[axis + 1 :])
            return jnp.moveaxis(array.reshape(split), axis, 0)

        def add(total: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            return total + super(ConvolutionLayer, self).pull(*part, summed), None

        stacked = (parts(inputs), parts(cotangent))
        shape = jax.eval_shape(
            lambda part: super(ConvolutionLayer, self).pull(*part, summed),
            jax.tree.map(lambda array: array[0], stacked),
        )
        return lax.scan(add, jnp.zeros(shape.shape, shape.dtype), stacked)[0]

    def pull_each(self, inputs: jax.Array, cotangents: jax.Array) -> jax.Array:
        plain = super().pull
        chunk = self._chunk(inputs, 0)
        if chunk == inputs.shape[0]:
            return jax.vmap(plain)(inputs, cotangents)
        return lax.map(lambda pair: plain(*pair), (inputs, cotangents), batch_size=chunk)


class EmbeddingLayer(Layer):
    """A table whose rows are looked up: the inputs are indices, and cotangents of invalid ones zero.

    Args:
      rows: As for `Layer`; there are no other axes of the inputs.
      restore: As for `Layer`; the canonical gradient has shape ``(size, *outputs)``.
      size: The number of rows of the table.
      key: As for `Layer`.
    """

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
        return super().sizes(inputs, cotangents, per_task)._replace(lookup=True)

    def input_size(self, shape: tuple[int, ...]) -> int:
        return self.size

    def gramian(self, leaf: FactoredLeaf, dtype: Any) -> jax.Array:
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
        return product(sums, sums, contract=(1, 2), dtype=dtype)

    def kernel(self, a_1: jax.Array, a_2: jax.Array, dtype: Any, tasks: int) -> jax.Array:
        a_2_dims, a_1_dims = range(a_1.ndim, a_1.ndim + a_2.ndim), range(a_1.ndim)
        a_1, a_2 = jnp.expand_dims(a_1, tuple(a_2_dims)), jnp.expand_dims(a_2, tuple(a_1_dims))
        return (a_1 == a_2).astype(dtype)

    def pull(self, inputs: jax.Array, cotangent: jax.Array, summed: int = 0) -> jax.Array:
        outputs = cotangent.shape[inputs.ndim :]
        dtype = jnp.promote_types(cotangent.dtype, jnp.float32)
        table = jnp.zeros((self.size, *outputs), dtype)
        return self.restore(table.at[inputs].add(cotangent.astype(dtype)))
