"""The stationarity gaps of `monitored`, which does not call the solver that has every digit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxjd.diagnostics import stationarity_gap
from jaxjd.diagnostics._stationarity import stationarity_gaps
from jaxjd.solvers.scaling import unit_diagonal
from tests.matrices import gaussian


def jacobians(m):
    """Rows that conflict, that do not, and that are nearly parallel or opposite, at any length."""
    found = []
    for seed in range(40):
        J = gaussian(seed, m, m + 3)
        kind = seed % 4
        if kind == 1:
            J[:, 0] += 3
        elif kind > 1:
            signs = np.where(np.arange(m) % kind, -1, 1)[:, None]
            J = signs * J[:1] + 10.0 ** -(seed % 6) * J
        found.append(J * 10 ** np.random.default_rng(seed).uniform(-2, 2, (m, 1)))
    found[0][0] = 0
    found[1][:] = 0
    found[2][:] = found[2][:1]
    return np.stack(found).astype(np.float32)


@functools.partial(jax.jit, static_argnames="exact")
def gaps_of(J, exact=False):
    def one(J):
        G = jnp.einsum("mn,kn->mk", J, J, precision="highest")
        if exact:
            return jnp.stack([stationarity_gap(G), stationarity_gap(G, relative=True)])
        return stationarity_gaps(unit_diagonal(G))

    return jax.vmap(one)(J)


@pytest.mark.parametrize("m", [1, 2, 3, pytest.param(4, marks=pytest.mark.slow), 6])
def test_gaps_are_those_of_the_exact_solver(m):
    J = jacobians(m)
    found = np.asarray(gaps_of(J))
    with jax.enable_x64(True):
        wanted = np.asarray(gaps_of(J.astype(np.float64), exact=True))
    # Of the longest row in the shortest combination; a length is the root of what is rounded.
    level = np.sqrt(m * np.finfo(np.float32).eps)
    shortest = np.linalg.norm(J, axis=2).min(axis=1)
    assert np.all(np.abs(found[:, 1] - wanted[:, 1]) <= level)
    assert np.all(np.abs(found[:, 0] - wanted[:, 0]) <= level * m * np.maximum(shortest, 1e-30))
    assert np.all(found[:2] == 0)
    well = wanted[:, 1] > 0.3
    np.testing.assert_allclose(found[well], wanted[well], rtol=1e-4)


def test_gaps_have_the_derivatives_of_the_shortest_combination():
    J = jnp.asarray(jacobians(3)[5])

    def of(gaps, J):
        G = jnp.einsum("mn,kn->mk", J, J, precision="highest")
        return gaps(G)

    new = jax.grad(lambda J: of(lambda G: stationarity_gaps(unit_diagonal(G))[0], J))(J)
    exact = jax.grad(lambda J: of(stationarity_gap, J))(J)
    np.testing.assert_allclose(new, exact, rtol=1e-3, atol=1e-3 * np.abs(exact).max())


@pytest.mark.parametrize("m", [2, 3, 6])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_not_hidden(m, bad):
    J = jacobians(m)
    J[:, 1, 2] = bad
    assert np.isnan(np.asarray(gaps_of(J))).all()
