"""Matrices that several layers use: every use as a parameter of its own, and joined again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex

from jaxjd.autodiff._owners import inline
from jaxjd.autodiff._taps import Site, bind, is_view
from jaxjd.autodiff._tasks import example_of
from jaxjd.linalg.factored import FactoredLeaf
from jaxjd.linalg.tied import TiedLeaf, joined_lookups, joined_matrices


def untied_run(engine: Any, batch: tuple) -> Callable[[tuple, int | None], tuple]:
    """The `run` of an engine for examples, with leaves of matrices of several layers factored."""
    program, consts = inline(engine.traced.jaxpr)
    counts = _counts(program, len(engine.leaves))
    several = {number for number, count in enumerate(counts) if count > 1}
    if not several:
        return engine.run
    # Once to see what becomes of every use, and again where all of them are layers.
    trial, owners = _with_copies(engine, program, consts, batch, several, counts)
    sites = trial.parts.taps.sites
    unfit = {n for place, n in enumerate(owners) if n in several and not _fits(sites.get(place))}
    several -= unfit
    if not several:
        return engine.run
    other, owners = _with_copies(engine, program, consts, batch, several, counts)

    def run(batch: tuple, chunk_size: int | None) -> tuple:
        losses, aux, rows = other.run(batch, chunk_size)
        leaves = []
        for number in range(len(engine.leaves)):
            places = [place for place, owner in enumerate(owners) if owner == number]
            own = [other.parts.taps.sites.get(place) for place in places]
            leaves.append(_joined([rows[place] for place in places], own))
        return losses, aux, jax.tree.unflatten(engine.treedef, leaves)

    return run


def _joined(leaves: Sequence[Any], sites: Sequence[Any]) -> Any:
    """One leaf of those of all uses of a parameter."""
    if len(leaves) == 1:
        return leaves[0]
    if not all(isinstance(leaf, FactoredLeaf) for leaf in leaves):  # On an explicit mesh.
        rows = [leaf.materialize() if isinstance(leaf, FactoredLeaf) else leaf for leaf in leaves]
        return sum(rows[1:], rows[0])
    lookups, matrices, turned = [], [], []
    for leaf, site in zip(leaves, sites, strict=True):
        if site.kind == "embedding":
            lookups.append(leaf)
        else:
            matrices.append(leaf)
            turned.append(_is_turned(site))
    if not matrices:
        return joined_lookups(lookups)
    matrix = joined_matrices(matrices, turned)
    return TiedLeaf(joined_lookups(lookups), matrix) if lookups else matrix


def _fits(site: Site | None) -> bool:
    """Whether a use is a product with the matrix or its transpose, or looks its rows up."""
    if site is None or len(site.shape) != 2 or site.view.lead:
        return False
    names = {equation.primitive.name for equation, _ in site.view.steps}
    if site.kind == "embedding":
        return names <= {"convert_element_type", "copy", "name"}
    if site.kind != "matrix" or not names <= {"convert_element_type", "copy", "name", "transpose"}:
        return False
    contract, batch = site.equation.params["dimension_numbers"]
    return not batch[0] and len(contract[0]) == 1


def _is_turned(site: Site) -> bool:
    """Whether the inputs of a layer belong to the second axis of the parameter."""
    (axis,) = site.equation.params["dimension_numbers"][0][site.position]
    for equation, _ in site.view.steps:
        if equation.params.get("permutation") == (1, 0):
            axis = 1 - axis
    return axis == 1


def _counts(program: Any, num_params: int) -> list[int]:
    """How often each of the first arguments is used, through whatever only views it."""
    owner = {var: number for number, var in enumerate(program.invars[:num_params])}
    counts = [0] * num_params
    for equation in program.eqns:
        known = [owner[v] for v in equation.invars if not _is_literal(v) and v in owner]
        if known and is_view(equation):
            owner[equation.outvars[0]] = known[0]
            continue
        for number in known:
            counts[number] += 1
    for var in program.outvars:
        if not _is_literal(var) and var in owner:
            counts[owner[var]] += 1
    return counts


def _with_copies(
    engine: Any,
    program: Any,
    consts: Sequence[Any],
    batch: tuple,
    several: set[int],
    counts: Sequence[int],
) -> tuple[Any, list[int]]:
    """An engine whose parameters are the uses of some, and what each of its parameters is of."""
    owners = []
    for number in range(len(engine.leaves)):
        owners += [number] * (counts[number] if number in several else 1)
    starts = [owners.index(number) for number in range(len(engine.leaves))]

    def run(*args: Any) -> list[Any]:
        copies, others = args[: len(owners)], args[len(owners) :]
        left = [
            iter(copies[start : start + count]) for start, count in zip(starts, counts, strict=True)
        ]
        values = dict(zip(program.constvars, consts, strict=True))
        views: dict[Any, tuple] = {}
        for number, var in enumerate(program.invars[: len(engine.leaves)]):
            if number in several:
                views[var] = (number,)
            else:
                values[var] = copies[starts[number]]
        values.update(zip(program.invars[len(engine.leaves) :], others, strict=True))

        def read(var: Any) -> Any:
            if _is_literal(var):
                return var.val
            if var not in views:
                return values[var]
            number, *steps = views[var]
            value = next(left[number])
            for step in steps:
                (value,) = bind(step, [value])
            return value

        for equation in program.eqns:
            first = equation.invars[0] if equation.invars else None
            if is_view(equation) and not _is_literal(first) and first in views:
                views[equation.outvars[0]] = (*views[first], equation)
                continue
            results = bind(equation, [read(var) for var in equation.invars])
            values.update(zip(equation.outvars, results, strict=True))
        return [read(var) for var in program.outvars]

    other = copy.copy(engine)
    other.leaves = [engine.leaves[number] for number in owners]
    other.treedef = jax.tree.structure(other.leaves)
    jaxpr = jax.make_jaxpr(run)(*other.leaves, *jax.tree.leaves(example_of(batch)))
    other.traced = engine.traced._replace(jaxpr=jaxpr)
    return other.factored(), owners


def _is_literal(var: Any) -> bool:
    return isinstance(var, jex.Literal)
