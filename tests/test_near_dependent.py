"""What docs/precision.md says of the range of a Gramian and of nearly dependent gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxjd
from tests.registry import NAMED, M, by_name

FEW = ("conflict_free", "mgda", "upgrad")
HOMOGENEOUS = [
    pytest.param(method, id=by_name(method), marks=[] if method.name in FEW else pytest.mark.slow)
    for method in NAMED
    if method.homogeneous and method.stat == "gramian" and not method.losses
]


@pytest.mark.parametrize("method", HOMOGENEOUS)
def test_a_scaled_jacobian_reaches_the_ends_of_the_range(method):
    # The rows are normal numbers of float32; their squares are not.
    rng = np.random.default_rng(0)
    jacobian = rng.normal(size=(M, 6)).astype(np.float32)

    @jax.jit
    def run(jacobian, factor):
        tx = optax.chain(
            jaxjd.per_task(optax.scale(factor), M),
            method.aggregator(M),
            optax.scale(1 / factor),
        )
        updates, state = tx.update(jacobian, tx.init(jnp.zeros(6)))
        return updates, state[1].weights

    updates, weights = run(jacobian, np.float32(1))
    for exponent, factor in ((-90, 60), (-30, 60), (0, 30), (100, -60)):
        found = run(np.ldexp(jacobian, exponent), np.float32(2.0**factor))
        np.testing.assert_array_equal(found[1], weights)
        np.testing.assert_array_equal(found[0], np.ldexp(updates, exponent))


ANGLES = (1e-1, 1e-2, 3e-3)
NEAR = {
    "conflict_free": (jaxjd.weightings.conflict_free(), (1, -1)),
    # Nearly parallel gradients cost these two nothing.
    "nash_mtl": (jaxjd.weightings.nash_mtl(max_norm=0.0), (-1,)),
    "fairgrad": (jaxjd.weightings.fairgrad(2.0), (-1,)),
}


def near(angle, sign, seed):
    """Three unit rows with 1,000 entries, of which two are an angle from parallel or opposite."""
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(1000, 2)))[0].T
    third = np.random.default_rng(seed + 100).normal(size=1000)
    second = sign * np.cos(angle) * basis[0] + np.sin(angle) * basis[1]
    return np.stack([basis[0], second, third / np.linalg.norm(third)]).astype(np.float32)


@functools.lru_cache
def solver(name):
    weighting = NEAR[name][0]
    return jax.jit(lambda gramian: weighting.update(gramian, ())[0])


def error(name, jacobian):
    """The relative error of the update from the float32 Gramian."""
    exact_jacobian = jacobian.astype(np.float64)
    with jax.enable_x64(True):
        exact = np.asarray(solver(name)(jnp.asarray(exact_jacobian @ exact_jacobian.T)))
    weights = np.asarray(solver(name)(jaxjd.gramian(jacobian)), np.float64)
    exact_update = exact @ exact_jacobian
    return np.linalg.norm(weights @ exact_jacobian - exact_update) / np.linalg.norm(exact_update)


@pytest.mark.parametrize("name", NEAR)
def test_nearly_dependent_rows_lose_the_square_of_the_angle(name):
    # The Gramian is rounded by up to sqrt(n) eps, and its smallest eigenvalue is angle^2 / 2.
    eps = float(np.finfo(np.float32).eps)
    for angle in ANGLES:
        for sign in NEAR[name][1]:
            for seed in range(3):
                assert error(name, near(angle, sign, seed)) <= 32 * eps / angle**2


@pytest.mark.parametrize("name", ["nash_mtl", "fairgrad"])
def test_nearly_parallel_rows_cost_the_fair_methods_nothing(name):
    for angle in (1e-1, 1e-3):
        assert error(name, near(angle, 1, 0)) <= 32 * float(np.finfo(np.float32).eps)
