"""Groups whose aggregators are made alike, weighed by one program for all of them."""

from __future__ import annotations

import collections
import dataclasses
import functools
import types
from collections.abc import Collection, Hashable, Mapping
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
from jaxjd.grouping._cut import PAIRS
from jaxjd.grouping._grouped import residuals_of
from jaxjd.linalg.algebra import count_tasks


class _Problem(NamedTuple):
    """What a group is weighed by."""

    num_tasks: int
    stat: jax.Array
    state: PyTree


class Weighed(NamedTuple):
    """What comes of weighing one group.

    Attributes:
      weights: Shape ``(m,)``.
      state: The next state of the group's aggregator.
      certificate: That of all groups that were weighed together, for one of them; None for others.
    """

    weights: jax.Array
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


def weigh_together(
    updates: Mapping[str, WeightedUpdate],
    kinds: Mapping[str, Hashable],
    parts: Mapping[str, tuple[Jacobian, PyTree | None, dict[str, Any]]],
    states: Mapping[str, PyTree],
    extra_args: Mapping[str, Any],
    cut_names: Collection[str],
) -> dict[str, Weighed]:
    """Weighs groups whose aggregators, statistics and states are alike by one program.

    Args:
      updates: The `update` of every aggregator in `kinds`, by label.
      kinds: What `kinds_of` returned.
      parts: The Jacobian, the parameters and the extra arguments of every group.
      states: The states of the aggregators.
      extra_args: The extra arguments, not cut to a group.
      cut_names: The names of those that are cut to it.

    Returns:
      What was found, by label. A group that is alone of its kind or cannot be mapped is not there.
    """
    given = {name for name in cut_names if extra_args.get(name) is not None}
    shared = {name: value for name, value in extra_args.items() if name not in given}
    batches: dict[Hashable, dict[str, _Problem]] = {}
    for label, kind in kinds.items():
        update, (jacobian, params, extra) = updates[label], parts[label]
        # The pair of Jacobians is in the statistic; others may be read for themselves.
        is_pair = isinstance(update.weighting, CrossGramianWeighting) and given <= {*PAIRS}
        leaves, treedef = jax.tree.flatten(states[label])
        if (given and not is_pair) or not all(map(_is_mapped_alike, leaves)):
            continue
        m = count_tasks(jacobian, params)
        if m is not None:
            stat = read_stat(update.weighting, jacobian, extra)
            key = (kind, m, jax.typeof(stat), treedef, *map(jax.typeof, leaves))
            batches.setdefault(key, {})[label] = _Problem(m, stat, states[label])
    found: dict[str, Weighed] = {}
    for problems in batches.values():
        if len(problems) > 1:
            update = updates[next(iter(problems))]
            try:
                found |= _in_one_batch(update, problems, shared)
            except (jax.errors.JAXTypeError, NotImplementedError, ValueError):
                # A callback or a Python `if` on its values, say: one by one it works, or fails with
                # the message for one.
                continue
    return found


def _is_mapped_alike(leaf: Any) -> bool:
    """Whether a leaf of a state is an array that stands for the same in a batch as alone."""
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return dtype is not None
    # Other generators draw other numbers in a batch.
    return jax.random.key_impl(leaf) == "threefry2x32"


def _in_one_batch(
    update: WeightedUpdate, problems: Mapping[str, _Problem], extra_args: Mapping[str, Any]
) -> dict[str, Weighed]:
    m = next(iter(problems.values())).num_tasks
    pairs = [(problem.stat, problem.state) for problem in problems.values()]
    stats, states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *pairs)
    weights, states, certificates = jax.vmap(
        lambda stat, state: update.weigh(lambda: stat, m, state, extra_args)
    )(stats, states)
    leaves, treedef = jax.tree.flatten((weights, states))
    certificate = certificates and jax.tree_util.Partial(residuals_of, certificates)
    found = {}
    for place, label in enumerate(problems):
        slices = [lax.index_in_dim(leaf, place, keepdims=False) for leaf in leaves]
        own, state = treedef.unflatten(slices)
        # One certificate stands for all.
        found[label] = Weighed(own, state, None if place else certificate)
    return found
