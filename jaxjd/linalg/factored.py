"""Jacobian leaves that are kept as two factors.

For a kernel that is used as ``y = a @ W``, task `i`'s gradient is ``a^T b_i``, with the layer's
input `a` and the cotangent `b_i` at its output. Keeping `a` and `b` gives the Gramian without an
array of shape ``(m, *W.shape)``, and a combination of the rows without another backward pass.

A leaf is opaque on purpose: were it a registered pytree node, arithmetic over a Jacobian would act
on the two factors and be silently wrong.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxjd.linalg.costs import Sizes, gramian_costs
from jaxjd.linalg.layers import Layer
from jaxjd.linalg.opaque import OpaqueLeaf
from jaxjd.linalg.products import product, row_products


class FactoredLeaf(OpaqueLeaf):
    """One leaf of a Jacobian as the inputs of a layer and the cotangents at its output.

    Args:
      layer: How inputs and cotangents make a gradient.
      inputs: The layer's inputs, canonical (see `Layer`), with a leading task axis if `per_task`.
      cotangents: One cotangent per task at the layer's output, canonical, with a leading task axis.
      shape: ``(m, *param.shape)``.
      dtype: The parameter's dtype.
      per_task: Whether every task has inputs of its own, as with one task per example.
    """

    __slots__ = ("cotangents", "inputs", "layer", "per_task")

    WAY_OUT = (
        "a factored Jacobian leaf; only jaxjd.gramian, cross_gramian, combine, materialize and "
        "aggregators read it: call jaxjd.materialize(J) first, or ask for form='dense'"
    )

    def __init__(
        self,
        layer: Layer,
        inputs: jax.Array,
        cotangents: jax.Array,
        shape: tuple[int, ...],
        dtype: Any,
        per_task: bool = False,
    ) -> None:
        super().__init__(shape, dtype)
        self.layer = layer
        self.inputs = inputs
        self.cotangents = cotangents
        self.per_task = per_task

    @property
    def arrays(self) -> list[jax.Array]:
        """What it is made of."""
        return [self.inputs, self.cotangents]

    @property
    def sizes(self) -> Sizes:
        """The sizes that decide about its Gramian."""
        return self.layer.sizes(self.inputs, self.cotangents, self.per_task)

    def gramian(self, dtype: Any) -> jax.Array:
        """The inner products of the rows, shape ``(m, m)``."""
        kernel, transient = gramian_costs(self.sizes)
        if transient.total < kernel.total:
            if self.per_task and self.layer.has_columns:
                return self.layer.gramian_by_columns(self, dtype)
            rows = self._rows()  # Not rounded to the parameter's dtype.
            return row_products(rows, rows, dtype)
        return self.layer.gramian(self, dtype)

    def smaller(self) -> FactoredLeaf | jax.Array:
        """Itself, or its rows as an array if they have no more entries than the factors."""
        sizes = self.sizes
        is_large = sizes.tasks * sizes.entries > sizes.factor_entries
        return self if is_large else self._rows()  # Not rounded to the parameter's dtype.

    def squared_norms(self, dtype: Any) -> jax.Array:
        """The squared lengths of the rows, shape ``(m,)``; every task has inputs of its own."""
        found = self.layer.squared_norms(self.inputs, self.cotangents, dtype)
        return jnp.maximum(found, 0)  # Where rows cancel, rounding can go below.

    def cross_gramian(self, other: FactoredLeaf, dtype: Any) -> jax.Array | None:
        """The inner products with the rows of another leaf; None where there is no better way."""
        kernel, transient = gramian_costs(self.sizes)
        alike = self.layer.like(other.layer) and self.per_task == other.per_task
        if not alike or transient.total < kernel.total:
            return None
        return self.layer.cross_gramian(self, other, dtype)

    def products(self, rows: jax.Array, dtype: Any) -> jax.Array:
        """The inner products with `k` dense rows, shape ``(m, k)``: none of its own is made."""
        # The transpose of the combination, <w^T J, r> = <w, J r>.
        combined, transposed = jax.vjp(self.combine, jnp.zeros(self.shape[:1], dtype))
        return jax.vmap(lambda row: transposed(row)[0], out_axes=1)(rows.astype(combined.dtype))

    def combine(self, weights: jax.Array) -> jax.Array:
        """The combination of the rows, shaped like the parameter; at least float32."""
        dtype = jnp.result_type(jnp.float32, weights.dtype, self.dtype)
        cotangents = self.cotangents.astype(dtype)
        if self.per_task:
            scaled = jnp.expand_dims(weights.astype(dtype), range(1, cotangents.ndim)) * cotangents
            return self.layer.pull(self.inputs, scaled, summed=1)
        combined = product(weights.astype(dtype), cotangents, contract=[0], dtype=dtype)
        return self.layer.pull(self.inputs, combined)

    def all_finite(self) -> jax.Array:
        """Whether both factors are finite, a boolean scalar."""
        return jnp.all(jnp.isfinite(self.inputs)) & jnp.all(jnp.isfinite(self.cotangents))

    def materialize(self) -> jax.Array:
        """The dense leaf, shape ``(m, *param.shape)``."""
        return self._rows().astype(self.dtype)

    def _rows(self) -> jax.Array:
        pull = self.layer.pull_each if self.per_task else self.layer.pull_all
        return pull(self.inputs, self.cotangents)
