"""Steps that see some of the tasks: the others keep their state and have no weight."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, overload

import jax
import jax.numpy as jnp
import optax

from jaxjd.aggregators import MomentumConflictFreeState, weighted
from jaxjd.base import (
    Aggregator,
    AggregatorState,
    Certified,
    Jacobian,
    PyTree,
    Scalarizer,
    Weighting,
    solve,
)
from jaxjd.checks import check_length, check_static_int, path_name, type_name
from jaxjd.grouping import GroupedState
from jaxjd.linalg.algebra import count_rows, param_shapes, plain_leaves

_LOGS = (AggregatorState, GroupedState, MomentumConflictFreeState)
"""The states whose field `weights` is read by nobody but the user."""


@overload
def subset(weighting: Scalarizer, *, num_tasks: int, num_present: int) -> Scalarizer: ...


@overload
def subset(
    weighting: Weighting | Callable[..., Weighting | optax.GradientTransformation],
    *,
    num_tasks: int,
    num_present: int,
) -> Aggregator: ...


def subset(weighting: Any, *, num_tasks: int, num_present: int) -> Any:
    r"""Aggregates steps that see `k` of the `m` tasks, as if there were only those.

    With the rows :math:`J` and the tasks :math:`t_1, \dots, t_k` of a step, and the part
    :math:`S_t` of the state that belongs to these tasks:

    .. math:: d, \; S_t \leftarrow A(J, S_t), \qquad w_i = 0 \text{ for } i \notin t

    The state is that of all tasks. What is per task in it, whether a number, a row and column of a
    matrix or a row of a Jacobian, is gathered for the tasks of the step, goes through the method
    with the `k` rows, and is scattered back. The state of absent tasks stays as it is, bit for bit;
    what belongs to no task (a count, a key) is that of the last step. All shapes are fixed, so one
    compiled program serves every choice of `k` tasks.

    What is per task is found by comparing the states of methods for `m` and for ``m + 1`` tasks,
    not by sizes. The state begins as that of methods for `k` tasks, so that weights on a simplex
    begin at ``1 / k``.

    Training on some of the tasks in each step is common where there are many, as on the 50 tasks of
    MT50 (Yu et al., "Meta-World: A Benchmark and Evaluation for Multi-Task and Meta Reinforcement
    Learning", CoRL 2019, https://arxiv.org/abs/1910.10897).

    Args:
      weighting: A weighting or a `Scalarizer` without arguments that hold one entry per task. Or a
        function of the indices of the tasks, whose argument is named ``tasks``, that returns a
        weighting, an aggregator, a chain with one, or a scalarizer for these tasks:
        ``lambda tasks: jaxjd.weightings.upgrad(preferences[tasks])``,
        ``lambda tasks: jaxjd.graddrop(num_tasks=tasks.size)``. It is traced, also for numbers of
        tasks other than `k`.
      num_tasks: The number of all tasks ``m``.
      num_present: The number of tasks in a step ``k``.

    Returns:
      An `Aggregator` whose state is that of the aggregator of `m` tasks: `AggregatorState` for a
      weighting, with weights of shape ``(m,)`` that are zero for absent tasks. Its `update` takes a
      Jacobian with `k` rows, losses of `k` tasks, and the extra argument ``tasks=``: the indices of
      the tasks in the order of the rows, all different, integers of shape ``(k,)``. Indices that
      are no such thing are an error in a list; in an array, which may be traced, they make the
      update NaN.

      For a scalarizer a `Scalarizer` whose `apply` and `update` take the `k` losses and ``tasks=``.

    Raises:
      ValueError: If `weighting` is neither, `num_present` is more than `num_tasks`, or the
        weighting has an argument with one entry per task; in `init`, if a part of the state depends
        on the number of tasks in another way than by axes of this size; in `update`, if `tasks` is
        missing or not of shape ``(k,)``, if the Jacobian has not `k` rows or is malformed, or if
        the state belongs to another number of tasks.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> aggregator = jaxjd.subset(jaxjd.weightings.upgrad(), num_tasks=5, num_present=2)
      >>> state = aggregator.init(jnp.zeros(3))
      >>> jacobian = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> update, state = aggregator.update(jacobian, state, tasks=jnp.array([3, 1]))
      >>> print(jnp.round(state.weights, 4))
      [0.     0.7895 0.     1.1111 0.    ]

      Preferences of all tasks, of which a step takes its own:

      >>> preferences = jnp.array([1.0, 1.0, 1.0, 2.0, 2.0])
      >>> aggregator = jaxjd.subset(
      ...     lambda tasks: jaxjd.weightings.constant(preferences[tasks]),
      ...     num_tasks=5,
      ...     num_present=2,
      ... )
      >>> state = aggregator.init(jnp.zeros(3))
      >>> update, state = aggregator.update(jacobian, state, tasks=jnp.array([3, 1]))
      >>> print(update)
      [-2.  3.  3.]
    """
    m = check_static_int("num_tasks", num_tasks, at_least=1)
    k = check_static_int("num_present", num_present, at_least=1)
    if k > m:
        raise ValueError(f"`num_present` must be <= {m}, the number of tasks, got {k}.")
    make, given = _maker(weighting), isinstance(weighting, Weighting)
    if isinstance(make(jnp.arange(m)), Scalarizer):
        return _scalarizer(make, m, k)

    def init(params: PyTree) -> PyTree:
        return _initial(lambda tasks: make(tasks).init(params), m, k)

    def update(
        updates: Jacobian,
        state: PyTree,
        params: PyTree | None = None,
        *,
        tasks: Any = None,
        **extra_args: Any,
    ) -> tuple:
        rows = count_rows(updates, params, plain_leaves(updates, params))
        if rows is None:
            return updates, state, None
        if rows != k:
            raise ValueError(
                f"`subset` was made with num_present={k}, but the Jacobian has {rows} rows."
            )
        tasks, valid = _check_tasks(tasks, m, k)
        like = param_shapes(updates) if params is None else params
        axes = _task_axes(lambda tasks: make(tasks).init(like), m, state)
        new, part, certificate = solve(
            make(tasks).update, updates, _take(state, axes, tasks), params, **extra_args
        )
        new = jax.tree.map(lambda leaf: jnp.where(valid, leaf, jnp.nan), new)
        return new, _put(_without_logs(state), axes, tasks, part), certificate

    certified = Certified(update)
    if isinstance(weighting if given else weighting(tasks=jnp.arange(m)), Weighting):
        # The weights are all there is to its step: `aggregated_value_and_grad` may keep them.
        certified.present = lambda tasks: _check_tasks(tasks, m, k)  # type: ignore[attr-defined]
    return Aggregator(init, certified)  # type: ignore[arg-type]


def _maker(weighting: Any) -> Callable[[jax.Array], Any]:
    """A function of the tasks that returns an aggregator or a scalarizer for them."""
    given = isinstance(weighting, (Weighting, Scalarizer))
    if not given:
        try:
            inspect.signature(weighting).bind(tasks=None)
        except (TypeError, ValueError) as error:
            raise ValueError(
                "`weighting` must be a jaxjd.Weighting, a jaxjd.Scalarizer, or a function of one "
                f"argument `tasks` that returns one or an aggregator, got {type_name(weighting)}. "
                "(A factory has to be called first; an aggregator is for a number of tasks: "
                "`lambda tasks: jaxjd.graddrop(num_tasks=tasks.size)`.)"
            ) from error

    def make(tasks: jax.Array) -> Any:
        made = weighting if given else weighting(tasks=tasks)
        if isinstance(made, Scalarizer):
            return made
        if isinstance(made, Weighting):
            return weighted(made, num_tasks=tasks.size)
        if not isinstance(made, optax.GradientTransformation):
            raise ValueError(
                "The function of `tasks` must return a jaxjd.Weighting, an aggregator or a "
                f"jaxjd.Scalarizer, got {type_name(made)}."
            )
        return optax.with_extra_args_support(made)

    return make


def _scalarizer(make: Callable[[jax.Array], Scalarizer], m: int, k: int) -> Scalarizer:
    def state_of(tasks: jax.Array) -> PyTree:
        return make(tasks).init(tasks.size)

    # Arguments with one entry per task show in `apply`.
    _shapes(lambda tasks: make(tasks).apply(jnp.ones(tasks.size), state_of(tasks)), m + 1)

    def init(num_tasks: Any = None) -> PyTree:
        if num_tasks not in (None, m):
            raise ValueError(f"`subset` was made with num_tasks={m}, got {num_tasks}.")
        return _initial(state_of, m, k)

    def present(losses: PyTree, state: PyTree, tasks: Any) -> tuple:
        check_length("losses", sum(jnp.size(leaf) for leaf in jax.tree.leaves(losses)), k)
        tasks, valid = _check_tasks(tasks, m, k)
        axes = _task_axes(state_of, m, state)
        return make(tasks), _take(state, axes, tasks), axes, tasks, valid

    def apply(losses: PyTree, state: PyTree, *, tasks: Any = None) -> jax.Array:
        scalarizer, part, _, _, valid = present(losses, state, tasks)
        return scalarizer.apply(losses, part) * jnp.where(valid, 1, jnp.nan)

    def update(losses: PyTree, state: PyTree, *, tasks: Any = None, **extra_args: Any) -> PyTree:
        scalarizer, part, axes, tasks, _ = present(losses, state, tasks)
        return _put(state, axes, tasks, scalarizer.update(losses, part, **extra_args))

    return Scalarizer(init, apply, update)


def _check_tasks(tasks: Any, m: int, k: int) -> tuple[jax.Array, jax.Array]:
    """Returns the indices, and whether they are different tasks, which a tracer does not tell."""
    if isinstance(tasks, (list, tuple)) and all(isinstance(task, int) for task in tasks):
        if len(set(tasks)) != len(tasks) or not all(0 <= task < m for task in tasks):
            raise ValueError(f"`tasks` must be different integers from 0 to {m - 1}, got {tasks}.")
        tasks = jnp.asarray(tasks)
    kind = getattr(tasks, "dtype", None)
    if kind is None or not jnp.issubdtype(kind, jnp.integer) or tasks.shape != (k,):
        raise ValueError(
            f"`tasks` must be the indices of the {k} tasks of the step, integers of shape ({k},), "
            f"got {type_name(tasks)}."
        )
    tasks = jnp.asarray(tasks).astype(jnp.int32)  # A narrow dtype may not hold `m`.
    ordered = jnp.sort(tasks)
    inside = (ordered[0] >= 0) & (ordered[-1] < m)
    return tasks, inside & jnp.all(ordered[1:] != ordered[:-1])


def _initial(state_of: Callable[[jax.Array], PyTree], m: int, k: int) -> PyTree:
    """The first state of `m` tasks, with the values of methods for `k` of them."""
    state = state_of(jnp.arange(m))
    axes = _task_axes(state_of, m, state)
    leaves, treedef = jax.tree.flatten(state)
    for start in range(0, m, k) if any(axes) else ():
        tasks = min(start, m - k) + jnp.arange(k)
        part = jax.tree.leaves(state_of(tasks))
        # The rest is counts and keys, and keys of tasks differ within one state only.
        leaves = [
            _put_leaf(leaf, new, own, tasks)
            if own and jnp.issubdtype(leaf.dtype, jnp.inexact)
            else leaf
            for leaf, new, own in zip(leaves, part, axes, strict=True)
        ]
    return treedef.unflatten(leaves)


def _task_axes(
    state_of: Callable[[jax.Array], PyTree], m: int, state: PyTree
) -> list[tuple[int, ...]]:
    """The task axes of every leaf of a state, in tree order.

    Raises:
      ValueError: If a leaf depends on the number of tasks in another way, or `state` is not for
        `m` tasks.
    """
    shapes, more = (_shapes(state_of, size) for size in (m, m + 1))
    leaves = jax.tree.leaves(state)
    if jax.tree.structure(shapes) != jax.tree.structure(state):
        raise ValueError(
            f"The state of `subset` must be what its `init` returns, {jax.tree.structure(shapes)}, "
            f"got {jax.tree.structure(state)}."
        )
    if jax.tree.structure(shapes) != jax.tree.structure(more):
        raise ValueError(
            "`subset` expects a state whose structure does not depend on the number of tasks, "
            f"found {jax.tree.structure(shapes)} for {m} tasks and {jax.tree.structure(more)} for "
            f"{m + 1}."
        )
    found = []
    pairs = zip(jax.tree.leaves_with_path(shapes), jax.tree.leaves(more), leaves, strict=True)
    for (path, small), large, leaf in pairs:
        sizes = list(zip(small.shape, large.shape, strict=False))
        axes = tuple(place for place, (size, other) in enumerate(sizes) if size != other)
        if small.ndim != large.ndim or any(sizes[axis] != (m, m + 1) for axis in axes):
            raise ValueError(
                f"State leaf '{path_name(path)}': `subset` expects axes of the size of the number "
                f"of tasks, found the shape {small.shape} for {m} tasks and {large.shape} for "
                f"{m + 1}."
            )
        if any(jnp.shape(leaf)[axis : axis + 1] != (m,) for axis in axes):
            raise ValueError(
                f"State leaf '{path_name(path)}': expected the shape {small.shape} for {m} tasks, "
                f"found {jnp.shape(leaf)}."
            )
        found.append(axes)
    return found


def _shapes(state_of: Callable[[jax.Array], PyTree], size: int) -> PyTree:
    try:
        return jax.eval_shape(lambda: state_of(jnp.arange(size)))
    except ValueError as error:
        raise ValueError(
            f"`subset` makes the method for {size} tasks to see what its state holds per task, and "
            "this fails. If it has an argument with one entry per task, pass a function: "
            f"`lambda tasks: jaxjd.weightings.upgrad(preferences[tasks])`. ({error})"
        ) from error


def _take(state: PyTree, axes: list[tuple[int, ...]], tasks: jax.Array) -> PyTree:
    """The part of a state that belongs to some tasks, and what belongs to none."""
    leaves, treedef = jax.tree.flatten(state)

    def take(leaf: Any, own: tuple[int, ...]) -> Any:
        if not own:
            return leaf
        front = jnp.moveaxis(leaf, own, range(len(own)))
        return jnp.moveaxis(front[jnp.ix_(*[tasks] * len(own))], range(len(own)), own)

    return treedef.unflatten([take(*pair) for pair in zip(leaves, axes, strict=True)])


def _put(state: PyTree, axes: list[tuple[int, ...]], tasks: jax.Array, part: PyTree) -> PyTree:
    """A state with another part for some tasks, and for what belongs to none."""
    leaves, treedef = jax.tree.flatten(state)
    rows = zip(leaves, jax.tree.leaves(part), axes, strict=True)
    return treedef.unflatten(
        [_put_leaf(leaf, new, own, tasks) if own else new for leaf, new, own in rows]
    )


def _put_leaf(leaf: Any, new: Any, axes: tuple[int, ...], tasks: jax.Array) -> jax.Array:
    places = range(len(axes))
    front, new = (jnp.moveaxis(array, axes, places) for array in (leaf, new))
    return jnp.moveaxis(front.at[jnp.ix_(*[tasks] * len(axes))].set(new), places, axes)


def _without_logs(state: PyTree) -> PyTree:
    """The state with zeros for the weights of the last call, which absent tasks have none of."""

    def clear(node: Any) -> Any:
        if not isinstance(node, _LOGS):
            return node
        return node._replace(weights=jax.tree.map(jnp.zeros_like, node.weights))

    return jax.tree.map(clear, state, is_leaf=lambda node: isinstance(node, _LOGS))
