"""What there is to log in the state of an optimizer, however deep it is nested."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax

from jaxjd.base import PyTree
from jaxjd.checks import path_name
from jaxjd.diagnostics._monitored import MonitoredState

# By name: the chain links stand above the diagnostics.
_SKIPS = ("SkipIfNotFiniteState", "skipped")


def weights(opt_state: PyTree) -> dict[str, jax.Array]:
    """Finds the last weights of every aggregator in the state of an optimizer.

    Args:
      opt_state: The state of an aggregator or of any optax transformation around one: a chain, a
        partition, ``inject_hyperparams``, ``MultiSteps``, ... also stacked by ``jax.vmap`` or by a
        scan.

    Returns:
      The weights by the path in the state that leads to them: shape ``(m,)`` for an aggregator,
      ``(g, m)`` for `jaxjd.grouped`. They are zeros before the first step.

    Raises:
      ValueError: If there are none: aggregators keep their weights if they are made with
        `num_tasks`, and a few methods have none.

    Example:
      >>> import jax.numpy as jnp, optax, jaxjd
      >>> tx = optax.chain(jaxjd.upgrad(num_tasks=2), optax.adam(1e-3))
      >>> jacobian = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> _, state = tx.update(jacobian, tx.init(jnp.zeros(3)))
      >>> for path, found in jaxjd.diagnostics.weights(state).items():
      ...     print(path, jnp.round(found, 4))
      0/weights [1.1111 0.7895]
    """
    found = dict(_fields(opt_state, _weights_of))
    if not found:
        raise ValueError(
            "No aggregator's weights in this state. An aggregator keeps them if it is made with "
            "`num_tasks=`."
        )
    return found


def skipped_steps(opt_state: PyTree) -> dict[str, jax.Array]:
    """Finds how many steps every `jaxjd.skip_if_not_finite` has skipped.

    Args:
      opt_state: As for `weights`.

    Returns:
      The counts by the path in the state that leads to them, int32 scalars.

    Raises:
      ValueError: If no step of this state can have been skipped.

    Example:
      >>> import jax.numpy as jnp, optax, jaxjd
      >>> tx = jaxjd.skip_if_not_finite(optax.chain(jaxjd.upgrad(), optax.sgd(1.0)))
      >>> params = jnp.ones(2)
      >>> _, state = tx.update(jnp.array([[1.0, jnp.nan]]), tx.init(params), params)
      >>> print(jaxjd.diagnostics.skipped_steps(state)["skipped"])
      1
    """
    found = dict(_fields(opt_state, _skipped_of))
    if not found:
        raise ValueError(
            "No `skip_if_not_finite` in this state: wrap the chain by it to count skipped steps."
        )
    return found


def summary(opt_state: PyTree) -> dict[str, jax.Array]:
    """Collects everything worth logging in the state of an optimizer, flat.

    Args:
      opt_state: As for `weights`.

    Returns:
      A dict from the path in the state to the array: the weights of every aggregator, the
      diagnostics of every `monitored` one, and the counts of skipped steps. Its keys do not change
      over the training, so that it can be the output of a ``lax.scan``. Empty if there is nothing.

    Example:
      >>> import jax.numpy as jnp, optax, jaxjd
      >>> monitored = jaxjd.diagnostics.monitored(jaxjd.mean(num_tasks=2), num_tasks=2)
      >>> tx = optax.chain(monitored, optax.adam(1e-3))
      >>> for path in jaxjd.diagnostics.summary(tx.init(jnp.zeros(3))):
      ...     print(path)
      0/cosines
      0/conflict_rate
      0/update_conflict_rate
      0/predicted_change
      0/stationarity_gap
      0/relative_stationarity_gap
      0/effective_rank
      0/solver_residual
      0/inner_state/weights
    """
    return dict(_fields(opt_state, _monitored_of, _weights_of, _skipped_of))


def _weights_of(node: Any) -> tuple[str, ...]:
    # Other states may have a field of this name, and so may parameters, which some states hold.
    own = type(node).__module__.startswith("jaxjd.")
    return ("weights",) if own and "weights" in getattr(node, "_fields", ()) else ()


def _skipped_of(node: Any) -> tuple[str, ...]:
    name, field = _SKIPS
    return (field,) if type(node).__name__ == name and hasattr(node, field) else ()


def _monitored_of(node: Any) -> tuple[str, ...]:
    if not isinstance(node, MonitoredState):
        return ()
    return tuple(field for field in node._fields if field != "inner_state")


def _fields(
    tree: PyTree, *readers: Callable[[Any], tuple[str, ...]], path: tuple[Any, ...] = ()
) -> Iterator[tuple[str, jax.Array]]:
    """Yields the arrays in the fields that `readers` name, with their paths."""
    readable = readers
    for reader in readers:
        for field in reader(tree):
            # A library may have put the array into a box of its own, or nothing be there.
            for array in jax.tree.leaves(getattr(tree, field)):
                yield path_name((*path, jax.tree_util.GetAttrKey(field))), array
                if reader is _weights_of:  # Those inside are a weighting's.
                    readable = tuple(other for other in readable if other is not _weights_of)
    # One level: everything but the tree itself counts as a leaf.
    for key, child in jax.tree.leaves_with_path(tree, is_leaf=lambda node: node is not tree):
        if key:
            yield from _fields(child, *readable, path=(*path, *key))
