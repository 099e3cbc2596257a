"""The algebra of the task axis: the only functions that read the numbers of a Jacobian.

A Jacobian is a pytree like the parameters whose leaves have a leading task axis. Everything else in
jaxjd sees a Jacobian through `gramian`, `cross_gramian`, `combine` and `materialize`, so that how a
leaf is stored is decided here alone. A leaf is never reshaped to an ``(m, n)`` matrix: contracting
over its own axes keeps its sharding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxjd.base import Gramian, Jacobian, PyTree, weight_dtype
from jaxjd.checks import check_weights, leaf_names, path_name, type_name
from jaxjd.linalg.factored import FactoredLeaf
from jaxjd.linalg.owned import BlocksLeaf, RowsLeaf, scatter
from jaxjd.linalg.products import row_products
from jaxjd.linalg.sharded import (
    local_part,
    local_rows,
    refuse_sharded,
    shard_axes,
    sum_leaves,
)

# Signs of small inner products carry the conflict: TF32 and bfloat16 products would destroy them.
_PRECISION = lax.Precision.HIGHEST


def count_tasks(jacobian: Jacobian, params: PyTree | None = None) -> int | None:
    """Checks that a pytree is a Jacobian and returns its number of tasks ``m``.

    Args:
      jacobian: A pytree whose leaves have a leading task axis of one common size.
      params: The parameters it belongs to, for a check of every leaf's shape.

    Returns:
      ``m``, or ``None`` for a pytree without leaves.

    Raises:
      ValueError: If a leaf is not a floating point array, has no task axis, disagrees with another
        leaf about ``m``, or does not fit its parameter. The message names the leaf's path.
    """
    leaves = jax.tree.leaves_with_path(jacobian)
    first: tuple[str, int] | None = None
    for path, leaf in leaves:
        name = path_name(path)
        shaped = hasattr(leaf, "shape") and hasattr(leaf, "dtype")
        if not shaped or isinstance(leaf, jax.ShapeDtypeStruct):
            raise ValueError(
                f"Jacobian leaf '{name}': expected an array with a leading task axis, "
                f"found {type_name(leaf)}."
            )
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise ValueError(
                f"Jacobian leaf '{name}': expected a floating point dtype, found "
                f"{type_name(leaf)}. Differentiate with respect to floating point leaves only."
            )
        if jnp.finfo(leaf.dtype).bits not in (16, 32, 64):  # No sums of 8-bit floats.
            raise ValueError(
                f"Jacobian leaf '{name}': expected a floating point dtype of 16, 32 or 64 bits, "
                f"found {type_name(leaf)}."
            )
        if leaf.ndim == 0 or leaf.shape[0] == 0:
            raise ValueError(
                f"Jacobian leaf '{name}': expected a leading task axis, found shape {leaf.shape}."
            )
        first = first or (name, leaf.shape[0])
        if leaf.shape[0] != first[1]:
            raise ValueError(
                f"Jacobian leaf '{name}': expected a task axis of size {first[1]} as in leaf "
                f"'{first[0]}', found shape {leaf.shape}. {_why_sizes_differ(leaves, params)}"
            )
    if params is not None:
        _check_against_params(leaves, jacobian, params)
    return None if first is None else first[1]


def refuse_complex(jacobian: Jacobian, name: str) -> None:
    """Checks that a method which compares or squares single entries gets real ones.

    Raises:
      ValueError: If a leaf is complex; its path is named.
    """
    for path, leaf in jax.tree.leaves_with_path(jacobian):
        if jnp.iscomplexobj(leaf):
            raise ValueError(
                f"Jacobian leaf '{path_name(path)}': `{name}` looks at single entries, which must "
                f"be real, found {type_name(leaf)}. Methods of the Gramian take complex leaves."
            )


def plain_leaves(updates: PyTree, params: PyTree | None) -> list[bool]:
    """Tells which leaves are plain gradients, shaped like their parameters, beside a Jacobian.

    The one place that knows the layout of `mtl_value_and_jacobian`: a task axis in the leaves of
    the trunk only. What has no Jacobian at all is malformed and not of that layout, and without
    parameters there is nothing to go by; then no leaf counts as plain.

    Args:
      updates: Rows of a Jacobian and plain gradients, in the structure of the parameters.
      params: The parameters or their shapes, or None.

    Returns:
      One truth value per leaf, in tree order.
    """
    leaves, wanted = jax.tree.leaves(updates), jax.tree.leaves(params)
    plain = [False] * len(leaves)
    if len(leaves) == len(wanted):
        plain = [
            getattr(leaf, "shape", None) == jnp.shape(param)
            for leaf, param in zip(leaves, wanted, strict=True)
        ]
    return [False] * len(leaves) if all(plain) else plain


def param_shapes(jacobian: Jacobian) -> PyTree:
    """Returns the shapes of the parameters that a Jacobian belongs to."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), jacobian)


def without(tree: PyTree, hidden: Sequence[bool]) -> PyTree:
    """Replaces some leaves, told in tree order, by nodes without leaves."""
    leaves, treedef = jax.tree.flatten(tree)
    kept = [optax.MaskedNode() if hide else leaf for leaf, hide in zip(leaves, hidden, strict=True)]
    return jax.tree.unflatten(treedef, kept)


def count_rows(updates: PyTree, params: PyTree | None, plain: Sequence[bool]) -> int | None:
    """As `count_tasks`, of the leaves that are not plain gradients."""
    if any(plain):
        updates, params = without(updates, plain), without(params, plain)
    return count_tasks(updates, params)


def _why_sizes_differ(leaves: Sequence[tuple[Any, Any]], params: PyTree | None) -> str:
    if params is not None:
        wanted = [jnp.shape(leaf) for leaf in jax.tree.leaves(params)]
        found = [getattr(leaf, "shape", None) for _, leaf in leaves]
        if found == wanted:
            return (
                "All leaves have the shapes of the parameters: this is a gradient without a task "
                "axis, as `jax.grad` returns it; `jaxjd.value_and_jacobian` returns a Jacobian."
            )
        copies = len(found) // max(len(wanted), 1)
        if copies > 1 and found == wanted * copies:
            return (
                f"There are {copies} gradients without a task axis, as `jax.jacrev` returns them "
                "for a list or dict of losses: `jaxjd.stack_tasks` joins them, and "
                "`jaxjd.value_and_jacobian` returns them joined."
            )
    return "Is it a gradient without a task axis?"


def _check_against_params(
    leaves: Sequence[tuple[Any, Any]], jacobian: Jacobian, params: PyTree
) -> None:
    params_leaves = jax.tree.leaves(params)
    if len(params_leaves) != len(leaves):
        raise ValueError(
            f"The Jacobian has {len(leaves)} leaves, but the parameters have {len(params_leaves)}."
        )
    for (path, leaf), name, param_name, param in zip(
        leaves, leaf_names(jacobian), leaf_names(params), params_leaves, strict=True
    ):
        if name != param_name:
            raise ValueError(
                f"Jacobian leaf '{'/'.join(name)}': expected the structure of the parameters, "
                f"which have the leaf '{'/'.join(param_name)}' in its place."
            )
        if leaf.shape[1:] != jnp.shape(param):
            raise ValueError(
                f"Jacobian leaf '{path_name(path)}': expected shape (m, *{jnp.shape(param)}) for "
                f"its parameter, found {leaf.shape}."
                + (" It has no task axis." if leaf.shape == jnp.shape(param) else "")
            )
        if jnp.iscomplexobj(leaf) and not jnp.iscomplexobj(param):
            raise ValueError(
                f"Jacobian leaf '{path_name(path)}': expected a real dtype, as that of its "
                f"parameter, found {type_name(leaf)}."
            )


def gramian(jacobian: Jacobian) -> Gramian:
    r"""Computes the Gramian of the rows, :math:`G = J J^\top`, summed over the leaves.

    .. math:: G_{ij} = \sum_{\text{leaves}} \langle J_i, J_j \rangle

    The rows of a complex parameter have the inner product of their real and imaginary parts,
    :math:`\operatorname{Re} J J^H`, so that the Gramian is real. Products are taken at
    ``Precision.HIGHEST`` and accumulated in float32 or better, whatever the dtype of the leaves.

    Args:
      jacobian: A pytree whose leaves have shape ``(m, *param.shape)``. ``None`` holes are skipped.

    Returns:
      An array of shape ``(m, m)``; its dtype is the leaves' promoted real dtype, at least float32.

    Raises:
      ValueError: If the pytree has no leaves or is not a Jacobian.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> print(jaxjd.gramian({"w": jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])}))
      [[ 18. -22.]
       [-22.  38.]]
    """
    _require_leaves(jacobian, "jacobian")
    dtype = weight_dtype(jacobian)
    # Passing the same leaf twice lets XLA see the symmetry of the product.
    leaves = jax.tree.leaves(jacobian)
    return sum_leaves([_leaf_product(leaf, leaf, dtype) for leaf in leaves], leaves)


def cross_gramian(jacobian_1: Jacobian, jacobian_2: Jacobian) -> jax.Array:
    r"""Computes :math:`A = J_1 J_2^\top` for the Jacobians of two independent batches.

    Complex leaves are treated as in `gramian`.

    Args:
      jacobian_1: A pytree whose leaves have shape ``(m1, *param.shape)``.
      jacobian_2: A pytree of the same structure whose leaves have shape ``(m2, *param.shape)``. The
        numbers of rows may differ: with an update as the only row, :math:`A` is what it changes.

    Returns:
      An array of shape ``(m1, m2)``, in the leaves' promoted real dtype, at least float32. For two
      batches of the same tasks it is, in expectation, the Gramian of the expected Jacobian.

    Raises:
      ValueError: If either is not a Jacobian, or the two do not belong to the same parameters; the
        leaf's path is named.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> print(jaxjd.cross_gramian(jnp.eye(2), jnp.array([[1.0, 2.0], [3.0, 4.0]])))
      [[1. 3.]
       [2. 4.]]
    """
    _require_leaves(jacobian_1, "jacobian_1")
    _require_leaves(jacobian_2, "jacobian_2")
    leaves_1 = jax.tree.leaves_with_path(jacobian_1)
    leaves_2 = jax.tree.leaves(jacobian_2)
    if jax.tree.structure(jacobian_1) != jax.tree.structure(jacobian_2):
        raise ValueError(
            "The two Jacobians of a cross-Gramian must have the same structure, found "
            f"{jax.tree.structure(jacobian_1)} and {jax.tree.structure(jacobian_2)}."
        )
    for (path, leaf_1), leaf_2 in zip(leaves_1, leaves_2, strict=True):
        if leaf_1.shape[1:] != leaf_2.shape[1:]:
            raise ValueError(
                f"Jacobian leaf '{path_name(path)}': expected one shape after the task axis in "
                f"both Jacobians, found {leaf_1.shape} and {leaf_2.shape}."
            )
        axes = (shard_axes(leaf_1), shard_axes(leaf_2))
        if all(axes) and axes[0] != axes[1]:
            raise ValueError(
                f"Jacobian leaf '{path_name(path)}': expected both Jacobians split over the same "
                f"mesh axes, found {axes[0]} and {axes[1]}."
            )
    dtype = weight_dtype((jacobian_1, jacobian_2))
    pairs = [(leaf_1, leaf_2) for (_, leaf_1), leaf_2 in zip(leaves_1, leaves_2, strict=True)]
    products = [_leaf_product(leaf_1, leaf_2, dtype) for leaf_1, leaf_2 in pairs]
    # An update in the place of a Jacobian has no marks, but the shapes of the same shards.
    split = [leaf_1 if shard_axes(leaf_1) else leaf_2 for leaf_1, leaf_2 in pairs]
    return sum_leaves(products, split)


def combine(weights: jax.Array, jacobian: Jacobian) -> PyTree:
    r"""Combines the rows of a Jacobian into one update, :math:`w^\top J`.

    Args:
      weights: One weight per task, shape ``(m,)``.
      jacobian: A pytree whose leaves have shape ``(m, *param.shape)``.

    Returns:
      A pytree like the parameters; each leaf has the dtype of its Jacobian leaf, with the sum over
      tasks accumulated in float32 or better. For complex parameters it is what ``jax.grad`` gives
      for the weighted sum of the losses: the conjugate of the direction in which that grows.

    Raises:
      ValueError: If it is not a Jacobian, or has not one row per weight.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> print(jaxjd.combine(jnp.array([1.0, 2.0]), jnp.array([[-4.0, 1.0], [6.0, 1.0]])))
      [8. 3.]
    """
    check_weights("weights", weights, count_tasks(jacobian))
    return jax.tree.map(
        lambda wide, leaf: wide.astype(leaf.dtype), wide_combination(weights, jacobian), jacobian
    )


def wide_combination(weights: jax.Array, jacobian: Jacobian) -> PyTree:
    """The combination of the rows before it is rounded to the dtypes of the leaves."""
    return jax.tree.map(lambda leaf: _leaf_combination(weights, leaf), jacobian)


def keep_smaller(jacobian: Jacobian) -> Jacobian:
    """Writes out the factored leaves whose rows have no more entries than the factors."""
    return jax.tree.map(
        lambda leaf: leaf.smaller() if isinstance(leaf, FactoredLeaf) else leaf, jacobian
    )


def squared_norms(jacobian: Jacobian, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """The squared lengths of the rows, shape ``(m,)``: the diagonal of the Gramian alone.

    Factored leaves are those of tasks with inputs of their own.
    """
    total = jnp.zeros(shape, dtype)
    for leaf in jax.tree.leaves(jacobian):
        if isinstance(leaf, FactoredLeaf):
            total = total + leaf.squared_norms(dtype)
            continue
        for part in (leaf.real, leaf.imag) if jnp.iscomplexobj(leaf) else (leaf,):
            axes = tuple(range(1, leaf.ndim))
            total = total + jnp.sum(jnp.square(part.astype(dtype)), axis=axes)
    return total


def materialize(jacobian: Jacobian) -> Jacobian:
    """Returns the Jacobian with every leaf as a plain array of shape ``(m, *param.shape)``.

    What needs the entries of a Jacobian, not only its products, calls this, leaf by leaf where the
    memory matters.

    Args:
      jacobian: A pytree whose leaves have shape ``(m, *param.shape)``.

    Returns:
      The same pytree with plain arrays.

    Raises:
      ValueError: If it is not a Jacobian, or a leaf is split over devices (`jaxjd.sharding`).

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> jaxjd.materialize({"w": jnp.ones((2, 3))})["w"].shape
      (2, 3)
    """
    count_tasks(jacobian)
    refuse_sharded(jacobian, "what reads the entries of a Jacobian")
    return jax.tree.map(local_rows, jacobian)


def all_finite(tree: PyTree) -> jax.Array:
    """Returns whether no entry is a NaN or an infinity, a boolean scalar.

    Of a factored leaf the factors count, whose products are not formed.
    """
    leaves = jax.tree.leaves(tree)
    # Counted, since all devices have to agree about a leaf that is split over them.
    bad = [(~_leaf_is_finite(local_part(leaf))).astype(jnp.int32) for leaf in leaves]
    return sum_leaves(bad, leaves) == 0 if leaves else jnp.ones((), bool)


def _leaf_is_finite(leaf: Any) -> jax.Array:
    if isinstance(leaf, FactoredLeaf):
        return leaf.all_finite()
    if isinstance(leaf, RowsLeaf):
        return _leaf_is_finite(leaf.rows)
    if isinstance(leaf, BlocksLeaf):
        return _leaf_is_finite(leaf.blocks)
    if jnp.issubdtype(leaf.dtype, jnp.inexact):
        return jnp.all(jnp.isfinite(leaf))
    return jnp.ones((), bool)


def _require_leaves(jacobian: Jacobian, name: str) -> None:
    if count_tasks(jacobian) is None:
        raise ValueError(f"`{name}` has no leaves, so it has no Gramian.")


def _leaf_product(leaf_1: Any, leaf_2: Any, dtype: jnp.dtype) -> jax.Array:
    """The inner products of what this device holds of two leaves."""
    leaf_1, leaf_2 = local_part(leaf_1), local_part(leaf_2)
    if isinstance(leaf_1, RowsLeaf) or isinstance(leaf_2, RowsLeaf):
        (rows_1, tasks_1), (rows_2, tasks_2) = _own_rows(leaf_1), _own_rows(leaf_2)
        found = jnp.zeros((len(tasks_1), len(tasks_2)), dtype)
        if found.size:
            found = _leaf_product(rows_1, rows_2, dtype)
        found = scatter(found, tasks_1, leaf_1.shape[0], 0)
        return scatter(found, tasks_2, leaf_2.shape[0], 1)
    if isinstance(leaf_1, BlocksLeaf) and leaf_1 is leaf_2:
        return leaf_1.gramian(dtype)
    if isinstance(leaf_1, FactoredLeaf) and leaf_1 is leaf_2:
        return leaf_1.gramian(dtype)
    if isinstance(leaf_1, FactoredLeaf) and isinstance(leaf_2, FactoredLeaf):
        found = leaf_1.cross_gramian(leaf_2, dtype)
        if found is not None:
            return found
    # A few dense rows go through the layer instead of the other's many out of it.
    if isinstance(leaf_1, FactoredLeaf) and leaf_2.shape[0] < leaf_1.shape[0]:
        return leaf_1.products(local_rows(leaf_2), dtype)
    if isinstance(leaf_2, FactoredLeaf) and leaf_1.shape[0] < leaf_2.shape[0]:
        return leaf_2.products(local_rows(leaf_1), dtype).T
    leaf_1, leaf_2 = local_rows(leaf_1), local_rows(leaf_2)
    if jnp.iscomplexobj(leaf_1) or jnp.iscomplexobj(leaf_2):  # Twice as many real numbers.
        parts = [(leaf_1.real, leaf_2.real), (leaf_1.imag, leaf_2.imag)]
        return jnp.add(*(_leaf_product(*pair, dtype) for pair in parts))
    sharding = _explicit_sharding(leaf_1, PartitionSpec(None, None))
    return row_products(leaf_1, leaf_2, dtype, sharding)


def _own_rows(leaf: Any) -> tuple[Any, tuple[int, ...]]:
    """The rows of a leaf that need not be zero, and their numbers."""
    if isinstance(leaf, RowsLeaf):
        return leaf.rows, leaf.tasks
    return leaf, tuple(range(leaf.shape[0]))


def _leaf_combination(weights: jax.Array, leaf: Any) -> jax.Array:
    leaf = local_part(leaf)
    if isinstance(leaf, RowsLeaf):
        if not leaf.tasks:
            return jnp.zeros(leaf.shape[1:], leaf.dtype)
        return _leaf_combination(weights[jnp.asarray(leaf.tasks, jnp.int32)], leaf.rows)
    if isinstance(leaf, (FactoredLeaf, BlocksLeaf)):
        return leaf.combine(weights)
    leaf = jnp.asarray(leaf)
    if jnp.iscomplexobj(leaf):
        return lax.complex(*(_leaf_combination(weights, part) for part in (leaf.real, leaf.imag)))
    dtype = jnp.result_type(jnp.float32, weights.dtype, leaf.dtype)
    spec = None
    if _explicit_mesh(leaf) is not None:
        spec = PartitionSpec(*jax.typeof(leaf).sharding.spec[1:])
    return lax.dot_general(
        weights.astype(dtype),
        leaf.astype(dtype),
        (((0,), (0,)), ((), ())),
        precision=_PRECISION,
        preferred_element_type=dtype,
        out_sharding=_explicit_sharding(leaf, spec),
    )


def _explicit_mesh(array: jax.Array) -> Any | None:
    mesh = jax.typeof(array).sharding.mesh
    return mesh if AxisType.Explicit in mesh.axis_types else None


def _explicit_sharding(array: jax.Array, spec: PartitionSpec | None) -> NamedSharding | None:
    """Under an Explicit mesh a contraction over sharded axes must name the sharding it wants."""
    mesh = _explicit_mesh(array)
    return None if mesh is None or spec is None else NamedSharding(mesh, spec)
