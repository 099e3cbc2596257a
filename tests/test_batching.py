"""`jax.vmap` of a weighting is a loop: over statistics and states, preferences, and scalars."""

from __future__ import annotations

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxjd import weightings as W
from tests.registry import NAMED, WEIGHTINGS, M, Method, by_name, slow_but

COUNT = 4
PARAMS = {"w": jnp.zeros(4), "b": jnp.zeros(())}
VECTORS = {
    "aligned_mtl": "pref_vector",
    "conflict_free": "pref_vector",
    "constant": "weights",
    "dualproj": "pref_vector",
    "pcd": "tau",
    "sdmgrad": "pref_vector",
    "upgrad": "pref_vector",
}
"""Arguments with one entry per task, or per task but the first."""

CONSTANT = ("constant", "cr_mogm(mean, schedule)", "mean", "random", "sum")
"""Weights that do not depend on the Jacobian."""

BOUND = 1e-6  # Relative to the largest weight: a batched product rounds in another order.


@functools.cache
def jacobians() -> dict:
    key_w, key_b = jax.random.split(jax.random.key(3))
    return {
        "w": jax.random.normal(key_w, (COUNT, M, 4)),
        "b": jax.random.normal(key_b, (COUNT, M)),
    }


def make(method: Method, arguments: dict):
    if not arguments:
        return method.weighting()
    return getattr(W, method.name)(**{**method.required, **arguments})


def call(method: Method, jacobian, state, arguments):
    weighting = make(method, arguments)
    return weighting.update(method.stat_of(jacobian), state, **method.extra_args(jacobian))


@functools.cache
def single(name: str):
    """The jitted function of one call that every test compares with."""
    (method,) = (method for method in WEIGHTINGS if method.name == name)
    return jax.jit(functools.partial(call, method))


def state_after(method: Method, jacobian):
    """The state after two calls; no warm-up in the registry is longer."""
    state = make(method, {}).init(M, PARAMS)
    for _ in range(2):
        _, state = single(method.name)(jacobian, state, {})
    return state


def item(tree, k: int):
    return jax.tree.map(lambda leaf: leaf[k], tree)


def assert_a_loop(method: Method, found, expected: list) -> None:
    weights, state = found
    for k, (w, s) in enumerate(expected):
        assert np.isfinite(w).all()
        np.testing.assert_allclose(weights[k], w, rtol=0, atol=BOUND * np.abs(w).max())
        for a, b in zip(jax.tree.leaves(item(state, k)), jax.tree.leaves(s), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
                a, b = jax.random.key_data(a), jax.random.key_data(b)
            largest = np.max(np.abs(np.asarray(b, float)), initial=0)
            np.testing.assert_allclose(a, b, rtol=0, atol=BOUND * largest)


SOLVED = {"aligned_mtl", "cagrad", "dualproj", "fairgrad", "gradvac", "imtl_g", "mgda", "pcd"}
NAMED_QUICK = slow_but({method.name for method in NAMED} - SOLVED, WEIGHTINGS)
"""By default the methods by name; what is made of them is slow, and of the solvers all but those
of UPGrad, ConFIG and Nash-MTL."""


@pytest.mark.parametrize("method", NAMED_QUICK, ids=by_name)
def test_over_jacobians_and_states(method):
    rows = [item(jacobians(), k) for k in range(COUNT)]
    # Every state comes from another Jacobian than the one of the call.
    states = [state_after(method, rows[k - 1]) for k in range(COUNT)]
    stacked = jax.jit(lambda states: jax.tree.map(lambda *leaves: jnp.stack(leaves), *states))(
        states
    )
    batched = jax.jit(jax.vmap(functools.partial(call, method), in_axes=(0, 0, None)))
    found = batched(jacobians(), stacked, {})
    expected = [
        single(method.name)(row, state, {}) for row, state in zip(rows, states, strict=True)
    ]
    assert found[0].shape[0] == COUNT
    assert_a_loop(method, found, expected)
    # The rows differ, so that a batch of one answer would not pass.
    if method.name not in CONSTANT:
        assert np.ptp(np.asarray(found[0]), axis=0).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("method", [m for m in NAMED if m.name in VECTORS], ids=by_name)
def test_over_preference_vectors(method):
    jacobian = item(jacobians(), 0)
    state = state_after(method, jacobian)
    length = M - 1 if method.name == "pcd" else M
    vectors = jax.random.uniform(jax.random.key(5), (COUNT, length), minval=0.1)
    arguments = {VECTORS[method.name]: vectors}
    batched = jax.jit(jax.vmap(functools.partial(call, method), in_axes=(None, None, 0)))
    found = batched(jacobian, state, arguments)
    expected = [single(method.name)(jacobian, state, item(arguments, k)) for k in range(COUNT)]
    assert_a_loop(method, found, expected)
    assert np.ptp(np.asarray(found[0]), axis=0).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("method", [m for m in NAMED if m.hyperparameters], ids=by_name)
def test_over_every_scalar(method):
    """One batch, in which one hyper-parameter at a time differs from the registered values."""
    jacobian = item(jacobians(), 0)
    state = state_after(method, jacobian)
    settings = [
        {**method.hyperparameters, name: factor * value}
        for name, value in method.hyperparameters.items()
        for factor in (0.3, 0.6, 0.9)
    ]
    arguments = jax.tree.map(lambda *values: jnp.array(values, jnp.float32), *settings)
    batched = jax.jit(jax.vmap(functools.partial(call, method), in_axes=(None, None, 0)))
    found = batched(jacobian, state, arguments)
    expected = [
        single(method.name)(jacobian, state, item(arguments, k)) for k in range(len(settings))
    ]
    assert_a_loop(method, found, expected)


def test_methods_with_a_vector_are_all_there():
    vectors = {"pref_vector", "weights", "tau"}
    parameters = {m.name: inspect.signature(getattr(W, m.name)).parameters for m in NAMED}
    assert set(VECTORS) == {name for name, found in parameters.items() if vectors & set(found)}
