"""The exact solvers against their optimality conditions, brute force and finite differences."""

from __future__ import annotations

import itertools

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxjd import linalg
from jaxjd.solvers import nonnegative_qp as qp
from jaxjd.solvers import pivoting
from jaxjd.solvers.pseudo_inverse import pseudo_inverse
from tests.rounding import UNFUSED

project = jax.jit(linalg.project_onto_dual_cone)
min_norm = jax.jit(linalg.min_norm_weights)

deterministic = hypothesis.settings(
    derandomize=True, deadline=None, max_examples=150, database=None
)
small_integers = st.lists(
    st.lists(st.integers(-2, 2), min_size=3, max_size=3), min_size=5, max_size=5
)
"""Five rows in three dimensions: zero, equal, opposite and dependent rows come up all the time."""

# Few row counts, since each is compiled: five rows by default, as in most of this file.
SHAPES = [
    pytest.param(shape, id=str(shape), marks=() if shape[0] == 5 else pytest.mark.slow)
    for shape in [(1, 3), (5, 2), (5, 9), (12, 6), (12, 12), (12, 30)]
]


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


@pytest.mark.parametrize("shape", SHAPES)
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
    norm_eps, reg_eps = 1e-4, 1e-2
    regularized = jax.jit(linalg.regularized_projector(norm_eps, reg_eps))
    with jax.enable_x64():
        for _ in range(20):
            matrix = rng.standard_normal((5, 6))
            gramian = matrix @ matrix.T
            u = rng.uniform(0, 1, 5)
            expected = brute_force_dual_cone(u, gramian)
            np.testing.assert_allclose(project(u, jnp.asarray(gramian)), expected, rtol=1e-9)
            found = regularized(jnp.asarray(u), jnp.asarray(gramian))
            problem = gramian / np.trace(gramian) + reg_eps * np.eye(5)
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


@pytest.mark.parametrize("shape", SHAPES)
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


@pytest.mark.slow
def test_chunks_change_nothing(monkeypatch):
    rng = np.random.default_rng(3)
    with jax.enable_x64():
        rows = jnp.asarray(rng.standard_normal((5, 6)))
        U = jnp.asarray(rng.uniform(0, 1, (7, 5)))

        def value_and_gradient(rows):
            def loss(rows):
                weights = linalg.project_onto_dual_cone(U, rows @ rows.T)
                return jnp.sum(weights**2), weights

            return jax.value_and_grad(loss, has_aux=True)(rows)

        whole = jax.jit(value_and_gradient).trace(rows)
        monkeypatch.setattr(qp, "_CHUNK_ELEMENTS", 2 * 25)
        # Another function object, so that nothing comes from a cache.
        chunked = jax.jit(lambda rows: value_and_gradient(rows)).trace(rows)
        assert "scan" in str(chunked.jaxpr)
        assert "scan" not in str(whole.jaxpr)
        whole, chunked = (traced.lower().compile()(rows) for traced in (whole, chunked))
        chex.assert_trees_all_close(chunked, whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("solver", ["dual cone", "min norm"])
@pytest.mark.slow
def test_derivatives_against_finite_differences(solver):
    rng = np.random.default_rng(4)

    def weights(U, rows):
        gramian = rows @ rows.T
        if solver == "dual cone":
            return linalg.project_onto_dual_cone(U, gramian)
        return linalg.min_norm_weights(gramian)

    @jax.jit
    def derivatives(point, direction, cotangent):
        _, forward = jax.jvp(weights, point, direction)
        _, pull_back = jax.vjp(weights, *point)
        return forward, pull_back(cotangent)

    weights_ = jax.jit(weights)
    with jax.enable_x64():
        for scale in (np.ones(5), np.ones(5), 10 ** rng.uniform(-2, 2, 5)):
            point = (rng.uniform(0.1, 1, (5, 5)), rng.standard_normal((5, 7)) * scale[:, None])
            direction = (rng.standard_normal((5, 5)), rng.standard_normal((5, 7)) * scale[:, None])
            step = 1e-6
            ahead, behind = (
                np.asarray(
                    weights_(
                        *(x + sign * step * dx for x, dx in zip(point, direction, strict=True))
                    )
                )
                for sign in (1, -1)
            )
            numeric = (ahead - behind) / (2 * step)
            cotangent = rng.standard_normal(numeric.shape)
            forward, backward = derivatives(point, direction, cotangent)
            size = np.abs(numeric).max()
            np.testing.assert_allclose(forward, numeric, rtol=1e-5, atol=1e-6 * size)
            pulled = sum(np.sum(x * dx) for x, dx in zip(backward, direction, strict=True))
            np.testing.assert_allclose(pulled, np.sum(cotangent * forward), rtol=1e-9)


@pytest.mark.slow
def test_vmap_equals_a_loop():
    matrices_ = jax.random.normal(jax.random.key(5), (4, 5, 9))
    gramians = matrices_ @ jnp.swapaxes(matrices_, 1, 2)
    U = jnp.diag(jnp.full((5,), 1 / 5))
    batched = jax.jit(jax.vmap(linalg.project_onto_dual_cone, (None, 0)))(U, gramians)
    for gramian, V in zip(gramians, batched, strict=True):
        np.testing.assert_allclose(project(U, gramian), V, rtol=1e-4, atol=1e-5)
    batched = jax.jit(jax.vmap(linalg.min_norm_weights))(gramians)
    for gramian, w in zip(gramians, batched, strict=True):
        np.testing.assert_allclose(min_norm(gramian), w, rtol=1e-4, atol=1e-5)


@deterministic
@hypothesis.given(rows=small_integers)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float64", 1e-14)])
def test_dual_cone_of_small_integers(rows, dtype, tolerance):
    matrix = np.array(rows, float)
    gramian = matrix @ matrix.T
    scale = np.sqrt(np.diag(gramian))
    with jax.enable_x64(dtype == "float64"):
        U = jnp.diag(jnp.full((5,), 0.2, dtype))
        V = np.asarray(project(U, jnp.asarray(gramian, dtype)), np.float64)
    v, slack = V * scale, (V - np.asarray(U)) * scale
    size = UNFUSED * np.sum(np.abs(v), axis=1, keepdims=True)
    products = np.divide(V @ gramian, scale, where=scale > 0, out=np.zeros((5, 5)))
    assert (slack >= 0).all()
    assert (products >= -tolerance * size).all()
    assert (np.minimum(slack, products) <= tolerance * size).all()
    # A zero row keeps its weight.
    np.testing.assert_array_equal(V[:, scale == 0], np.asarray(U)[:, scale == 0])


def brute_force_min_norm(matrix):
    """The smallest norm over the hulls of all linearly independent sets of rows.

    By Caratheodory's theorem the point of smallest norm is in one of them: zero is where a set of
    rows is dependent with positive coefficients, and this only gives an upper bound.
    """
    best = np.inf
    for size in range(1, len(matrix) + 1):
        for support in itertools.combinations(range(len(matrix)), size):
            rows = matrix[list(support)]
            # Affine weights that sum to one: the first weight is what the others leave.
            others = np.linalg.lstsq((rows[1:] - rows[0]).T, -rows[0], rcond=None)[0]
            w = np.concatenate([[1 - others.sum()], others])
            if (w >= -1e-12).all():
                best = min(best, np.sum((w @ rows) ** 2))
    return best


@deterministic
@hypothesis.given(rows=small_integers)
def test_min_norm_of_small_integers(rows):
    matrix = np.array(rows, float)
    with jax.enable_x64():
        w = np.asarray(min_norm(jnp.asarray(matrix @ matrix.T)))
    assert (w >= 0).all()
    np.testing.assert_allclose(w.sum(), 1, rtol=1e-14)
    np.testing.assert_allclose(np.sum((w @ matrix) ** 2), brute_force_min_norm(matrix), atol=1e-13)
    single = np.asarray(min_norm(jnp.asarray(matrix @ matrix.T, jnp.float32)), np.float64)
    error = np.linalg.norm((single - w) @ matrix)
    assert error <= 1e-5 * np.linalg.norm(matrix, axis=1).max()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_powers_of_two_scale_rows_exactly(dtype):
    # The unit-diagonal problem is then the same to the last bit.
    rng = np.random.default_rng(6)
    scale = 2.0 ** rng.integers(-12, 13, 5)
    with jax.enable_x64(dtype == "float64"):
        for n in (3, 9):
            matrix = rng.standard_normal((5, n))
            U = rng.uniform(0, 1, (5, 5)).astype(dtype)
            V = project(jnp.asarray(U), jnp.asarray(matrix @ matrix.T, dtype))
            scaled = (matrix @ matrix.T).astype(dtype) * np.outer(scale, scale)
            found = project(jnp.asarray((U / scale).astype(dtype)), jnp.asarray(scaled, dtype))
            np.testing.assert_array_equal(found, np.asarray(V) / scale)


def test_weights_to_project_may_be_negative():
    # U may hold any numbers: here rows that already improve all tasks, or that worsen them.
    gramian = np.eye(5, dtype=np.float32)
    gramian[:2, :2] = [[2, 1], [1, 2]]
    U = np.zeros((5, 5), np.float32)
    U[:, :2] = [[0, 0], [1, 0.5], [-1, 0], [-1, -2], [1, -1]]
    # The cone's edges are where a product is zero: v = (1, -1/2) and (-1/2, 1) times a factor.
    expected = np.zeros((5, 5))
    expected[:, :2] = [[0, 0], [1, 0.5], [0, 0], [0, 0], [1, -0.5]]
    found = project(jnp.asarray(U), jnp.asarray(gramian))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def iterations(cosines, linear, original):
    """The number of steps of the search by factorizations, and whether it ended before the end."""
    ends = []

    def recording(cond_fun, body_fun, init_val):
        ends.append(original(cond_fun, body_fun, init_val))
        return ends[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pivoting.lax, "while_loop", recording)
        guess = jnp.maximum(-linear, 0)
        pivoting.search(cosines, linear, guess, jnp.ones(linear.shape[0], bool))
    ((count, _, _, live, _, _),) = ends
    return count, jnp.any(live)


def degenerate_rows(m: int):
    """Unit rows of m tasks, from generic to as degenerate as it gets."""
    rng = np.random.default_rng(7)
    signs = rng.choice([-1.0, 1.0], (m, 1))
    raw = {
        "wide": [rng.standard_normal((m, 4 * m)) for _ in range(10)],
        "square": [rng.standard_normal((m, m)) for _ in range(10)],
        "tall": [rng.standard_normal((m, n)) for n in (1, 2, 3, m // 2, m - 1)],
        "equal": [np.ones((m, 1)) * rng.standard_normal((1, m))],
        "opposite": [signs * rng.standard_normal((1, m))],
        "nearly equal": [1 + 10.0**-k * rng.standard_normal((m, m)) for k in (2, 4, 6)],
        "nearly opposite": [signs + 10.0**-k * rng.standard_normal((m, m)) for k in (2, 4, 6)],
        "two groups": [np.repeat(rng.standard_normal((m // 4, m)), 4, axis=0) * signs],
        "integers": [rng.integers(-1, 2, (m, n)) + 0.0 for n in (2, 3, 8) for _ in range(4)],
        "zero": [np.zeros((m, m))],
        "sum to zero": [(lambda x: x - x.mean(axis=0))(rng.standard_normal((m, m)))],
    }
    for name, group in raw.items():
        for rows in group:
            rows = np.pad(rows, ((0, 0), (0, 4 * m - rows.shape[1])))
            norms = np.linalg.norm(rows, axis=1, keepdims=True)
            yield name, np.where(norms > 0, rows / np.where(norms > 0, norms, 1), 0)


@pytest.mark.parametrize("problem", ["dual cone", "min norm"])
def test_the_search_ends_at_a_solution(problem):
    m = 16
    names, rows = zip(*degenerate_rows(m), strict=True)
    rows = np.stack(rows).astype(np.float32)
    cosines = np.einsum("kmn,kpn->kmp", rows, rows)
    cosines[:, np.arange(m), np.arange(m)] = 1
    if problem == "dual cone":
        linear = cosines / m  # All rows of UPGrad's U at once.
    else:
        linear = np.full((len(rows), 1, m), -1, np.float32)
    original = pivoting.lax.while_loop
    run = jax.jit(jax.vmap(lambda C, q: iterations(C, q, original)))
    counts, unsolved = map(np.asarray, run(cosines, linear))
    longest = {}
    for name, count in zip(names, counts, strict=True):
        longest[name] = max(longest.get(name, 0), int(count))
    print(longest)
    assert not unsolved.any(), [name for name, bad in zip(names, unsolved, strict=True) if bad]
    assert longest["wide"] <= pivoting._PIVOTING_STEPS
    assert max(longest.values()) <= 20 + m


@pytest.mark.slow
@pytest.mark.parametrize("problem", ["dual cone", "min norm"])
def test_both_stages_find_the_same_solution(problem, monkeypatch):
    m = 16
    names, rows = zip(*degenerate_rows(m), strict=True)
    rows = np.stack(rows)
    cosines = np.einsum("kmn,kpn->kmp", rows, rows)
    cosines[:, np.arange(m), np.arange(m)] = 1
    # Both kinds of linear terms lie in the range of C, so that every problem is bounded.
    linear = cosines / m if problem == "dual cone" else -cosines.sum(axis=2)[:, None, :]

    def images(C, q):
        x, easy = qp.approximate(C, q, jnp.maximum(-q, 0))
        return qp.solve_from.__wrapped__(C, q, jnp.maximum(-q, 0)) @ C, easy, x

    with jax.enable_x64():
        products, easy, _ = map(np.asarray, jax.jit(jax.vmap(images))(cosines, linear))
        monkeypatch.setattr(qp, "_DESCENT_STEPS", 0)
        factored, skipped, _ = map(
            np.asarray, jax.jit(jax.vmap(lambda C, q: images(C, q)))(cosines, linear)
        )
    # Products are enough for the rows that a training step has, and for many others.
    assert easy[[name == "wide" for name in names]].all()
    assert 0.3 < easy.mean() < 1
    assert skipped.mean() < easy.mean() / 2
    # Of equal or dependent rows only the combination is unique, not the weights.
    scale = np.abs(linear).max(axis=(1, 2), keepdims=True)
    errors = np.max(np.abs(products - factored) / np.where(scale > 0, scale, 1), axis=(1, 2))
    worst = {name: float(error) for name, error in zip(names, errors, strict=True)}
    print(worst)
    assert errors.max() <= 1e-9, worst


@pytest.mark.parametrize("solver", ["nonnegative_qp", "pseudo_inverse"])
def test_what_is_slow_stays_in_its_loop(solver):
    # XLA moves what does not depend on a loop's carry in front of the loop, and runs it always.
    eye = jnp.eye(12)
    arguments = (eye, eye) if solver == "nonnegative_qp" else (eye,)
    slow = "spotrf" if solver == "nonnegative_qp" else "ssyevd"
    function = {"nonnegative_qp": qp.nonnegative_qp, "pseudo_inverse": pseudo_inverse}[solver]
    text = jax.jit(function).lower(*arguments).compile().as_text()
    if "lapack" not in text:
        pytest.skip("not on CPU")
    assert slow in text
    assert slow not in text[text.index("ENTRY") :]


def test_a_non_finite_row_of_u_stays_alone():
    rng = np.random.default_rng(8)
    matrix = rng.standard_normal((5, 6))
    gramian = jnp.asarray(matrix @ matrix.T, jnp.float32)
    U = jnp.eye(5) / 5
    V = project(U, gramian)
    for bad in (np.nan, np.inf, -np.inf):
        found = np.asarray(project(U.at[1, 2].set(bad), gramian))
        assert np.isnan(found[1]).all()
        others = np.array([0, 2, 3, 4])
        np.testing.assert_array_equal(found[others], V[others])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_non_finite_gramian_never_gives_finite_weights(bad):
    gramian = np.eye(5, dtype=np.float32) + 1
    U = jnp.eye(5) / 5
    for entry in [(0, 0), (2, 2), (0, 1)]:
        broken = gramian.copy()
        broken[entry] = broken[entry[::-1]] = bad
        # Each projection depends on the broken rows, and the sum over them is what UPGrad returns.
        assert np.isnan(np.asarray(project(U, jnp.asarray(broken))).sum(axis=0)).all()
        assert np.isnan(min_norm(jnp.asarray(broken))).all()


@pytest.mark.parametrize("solver", ["dual cone", "min norm"])
def test_derivatives_are_finite_at_degenerate_points(solver):
    rng = np.random.default_rng(9)
    U = jnp.eye(5) / 5

    @jax.jit
    def gradient(matrix):
        def total(matrix):
            gramian = matrix @ matrix.T
            if solver == "dual cone":
                return jnp.sum(linalg.project_onto_dual_cone(U, gramian) ** 2)
            return jnp.sum(linalg.min_norm_weights(gramian) ** 2)

        return jax.grad(total)(matrix)

    matrix = rng.standard_normal((5, 6)).astype(np.float32)
    for scale in ([1, 0, 1, 1, 1], [0, 0, 0, 0, 0], [1, 1e-6, 1e6, 1, 1]):
        assert np.isfinite(gradient(jnp.asarray(matrix * np.float32(scale)[:, None]))).all()
    for order in ([0, 1, 1, 2, 3], [0, 0, 0, 0, 0]):
        assert np.isfinite(gradient(jnp.asarray(matrix[order]))).all()


@pytest.mark.parametrize("offset", [0.0, 1e3, -1e6, 1e15])
def test_simplex_against_bisection(offset):
    rng = np.random.default_rng(11)
    with jax.enable_x64():
        # Multiples of 1/8, so that adding the offset rounds nothing.
        x = rng.integers(-16, 17, (50, 6)) / 8
        found = np.asarray(linalg.project_onto_simplex(jnp.asarray(x + offset)))
        low, high = x.min(axis=1) - 1, x.max(axis=1)
        for _ in range(60):
            middle = (low + high) / 2
            above = np.maximum(x - middle[:, None], 0).sum(axis=1) > 1
            low, high = np.where(above, middle, low), np.where(above, high, middle)
        np.testing.assert_allclose(found, np.maximum(x - high[:, None], 0), atol=1e-14)


def test_simplex_of_huge_and_non_finite_entries():
    x = jnp.asarray([[3e38, 0.0, -3e38], [1e30, 1e30, 0.0], [0.0, -1e30, 1e30]])
    expected = [[1, 0, 0], [0.5, 0.5, 0], [0, 0, 1]]
    np.testing.assert_array_equal(linalg.project_onto_simplex(x), expected)
    assert np.isnan(linalg.project_onto_simplex(jnp.asarray([0.0, np.nan, 1.0]))).all()
