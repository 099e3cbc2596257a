"""Steps whose Jacobian or result is not finite leave everything as it was."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxjd.base import Jacobian, PyTree
from jaxjd.linalg.algebra import all_finite
from jaxjd.linalg.sharded import shard_axes, vary
from jaxjd.transforms._arguments import check_transform


class SkipIfNotFiniteState(NamedTuple):
    """The state of `skip_if_not_finite`.

    Attributes:
      skipped: How many steps were skipped, int32.
      consecutive: How many of the last ones, int32; 0 after a step that was taken.
      inner_state: The state of the transformation; a skipped step leaves it as it is.

    Example:
      >>> import jax.numpy as jnp, optax, jaxjd
      >>> tx = jaxjd.skip_if_not_finite(optax.chain(jaxjd.upgrad(), optax.sgd(0.1)))
      >>> state = tx.init(jnp.zeros(3))
      >>> int(state.skipped), int(state.consecutive)
      (0, 0)
    """

    skipped: jax.Array
    consecutive: jax.Array
    inner_state: PyTree


def skip_if_not_finite(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    r"""Skips a step that is not finite: zero updates, and every bit of the state as it was.

    A step is skipped if the Jacobian holds a NaN or an infinity, if an update would, or if an entry
    of the state that was finite would not be any more (a Gramian or a second moment that
    overflows). The aggregator's state is inside, where ``optax.apply_if_finite`` behind it would
    come too late, and around it would not fit the shapes. Devices that hold shards of the
    parameters, by the marks of `jaxjd.sharding`, all skip if one of them does.

    Args:
      tx: The whole chain, aggregator first.

    Returns:
      A transformation with state `SkipIfNotFiniteState`.

    Raises:
      ValueError: If `tx` is no transformation.

    Example:
      >>> import jax.numpy as jnp, optax, jaxjd
      >>> tx = jaxjd.skip_if_not_finite(optax.chain(jaxjd.sum(), optax.sgd(1.0)))
      >>> state = tx.init(jnp.zeros(2))
      >>> update, state = tx.update(jnp.array([[1.0, 2.0], [jnp.nan, 0.0]]), state)
      >>> print(update, state.skipped)
      [0. 0.] 1
    """
    inner = optax.with_extra_args_support(check_transform("tx", tx))

    def init(params: PyTree) -> SkipIfNotFiniteState:
        zero = jnp.zeros((), jnp.int32)
        return SkipIfNotFiniteState(zero, jnp.zeros_like(zero), inner.init(params))

    def update(
        updates: Jacobian,
        state: SkipIfNotFiniteState,
        params: PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, SkipIfNotFiniteState]:
        new, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        fine = all_finite(updates) & all_finite(new) & _stays_finite(state.inner_state, inner_state)
        axes = sorted({axis for leaf in jax.tree.leaves(updates) for axis in shard_axes(leaf)})
        if axes:
            fine = lax.psum(vary((~fine).astype(jnp.int32), axes), tuple(axes)) == 0
        return (
            jax.tree.map(lambda leaf: jnp.where(fine, leaf, jnp.zeros_like(leaf)), new),
            SkipIfNotFiniteState(
                jnp.where(fine, state.skipped, optax.safe_increment(state.skipped)),
                jnp.where(fine, 0, optax.safe_increment(state.consecutive)),
                jax.tree.map(
                    lambda leaf, old: jnp.where(fine, leaf, old), inner_state, state.inner_state
                ),
            ),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _stays_finite(before: PyTree, after: PyTree) -> jax.Array:
    fine = jnp.ones((), bool)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        if jnp.issubdtype(new.dtype, jnp.inexact):
            # Some states begin at infinity, the best loss so far for one.
            fine &= jnp.all(jnp.isfinite(new) | ~jnp.isfinite(old))
    return fine
