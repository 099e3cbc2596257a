"""A leaf of a table that is looked up and is the matrix of layers as well."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxjd.linalg.factored import FactoredLeaf
from jaxjd.linalg.layers import EmbeddingLayer, Layer
from jaxjd.linalg.products import product


def joined_matrices(leaves: list[FactoredLeaf], are_turned: list[bool]) -> FactoredLeaf:
    """The leaf of a matrix that several layers use: their rows one after the other.

    Args:
      leaves: A leaf for each layer, with one task per example and nothing that inputs, cotangents
        and parameter share.
      are_turned: Whether the layer multiplies by the transpose.
    """
    pairs = []
    for leaf, is_turned in zip(leaves, are_turned, strict=True):
        factors = [
            array.reshape(array.shape[0], -1, array.shape[-1])
            for array in (leaf.inputs, leaf.cotangents)
        ]
        pairs.append(factors[::-1] if is_turned else factors)
    inputs, cotangents = (jnp.concatenate(arrays, axis=1) for arrays in zip(*pairs, strict=True))
    layer = Layer(0, 1, lambda gradient: gradient)
    return FactoredLeaf(layer, inputs, cotangents, leaves[0].shape, leaves[0].dtype, per_task=True)


def joined_lookups(leaves: list[FactoredLeaf]) -> FactoredLeaf:
    """The leaf of a table that is looked up several times: its indices one after the other."""
    tasks = leaves[0].shape[0]
    inputs = jnp.concatenate([leaf.inputs.reshape(tasks, -1) for leaf in leaves], axis=1)
    cotangents = jnp.concatenate(
        [leaf.cotangents.reshape(tasks, -1, leaf.shape[2]) for leaf in leaves], axis=1
    )
    shape, dtype = leaves[0].shape, leaves[0].dtype
    layer = EmbeddingLayer(1, lambda gradient: gradient, size=shape[1])
    return FactoredLeaf(layer, inputs, cotangents, shape, dtype, per_task=True)


class TiedLeaf(FactoredLeaf):
    r"""The rows of a table that is looked up and multiplied by, for lengths and sums of them.

    With the looked-up rows :math:`v_t` and their cotangents :math:`c_t`, and the inputs and
    cotangents :math:`a_r, b_r` of the products, the gradient is
    :math:`\sum_t e_{v_t}^\top c_t + \sum_r a_r^\top b_r`, and the inner product of its two
    parts :math:`\sum_{tr} a_{r v_t} \langle c_t, b_r \rangle`.

    Args:
      lookup: The leaf of what is looked up.
      matrix: The leaf of the products, as from `joined_matrices`.
    """

    __slots__ = ("lookup", "matrix")

    def __init__(self, lookup: FactoredLeaf, matrix: FactoredLeaf) -> None:
        super().__init__(
            matrix.layer, matrix.inputs, matrix.cotangents, matrix.shape, matrix.dtype, True
        )
        self.lookup, self.matrix = lookup, matrix

    def smaller(self) -> FactoredLeaf | jax.Array:
        """Itself, or its rows as an array if they have no more entries than the factors."""
        factors = self.lookup.sizes.factor_entries + self.matrix.sizes.factor_entries
        return self if self.size > factors else self._rows()

    def squared_norms(self, dtype: jnp.dtype) -> jax.Array:
        """The squared lengths of the rows, shape ``(m,)``."""
        tasks = self.shape[0]
        indices = self.lookup.inputs.reshape(tasks, -1)
        looked_up = self.lookup.cotangents.reshape(tasks, indices.shape[1], -1)
        chosen = jnp.take_along_axis(self.matrix.inputs, indices[:, None], axis=2)
        pairs = product(self.matrix.cotangents, looked_up, contract=[2], batch=[0], dtype=dtype)
        both = jnp.sum(chosen.astype(dtype) * pairs, axis=(1, 2))
        own = self.lookup.squared_norms(dtype) + self.matrix.squared_norms(dtype)
        return jnp.maximum(own + 2 * both, 0)  # Where rows cancel, rounding can go below.

    def combine(self, weights: jax.Array) -> jax.Array:
        """The combination of the rows, shaped like the parameter; at least float32."""
        return self.lookup.combine(weights) + self.matrix.combine(weights)

    def _rows(self) -> jax.Array:
        return self.lookup._rows() + self.matrix._rows()
