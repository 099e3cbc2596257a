"""Any transformation of gradients, applied to every task's gradient on its own."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxjd.base import Jacobian, PyTree, stack_states
from jaxjd.checks import check_length, check_static_int, path_name
from jaxjd.linalg.algebra import count_rows, materialize, plain_leaves
from jaxjd.transforms._arguments import check_transform


class PerTaskState(NamedTuple):
    """The state of `per_task`.

    Attributes:
      inner_states: The transformation's states of all tasks, stacked: every leaf has a leading task
        axis of size ``m``.

    Example:
      >>> import jax.numpy as jnp, optax, jaxjd
      >>> state = jaxjd.per_task(optax.trace(0.9), num_tasks=2).init({"w": jnp.zeros(3)})
      >>> state.inner_states.trace["w"].shape
      (2, 3)
    """

    inner_states: PyTree


def per_task(
    tx: optax.GradientTransformation, num_tasks: int
) -> optax.GradientTransformationExtraArgs:
    r"""Applies a transformation of gradients to the gradient of every task, before aggregation.

    Row `i` of the result is what `tx`, with a state of its own, makes of row `i`. Clipping,
    normalizing, momentum or an average of every task's gradient is done this way; without it,
    ``optax.clip_by_global_norm`` would clip the joint norm of all tasks, and ``optax.ema`` would
    change the shapes of its state at the first step.

    Args:
      tx: A transformation that keeps the shapes of the gradient. Each task has its own state;
        random keys in it differ from task to task.
      num_tasks: The number of tasks ``m``.

    Returns:
      A transformation with state `PerTaskState`. It takes and returns a Jacobian, with leaves of
      shape ``(m, *param.shape)``; factored leaves are materialized, and leaves that are split over
      devices refused, since `tx` may sum over entries. `params` and extra arguments are the same
      for all tasks. Leaves that are plain gradients, shaped like their parameters (heads beside the
      Jacobian of a trunk; `params` tell), belong to no task and pass as they are: `tx` sees zeros
      in their place. (``optax.masked`` around `per_task` saves the state for them.)

    Raises:
      ValueError: If `tx` is no transformation or `num_tasks` no positive static int; in `update`,
        if the Jacobian is malformed or has another number of tasks, or if `tx` changes a shape.

    Example:
      >>> import jax.numpy as jnp, optax, jaxjd
      >>> tx = optax.chain(jaxjd.per_task(optax.clip_by_global_norm(1.0), num_tasks=2), jaxjd.sum())
      >>> update, _ = tx.update(jnp.array([[3.0, 0.0], [0.0, 0.5]]), tx.init(jnp.zeros(2)))
      >>> print(update)
      [1.  0.5]
    """
    inner = optax.with_extra_args_support(check_transform("tx", tx))
    num_tasks = check_static_int("num_tasks", num_tasks, at_least=1)

    def init(params: PyTree) -> PerTaskState:
        return PerTaskState(stack_states(inner.init(params), num_tasks))

    def update(
        updates: Jacobian, state: PerTaskState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[Jacobian, PerTaskState]:
        plain = plain_leaves(updates, params)
        m = count_rows(updates, params, plain)
        if m is None:
            return updates, state
        check_length("the Jacobian", m, num_tasks)
        leaves, treedef = jax.tree.flatten(updates)
        rows = [
            jnp.zeros((m, *leaf.shape), leaf.dtype) if is_plain else leaf
            for leaf, is_plain in zip(leaves, plain, strict=True)
        ]
        rows = materialize(jax.tree.unflatten(treedef, rows))
        new, states = jax.vmap(lambda row, own: inner.update(row, own, params, **extra_args))(
            rows, state.inner_states
        )
        _check_shapes(rows, new)
        results = [
            leaf if is_plain else result
            for leaf, is_plain, result in zip(leaves, plain, jax.tree.leaves(new), strict=True)
        ]
        return jax.tree.unflatten(treedef, results), PerTaskState(states)

    return optax.GradientTransformationExtraArgs(init, update)


def _check_shapes(rows: Jacobian, new: Jacobian) -> None:
    if jax.tree.structure(rows) != jax.tree.structure(new):
        raise ValueError(
            "`per_task` expects a transformation that keeps the structure of the gradient "
            f"{jax.tree.structure(rows)}, found {jax.tree.structure(new)}."
        )
    found = jax.tree.leaves(new)
    for (path, row), leaf in zip(jax.tree.leaves_with_path(rows), found, strict=True):
        if leaf.shape != row.shape:
            raise ValueError(
                f"Leaf '{path_name(path)}': `per_task` expects a transformation that keeps the "
                f"shape {row.shape[1:]} of a gradient, found {leaf.shape[1:]}."
            )
