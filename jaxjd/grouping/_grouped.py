"""One weighting for all groups of parameters, solved in one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxjd.aggregators._weighted import check_logged, check_num_tasks, read_stat, weighted
from jaxjd.base import (
    Aggregator,
    Certified,
    CrossGramianWeighting,
    Jacobian,
    JacobianWeighting,
    PyTree,
    Weighting,
    solve,
    stack_states,
    weight_dtype,
)
from jaxjd.checks import check_state
from jaxjd.grouping._cut import cut, cut_extra_args
from jaxjd.labels import resolve
from jaxjd.linalg.algebra import combine, count_tasks, gramian, param_shapes


class GroupedState(NamedTuple):
    """The state of `grouped`; groups are in the sorted order of their labels.

    Attributes:
      weights: The last weights of every group, shape ``(g, m)``, zeros at first; the empty tuple
        without `num_tasks`.
      weighting: The weighting's states, stacked along a leading axis of size `g`.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> aggregator = jaxjd.grouped(
      ...     jaxjd.weightings.gradvac(), jaxjd.labels.by_tensor, num_tasks=2
      ... )
      >>> state = aggregator.init({"w": jnp.zeros(3), "b": jnp.zeros(1)})
      >>> state.weights.shape, state.weighting.target.shape
      ((2, 2), (2, 2, 2))
    """

    weights: jax.Array | tuple[()]
    weighting: PyTree


def grouped(weighting: Weighting, labels: Any, *, num_tasks: int | None = None) -> Aggregator:
    r"""Gives every group of parameters weights of its own, all by one weighting in one batch.

    The Gramians of the `g` groups are stacked to ``(g, m, m)`` and the weighting is mapped over
    them, each group with its own state. It equals `jaxjd.partition` with the same aggregator for
    every label, but is one small batched problem instead of `g`. Random weightings draw
    independently for every group.

    Args:
      weighting: A weighting of the Gramian or of the cross-Gramian. (For one of the Jacobian use
        `jaxjd.partition`.)
      labels: As for `jaxjd.partition`.
      num_tasks: The number of tasks ``m``, as for `jaxjd.weighted`.

    Returns:
      An `Aggregator` with state `GroupedState`.

    Raises:
      ValueError: As for `jaxjd.weighted`, and if a leaf has no label or the state belongs to
        another number of groups.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> aggregator = jaxjd.grouped(jaxjd.weightings.upgrad(), jaxjd.labels.by_tensor, num_tasks=2)
      >>> params = {"a": jnp.zeros(3), "b": jnp.zeros(2)}
      >>> jacobian = {"a": jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]), "b": jnp.eye(2)}
      >>> updates, state = aggregator.update(jacobian, aggregator.init(params), params)
      >>> print(jnp.round(state.weights, 4))
      [[1.1111 0.7895]
       [0.5    0.5   ]]
    """
    weighted(weighting, num_tasks=num_tasks)  # Reports a bad weighting or number of tasks.
    if isinstance(weighting, JacobianWeighting):
        raise ValueError(
            "`grouped` stacks Gramians; for a weighting of the Jacobian use `jaxjd.partition` with "
            "one aggregator per label."
        )

    def init(params: PyTree) -> GroupedState:
        size = max(1, len(set(resolve(labels, params))))
        state = weighting.init(num_tasks, params)
        weights: Any = ()
        if num_tasks is not None:
            weights = jnp.zeros((size, num_tasks), weight_dtype(params))
        return GroupedState(weights, stack_states(state, size))

    def update(
        updates: Jacobian, state: GroupedState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple:
        m = count_tasks(updates, params)
        if m is None:
            return updates, state, None
        found = resolve(labels, param_shapes(updates) if params is None else params)
        leaves, treedef = jax.tree.flatten(updates)

        groups: dict[str, list[Any]] = {group: [] for group in sorted(set(found))}
        for label, leaf in zip(found, leaves, strict=True):
            groups[label].append(leaf)

        def stat_of(group: str) -> Any:
            if not isinstance(weighting, CrossGramianWeighting):
                return gramian(groups[group])
            extra = cut_extra_args(extra_args, updates, found, group)
            return read_stat(weighting, cut(updates, found, group), extra)

        weights, next_state, certificate = weigh_groups(
            weighting, num_tasks, stat_of, list(groups), m, state, extra_args
        )
        number = {group: place for place, group in enumerate(groups)}
        combined = [
            combine(weights[number[label]], leaf) for leaf, label in zip(leaves, found, strict=True)
        ]
        return jax.tree.unflatten(treedef, combined), next_state, certificate

    return Aggregator(init, Certified(update))  # type: ignore[arg-type]


def weigh_groups(
    weighting: Weighting,
    num_tasks: int | None,
    stat_of: Callable[[str], Any],
    groups: Sequence[str],
    m: int,
    state: GroupedState,
    extra_args: Mapping[str, Any],
) -> tuple[jax.Array, GroupedState, Any]:
    """What `grouped` does with the statistics of all groups, of ``m`` tasks.

    Returns:
      The weights of every group, the next state, and the certificate.
    """
    check_num_tasks(m, num_tasks)
    check_state("`grouped`", state, GroupedState)
    for leaf in jax.tree.leaves(state):
        if leaf.shape[0] != len(groups):
            raise ValueError(
                f"The state holds {leaf.shape[0]} groups, but the labels are {list(groups)}."
            )
    check_logged(state.weights, () if num_tasks is None else (len(groups), m))
    stats = jnp.stack([stat_of(group) for group in groups])
    weights, inner, certificates = jax.vmap(
        lambda stat, inner: solve(weighting.update, stat, inner, **extra_args)
    )(stats, state.weighting)
    logged: Any = ()
    if num_tasks is not None:
        logged = weights.astype(jnp.asarray(state.weights).dtype)
    certificate = certificates and jax.tree_util.Partial(residuals_of, certificates)
    return weights, GroupedState(logged, inner), certificate


def residuals_of(certificates: jax.tree_util.Partial) -> jax.Array:
    """The residuals of certificates that are stacked along a leading axis."""
    return jax.vmap(lambda certificate: certificate())(certificates)
