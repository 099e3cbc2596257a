"""Jacobians on many devices, inside `jax.shard_map` and `jax.pmap`.

Under `jax.jit` with arrays that have a `jax.sharding.NamedSharding` nothing of this is needed:
there a program is written as for one device. Where every device runs a program of its own, its
Jacobian is that of its own losses and of its own shards. `parallel` makes the right one of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jaxjd.base import Differentiated, Jacobian, PyTree
from jaxjd.checks import argument_number, path_name, type_name
from jaxjd.linalg.opaque import OpaqueLeaf
from jaxjd.linalg.reduction import gather_leaf, mean_leaf
from jaxjd.linalg.sharded import ShardedLeaf, is_checked, local_part, shard_axes, varying_axes
from jaxjd.linalg.sharded import vary as _vary

__all__ = ["gather_tasks", "parallel", "pmean_jacobian", "sharded", "vary"]

AxisNames = str | Sequence[str]


def parallel(
    engine: Any,
    axis_name: AxisNames,
    param_specs: PyTree | None = None,
) -> Any:
    r"""Makes an engine return the losses and the Jacobian of all devices together.

    With :math:`\ell^d(\theta)` the losses that the function of the engine returns on device `d`,
    they are those of the mean,

    .. math:: \ell(\theta) = \frac{1}{D} \sum_d \ell^d(\theta), \qquad
              J = \frac{1}{D} \sum_d \frac{\partial \ell^d}{\partial \theta}

    over the devices of the mesh axes in `axis_name` and `param_specs`. It is the same line with
    and without ``check_vma``, under `jax.pmap` and under ``jax.vmap(axis_name=...)``, though what
    differentiation means differs between them: with types that tell what varies, the gradient of
    replicated parameters is already summed over the devices, and without them the transpose of
    ``psum`` is ``psum``. So it also does not matter whether the function averages its losses over
    the batch axis itself. It may use collectives (``all_gather`` of sharded parameters, ``psum``
    between tensor-parallel layers), but no derivative rules that undo what they do.

    Args:
      engine: What `jaxjd.value_and_jacobian` or `jaxjd.mtl_value_and_jacobian` returned. It tells
        which arguments it differentiates and whether it has auxiliary output; a function around it
        does with ``functools.wraps(engine)``, as `jax.jit` does. Or what
        `jaxjd.aggregated_value_and_grad` returned.
      axis_name: The mesh axis, or axes, over which the batch is split.
      param_specs: How the differentiated parameters are split, a pytree of
        `jax.sharding.PartitionSpec` as ``in_specs`` of `jax.shard_map` has it, or a prefix of it;
        not split at all by default. A tuple of such where a sequence of arguments is
        differentiated, and for trunk and heads.

    Returns:
      A pair ``(init, apply)`` for such a pair: the losses and the gradient are those of the mean of
      the losses over all devices, and the weights are alike on all of them. Else a function of the
      engine's arguments that returns the same as the engine, with the mean of the losses over all
      devices, and the Jacobian of this mean. `aux` stays that of the device. A leaf
      of a parameter that is split is the device's shard and is marked as `sharded` marks it. A
      factored leaf that is averaged either stays factored, with the rows of all devices gathered,
      or becomes dense, whichever is cheaper (see `pmean_jacobian`).

    Raises:
      ValueError: When called, if an axis is unknown, the specs do not fit the parameters or, where
        types tell what varies, contradict them, or if the engine is of another kind.

    Example:
      >>> import jax, jax.numpy as jnp, jaxjd
      >>> from jaxjd import sharding
      >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
      >>> losses = lambda w, x: jnp.stack([jnp.mean((x @ w) ** 2), jnp.mean(x @ w)])
      >>> engine = sharding.parallel(jaxjd.value_and_jacobian(losses), "data")
      >>> step = jax.shard_map(
      ...     engine, mesh=mesh, in_specs=(jax.P(), jax.P("data")), out_specs=jax.P()
      ... )
      >>> w, x = jnp.array([1.0, 2.0]), jnp.arange(16.0).reshape(8, 2)
      >>> values, jacobian = step(w, jax.device_put(x, jax.NamedSharding(mesh, jax.P("data"))))
      >>> print(jacobian)
      [[448. 494.]
       [  7.   8.]]
    """
    if through := getattr(getattr(engine, "apply", None), "through", None):
        return through(lambda inner: parallel(inner, axis_name, param_specs))
    names = _names(axis_name)

    def parallel_fn(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        argnums, single, has_aux = _differentiated(engine)
        numbers = [argument_number(number, len(args)) for number in argnums]
        chosen = tuple(args[number] for number in numbers)
        prefix = (param_specs,) if single or param_specs is None else tuple(param_specs)
        if param_specs is None:
            prefix = (None,) * len(chosen)
        splits, axes = _splits(chosen, prefix, names)
        leaves, treedef = jax.tree.flatten(chosen)
        varied = [
            _vary(leaf, [name for name in names if name not in split])
            for leaf, split in zip(leaves, splits, strict=True)
        ]
        full = list(args)
        for number, arg in zip(numbers, jax.tree.unflatten(treedef, varied), strict=True):
            full[number] = arg
        values, jacobian = engine(*full, **kwargs)
        losses, aux = values if has_aux else (values, None)
        over = _loss_axes(losses, axes)
        count = lax.axis_size(over) if over else 1
        if over:
            losses = jax.tree.map(lambda loss: mean_leaf(loss, over, count), losses)

        def reduce(leaf: Any, param: Any, split: tuple[str, ...]) -> Any:
            found = _varying(leaf)
            summed = tuple(
                axis
                for axis in axes
                if axis not in split and (axis in found or not is_checked(axis))
            )
            leaf = mean_leaf(leaf, summed, count)
            # The gradients of task heads have no task axis, and no products either.
            is_row = leaf.ndim == jnp.ndim(param) + 1
            return ShardedLeaf(leaf, split) if split and is_row else leaf

        reduced = [
            reduce(leaf, param, split)
            for leaf, param, split in zip(jax.tree.leaves(jacobian), leaves, splits, strict=True)
        ]
        jacobian = jax.tree.unflatten(jax.tree.structure(jacobian), reduced)
        return ((losses, aux) if has_aux else losses), jacobian

    return parallel_fn


def vary(tree: PyTree, axis_name: AxisNames) -> PyTree:
    """Makes arrays that are the same on all devices count as different ones.

    Under ``jax.shard_map(check_vma=True)`` the gradient with respect to an array that does not vary
    over an axis is summed over its devices. That with respect to one that does is each device's
    own, as it is everywhere else. `parallel` does this by itself.

    Args:
      tree: A pytree of arrays, parameters usually.
      axis_name: The mesh axis, or axes.

    Returns:
      The same values; unchanged where they vary already, and where types do not tell what varies.

    Raises:
      ValueError: If there is no such axis.

    Example:
      >>> import jax, jax.numpy as jnp, jaxjd
      >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
      >>> def gradient(w, x):
      ...     w = jaxjd.sharding.vary(w, "data")
      ...     return jax.lax.pmean(jax.grad(lambda w: jnp.mean(w * x))(w), "data")
      >>> x = jax.device_put(jnp.arange(8.0), jax.NamedSharding(mesh, jax.P("data")))
      >>> in_specs = (jax.P(), jax.P("data"))
      >>> print(jax.shard_map(gradient, mesh=mesh, in_specs=in_specs, out_specs=jax.P())(1.0, x))
      3.5
    """
    axes = _axes(axis_name)
    return jax.tree.map(lambda leaf: _vary(leaf, axes), tree)


def pmean_jacobian(jacobian: Jacobian, axis_name: AxisNames) -> Jacobian:
    r"""Averages the Jacobians of the devices' own losses; `parallel` does this by itself.

    A dense leaf takes one ``pmean``. A factored leaf :math:`a^\top b_i` has two ways:

    - *dense*: an all-reduce of the ``m * n`` numbers of the leaf, of which each of `D` devices
      sends :math:`2 \frac{D-1}{D} m n` in a ring;
    - *gathered*: an all-gather of the rows of both factors, the cotangents scaled by `1/D`. It
      sends :math:`(D-1) N (p + m q)` numbers for `N` rows per device of `p` inputs and `q` outputs,
      and the leaf stays factored, with `D N` rows.

    The way is chosen per leaf from static shapes: the one for which the floating point operations
    of the leaf's products, plus ten for each byte that memory moves, plus a hundred for each byte
    that crosses devices, are fewer.

    Args:
      jacobian: A Jacobian of local losses, with respect to parameters that vary (see `vary`);
        plain gradients may be among its leaves.
      axis_name: The mesh axis, or axes.

    Returns:
      The Jacobian of the mean of the losses over the devices.

    Raises:
      ValueError: If there is no such axis, or a leaf does not vary over it: then its gradient was
        already summed over the devices, or it is the same on all of them.

    Example:
      >>> import jax, jax.numpy as jnp, jaxjd
      >>> from jaxjd import sharding
      >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
      >>> def mean_jacobian(w, x):
      ...     losses = lambda w: jnp.stack([jnp.mean(w * x), jnp.mean((w * x) ** 2)])
      ...     _, jacobian = jaxjd.value_and_jacobian(losses)(sharding.vary(w, "data"))
      ...     return sharding.pmean_jacobian(jacobian, "data")
      >>> x = jax.device_put(jnp.arange(8.0), jax.NamedSharding(mesh, jax.P("data")))
      >>> in_specs = (jax.P(), jax.P("data"))
      >>> print(
      ...     jax.shard_map(mean_jacobian, mesh=mesh, in_specs=in_specs, out_specs=jax.P())(1.0, x)
      ... )
      [ 3.5 35. ]
    """
    axes = _axes(axis_name)
    count = lax.axis_size(axes)

    def mean(path: Any, leaf: Any) -> Any:
        _check_varying(path, leaf, axes)
        if not isinstance(leaf, ShardedLeaf):
            return mean_leaf(leaf, axes, count)
        if set(leaf.axes) & set(axes):
            raise ValueError(
                f"Jacobian leaf '{path_name(path)}' is split over {leaf.axes}: its shards have no "
                f"mean over {axes}."
            )
        return ShardedLeaf(mean_leaf(leaf.local, axes, count), leaf.axes)

    return jax.tree.map_with_path(mean, jacobian)


def sharded(jacobian: Jacobian, param_specs: PyTree | None = None) -> Jacobian:
    r"""Marks the leaves of parameters of which each device holds a shard.

    The products of such a leaf's rows are summed over the devices that it is split over,

    .. math:: G = \sum_d J^d {J^d}^\top,

    so that aggregators, `jaxjd.partition` and `jaxjd.grouped` work as they are, and only the
    ``(m, m)`` Gramian crosses devices. Methods that look at single entries treat their shard;
    `jaxjd.graddrop` and `jaxjd.materialize` refuse one. `parallel` marks by itself.

    Args:
      jacobian: A pytree whose leaves are the device's shards, ``(m, *local_param.shape)``.
      param_specs: How the parameters are split, a pytree of `jax.sharding.PartitionSpec` without
        the task axis, or a prefix of it. By default it is read from the types, which tell it
        inside ``jax.shard_map(check_vma=True)`` only.

    Returns:
      The same pytree with opaque leaves, which only `jaxjd.gramian`, `jaxjd.cross_gramian`,
      `jaxjd.combine` and aggregators open; leaves that are not split are unchanged.

    Raises:
      ValueError: If there are no specs and the types do not tell, or the specs do not fit.

    Example:
      >>> import jax, jax.numpy as jnp, jaxjd
      >>> mesh = jax.make_mesh((jax.device_count(),), ("model",))
      >>> rows = lambda spec: jax.NamedSharding(mesh, spec)
      >>> jacobian = jax.device_put(jnp.arange(16.0).reshape(2, 8), rows(jax.P(None, "model")))
      >>> def products(shard):
      ...     return jaxjd.gramian(jaxjd.sharding.sharded(shard, jax.P("model")))
      >>> print(
      ...     jax.shard_map(products, mesh=mesh, in_specs=jax.P(None, "model"), out_specs=jax.P())(
      ...         jacobian
      ...     )
      ... )
      [[ 140.  364.]
       [ 364. 1100.]]
    """
    if param_specs is None:
        splits = [_split_of_type(path, leaf) for path, leaf in jax.tree.leaves_with_path(jacobian)]
    else:
        splits = [_spec_axes(spec) for spec in _broadcast(param_specs, jacobian)]
    pairs = zip(jax.tree.leaves_with_path(jacobian), splits, strict=True)
    marked = []
    for (path, leaf), split in pairs:
        _axes(split)  # Reports unknown axes.
        already = shard_axes(leaf)
        if split and already:
            raise ValueError(
                f"Jacobian leaf '{path_name(path)}' is already marked as split over {already}."
            )
        _check_split(path, leaf, split)
        marked.append(ShardedLeaf(leaf, split) if split else leaf)
    return jax.tree.unflatten(jax.tree.structure(jacobian), marked)


def gather_tasks(tree: PyTree, axis_name: AxisNames) -> PyTree:
    """Puts the rows of all devices one below the other.

    For tasks that are spread over the devices, above all one task per example: every device
    differentiates the losses of its part of the batch with respect to parameters that `vary`, and
    all of them get the whole Jacobian. Factored leaves stay factored if every task has inputs of
    its own, as `jaxjd.per_example_value_and_jacobian` makes them.

    Args:
      tree: A pytree of Jacobian leaves ``(m_local, *param.shape)`` or vectors of losses.
      axis_name: The mesh axis, or axes, that the tasks are spread over.

    Returns:
      The same pytree with ``m_local`` times the number of devices rows, alike on all devices.

    Raises:
      ValueError: If there is no such axis, or a leaf does not vary over it.

    Example:
      >>> import jax, jax.numpy as jnp, jaxjd
      >>> from jaxjd import sharding
      >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
      >>> def step(w, x):
      ...     engine = jaxjd.per_example_value_and_jacobian(lambda w, x: (w @ x) ** 2)
      ...     found = engine(sharding.vary(w, "data"), x)
      ...     losses, jacobian = sharding.gather_tasks(found, "data")
      ...     return losses, jaxjd.gramian(jacobian)
      >>> in_specs = (jax.P(), jax.P("data"))
      >>> x = jax.device_put(jnp.ones((8, 2)), jax.NamedSharding(mesh, jax.P("data")))
      >>> losses, gramian = jax.shard_map(step, mesh=mesh, in_specs=in_specs, out_specs=jax.P())(
      ...     jnp.ones(2), x
      ... )
      >>> losses.shape, gramian.shape
      ((8,), (8, 8))
    """
    axes = _axes(axis_name)

    def gather(path: Any, leaf: Any) -> Any:
        _check_varying(path, leaf, axes)
        if isinstance(leaf, ShardedLeaf):
            return ShardedLeaf(gather_leaf(leaf.local, axes), leaf.axes)
        return gather_leaf(leaf, axes)

    return jax.tree.map_with_path(gather, tree)


def _names(axis_name: AxisNames) -> tuple[str, ...]:
    return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)


def _axes(axis_name: AxisNames) -> tuple[str, ...]:
    names = _names(axis_name)
    for name in names:
        try:
            lax.axis_size(name)
        except NameError as error:
            raise ValueError(
                f"There is no mesh axis {name!r} here: call this inside jax.shard_map, jax.pmap or "
                "jax.vmap with that axis name. Under jax.jit with NamedSharding it is not needed."
            ) from error
    return names


def _differentiated(engine: Any) -> Differentiated:
    found = getattr(engine, "differentiated", None)
    if not isinstance(found, Differentiated):
        raise ValueError(
            "`engine` must be what jaxjd.value_and_jacobian or jaxjd.mtl_value_and_jacobian "
            f"returned, got {getattr(engine, '__name__', type_name(engine))}. The Gramian of a "
            "mean of Jacobians is no mean of Gramians: take jaxjd.gramian and jaxjd.combine of the "
            "Jacobian. With a loss per example the devices' rows differ: jaxjd.sharding."
            "gather_tasks. A function around an engine needs functools.wraps(engine)."
        )
    return found


def _splits(
    chosen: tuple[PyTree, ...], prefix: tuple[Any, ...], names: tuple[str, ...]
) -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
    """The axes that every parameter is split over, and all axes there are."""
    if len(prefix) != len(chosen):
        raise ValueError(
            f"`param_specs` must have one entry per differentiated argument, {len(chosen)}, found "
            f"{len(prefix)}."
        )
    splits = []
    for tree, specs in zip(chosen, prefix, strict=True):
        specs = _broadcast(PartitionSpec() if specs is None else specs, tree)
        splits += [_spec_axes(spec) for spec in specs]
    axes = _axes(tuple(dict.fromkeys([*names, *(axis for split in splits for axis in split)])))
    given = any(specs is not None for specs in prefix)
    for (path, leaf), split in zip(jax.tree.leaves_with_path(chosen), splits, strict=True):
        path = path if len(chosen) > 1 else path[1:]
        _check_split(path, leaf, split)
        found = tuple(axis for axis in axes if axis in varying_axes(leaf))
        if found and not given:
            raise ValueError(
                f"Parameter leaf '{path_name(path)}' varies over the mesh axes {found}: pass "
                "`param_specs` if it is split over them, or the parameter as it is without `vary`."
            )
    return splits, axes


def _broadcast(prefix: PyTree, tree: PyTree) -> list[Any]:
    is_spec = lambda node: isinstance(node, PartitionSpec)
    for path, spec in jax.tree.leaves_with_path(prefix, is_leaf=is_spec):
        if not is_spec(spec):
            raise ValueError(
                f"`param_specs`, leaf '{path_name(path)}': expected a jax.sharding.PartitionSpec, "
                f"found {type_name(spec)}."
            )
    try:
        full = jax.tree.broadcast(prefix, tree, is_leaf=is_spec)
    except ValueError as error:
        raise ValueError(
            "`param_specs` must have the structure of the parameters or a prefix of it: expected "
            f"{jax.tree.structure(tree)}, found {jax.tree.structure(prefix, is_leaf=is_spec)}."
        ) from error
    return jax.tree.leaves(full, is_leaf=is_spec)


def _spec_axes(spec: PartitionSpec) -> tuple[str, ...]:
    found: list[str] = []
    for entry in spec:
        if entry is not None:
            found += [entry] if isinstance(entry, str) else list(entry)
    return tuple(found)


def _split_of_type(path: Any, leaf: Any) -> tuple[str, ...]:
    mesh = jax.sharding.get_abstract_mesh()
    manual = tuple(mesh.manual_axes)
    if not manual or not all(is_checked(axis) for axis in manual):
        raise ValueError(
            "Types tell how a Jacobian is split inside jax.shard_map(check_vma=True) only: pass "
            "`param_specs`."
        )
    return tuple(axis for axis in manual if axis in _varying(leaf))


def _check_split(path: Any, leaf: Any, split: tuple[str, ...]) -> None:
    missing = [axis for axis in split if is_checked(axis) and axis not in _varying(leaf)]
    if missing:
        raise ValueError(
            f"Leaf '{path_name(path)}' is the same on all devices of the mesh axes {missing}, but "
            "its PartitionSpec says that it is split over them."
        )


def _check_varying(path: Any, leaf: Any, axes: tuple[str, ...]) -> None:
    missing = [axis for axis in axes if is_checked(axis) and axis not in _varying(leaf)]
    if missing:
        raise ValueError(
            f"Leaf '{path_name(path)}' is the same on all devices of the mesh axes {missing}: the "
            "gradient with respect to parameters that do not vary is already a sum over them. "
            "Differentiate with respect to jaxjd.sharding.vary(params, axis_name), or use "
            "jaxjd.sharding.parallel."
        )


def _varying(leaf: Any) -> frozenset[str]:
    leaf = local_part(leaf)
    arrays = leaf.arrays if isinstance(leaf, OpaqueLeaf) else [leaf]
    return frozenset().union(*map(varying_axes, arrays))


def _loss_axes(losses: PyTree, axes: tuple[str, ...]) -> tuple[str, ...]:
    """The axes whose devices have losses of their own."""
    found = {
        tuple(axis for axis in axes if axis in varying_axes(loss) or not is_checked(axis))
        for loss in jax.tree.leaves(losses)
    }
    if len(found) != 1:
        raise ValueError(
            f"The losses vary over different mesh axes, {sorted(found)}: return them as one array, "
            "with jnp.stack, say."
        )
    return found.pop()
