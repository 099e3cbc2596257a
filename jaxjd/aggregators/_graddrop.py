"""Gradient sign dropout (GradDrop)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxjd.aggregators._weighted import check_num_tasks
from jaxjd.base import Aggregator, Jacobian, PyTree, fresh_key
from jaxjd.checks import (
    as_vector,
    check_entries,
    check_length,
    check_state,
    check_static_int,
    type_name,
)
from jaxjd.linalg.algebra import count_tasks, materialize, refuse_complex
from jaxjd.linalg.sharded import refuse_sharded


class GradDropState(NamedTuple):
    """The state of `graddrop`.

    Attributes:
      key: A typed PRNG key, shape ``()``; split once per call.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> jaxjd.graddrop(key=1).init(jnp.zeros(3)).key.shape
      ()
    """

    key: jax.Array


def graddrop(
    leak: PyTree | None = None,
    f: Callable[[jax.Array], jax.Array] | None = None,
    key: jax.Array | int = 0,
    *,
    num_tasks: int | None = None,
) -> Aggregator:
    r"""GradDrop: in every entry, keeps the values of one sign, chosen at random.

    With the sign purity :math:`P` of an entry and a uniform draw :math:`U` for it:

    .. math:: P = \frac12 \Big(1 + \frac{\sum_i J_i}{\sum_i |J_i|}\Big), \qquad
              M_i = [f(P) > U] [J_i > 0] + [f(P) < U] [J_i < 0], \qquad
              d = \sum_i (\ell_i + (1 - \ell_i) M_i) J_i

    From Chen et al., "Just Pick a Sign: Optimizing Deep Multitask Models with Gradient Sign
    Dropout" (NeurIPS 2020, https://arxiv.org/abs/2010.06808), which does this to the gradients of a
    layer's output; here it is the Jacobian of the parameters, as in TorchJD. There are no weights,
    since each entry has its own. An entry with a value that is not finite becomes NaN.

    The draws of a leaf depend on the key, the place of the leaf in tree order, and the leaf's own
    shape; splitting it over devices does not change them.

    Args:
      leak: How much of each task's gradient is always kept, :math:`\ell`, in [0, 1], shape
        ``(m,)`` or laid out as the losses; zeros by default.
      f: An increasing function from [0, 1] to [0, 1], applied to arrays; the identity by default.
      key: A typed PRNG key or a seed. The same key gives the same run, in every lane of a
        `jax.vmap` too: give each the state of an aggregator with a key of its own.
      num_tasks: The number of tasks ``m``, for a check of the Jacobian.

    Returns:
      An `Aggregator` with state `GradDropState`.

    Raises:
      ValueError: If `leak` is not a vector, `f` not a function or `key` neither key nor seed; in
        `update`, if the Jacobian is malformed or `leak` has not one entry per task, or if a leaf
        is split over devices inside `jax.shard_map` (`jaxjd.sharding.sharded`).

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> aggregator = jaxjd.graddrop()
      >>> jacobian = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> update, state = aggregator.update(jacobian, aggregator.init(jnp.zeros(3)))
      >>> print(update.shape, update[1:])  # the first entry is -4 or 6
      (3,) [2. 2.]
    """
    given = leak
    leak = None if leak is None else as_vector("leak", leak)
    check_entries("leak", given, at_least=0, at_most=1)
    if f is not None and not callable(f):
        raise ValueError(f"`f` must be a function from [0, 1] to [0, 1], got {f!r}.")
    fresh_key(key)  # Reports a bad key here, not at init.
    if num_tasks is not None:
        num_tasks = check_static_int("num_tasks", num_tasks, at_least=1)
        if leak is not None:
            check_length("leak", leak.shape[0], num_tasks)

    def init(params: PyTree) -> GradDropState:
        del params
        return GradDropState(key=fresh_key(key))

    def update(
        updates: Jacobian, state: GradDropState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, GradDropState]:
        m = count_tasks(updates, params)
        if m is None:
            return updates, state
        check_num_tasks(m, num_tasks)
        check_state("`graddrop`", state, GradDropState)
        if leak is not None:
            check_length("leak", leak.shape[0], m)
        refuse_complex(updates, "graddrop")
        refuse_sharded(updates, "`graddrop`, whose draws depend on the place in the parameter,")
        key, draw_key = jax.random.split(state.key)
        leaves, treedef = jax.tree.flatten(updates)
        combined = []
        for place, leaf in enumerate(leaves):
            dtype = jnp.promote_types(leaf.dtype, jnp.float32)
            rows = materialize(leaf).astype(dtype)
            uniforms = jax.random.uniform(
                jax.random.fold_in(draw_key, place), rows.shape[1:], dtype
            )
            combined.append(drop_signs(rows, uniforms, leak, f).astype(leaf.dtype))
        return jax.tree.unflatten(treedef, combined), GradDropState(key=key)

    return Aggregator(init, update)  # type: ignore[arg-type]


def drop_signs(
    rows: jax.Array,
    uniforms: jax.Array,
    leak: jax.Array | None = None,
    f: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """Returns GradDrop's update of one leaf for given draws.

    Args:
      rows: The leaf, shape ``(m, *param.shape)``.
      uniforms: The draws, shape ``param.shape``.
      leak: How much of each row is always kept, shape ``(m,)``, or None for nothing.
      f: Applied to the sign purity, or None for the identity.

    Returns:
      The update, shape ``param.shape``.
    """
    total = jnp.sum(jnp.abs(rows), axis=0)
    purity = (1 + jnp.sum(rows, axis=0) / jnp.where(total == 0, 1, total)) / 2
    if f is not None:
        purity = jnp.asarray(f(purity))
        if purity.shape not in ((), total.shape):
            raise ValueError(f"`f` must keep the shape {total.shape}, got {type_name(purity)}.")
        purity = jnp.broadcast_to(purity, total.shape)
    keep = jnp.where(rows > 0, (purity > uniforms)[None], (purity < uniforms)[None])
    kept = keep.astype(rows.dtype)
    if leak is not None:
        least = jnp.expand_dims(leak.astype(rows.dtype), tuple(range(1, rows.ndim)))
        kept = least + (1 - least) * kept
    # Explicitly, since XLA may turn a product with zero into a selection.
    return jnp.where(jnp.isfinite(total), jnp.sum(kept * rows, axis=0), jnp.nan)
