"""Diagnostics in the state of an aggregator."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxjd.base import (
    Aggregator,
    Certified,
    Jacobian,
    PyTree,
    largest_residual,
    solve,
    weight_dtype,
)
from jaxjd.checks import check_range, check_static_int, type_name
from jaxjd.diagnostics._change import predicted_change_by
from jaxjd.diagnostics._conflict import conflict_rate, cosine_matrix
from jaxjd.diagnostics._rank import effective_rank
from jaxjd.diagnostics._stationarity import stationarity_gaps
from jaxjd.linalg.algebra import count_rows, gramian, plain_leaves, without
from jaxjd.solvers.scaling import unit_diagonal


class MonitoredState(NamedTuple):
    """The state of `monitored`; the diagnostics are those of the last call, zeros before it.

    Attributes:
      inner_state: The state of the aggregator; its weights are there.
      cosines: The cosines between the tasks' gradients, shape ``(m, m)``; see `cosine_matrix`.
      conflict_rate: The share of the pairs of tasks that conflict, shape ``()``.
      update_conflict_rate: The share of the losses that the step increases to first order, beyond
        rounding, shape ``()``.
      predicted_change: The change of every loss by the step, to first order, shape ``(m,)``; per
        unit of the learning rate unless one was given.
      stationarity_gap: The length of the shortest convex combination of the gradients, shape
        ``()``.
      relative_stationarity_gap: The same with all gradients scaled to unit length, from 0 to 1,
        shape ``()``.
      effective_rank: The effective rank of the Gramian, from 1 to `m`, shape ``()``.
      solver_residual: By how much the aggregator's answer misses the conditions of its problem,
        shape ``()``; -1 if it solves none. See `jaxjd.diagnostics.solver_residual`.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> aggregator = jaxjd.diagnostics.monitored(jaxjd.upgrad(), num_tasks=2)
      >>> aggregator.init(jnp.zeros(3)).cosines.shape
      (2, 2)
    """

    inner_state: PyTree
    cosines: jax.Array
    conflict_rate: jax.Array
    update_conflict_rate: jax.Array
    predicted_change: jax.Array
    stationarity_gap: jax.Array
    relative_stationarity_gap: jax.Array
    effective_rank: jax.Array
    solver_residual: jax.Array


def monitored(
    aggregator: optax.GradientTransformation,
    num_tasks: int,
    learning_rate: jax.typing.ArrayLike | None = 1.0,
) -> Aggregator:
    """Keeps diagnostics of every call in the state of an aggregator, which works as before.

    They are functions of the Gramian of the Jacobian that comes in, which the compiler computes
    once for them and for the aggregator, and of what the aggregator makes of it. The aggregator's
    problem is solved once. Around a `jaxjd.partition` with plain gradients for some parameters
    (task heads), they are those of the other parameters, which have a Jacobian: the cosines, and
    the part of every change, in them.

    Args:
      aggregator: Any aggregator, also within `jaxjd.partition`; or a chain that starts with one.
      num_tasks: The number of tasks ``m``, which sizes the state.
      learning_rate: What the predicted changes are multiplied by: the step is taken to be
        ``-learning_rate`` times what `aggregator` returns. None if it is a whole chain that returns
        the step itself, sign and learning rate included.

    Returns:
      An `Aggregator` with state `MonitoredState`. Extra arguments reach `aggregator`.

    Raises:
      ValueError: If `aggregator` is none, `num_tasks` not a positive static int or `learning_rate`
        not a scalar; in `update`, if the Jacobian is malformed or has another number of tasks.

    Example:
      >>> import jax.numpy as jnp, optax, jaxjd
      >>> aggregator = jaxjd.diagnostics.monitored(jaxjd.mean(), num_tasks=2)
      >>> tx = optax.chain(aggregator, optax.sgd(0.1))
      >>> jacobian = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> _, (state, _) = tx.update(jacobian, tx.init(jnp.zeros(3)))
      >>> print(state.predicted_change)  # The first loss would rise.
      [ 2. -8.]
      >>> print(state.update_conflict_rate)
      0.5
    """
    if not isinstance(aggregator, optax.GradientTransformation):
        raise ValueError(
            "`aggregator` must be an aggregator or a chain that starts with one (a factory has to "
            f"be called first), got {type_name(aggregator)}."
        )
    num_tasks = check_static_int("num_tasks", num_tasks, at_least=1)
    if learning_rate is not None:
        check_range("learning_rate", learning_rate)
    inner = optax.with_extra_args_support(aggregator)

    def init(params: PyTree) -> MonitoredState:
        shapes = [(num_tasks, num_tasks), (), (), (num_tasks,), (), (), (), ()]
        dtype = weight_dtype(params)
        return MonitoredState(inner.init(params), *(jnp.zeros(shape, dtype) for shape in shapes))

    def update(
        updates: Jacobian, state: MonitoredState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple:
        plain = plain_leaves(updates, params)
        m = count_rows(updates, params, plain)
        if m is not None and m != num_tasks:
            raise ValueError(
                f"`monitored` was made with num_tasks={num_tasks}, but the Jacobian has {m} rows "
                "(the size of its leading task axis)."
            )
        direction, inner_state, certificate = solve(
            inner.update, updates, state.inner_state, params, **extra_args
        )
        if m is None:
            return direction, state._replace(inner_state=inner_state), None
        residual = largest_residual(certificate, weight_dtype(updates))
        rows, moved = (without(tree, plain) for tree in (updates, direction))
        found = (*_diagnose(rows, moved, learning_rate), residual)
        cast = jax.tree.map(lambda new, old: new.astype(jnp.asarray(old).dtype), found, state[1:])
        return direction, MonitoredState(inner_state, *cast), certificate

    return Aggregator(init, Certified(update))  # type: ignore[arg-type]


def _diagnose(
    jacobian: Jacobian, direction: PyTree, learning_rate: jax.typing.ArrayLike | None
) -> tuple[jax.Array, ...]:
    """The fields of `MonitoredState` between the first and the last one."""
    products = gramian(jacobian)
    if learning_rate is None:
        change = predicted_change_by(direction, jacobian)
    else:  # A gradient, which an optimizer subtracts the conjugate of.
        change = -predicted_change_by(jax.tree.map(jnp.conj, direction), jacobian)
    # No more than the rounding of the direction to its dtype can make of nothing.
    unit = unit_diagonal(products)
    gaps = stationarity_gaps(unit)
    rounding = jnp.sqrt(_square(direction)) * unit.lengths
    level = max(_eps(leaf) for leaf in jax.tree.leaves(direction)) * rounding
    worse = jnp.mean((change > level).astype(change.dtype))
    worse = jnp.where(jnp.any(jnp.isnan(change)), jnp.nan, worse)
    if learning_rate is not None:
        change = jnp.asarray(learning_rate, change.dtype) * change
    return (
        cosine_matrix(products),
        conflict_rate(products),
        worse,
        change,
        gaps[0],
        gaps[1],
        effective_rank(products),
    )


def _eps(leaf: jax.Array) -> float:
    # At least what the products and their sums are rounded by.
    info = jnp.finfo
    return max(float(info(leaf.dtype).eps), 16 * float(info(weight_dtype([leaf])).eps))


def _square(tree: PyTree) -> jax.Array:
    rows = jax.tree.map(lambda leaf: leaf[None], tree)
    return gramian(rows)[0, 0]
