"""Jacobian leaves that are kept as two factors.

For a kernel that is used as ``y = a @ W``, task `i`'s gradient is ``a^T b_i``, with the layer's
input `a` and the cotangent `b_i` at its output. Keeping `a` and `b` gives the Gramian without an
array of shape ``(m, *W.shape)``, and a combination of the rows without another backward pass.

A leaf is opaque on purpose: were it a registered pytree node, arithmetic over a Jacobian would act
on the two factors and be silently wrong.
"""

from __future__ import annotations

import math
from typing import Any, NoReturn

import jax
import jax.numpy as jnp

from jaxjd.checks import type_name
from jaxjd.linalg.costs import Sizes, gramian_costs
from jaxjd.linalg.layers import Layer, product

_WAY_OUT = (
    "a factored Jacobian leaf; only jaxjd.gramian, cross_gramian, combine, materialize and "
    "aggregators read it: call jaxjd.materialize(J) first, or ask for form='dense'"
)


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
        """The number of axes, the task axis included."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of entries of the dense leaf."""
        return math.prod(self.shape)

    @property
    def sizes(self) -> Sizes:
        """The sizes that decide about its Gramian."""
        return self.layer.sizes(self.inputs, self.cotangents, self.per_task)

    def gramian(self, dtype: Any) -> jax.Array:
        """The inner products of the rows, shape ``(m, m)``."""
        kernel, transient = gramian_costs(self.sizes)
        if transient.total < kernel.total:
            rows = self._rows()  # Not rounded to the parameter's dtype.
            return product(rows, rows, contract=range(1, self.ndim), dtype=dtype)
        return self.layer.gramian(self, dtype)

    def cross_gramian(self, other: FactoredLeaf, dtype: Any) -> jax.Array | None:
        """The inner products with the rows of another leaf; None where there is no better way."""
        kernel, transient = gramian_costs(self.sizes)
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
        return self._rows().astype(self.dtype)

    def _rows(self) -> jax.Array:
        pull = self.layer.pull_each if self.per_task else self.layer.pull_all
        return pull(self.inputs, self.cotangents)

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
