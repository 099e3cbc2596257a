"""A check that nothing with a task axis reaches the parameters."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import optax

from jaxjd.base import PyTree
from jaxjd.checks import path_name, type_name
from jaxjd.transforms._arguments import check_transform, check_updates

_CURE = (
    "Is it a Jacobian that no aggregator has taken? Adding it would broadcast the parameters: put "
    "an aggregator first (in every group; `jaxjd.freeze()` instead of `optax.set_to_zero()`)."
)


class EnsureAggregatedState(NamedTuple):
    """The state of `ensure_aggregated`.

    Attributes:
      inner_state: The state of the checked chain; the empty tuple without one.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> jaxjd.ensure_aggregated().init(jnp.zeros(3))
      EnsureAggregatedState(inner_state=())
    """

    inner_state: PyTree


def ensure_aggregated(
    tx: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Checks while tracing that the updates are shaped like the parameters.

    A Jacobian that reaches ``optax.apply_updates`` broadcasts the parameters to
    ``(m, *param.shape)`` without an error. As the last link of a chain this makes it one. Around a
    whole chain it also checks that the state keeps its shapes and dtypes, which tells an optimizer
    that stands before the aggregator: its moments would broadcast against the Jacobian at the first
    step. All of it happens while tracing and costs nothing at run time.

    Args:
      tx: A chain to check, or ``None`` for a link that passes the updates on.

    Returns:
      A transformation with state `EnsureAggregatedState`; its `update` needs `params`.

    Raises:
      ValueError: If `tx` is no transformation; in `update`, without `params`, if an update has not
        the path and the shape of its parameter, or if the state of `tx` changes its structure,
        shapes or dtypes.

    Example:
      >>> import jax.numpy as jnp, optax, jaxjd
      >>> params, jacobian = {"w": jnp.zeros(3)}, {"w": jnp.ones((2, 3))}
      >>> tx = optax.chain(optax.sgd(0.1), jaxjd.ensure_aggregated())
      >>> tx.update(jacobian, tx.init(params), params)
      Traceback (most recent call last):
      ...
      ValueError: Update leaf 'w': expected the shape (3,) of its parameter, found (2, 3) with a ...
    """
    inner = optax.identity() if tx is None else check_transform("tx", tx)
    inner = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> EnsureAggregatedState:
        return EnsureAggregatedState(() if tx is None else inner.init(params))

    def update(
        updates: PyTree,
        state: EnsureAggregatedState,
        params: PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, EnsureAggregatedState]:
        if params is None:
            raise ValueError(
                "`ensure_aggregated` compares the updates with the parameters: pass `params` to "
                "update."
            )
        new_state = state.inner_state
        if tx is not None:
            updates, new_state = inner.update(updates, new_state, params, **extra_args)
            _check_state(state.inner_state, new_state)
        check_updates(updates, params, _CURE)
        return updates, EnsureAggregatedState(new_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _check_state(before: PyTree, after: PyTree) -> None:
    if jax.tree.structure(before) != jax.tree.structure(after):
        raise ValueError(
            f"The state changed its structure from {jax.tree.structure(before)} to "
            f"{jax.tree.structure(after)}."
        )
    leaves = zip(jax.tree.leaves_with_path(before), jax.tree.leaves(after), strict=True)
    for (path, old), new in leaves:
        if type_name(old) != type_name(new):
            raise ValueError(
                f"State leaf '{path_name(path)}': expected {type_name(old)} as before the update, "
                f"found {type_name(new)}. Is there an optimizer before the aggregator? It would "
                "see a Jacobian: put the aggregator first, or wrap what comes before it in "
                "`jaxjd.per_task`."
            )
