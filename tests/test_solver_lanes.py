"""The quadratic programs of few rows: which operations they take, and lanes of `vmap`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxjd import linalg, weightings
from jaxjd.solvers.nonnegative_qp import nonnegative_qp

project = linalg.project_onto_dual_cone


def gramians(*shape: int) -> jax.Array:
    """Of rows that conflict, of lengths of 1e-3 to 1e3, shape ``(*shape, m, m)``."""
    *lanes, m = shape
    rng = np.random.default_rng(m)
    rows = rng.standard_normal((*lanes, m, m)) - rng.standard_normal((*lanes, 1, m))
    rows *= 10.0 ** rng.uniform(-3, 3, (*lanes, m, 1))
    return jnp.asarray(rows @ np.swapaxes(rows, -1, -2), jnp.float32)


@pytest.mark.parametrize("m", [2, 3])
def test_few_rows_take_no_loop_and_no_factorization(m):
    for weighting in (weightings.upgrad(), weightings.mgda(), weightings.pcd()):
        state = weighting.init(m)
        text = str(jax.make_jaxpr(lambda G: weighting.update(G, state)[0])(jnp.eye(m)))  # noqa: B023
        for slow in ("while", "cholesky", "triangular_solve", "sort"):
            assert f" {slow}[" not in text, slow


def test_up_to_eight_rows_are_not_factorized():
    text = str(jax.make_jaxpr(lambda G: project(jnp.eye(8), G))(jnp.eye(8)))
    assert text.count(" while[") == 1
    assert "cholesky" not in text


def test_lanes_are_those_of_a_loop():
    G = gramians(3, 4, 5)
    U = jnp.eye(5) / 5
    one = jax.jit(project)
    expected = np.array([[one(U, matrix) for matrix in lane] for lane in G])
    nested = jax.jit(jax.vmap(jax.vmap(project, (None, 0)), (None, 0)))(U, G)
    residual = jax.jit(jax.vmap(jax.vmap(linalg.dual_cone_residual, (0, None, 0)), (0, None, 0)))
    assert (residual(nested, U, G) < 1e-5).all()
    scale = np.abs(expected).max(axis=(2, 3), keepdims=True)
    np.testing.assert_allclose(nested / scale, expected / scale, atol=1e-3)
    # One matrix for all lanes.
    shared = jax.jit(jax.vmap(project, (0, None)))(jnp.stack([U, 2 * U]), G[0, 0])
    np.testing.assert_allclose(shared[1], 2 * shared[0], rtol=1e-5)


def test_supports_that_lose_nearly_dependent_rows_are_right_to_rounding():
    # The last two rows are close, and all of them are in the support at first.
    angle = 1e-3
    rows = np.eye(5)
    rows[3] = [-1, -1, 0, 1, 0]
    rows[4] = rows[3] + angle * np.array([2, -2, 1, 0, 1])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    with jax.enable_x64():
        C = jnp.asarray(rows @ rows.T)
        q = jnp.asarray(np.random.default_rng(0).uniform(-1, -0.1, (40, 5)))
        x = np.asarray(jax.jit(nonnegative_qp)(C, q))
        slack = np.asarray(x @ C + q)
    size = np.abs(x).max(axis=1, keepdims=True)
    assert (x >= 0).all()
    assert (slack >= -1e-13 * size).all()
    assert (np.minimum(x, slack) <= 1e-13 * size).all()
    assert np.sum(x == 0) > 20


@pytest.mark.parametrize("m", [3, *(pytest.param(m, marks=pytest.mark.slow) for m in (5, 12))])
@pytest.mark.parametrize("name", ["upgrad", "dualproj", "mgda", "cagrad", "pcd"])
def test_devices_may_have_problems_of_their_own(name, m):
    """As with different batches inside of `jax.shard_map`, where each device ends its own loop."""
    weighting = weightings.cagrad(0.5) if name == "cagrad" else getattr(weightings, name)()
    state = weighting.init(m)
    devices = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("devices",))
    spec = jax.sharding.PartitionSpec("devices")
    G = gramians(2, m)

    def solve(G):
        return weighting.update(G[0], state)[0][None]

    found = jax.jit(jax.shard_map(solve, mesh=devices, in_specs=spec, out_specs=spec))(G)
    one = jax.jit(lambda G: weighting.update(G, state)[0])
    for weights, matrix in zip(found, G, strict=True):
        scale = np.sqrt(np.diag(matrix))  # As contributions: rows have very different lengths.
        expected = one(matrix) * scale
        np.testing.assert_allclose(weights * scale, expected, atol=1e-3 * np.abs(expected).max())
