"""ConFIG on momenta (M-ConFIG)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxjd.aggregators._weighted import check_num_tasks
from jaxjd.base import (
    Aggregator,
    Certified,
    PyTree,
    require_num_tasks,
    solve,
    weight_dtype,
)
from jaxjd.checks import check_range, check_state, check_static_int, path_name, type_name
from jaxjd.linalg.algebra import combine, count_tasks, gramian, refuse_complex
from jaxjd.linalg.sharded import local_rows, mark_like, num_shards, sum_leaves
from jaxjd.solvers.scaling import safe_sqrt
from jaxjd.weightings._conflict_free import conflict_free
from jaxjd.weightings._rows import as_shaped


class MomentumConflictFreeState(NamedTuple):
    """The state of `momentum_conflict_free`.

    Attributes:
      task_counts: How many gradients each task has had, shape ``(m,)``, int32.
      count: The number of calls since every task has had one, shape ``()``, int32.
      weights: The weights of the first moments in the last call, shape ``(m,)``, zeros at first.
      first_moments: The bias-corrected averages of each task's gradients: a pytree like the
        parameters whose leaves have shape ``(m, *param.shape)``, zeros at first; at least float32.
      direction: The combination of them in the last call: a pytree like the parameters.
      second_moment: The bias-corrected average of squares that belongs to it: a pytree like the
        parameters.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> state = jaxjd.momentum_conflict_free(num_tasks=2).init(jnp.zeros(3))
      >>> print(state.first_moments.shape, state.second_moment.shape)
      (2, 3) (3,)
    """

    task_counts: jax.Array
    count: jax.Array
    weights: jax.Array
    first_moments: PyTree
    direction: PyTree
    second_moment: PyTree


def momentum_conflict_free(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    pref_vector: PyTree | None = None,
    *,
    num_tasks: int | None = None,
) -> Aggregator:
    r"""M-ConFIG: ConFIG of every task's momentum, for as little as one gradient per step.

    Each task has a first moment, as in Adam; the direction is that of `jaxjd.conflict_free` for
    these; and one second moment, of the gradient that would have moved the first moment of a plain
    Adam to this direction, scales it:

    .. math:: m_i \leftarrow \beta_1 m_i + (1 - \beta_1) g_i, \qquad
              d_t = \operatorname{ConFIG}(\hat m_1, \dots, \hat m_m), \qquad
              \tilde g_t = \frac{(1 - \beta_1^t) \, d_t - \beta_1 (1 - \beta_1^{t-1}) \, d_{t-1}}
              {1 - \beta_1}

    .. math:: v \leftarrow \beta_2 v + (1 - \beta_2) \tilde g_t^2, \qquad
              \text{update} = d_t / (\sqrt{\hat v} + \epsilon \bar v)

    Hats are bias corrections, for :math:`\hat m_i` with the number of gradients that the task has
    had, and :math:`\bar v` is the root mean square of :math:`\sqrt{\hat v}` over all parameters.
    From Liu, Chu and Thuerey, "ConFIG: Towards Conflict-free Training of Physics Informed Neural
    Networks" (ICLR 2025, https://arxiv.org/abs/2408.11104), Algorithm 1.

    `update` takes either the Jacobian, or, with the extra argument ``task=``, the gradient of that
    one task, shaped like the parameters: then a step costs one backward pass, and tasks take turns.
    Until every task has had a gradient the update is zero. Like Adam's, the update has the size of
    a learning rate, whatever the scale of the losses: chain it with `optax.scale_by_learning_rate`,
    not with another momentum. Memory is one Jacobian and two gradients.

    Args:
      b1: The decay :math:`\beta_1` of the first moments, in [0, 1).
      b2: The decay :math:`\beta_2` of the second moment, in [0, 1).
      eps: Added to the denominator, relative to its root mean square, so that it does not depend on
        the scale of the gradients, non-negative.
      pref_vector: The wanted cosines of the direction with the first moments up to a factor, shape
        ``(m,)`` or laid out as the losses; ones by default.
      num_tasks: The number of tasks ``m``, required: the state depends on it.

    Returns:
      An `Aggregator` with state `MomentumConflictFreeState`.

    Raises:
      ValueError: If an argument is out of range or `num_tasks` is missing; in `update`, if the
        Jacobian is malformed, or, with `task`, if `task` is not the index of a task or the gradient
        is not shaped like the parameters.

    Example:
      One gradient per step; the index of the task may be traced:

      >>> import jax, jax.numpy as jnp, optax, jaxjd
      >>> losses = lambda p: jnp.stack([jnp.sum((p - 1.0) ** 2), jnp.sum((p + 1.0) ** 2)])
      >>> tx = optax.chain(
      ...     jaxjd.momentum_conflict_free(num_tasks=2), optax.scale_by_learning_rate(0.1)
      ... )
      >>> def step(carry, task):
      ...     params, state = carry
      ...     gradient = jax.grad(lambda p: losses(p)[task])(params)
      ...     updates, state = tx.update(gradient, state, params, task=task)
      ...     return (optax.apply_updates(params, updates), state), None
      >>> params = jnp.array([3.0, -0.5])
      >>> (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(200) % 2)
      >>> bool(jnp.abs(params[0] - params[1]) < 0.02)  # between the minima of the losses
      True

      All of them:

      >>> aggregator = jaxjd.momentum_conflict_free(num_tasks=2)
      >>> jacobian = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> update, state = aggregator.update(jacobian, aggregator.init(jnp.zeros(3)))
      >>> print(jnp.round(update, 3))  # the first update of Adam is a sign, too
      [1. 1. 1.]
    """
    check_range("b1", b1, at_least=0, below=1)
    check_range("b2", b2, at_least=0, below=1)
    check_range("eps", eps, at_least=0)
    m = require_num_tasks(num_tasks, "momentum_conflict_free")
    weighting = conflict_free(pref_vector)

    def init(params: PyTree) -> MomentumConflictFreeState:
        weighting.init(m)  # Compares sizes.
        params = jax.tree.map_with_path(as_shaped, params)
        zeros = jax.tree.map(_zeros, params)
        return MomentumConflictFreeState(
            task_counts=jnp.zeros((m,), jnp.int32),
            count=jnp.zeros((), jnp.int32),
            weights=jnp.zeros((m,), weight_dtype(params)),
            first_moments=jax.tree.map(
                # Broadcasting keeps the sharding of the parameter in the type.
                lambda param: jnp.broadcast_to(_zeros(param), (m, *param.shape)),
                params,
            ),
            direction=zeros,
            second_moment=jax.tree.map(_zeros, params),
        )

    def update(
        updates: PyTree,
        state: MomentumConflictFreeState,
        params: PyTree | None = None,
        *,
        task: Any = None,
        **extra_args: Any,
    ) -> tuple:
        leaves, treedef = jax.tree.flatten(updates)
        if not leaves:
            return updates, state, None
        check_state("`momentum_conflict_free`", state, MomentumConflictFreeState)
        refuse_complex(updates, "momentum_conflict_free")
        moments, structure = jax.tree.flatten(state.first_moments)
        if task is None:
            check_num_tasks(count_tasks(updates, params) or m, m)
            _check_leaves(updates, [leaf.shape for leaf in moments])
            task_counts = optax.safe_increment(state.task_counts)
            rates = _rate(b1, task_counts, state.weights.dtype)
            moved = [
                moment + _rows(rates, moment) * (local_rows(leaf).astype(moment.dtype) - moment)
                for leaf, moment in zip(leaves, moments, strict=True)
            ]
        else:
            task = _check_task(task, m)
            _check_leaves(updates, [leaf.shape[1:] for leaf in moments], one_task=True)
            task_counts = state.task_counts.at[task].set(
                optax.safe_increment(state.task_counts[task])
            )
            rate = _rate(b1, task_counts[task], state.weights.dtype)
            moved = []
            for leaf, moment in zip(leaves, moments, strict=True):
                row = lax.dynamic_index_in_dim(moment, task, keepdims=False)
                row = row + rate.astype(row.dtype) * (local_rows(leaf).astype(row.dtype) - row)
                moved.append(lax.dynamic_update_index_in_dim(moment, row, task, 0))

        ready = jnp.all(task_counts > 0)
        weights, _, certificate = solve(weighting.update, gramian(mark_like(moved, leaves)), ())
        count = jnp.where(ready, optax.safe_increment(state.count), state.count)
        dtype = weights.dtype
        # The plain gradient whose average moves as the direction has moved.
        inverse_rate = 1 / _rate(b1, jnp.maximum(count, 1), dtype)
        rate = _rate(b2, jnp.maximum(count, 1), dtype)
        directions, seconds = [], []
        for direction, old, second in zip(
            combine(weights, moved),
            jax.tree.leaves(state.direction),
            jax.tree.leaves(state.second_moment),
            strict=True,
        ):
            pseudo = old + inverse_rate.astype(old.dtype) * (direction - old)
            new = second + rate.astype(second.dtype) * (jnp.square(pseudo) - second)
            directions.append(jnp.where(ready, direction, old))
            seconds.append(jnp.where(ready, new, second))
        scaled = [
            jnp.where(ready, new, 0).astype(leaf.dtype)
            for new, leaf in zip(
                _divide(directions, seconds, leaves, eps, dtype), leaves, strict=True
            )
        ]
        next_state = MomentumConflictFreeState(
            task_counts=task_counts,
            count=count,
            weights=jnp.where(ready, weights, 0).astype(state.weights.dtype),
            first_moments=jax.tree.unflatten(structure, moved),
            direction=jax.tree.unflatten(structure, directions),
            second_moment=jax.tree.unflatten(structure, seconds),
        )
        return jax.tree.unflatten(treedef, scaled), next_state, certificate

    return Aggregator(init, Certified(update))  # type: ignore[arg-type]


def _zeros(param: Any) -> jax.Array:
    return jnp.zeros_like(param, dtype=jnp.promote_types(param.dtype, jnp.float32))


def _rows(factors: jax.Array, leaf: jax.Array) -> jax.Array:
    """One number per row, shaped to multiply a leaf."""
    return jnp.expand_dims(factors.astype(leaf.dtype), tuple(range(1, leaf.ndim)))


def _rate(decay: jax.typing.ArrayLike, count: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The weight ``(1 - b) / (1 - b^t)`` of the newest value in a bias-corrected average."""
    new = jnp.asarray(1 - decay, dtype)
    # No difference of numbers that are close to one.
    return new / -jnp.expm1(count.astype(dtype) * jnp.log1p(-new))


def _divide(
    directions: list[jax.Array],
    seconds: list[jax.Array],
    leaves: list[Any],
    eps: jax.typing.ArrayLike,
    dtype: jnp.dtype,
) -> list[jax.Array]:
    """Divides by the roots of the second moments; what has had no gradient stays zero."""
    pairs = list(zip(seconds, leaves, strict=True))
    size = max(1, sum(second.size * num_shards(leaf) for second, leaf in pairs))
    total = sum_leaves([jnp.sum(second).astype(dtype) for second in seconds], leaves)
    small = jnp.asarray(eps, dtype) * safe_sqrt(total / size)
    divided = []
    for direction, second in zip(directions, seconds, strict=True):
        root = safe_sqrt(second) + small.astype(second.dtype)
        divided.append(jnp.where(root == 0, 0, direction / jnp.where(root == 0, 1, root)))
    return divided


def _check_task(task: Any, num_tasks: int) -> jax.Array:
    if not hasattr(task, "aval"):
        task = check_static_int("task", task, at_least=0)
        if task >= num_tasks:
            raise ValueError(f"`task` must be < {num_tasks}, the number of tasks, got {task}.")
        return jnp.asarray(task, jnp.int32)
    if task.shape != () or not jnp.issubdtype(task.dtype, jnp.integer):
        raise ValueError(f"`task` must be the index of one task, got {type_name(task)}.")
    return task


def _check_leaves(
    updates: PyTree, shapes: list[tuple[int, ...]], *, one_task: bool = False
) -> None:
    leaves = jax.tree.leaves_with_path(updates)
    if len(leaves) != len(shapes):
        raise ValueError(
            f"`momentum_conflict_free` was initialized with {len(shapes)} leaves, found "
            f"{len(leaves)}."
        )
    for (path, leaf), shape in zip(leaves, shapes, strict=True):
        if getattr(leaf, "shape", None) != shape:
            kind = "the gradient of one task, as `task` says," if one_task else "the Jacobian"
            raise ValueError(
                f"Leaf '{path_name(path)}': expected shape {shape} in {kind} found "
                f"{type_name(leaf)}."
            )
