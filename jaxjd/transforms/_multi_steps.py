"""One update from several microbatches: Jacobians are accumulated, and aggregated once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxjd.base import Jacobian, PyTree, weight_dtype
from jaxjd.checks import check_length, check_static_int
from jaxjd.linalg.algebra import count_rows, param_shapes, plain_leaves
from jaxjd.linalg.sharded import mark_like
from jaxjd.transforms._arguments import check_transform
from jaxjd.weightings._losses import read_losses
from jaxjd.weightings._rows import paired_leaves, zero_rows


class MultiStepsState(NamedTuple):
    """The state of `multi_steps`.

    Attributes:
      mini_step: How many microbatches are accumulated, int32, 0 after an update.
      step: How many updates there were, int32.
      inner_state: The state of the transformation; it changes when there is an update.
      jacobian: The sum of the accumulated Jacobians, leaves of shape ``(m, *param.shape)`` in at
        least float32; that of a plain gradient stands in each of the `m` places.
      losses: The sum of the accumulated losses, shape ``(m,)``; zeros if none are passed.
      cross_jacobians: The sums of the pair of Jacobians; the empty tuple unless asked for.

    Example:
      >>> import jax.numpy as jnp, optax, jaxjd
      >>> tx = optax.chain(jaxjd.upgrad(), optax.sgd(0.1))
      >>> state = jaxjd.multi_steps(tx, 4, num_tasks=2).init({"w": jnp.zeros(3)})
      >>> state.jacobian["w"].shape, int(state.mini_step)
      ((2, 3), 0)
    """

    mini_step: jax.Array
    step: jax.Array
    inner_state: PyTree
    jacobian: Jacobian
    losses: jax.Array
    cross_jacobians: tuple[Jacobian, Jacobian] | tuple[()]


def multi_steps(
    tx: optax.GradientTransformation,
    k: int | Callable[[jax.Array], jax.Array],
    num_tasks: int,
    *,
    cross_jacobians: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Accumulates the Jacobians of `k` microbatches and then aggregates their mean.

    .. math:: \bar J = \frac1k \sum_{t=1}^k J_t, \qquad u = \mathrm{tx}(\bar J)

    On the other calls the updates are zero and the state of `tx` stays as it is. With losses that
    are means over examples, `k` microbatches equal one batch of `k` times the size. (Aggregating
    every microbatch and averaging that, as ``optax.MultiSteps`` behind an aggregator does, is
    something else: the conflict between the means is not the mean of the conflicts.
    ``optax.MultiSteps`` around an aggregator fails, because its accumulator has no task axis.)

    Args:
      tx: The chain that starts with an aggregator.
      k: How many microbatches make an update, or a function of the number of updates so far
        (traced, int32) that returns it.
      num_tasks: The number of tasks ``m``.
      cross_jacobians: Whether the extra argument `cross_jacobians` is accumulated as well, which
        takes the memory of two more Jacobians.

    Returns:
      A transformation with state `MultiStepsState`. The sums are kept in at least float32; factored
      leaves are materialized. The extra argument ``losses`` reaches `tx` as the mean over the
      microbatches, as a vector; other extra arguments are those of the last microbatch. Leaves that
      are plain gradients, shaped like their parameters (task heads beside the Jacobian of a trunk),
      are accumulated likewise, for a `jaxjd.partition` that takes them.

    Raises:
      ValueError: If an argument is out of range; in `update`, if the Jacobian is malformed or has
        another number of tasks, or if `cross_jacobians` are passed without being accumulated.

    Example:
      >>> import jax.numpy as jnp, optax, jaxjd
      >>> tx = jaxjd.multi_steps(optax.chain(jaxjd.sum(), optax.sgd(1.0)), 2, num_tasks=2)
      >>> state = tx.init(jnp.zeros(2))
      >>> first, state = tx.update(jnp.array([[1.0, 0.0], [0.0, 2.0]]), state)
      >>> second, state = tx.update(jnp.array([[3.0, 0.0], [0.0, 4.0]]), state)
      >>> print(first, second)
      [0. 0.] [-2. -3.]
    """
    inner = optax.with_extra_args_support(check_transform("tx", tx))
    num_tasks = check_static_int("num_tasks", num_tasks, at_least=1)
    if not callable(k):
        k = check_static_int("k", k, at_least=1)

    def init(params: PyTree) -> MultiStepsState:
        zeros = [zero_rows(params, num_tasks, "multi_steps") for _ in range(3)]
        return MultiStepsState(
            mini_step=jnp.zeros((), jnp.int32),
            step=jnp.zeros((), jnp.int32),
            inner_state=inner.init(params),
            jacobian=zeros[0],
            losses=jnp.zeros((num_tasks,), weight_dtype(params)),
            cross_jacobians=(zeros[1], zeros[2]) if cross_jacobians else (),
        )

    def update(
        updates: Jacobian, state: MultiStepsState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, MultiStepsState]:
        like = param_shapes(state.jacobian) if params is None else params
        m = count_rows(updates, like, plain_leaves(updates, like))
        if m is None:
            return updates, state
        check_length("the Jacobian", m, num_tasks)
        with_losses = extra_args.get("losses") is not None
        losses = state.losses
        if with_losses:
            losses = losses + read_losses(extra_args, "multi_steps", m, losses.dtype)
        pair = _pair_of(extra_args, cross_jacobians)
        jacobian = _add(updates, state.jacobian)
        crossed = tuple(
            _add(new, old) for new, old in zip(pair, state.cross_jacobians, strict=True)
        )
        mini_step = state.mini_step + 1
        wanted = k(state.step) if callable(k) else k

        # Operands, not closures: outside of jit, zeros like a constant lose its sharding's type.
        operands = (jacobian, losses, crossed, params)

        def emit(jacobian, losses, crossed, params) -> tuple[PyTree, MultiStepsState]:
            extra = dict(extra_args)
            if with_losses:
                extra["losses"] = losses / mini_step.astype(losses.dtype)
            if pair:
                extra["cross_jacobians"] = tuple(
                    _mean(total, mini_step, new) for total, new in zip(crossed, pair, strict=True)
                )
            mean = _mean(jacobian, mini_step, updates)
            result, inner_state = inner.update(mean, state.inner_state, params, **extra)
            zeros = jax.tree.map(jnp.zeros_like, (jacobian, losses, crossed))
            step = optax.safe_increment(state.step)
            return result, MultiStepsState(jnp.zeros_like(mini_step), step, inner_state, *zeros)

        like, _ = jax.eval_shape(emit, *operands)

        def wait(jacobian, losses, crossed, params) -> tuple[PyTree, MultiStepsState]:
            # Made from what has the updates' sharding.
            rows = jax.tree.map(lambda leaf: leaf[0], jacobian) if params is None else params
            zeros = [
                jnp.zeros_like(row, dtype=leaf.dtype)
                for row, leaf in zip(jax.tree.leaves(rows), jax.tree.leaves(like), strict=True)
            ]
            result = jax.tree.unflatten(jax.tree.structure(like), zeros)
            return result, MultiStepsState(
                mini_step, state.step, state.inner_state, jacobian, losses, crossed
            )

        return lax.cond(mini_step >= wanted, emit, wait, *operands)

    return optax.GradientTransformationExtraArgs(init, update)


def _add(new: Jacobian, total: Jacobian) -> Jacobian:
    plain = plain_leaves(new, param_shapes(total))
    if any(plain):
        leaves, treedef = jax.tree.flatten(new)
        sizes = [leaf.shape[0] for leaf in jax.tree.leaves(total)]
        rows = [
            jnp.broadcast_to(leaf, (size, *leaf.shape)) if is_plain else leaf
            for leaf, size, is_plain in zip(leaves, sizes, plain, strict=True)
        ]
        new = jax.tree.unflatten(treedef, rows)
    sums = [old + leaf for leaf, old in paired_leaves(new, total, "multi_steps")]
    return jax.tree.unflatten(jax.tree.structure(total), sums)


def _mean(total: Jacobian, count: jax.Array, like: Jacobian) -> Jacobian:
    sums = [
        leaf[0] if is_plain else leaf
        for leaf, is_plain in zip(
            jax.tree.leaves(total), plain_leaves(like, param_shapes(total)), strict=True
        )
    ]
    leaves = zip(sums, jax.tree.leaves(like), strict=True)
    means = [(leaf / count.astype(leaf.dtype)).astype(wanted.dtype) for leaf, wanted in leaves]
    return jax.tree.unflatten(jax.tree.structure(like), mark_like(means, like))


def _pair_of(extra_args: dict[str, Any], accumulated: bool) -> tuple[Jacobian, ...]:
    pair = extra_args.get("cross_jacobians")
    if (pair is not None) != accumulated:
        raise ValueError(
            "`multi_steps` "
            + (
                "accumulates `cross_jacobians`: pass them to update."
                if accumulated
                else "got `cross_jacobians`, which it does not accumulate: make it with "
                "`cross_jacobians=True`."
            )
        )
    if pair is None:
        return ()
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise ValueError(
            f"`cross_jacobians` must be a pair of Jacobians, found {type(pair).__name__}."
        )
    return tuple(pair)
