"""The exact solvers against their optimality conditions, brute force and finite differences."""

from __future__ import annotations

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxjd import linalg
from jaxjd.linalg import nonnegative_qp as qp

project = jax.jit(linalg.project_onto_dual_cone)
min_norm = jax.jit(linalg.min_norm_weights)

SHAPES = [(1, 3), (2, 2), (5, 2), (8, 4), (8, 8), (12, 30)]


def matrices(m: int, n: int, count: int = 12):
    """Random rows, scaled rows, duplicate, opposite and zero rows."""
    rng = np.random.default_rng(m * 100 + n)
    for number in range(count):
        matrix = rng.standard_normal((m, n))
        if number % 3 == 1:
            matrix *= 10 ** rng.uniform(-3, 3, (m, 1))
        if number % 3 == 2 and m > 1:
            matrix[1] = (1, -1, 0)[number // 3 % 3] * matrix[0]
        yield matrix


def lengths(matrix):
    norms = np.linalg.norm(matrix, axis=1)
    return np.where(norms > 0, norms, 1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-12)])
def test_dual_cone_optimality(shape, dtype, tolerance):
    """For unit rows: v >= u, the projection conflicts with no row, and slack times dual is zero."""
    m = shape[0]
    with jax.enable_x64(dtype == "float64"):
        for matrix in matrices(*shape):
            gramian = jnp.asarray(matrix @ matrix.T, dtype)
            U = jnp.diag(jnp.full((m,), 1 / m, dtype))
            V = np.asarray(project(U, gramian), np.float64)
            assert np.isfinite(V).all()
            scale = lengths(matrix)
            cosines = np.asarray(gramian, np.float64) / np.outer(scale, scale)
            v = V * scale
            u = np.asarray(U, np.float64) * scale
            size = np.linalg.norm(v, axis=1, keepdims=True) + np.finfo(dtype).tiny
            products = v @ cosines
            assert ((v - u) >= -tolerance * size).all()
            assert (products >= -tolerance * size).all()
            complementarity = np.minimum(np.abs(v - u), np.abs(products))
            assert (complementarity <= tolerance * size).all()


def brute_force_dual_cone(u, gramian):
    """Tries every set of active constraints."""
    m = len(u)
    best, best_value = None, np.inf
    for support in itertools.product([False, True], repeat=m):
        free = np.array(support)
        v = u.astype(float).copy()
        if free.any():
            right = -gramian[np.ix_(free, ~free)] @ u[~free]
            v[free] = np.linalg.lstsq(gramian[np.ix_(free, free)], right, rcond=None)[0]
        if (v >= u - 1e-10).all() and v @ gramian @ v < best_value - 1e-14:
            best, best_value = v, v @ gramian @ v
    return best


def test_dual_cone_against_brute_force():
    rng = np.random.default_rng(0)
    with jax.enable_x64():
        for _ in range(20):
            matrix = rng.standard_normal((4, 5))
            gramian = matrix @ matrix.T
            u = rng.uniform(0, 1, 4)
            expected = brute_force_dual_cone(u, gramian)
            np.testing.assert_allclose(project(u, jnp.asarray(gramian)), expected, rtol=1e-9)
            norm_eps, reg_eps = 1e-4, 1e-2
            regularized = linalg.regularized_projector(norm_eps, reg_eps)
            found = regularized(jnp.asarray(u), jnp.asarray(gramian))
            problem = gramian / np.trace(gramian) + reg_eps * np.eye(4)
            np.testing.assert_allclose(found, brute_force_dual_cone(u, problem), rtol=1e-9)
            vanishing = regularized(jnp.asarray(u), jnp.asarray(gramian) * 1e-8)
            np.testing.assert_allclose(vanishing, u, rtol=1e-12)


def test_dual_cone_shapes_and_row_scaling():
    rng = np.random.default_rng(1)
    matrix = rng.standard_normal((5, 9))
    scale = 10 ** rng.uniform(-3, 3, 5)
    with jax.enable_x64():
        gramian = jnp.asarray(matrix @ matrix.T)
        U = jnp.asarray(rng.uniform(0, 1, (2, 3, 5)))
        V = project(U, gramian)
        assert V.shape == U.shape
        chex.assert_trees_all_close(V[1, 2], project(U[1, 2], gramian), rtol=1e-12)
        # The cone is the same for scaled rows; the weights of the same vector are scaled back.
        scaled = gramian * jnp.outer(scale, scale)
        scale = jnp.asarray(scale).reshape(1, 1, 5)
        chex.assert_trees_all_close(project(U / scale, scaled), V / scale, rtol=1e-9)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_min_norm_optimality(shape):
    with jax.enable_x64():
        for matrix in matrices(*shape):
            w = np.asarray(min_norm(jnp.asarray(matrix @ matrix.T)))
            assert (w >= 0).all()
            np.testing.assert_allclose(w.sum(), 1, rtol=1e-12)
            d = w @ matrix
            shortest = lengths(matrix).min() ** 2
            # The duality gap: |d|^2 - min_i g_i.d.
            assert d @ d - (matrix @ d).min() <= 1e-7 * max(d @ d, 1e-7 * shortest) or (
                d @ d <= 1e-12 * shortest
            )


def test_min_norm_against_brute_force():
    rng = np.random.default_rng(2)
    with jax.enable_x64():
        for _ in range(20):
            matrix = rng.standard_normal((5, 6))
            gramian = matrix @ matrix.T
            best = np.inf
            for support in itertools.product([False, True], repeat=5):
                free = np.array(support)
                if not free.any():
                    continue
                z = np.linalg.solve(gramian[np.ix_(free, free)], np.ones(free.sum()))
                if (z >= 0).all():
                    best = min(best, 1 / z.sum())
            w = np.asarray(min_norm(jnp.asarray(gramian)))
            np.testing.assert_allclose(w @ gramian @ w, best, rtol=1e-9)


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        ([0.5, 0.1, 0.1], [0.6, 0.2, 0.2]),
        ([1.0, 0.0, -0.5], [1.0, 0.0, 0.0]),
        ([0.2, 0.3, 0.5], [0.2, 0.3, 0.5]),
        ([7.0], [1.0]),
        ([-1e6, -1e6 + 0.5], [0.25, 0.75]),
    ],
)
def test_simplex_values(x, expected):
    found = linalg.project_onto_simplex(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_simplex_is_idempotent_and_batched():
    x = jax.random.normal(jax.random.key(0), (3, 4, 6)) * 10
    once = linalg.project_onto_simplex(x)
    assert (once >= 0).all()
    np.testing.assert_allclose(once.sum(-1), 1, rtol=1e-6)
    np.testing.assert_allclose(linalg.project_onto_simplex(once), once, atol=1e-6)
    np.testing.assert_allclose(linalg.project_onto_simplex(x[1, 2]), once[1, 2], atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_input_gives_nan_and_ends(bad):
    gramian = jnp.eye(3).at[1, 1].set(bad)
    U = jnp.diag(jnp.full((3,), 1 / 3))
    assert np.isnan(project(U, gramian)).any()
    assert np.isnan(min_norm(gramian)).all()


def test_chunks_change_nothing(monkeypatch):
    rng = np.random.default_rng(3)
    matrix = rng.standard_normal((6, 8))
    cosines = matrix @ matrix.T
    scale = np.sqrt(np.diag(cosines))
    cosines = jnp.asarray(cosines / np.outer(scale, scale), jnp.float32)
    linear = jnp.asarray(rng.standard_normal((7, 6)), jnp.float32)
    whole = qp.nonnegative_qp(cosines, linear)
    monkeypatch.setattr(qp, "_CHUNK_ELEMENTS", 2 * 36)
    np.testing.assert_allclose(qp.nonnegative_qp(cosines, linear), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("solver", ["dual cone", "min norm"])
def test_derivatives_against_finite_differences(solver):
    rng = np.random.default_rng(4)
    matrix, direction = rng.standard_normal((2, 5, 7))
    with jax.enable_x64():
        U = jnp.asarray(rng.uniform(0.1, 1, (5, 5)))

        def weights(t):
            rows = jnp.asarray(matrix) + t * jnp.asarray(direction)
            gramian = rows @ rows.T
            if solver == "dual cone":
                return linalg.project_onto_dual_cone(U * (1 + t), gramian)
            return linalg.min_norm_weights(gramian)

        step = 1e-6
        zero = jnp.zeros(())
        numeric = (weights(zero + step) - weights(zero - step)) / (2 * step)
        value, forward = jax.jvp(weights, (zero,), (jnp.ones(()),))
        np.testing.assert_allclose(forward, numeric, rtol=1e-5, atol=1e-6)
        cotangent = jnp.asarray(rng.standard_normal(value.shape))
        _, pull_back = jax.vjp(weights, zero)
        np.testing.assert_allclose(pull_back(cotangent)[0], jnp.sum(cotangent * forward), rtol=1e-8)


def test_vmap_equals_a_loop():
    matrices_ = jax.random.normal(jax.random.key(5), (4, 6, 9))
    gramians = matrices_ @ jnp.swapaxes(matrices_, 1, 2)
    U = jnp.diag(jnp.full((6,), 1 / 6))
    batched = jax.jit(jax.vmap(linalg.project_onto_dual_cone, (None, 0)))(U, gramians)
    for gramian, V in zip(gramians, batched, strict=True):
        np.testing.assert_allclose(project(U, gramian), V, rtol=1e-4, atol=1e-5)
    batched = jax.jit(jax.vmap(linalg.min_norm_weights))(gramians)
    for gramian, w in zip(gramians, batched, strict=True):
        np.testing.assert_allclose(min_norm(gramian), w, rtol=1e-4, atol=1e-5)
