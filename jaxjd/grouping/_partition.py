"""A different aggregator for every group of parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxjd.base import Aggregator, Certified, Jacobian, PyTree, solve
from jaxjd.checks import check_state, path_name, type_name
from jaxjd.grouping._cut import cut, cut_extra_args
from jaxjd.grouping._together import groups_of, kinds_of, weigh_together
from jaxjd.labels import resolve
from jaxjd.linalg.algebra import param_shapes


class PartitionState(NamedTuple):
    """The state of `partition`.

    Attributes:
      inner_states: The state of every label's aggregator, by label.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> aggregator = jaxjd.partition({"all": jaxjd.mean()}, "all")
      >>> sorted(aggregator.init(jnp.zeros(3)).inner_states)
      ['all']
    """

    inner_states: dict[str, PyTree]


def partition(
    aggregators: Mapping[str, optax.GradientTransformation],
    labels: Any,
    *,
    cut_args: Sequence[str] = (),
) -> Aggregator:
    r"""Aggregates every group of parameters on its own, with its own aggregator and state.

    Each group sees the Jacobian of its parameters only: its Gramian, its conflicts, its weights.
    Groups whose aggregators are made alike (one object, or by one factory with equal arguments) are
    weighed in one batch where they can be, so that many groups compile as fast as one.

    Args:
      aggregators: An aggregator for every label; also a chain that starts with one, or, for
        parameters that come with a plain gradient instead of a Jacobian (task heads), any
        transformation of gradients, such as ``optax.identity()``.
      labels: A pytree of strings with the structure of the parameters or a prefix of it, or a
        function of the parameters that returns one (see `jaxjd.labels`). A function is called on
        parameters (in `update` without `params`, on their shapes), never on the Jacobian, whose
        leaves have one axis more.
      cut_args: Names of extra arguments of your own that are laid out as the parameters, to be cut
        to the group. (``cross_jacobians`` always is.)

    Returns:
      An `Aggregator` with state `PartitionState`. Extra arguments reach every aggregator as they
      are, ``losses`` for one, whatever their structure; ``cross_jacobians`` and those of `cut_args`
      reach it cut to its group.

    Raises:
      ValueError: If `aggregators` is empty; in `init` and `update`, if a leaf has no label, a label
        no aggregator or an aggregator no leaf, if an extra argument to be cut has not the leaves of
        the Jacobian, or if a group's transformation returns something that is not shaped like its
        parameters (an ``optax.set_to_zero()`` on a Jacobian, say).

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> aggregator = jaxjd.partition(
      ...     {"encoder": jaxjd.upgrad(), "decoder": jaxjd.sum()}, jaxjd.labels.by_network
      ... )
      >>> params = {"encoder": {"w": jnp.zeros(3)}, "decoder": {"w": jnp.zeros(3)}}
      >>> rows = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> jacobian = {"encoder": {"w": rows}, "decoder": {"w": rows}}
      >>> updates, _ = aggregator.update(jacobian, aggregator.init(params), params)
      >>> print(jnp.round(updates["encoder"]["w"], 4), updates["decoder"]["w"])
      [0.2924 1.9006 1.9006] [2. 2. 2.]
    """
    if not isinstance(aggregators, Mapping) or not aggregators:
        raise ValueError("`aggregators` must map at least one label to an aggregator.")
    for label, transform in aggregators.items():
        if not isinstance(transform, optax.GradientTransformation):
            raise ValueError(
                f"Label {label!r}: expected an aggregator or another optax transformation (a "
                f"factory has to be called first), found {type_name(transform)}."
            )
    if isinstance(cut_args, str):
        raise ValueError(f"`cut_args` must be a sequence of names, got the string {cut_args!r}.")
    transforms = {
        label: optax.with_extra_args_support(transform) for label, transform in aggregators.items()
    }
    updates_of = {label: tx.update for label, tx in transforms.items()}
    kinds = kinds_of(updates_of)

    def init(params: PyTree) -> PartitionState:
        found = _resolve(labels, params, transforms)
        return PartitionState(
            {label: tx.init(cut(params, found, label)) for label, tx in transforms.items()}
        )

    def update(
        updates: Jacobian, state: PartitionState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple:
        check_state("`partition`", state, PartitionState)
        if sorted(state.inner_states) != sorted(transforms):
            raise ValueError(
                f"The state has the labels {sorted(state.inner_states)}, but there are aggregators "
                f"for {sorted(transforms)}."
            )
        leaves, treedef = jax.tree.flatten(updates)
        like = param_shapes(updates) if params is None else params
        found = _resolve(labels, like, transforms)
        if len(found) != len(leaves):
            raise ValueError(
                f"The Jacobian has {len(leaves)} leaves, but the parameters have {len(found)}."
            )
        paths = [path for path, _ in jax.tree.leaves_with_path(updates)]
        shapes = None if params is None else [jnp.shape(leaf) for leaf in jax.tree.leaves(params)]
        places: dict[str, list[int]] = {label: [] for label in transforms}
        for place, label in enumerate(found):
            places[label].append(place)
        groups = groups_of(places, state.inner_states, updates, params, extra_args, cut_args)
        weighed = weigh_together(updates_of, kinds, groups)
        results: list[Any] = [None] * len(leaves)
        inner_states, certificates = {}, {}
        for label, tx in transforms.items():
            if label in weighed:
                new, inner_states[label], certificates[label] = weighed[label]
            else:
                new, inner_states[label], certificates[label] = solve(
                    tx.update,
                    cut(updates, found, label),
                    state.inner_states[label],
                    None if params is None else cut(params, found, label),
                    **cut_extra_args(extra_args, updates, found, label, cut_args),
                )
            for place, leaf in zip(places[label], jax.tree.leaves(new), strict=True):
                expected = None if shapes is None else shapes[place]
                _check_shape(label, paths[place], leaf, leaves[place], expected)
                results[place] = leaf
        return jax.tree.unflatten(treedef, results), PartitionState(inner_states), certificates

    return Aggregator(init, Certified(update))  # type: ignore[arg-type]


def _resolve(labels: Any, params: PyTree, transforms: Mapping[str, Any]) -> list[str]:
    found = resolve(labels, params)
    unknown = sorted(set(found) - set(transforms))
    if unknown:
        raise ValueError(
            f"The labels {unknown} have no aggregator; there are aggregators for "
            f"{sorted(transforms)}."
        )
    unused = sorted(set(transforms) - set(found))
    # Without leaves there is nothing to label: optax initializes with such placeholders.
    if found and unused:
        raise ValueError(
            f"The aggregators of {unused} have no parameter; the labels are {sorted(set(found))}."
        )
    return found


def _check_shape(
    label: str, path: Any, new: Any, old: Any, expected: tuple[int, ...] | None
) -> None:
    name = path_name(path)
    if expected is None and new.shape == old.shape:
        raise ValueError(
            f"Leaf '{name}' in group {label!r} came out with the shape {new.shape} that it went in "
            "with: pass `params` to update if it is a plain gradient; if it is a Jacobian, its "
            "group needs an aggregator."
        )
    if expected is None:
        expected = old.shape[1:]
    if new.shape != expected:
        raise ValueError(
            f"Leaf '{name}' in group {label!r}: expected an update of shape {expected}, found "
            f"{new.shape}. A group with a Jacobian needs an aggregator first."
        )
