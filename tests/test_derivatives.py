"""Weights are differentiable in both modes, by implicit rules: no loop is differentiated.

Derivatives with respect to the Gramian (along symmetric directions), preference vectors and scalar
hyper-parameters are compared with central finite differences in float64. Errors count relative to
``sum_i |w_i| |g_i|``, so that rows of any length count alike.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxjd
from jaxjd import weightings as W
from tests import jaxprs
from tests.registry import slow_but


class Case(NamedTuple):
    """A method, whether it has a preference vector, a scalar with two values, and row lengths.

    With the two values of `nash_mtl` the norm is limited and free. Aligned-MTL knows a small
    eigenvalue only up to rounding of the largest one, so its rows differ less in length.
    """

    make: Callable[..., jaxjd.Weighting]
    preference: bool = False
    scalar: tuple[str, float, float] | None = None
    decades: float = 3.0


CASES = {
    "aligned_mtl": Case(W.aligned_mtl, preference=True, decades=0.5),
    "aligned_mtl(rmse)": Case(
        functools.partial(W.aligned_mtl, scale_mode="rmse"), preference=True, decades=0.5
    ),
    "cagrad": Case(W.cagrad, scalar=("c", 0.4, 1.3)),
    "conflict_free": Case(W.conflict_free, preference=True),
    "dualproj": Case(W.dualproj, preference=True),
    "fairgrad": Case(W.fairgrad, scalar=("alpha", 0.6, 2.0)),
    "imtl_g": Case(W.imtl_g),
    "mgda": Case(W.mgda),
    "nash_mtl": Case(W.nash_mtl, scalar=("max_norm", 0.7, 100.0)),
    "upgrad": Case(W.upgrad, preference=True),
}
SIZES = (pytest.param(2, marks=pytest.mark.slow), 6)
STEP = 3e-5

# One of each implicit rule.
QUICK = {"aligned_mtl", "cagrad", "conflict_free", "nash_mtl", "upgrad"}
all_cases = pytest.mark.parametrize("name", CASES)
most_slow = pytest.mark.parametrize("name", slow_but(QUICK, CASES))


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def weigh(name: str, gramian: jax.Array, arguments: dict) -> jax.Array:
    return CASES[name].make(**arguments).update(gramian, ())[0]


def inputs(name: str, m: int) -> tuple:
    """A batch of points, directions and cotangents, and the rows' lengths.

    The rows work together (no constraint is active), are in conflict, or are in conflict and very
    differently long; directions change the Gramian relative to its rows' lengths.
    """
    case = CASES[name]
    rng = np.random.default_rng(m)
    gramians, directions, lengths = [], [], []
    for kind in ("together", "conflict", "scaled") * 2:
        J = rng.standard_normal((m, 2 * m))
        if kind == "together":
            J = 0.3 * J + 1
        else:
            J[1:] -= 0.5 * J[0]
        if kind == "scaled":
            J *= 10 ** rng.uniform(-case.decades, case.decades, (m, 1))
        length = np.linalg.norm(J, axis=1)
        S = rng.standard_normal((m, m))
        gramians.append(J @ J.T)
        directions.append((S + S.T) * np.outer(length, length) / 4)
        lengths.append(length)
    count = len(gramians)
    arguments = {}
    if case.scalar is not None:
        key, *pair = case.scalar
        arguments[key] = np.repeat(pair, count // 2)
    if case.preference:
        arguments["pref_vector"] = rng.uniform(0.2, 1, (count, m))
    moves = {key: rng.uniform(0.5, 1, np.shape(value)) for key, value in arguments.items()}
    point = (np.stack(gramians), arguments)
    direction = (np.stack(directions), moves)
    # In units of weights, so that every entry of the result matters.
    cotangent = rng.standard_normal((count, m)) * np.stack(lengths)
    return jax.tree.map(jnp.asarray, (point, direction, cotangent, np.stack(lengths)))


def differentiate(name: str, point: tuple, direction: tuple, cotangent: jax.Array) -> tuple:
    """Returns the weights, their derivative along the direction, and the pull-back."""
    fn = functools.partial(weigh, name)
    weights, tangent = jax.jvp(fn, point, direction)
    _, pullback = jax.vjp(fn, *point)
    return weights, tangent, pullback(cotangent)


@functools.cache
def batched(name: str):
    return jax.jit(jax.vmap(functools.partial(differentiate, name)))


def values(name: str, point: tuple) -> np.ndarray:
    """The weights alone, from the one program that there is for a method and a size.

    The test against a loop compares them with those of the function that is not differentiated.
    """
    _, direction, cotangent, _ = inputs(name, point[0].shape[-1])
    return batched(name)(point, direction, cotangent)[0]


def inner(a, b) -> np.ndarray:
    """Inner products of two batches of trees."""
    products = jax.tree.map(lambda x, y: np.sum(x * y, axis=tuple(range(1, np.ndim(x)))), a, b)
    return sum(jax.tree.leaves(products))


@most_slow
@pytest.mark.parametrize("m", SIZES)
def test_derivatives_are_those_of_finite_differences(name, m):
    point, direction, cotangent, lengths = inputs(name, m)
    weights, tangent, gradient = batched(name)(point, direction, cotangent)

    def at(direction, step):
        return values(name, jax.tree.map(lambda x, d: x + step * d, point, direction))

    def along(direction):
        """The central difference of fourth order."""
        one = at(direction, STEP) - at(direction, -STEP)
        two = at(direction, 2 * STEP) - at(direction, -2 * STEP)
        return np.asarray(8 * one - two) / (12 * STEP)

    scale = np.sum(np.abs(weights) * lengths, axis=1, keepdims=True)
    np.testing.assert_allclose(
        tangent * lengths / scale, along(direction) * lengths / scale, rtol=1e-6, atol=1e-7
    )
    # Each argument by itself, in reverse mode.
    zeros = jax.tree.map(jnp.zeros_like, direction)
    single = [(direction[0], zeros[1])]
    single += [(zeros[0], {**zeros[1], key: move}) for key, move in direction[1].items()]
    for move in single:
        expected = np.sum(cotangent * along(move), axis=1)
        size = np.linalg.norm(cotangent * np.asarray(weights), axis=1)
        np.testing.assert_allclose(
            inner(gradient, move) / size, expected / size, rtol=1e-6, atol=1e-7
        )


@most_slow
@pytest.mark.parametrize("m", SIZES)
def test_forward_and_reverse_mode_agree(name, m):
    point, direction, cotangent, _ = inputs(name, m)
    weights, tangent, gradient = batched(name)(point, direction, cotangent)
    forward, reverse = np.sum(cotangent * tangent, axis=1), inner(gradient, direction)
    size = np.linalg.norm(cotangent * np.asarray(weights), axis=1)
    np.testing.assert_allclose(forward / size, reverse / size, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("m", SIZES)
def test_the_points_are_of_both_kinds(m):
    """Constraints are active at some points and at none of others, and so is the limit."""
    point, *_ = inputs("upgrad", m)
    added = np.asarray(values("upgrad", point) - point[1]["pref_vector"]).max(axis=1)
    assert (added == 0).any()
    assert (added > 0).any()
    if m > 2:
        weights = np.asarray(values("mgda", inputs("mgda", m)[0]))
        assert (weights == 0).any()
    (gramians, arguments), *_ = inputs("nash_mtl", m)
    weights = np.asarray(values("nash_mtl", (gramians, arguments)))
    norms = np.sqrt(np.einsum("ki,kij,kj->k", weights, gramians, weights))
    np.testing.assert_allclose(norms, [0.7] * 3 + [np.sqrt(m)] * 3, rtol=1e-9)


@all_cases
def test_no_loop_is_differentiated(name):
    point, direction, cotangent, _ = jax.tree.map(lambda x: x[1], inputs(name, 6))
    fn = functools.partial(weigh, name)

    def loops(fn, *args):
        names = ("while", "scan")
        return sum(eqn.primitive.name in names for eqn in jaxprs.equations(fn, *args))

    plain = loops(fn, *point)
    assert loops(lambda p, d: jax.jvp(fn, p, d)[1], point, direction) <= plain
    assert loops(lambda p, c: jax.vjp(fn, *p)[1](c), point, cotangent) <= plain


@pytest.mark.slow
@all_cases
def test_batched_derivatives_are_those_of_a_loop(name):
    point, direction, cotangent, lengths = inputs(name, 6)
    found = batched(name)(point, direction, cotangent)
    single = jax.jit(functools.partial(differentiate, name))
    plain = jax.jit(functools.partial(weigh, name))
    scale = np.sum(np.abs(found[0]) * lengths, axis=1)
    for k in (0, 1, 5):
        weights, tangent, gradient = single(
            *jax.tree.map(lambda x, k=k: x[k], (point, direction, cotangent))
        )
        rows = jax.tree.map(lambda x, k=k: x[k], found)
        undifferentiated = plain(*jax.tree.map(lambda x, k=k: x[k], point))
        for a, b in ((weights, rows[0]), (undifferentiated, rows[0]), (tangent, rows[1])):
            np.testing.assert_allclose(a * lengths[k], b * lengths[k], atol=1e-9 * scale[k])
        for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(rows[2]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9 * np.abs(b).max())
