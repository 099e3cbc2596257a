"""Groups whose aggregators are made alike, weighed by one program for all of them."""

from __future__ import annotations

import collections
import dataclasses
import functools
import types
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxjd.aggregators._weighted import WeightedUpdate, read_stat
from jaxjd.base import (
    Certified,
    CrossGramianWeighting,
    Jacobian,
    JacobianWeighting,
    PyTree,
    Weighting,
)
from jaxjd.checks import leaf_names
from jaxjd.grouping._cut import PAIRS
from jaxjd.grouping._grouped import residuals_of
from jaxjd.linalg.algebra import count_tasks


class Group(NamedTuple):
    """What there is of a group: flat lists, since a tree with holes is as large as the whole one.

    Attributes:
      rows: The leaves of its Jacobian.
      params: Those of its parameters, or None.
      extra: The extra arguments, the pair of Jacobians cut to the group.
      state: The state of its aggregator.
    """

    rows: list[Any]
    params: list[Any] | None
    extra: dict[str, Any]
    state: PyTree


class _Problem(NamedTuple):
    """What a group is weighed by."""

    label: str
    stat: jax.Array
    group: Group


class Weighed(NamedTuple):
    """What comes of one group that was weighed with others.

    Attributes:
      combined: The leaves of its update.
      state: The next state of the group's aggregator.
      certificate: That of all groups that were weighed together, for one of them; None for others.
    """

    combined: list[jax.Array]
    state: PyTree
    certificate: Any


def makings(value: Any, inside: tuple[int, ...] = ()) -> Hashable:
    """Returns a key that two values have in common if they were made alike.

    Functions are alike if they run the same code on values that are alike, as two calls of one
    factory return them; arrays and numbers if they are equal. Of anything else it is the identity.
    """
    if id(value) in inside:  # A function may hold itself.
        return inside.index(id(value))
    key = functools.partial(makings, inside=(*inside, id(value)))
    if isinstance(value, types.FunctionType):
        try:
            cells = [cell.cell_contents for cell in value.__closure__ or ()]
        except ValueError:  # One is empty so far.
            return id(value)
        defaults = (value.__defaults__, tuple((value.__kwdefaults__ or {}).items()))
        return (value.__code__, id(value.__globals__), *map(key, cells), key(defaults))
    if isinstance(value, types.MethodType):
        return (key(value.__func__), key(value.__self__))
    if isinstance(value, WeightedUpdate):
        return (type(value), key(value.weighting), value.num_tasks, value.combine_pair)
    if isinstance(value, Weighting):  # What `init` does shows in the states.
        return (type(value), key(value.update))
    if isinstance(value, Certified):
        return (type(value), key(value.solve))
    if isinstance(value, functools.partial):
        return (type(value), key(value.func), key(value.args), key(tuple(value.keywords.items())))
    if isinstance(value, tuple):
        return (type(value), *map(key, value))
    if dataclasses.is_dataclass(value) and type(value).__dataclass_params__.frozen:
        return (type(value), *(key(getattr(value, f.name)) for f in dataclasses.fields(value)))
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return (type(value), repr(value))  # Zeros of both signs are equal, and not alike.
    if isinstance(value, jax.Array) and _has_value(value):
        return (jax.typeof(value), value.sharding, jax.device_get(value).tobytes())
    return id(value)


def _has_value(array: jax.Array) -> bool:
    """Whether the entries of an array can be read here: not of a tracer, say, nor of a key."""
    try:
        here = array.is_fully_addressable
    except jax.errors.ConcretizationTypeError:
        return False
    return here and not jnp.issubdtype(array.dtype, jax.dtypes.extended)


def kinds_of(updates: Mapping[str, Any]) -> dict[str, Hashable]:
    """Returns the key of `makings` of what may be weighed together with another one, by label."""
    kinds = {
        label: makings(update)
        for label, update in updates.items()
        # Rows of a group have the shapes of its parameters; they are no statistic to stack.
        if isinstance(update, WeightedUpdate)
        and not isinstance(update.weighting, JacobianWeighting)
    }
    sizes = collections.Counter(kinds.values())
    return {label: kind for label, kind in kinds.items() if sizes[kind] > 1}


def groups_of(
    places: Mapping[str, Sequence[int]],
    states: Mapping[str, PyTree],
    jacobian: Jacobian,
    params: PyTree | None,
    extra_args: Mapping[str, Any],
    cut_names: Collection[str],
) -> dict[str, Group]:
    """Cuts everything to groups, by the places of their leaves; returns none if that is not plain.

    Trees that do not belong together have to be cut one by one, for the message, and so have extra
    arguments of `cut_names`, of which any weighting may read its own part.
    """
    pair = extra_args.get(PAIRS[0])
    pair = tuple(pair) if isinstance(pair, (tuple, list)) else ()
    trees = [jacobian, *pair] if params is None else [jacobian, *pair, params]
    names = [leaf_names(tree) for tree in trees]
    if any(extra_args.get(name) is not None for name in cut_names) or names[1:] != names[:-1]:
        return {}
    leaves = [jax.tree.leaves(tree) for tree in trees]
    groups = {}
    for label, own in places.items():
        rows, *rest = ([tree[place] for place in own] for tree in leaves)
        extra = {name: value for name, value in extra_args.items() if name not in PAIRS}
        if pair:
            extra[PAIRS[0]] = tuple(rest[: len(pair)])
        groups[label] = Group(rows, None if params is None else rest[-1], extra, states[label])
    return groups


def weigh_together(
    updates: Mapping[str, WeightedUpdate],
    kinds: Mapping[str, Hashable],
    groups: Mapping[str, Group],
) -> dict[str, Weighed]:
    """Weighs groups whose aggregators, statistics and states are alike by one program.

    Args:
      updates: The `update` of every aggregator in `kinds`, by label.
      kinds: What `kinds_of` returned.
      groups: What `groups_of` returned.

    Returns:
      What was found, by label. A group that is alone of its kind, or cannot be weighed in a batch,
      is not there; nor is one that something is wrong with, for the message.
    """
    batches: dict[Hashable, list[_Problem]] = {}
    for label, kind in kinds.items() if groups else ():
        weighting, group = updates[label].weighting, groups[label]
        leaves, treedef = jax.tree.flatten(group.state)
        # The pair is in the statistic of those that read one; others may look at it themselves.
        mixed = PAIRS[0] in group.extra and not isinstance(weighting, CrossGramianWeighting)
        if mixed or not all(map(_is_mapped_alike, leaves)):
            continue
        try:
            m = count_tasks(group.rows, group.params)
            stat = read_stat(weighting, group.rows, group.extra)
        except ValueError:
            continue
        key = (kind, m, jax.typeof(stat), treedef, *map(jax.typeof, leaves))
        batches.setdefault(key, []).append(_Problem(label, stat, group))
    found: dict[str, Weighed] = {}
    for problems in batches.values():
        if len(problems) > 1:
            try:
                found |= _in_one_batch(updates[problems[0].label], problems)
            except (jax.errors.JAXTypeError, NotImplementedError, ValueError):
                # A callback or a Python `if` on its values, say: one by one it works.
                continue
    return found


def _is_mapped_alike(leaf: Any) -> bool:
    """Whether a leaf of a state is an array that stands for the same in a batch as alone."""
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return dtype is not None
    # Other generators draw other numbers in a batch.
    return jax.random.key_impl(leaf) == "threefry2x32"


def _in_one_batch(update: WeightedUpdate, problems: Sequence[_Problem]) -> dict[str, Weighed]:
    m = problems[0].stat.shape[0]
    extra = {name: value for name, value in problems[0].group.extra.items() if name not in PAIRS}
    pairs = [(problem.stat, problem.group.state) for problem in problems]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *pairs)
    weights, states, certificates = jax.vmap(
        lambda pair: update.weigh(lambda: pair[0], m, pair[1], extra)
    )(stacked)
    leaves, treedef = jax.tree.flatten((weights, states))
    certificate = certificates and jax.tree_util.Partial(residuals_of, certificates)
    found = {}
    for place, (label, _, group) in enumerate(problems):
        slices = [lax.index_in_dim(leaf, place, keepdims=False) for leaf in leaves]
        own, state = treedef.unflatten(slices)
        # One certificate stands for all.
        found[label] = Weighed(
            update.combine(own, group.rows, group.extra), state, None if place else certificate
        )
    return found
