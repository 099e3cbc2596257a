"""What there is to log in the state of an optimizer, however deep it is nested."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from jaxjd.base import PyTree
from jaxjd.checks import path_name
from jaxjd.diagnostics._monitored import MonitoredState

# By name: the chain links stand above the diagnostics.
_SKIPS = ("SkipIfNotFiniteState", "skipped")
# The states of jaxjd's and optax's `partition`, and the field that holds those of the groups.
_GROUPS = ("PartitionState", "inner_states")


def weights(opt_state: PyTree) -> dict[str, jax.Array]:
    """Finds the last weights of every aggregator in the state of an optimizer.

    Args:
      opt_state: The state of an aggregator or of any optax transformation around one: a chain, a
        partition, ``inject_hyperparams``, ``MultiSteps``, ... also stacked by ``jax.vmap`` or by a
        scan.

    Returns:
      The weights by name: shape ``(m,)`` for an aggregator, ``(g, m)`` for `jaxjd.grouped`. They
      are zeros before the first step. The name is ``"weights"``, with the labels of the groups of a
      `jaxjd.partition` or ``optax.partition`` in front (``"trunk/weights"``), however chains are
      wrapped. Two that would have one name get the first differing part of the paths to them in
      front, as the place in a chain (``"0/weights"``).

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
      weights [1.1111 0.7895]
    """
    found = _collect(opt_state, _weights_of)
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
      The counts by name, ``"skipped"``, as for `weights`: int32 scalars.

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
    found = _collect(opt_state, _skipped_of)
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
      A dict from the name to the array, named as by `weights`: the weights of every aggregator, the
      diagnostics of every `monitored` one, and the counts of skipped steps. Its keys do not change
      over the training, so that it can be the output of a ``lax.scan``. Empty if there is nothing.

    Example:
      >>> import jax.numpy as jnp, optax, jaxjd
      >>> monitored = jaxjd.diagnostics.monitored(jaxjd.mean(num_tasks=2), num_tasks=2)
      >>> tx = optax.chain(monitored, optax.adam(1e-3))
      >>> for path in jaxjd.diagnostics.summary(tx.init(jnp.zeros(3))):
      ...     print(path)
      cosines
      conflict_rate
      update_conflict_rate
      predicted_change
      stationarity_gap
      relative_stationarity_gap
      effective_rank
      solver_residual
      weights
    """
    return _collect(opt_state, _monitored_of, _weights_of, _skipped_of)


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


class _Found(NamedTuple):
    """An array to log.

    Attributes:
      groups: The labels of the groups of partitions on the way to it.
      field: The name of the field that holds it.
      path: The whole path to it, for what groups and field do not tell apart.
      array: The array.
    """

    groups: tuple[str, ...]
    field: str
    path: tuple[Any, ...]
    array: jax.Array


def _collect(tree: PyTree, *readers: Callable[[Any], tuple[str, ...]]) -> dict[str, jax.Array]:
    """Returns the arrays in the fields that `readers` name, by short keys."""
    by_key: dict[str, list[_Found]] = {}
    for found in _fields(tree, *readers):
        by_key.setdefault("/".join((*found.groups, found.field)), []).append(found)
    result = {}
    for key, same in by_key.items():
        # Paths that lead to different arrays differ somewhere: in the places of a chain, say.
        names = [[path_name([entry]) for entry in found.path] for found in same]
        place = 0
        while len(same) > 1 and place < min(map(len, names)) and len({n[place] for n in names}) < 2:
            place += 1
        for found, own in zip(same, names, strict=True):
            short = f"{own[place]}/{key}" if len(same) > 1 and place < len(own) else key
            # Where the first difference is shared by some, the whole path tells them apart.
            if short in result or (short != key and short in by_key):
                short = path_name(found.path)
            result[short] = found.array
    return result


def _fields(
    tree: PyTree,
    *readers: Callable[[Any], tuple[str, ...]],
    path: tuple[Any, ...] = (),
    groups: tuple[str, ...] = (),
    owner: tuple[str, str] | None = None,
) -> Iterator[_Found]:
    """Yields the arrays in the fields that `readers` name."""
    readable = readers
    for reader in readers:
        for field in reader(tree):
            # A library may have put the array into a box of its own, or nothing be there.
            for array in jax.tree.leaves(getattr(tree, field)):
                yield _Found(groups, field, (*path, jax.tree_util.GetAttrKey(field)), array)
                if reader is _weights_of:  # Those inside are a weighting's.
                    readable = tuple(other for other in readable if other is not _weights_of)
    # One level: everything but the tree itself counts as a leaf.
    for key, child in jax.tree.leaves_with_path(tree, is_leaf=lambda node: node is not tree):
        if key:
            inside = (*groups, path_name(key)) if owner == _GROUPS else groups
            own = (type(tree).__name__, path_name(key))
            yield from _fields(child, *readable, path=(*path, *key), groups=inside, owner=own)
