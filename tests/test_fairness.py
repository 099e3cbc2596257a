"""The numbers of Nash-MTL, FairGrad and PCD, against closed forms and the defining equations."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxjd import weightings as W
from tests.matrices import G_BASE, J_BASE, badly_scaled, not_stationary, strongly_stationary

fair = jax.jit(lambda G, alpha: W.fairgrad(alpha).update(G, ())[0])
nash = jax.jit(lambda G, max_norm: W.nash_mtl(max_norm).update(G, ())[0])


def generic(m: int, count: int, seed: int, decades: float = 0.5) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [badly_scaled(rng, m, 3 * m, decades) for _ in range(count)]


# --- FairGrad and Nash-MTL ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (0.0, [0.5, 0.5]),
        (0.5, [0.74282825, 0.52539261]),
        (1.0, [0.59146115, 0.40707148]),
        (2.0, [0.47136292, 0.31945423]),
    ],
)
def test_fairgrad_on_base(alpha, expected):
    np.testing.assert_allclose(fair(jnp.asarray(G_BASE, "float32"), alpha), expected, rtol=2e-6)
    with jax.enable_x64(True):
        # The references have eight digits.
        np.testing.assert_allclose(fair(jnp.asarray(G_BASE), alpha), expected, rtol=3e-8)


def test_nash_mtl_on_base():
    with jax.enable_x64(True):
        G = jnp.asarray(G_BASE)
        # References of TorchJD, which iterates until two steps differ by less than 1e-6.
        np.testing.assert_allclose(nash(G, 0.0), [0.59146119, 0.40707150], rtol=2e-7)
        A = J_BASE.T @ np.asarray(nash(G, 1.0))
        np.testing.assert_allclose(A, [0.05415325, 0.70606920, 0.70606920], atol=1e-7)
        np.testing.assert_allclose(nash(G, 2.0), nash(G, 0.0), rtol=1e-12)


@pytest.mark.parametrize("alpha", [0.3, 0.5, 1.0, 2.0, 5.0])
def test_orthogonal_rows_have_a_closed_form(alpha):
    # w_i |g_i|^2 = w_i^(-1 / alpha), so w_i = |g_i|^(-2 alpha / (1 + alpha)).
    lengths = np.array([1e-3, 0.5, 1.0, 40.0])
    weights = fair(jnp.diag(jnp.asarray(lengths**2, "float32")), alpha)
    np.testing.assert_allclose(weights, lengths ** (-2 * alpha / (1 + alpha)), rtol=2e-6)


def test_two_rows_have_a_closed_form():
    # G w = 1 / w gives w_1 |g_1| = w_2 |g_2| = (1 + c)^(-1/2) for the cosine c.
    for cosine in (-0.999, -0.5, 0.0, 0.9, 1.0):
        lengths = np.array([0.2, 30.0])
        G = np.outer(lengths, lengths) * [[1, cosine], [cosine, 1]]
        expected = 1 / (lengths * np.sqrt(1 + cosine))
        with jax.enable_x64(True):
            np.testing.assert_allclose(nash(jnp.asarray(G), 0.0), expected, rtol=1e-12)


sizes = pytest.mark.parametrize("m", [2, 5, pytest.param(12, marks=pytest.mark.slow)])
"""Each number of rows is a program."""


@sizes
def test_fairgrad_with_alpha_one_is_nash_mtl_without_a_limit(m):
    for J in generic(m, 5, seed=m):
        G = jnp.asarray(J @ J.T, "float32")
        np.testing.assert_array_equal(fair(G, 1.0), nash(G, 0.0))
        # x^T G x = sum 1 = m.
        w = np.asarray(nash(G, 0.0), float)
        np.testing.assert_allclose(np.linalg.norm(J.T @ w), np.sqrt(m), rtol=1e-5)


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 1e3])
def test_nash_mtl_limits_the_norm_and_keeps_the_direction(max_norm):
    for J in generic(5, 5, seed=1):
        G = jnp.asarray(J @ J.T, "float32")
        free, limited = np.asarray(nash(G, 0.0), float), np.asarray(nash(G, max_norm), float)
        expected = free * min(1, max_norm / np.sqrt(5))
        np.testing.assert_allclose(limited, expected, rtol=1e-5)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("scale", [1e-10, 1e-5, 1.0, 1e5, 1e10])
@sizes
def test_the_equations_hold_at_every_scale(alpha, scale, m):
    for J in generic(m, 5, seed=10 + m):
        G = np.float32(scale * (J @ J.T))
        w = np.asarray(fair(jnp.asarray(G), alpha), float)
        # w_i (G w)_i^alpha = 1; for alpha = 1, that every task gains alike.
        residual = w * (np.asarray(G, float) @ w) ** alpha - 1
        assert np.abs(residual).max() < 1e-5


@pytest.mark.parametrize("decades", [3.0, 6.0])
@sizes
def test_the_equations_hold_for_rows_of_very_different_lengths(decades, m):
    for J in generic(m, 5, seed=20 + m, decades=decades):
        G = np.float32(J @ J.T)
        w = np.asarray(fair(jnp.asarray(G), 1.0), float)
        assert np.abs(w * (np.asarray(G, float) @ w) - 1).max() < 1e-5


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
@sizes
def test_float64_solves_to_rounding(alpha, m):
    with jax.enable_x64(True):
        for J in generic(m, 5, seed=30 + m, decades=2.0):
            G = J @ J.T
            w = np.asarray(fair(jnp.asarray(G), alpha))
            assert np.abs(w * (G @ w) ** alpha - 1).max() < 1e-11


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_zero_rows_get_no_weight_and_change_nothing(alpha):
    (J,) = generic(3, 1, seed=40)
    expected = np.asarray(fair(jnp.asarray(J @ J.T, "float32"), alpha))
    padded = np.zeros((5, 9))
    padded[[0, 2, 3]] = J
    G = jnp.asarray(padded @ padded.T, "float32")
    for weights in (fair(G, alpha), nash(G, 0.0)):
        assert not np.asarray(weights)[[1, 4]].any()
    np.testing.assert_allclose(np.asarray(fair(G, alpha))[[0, 2, 3]], expected, rtol=1e-6)
    assert not np.asarray(fair(jnp.zeros((5, 5)), alpha)).any()
    assert not np.asarray(nash(jnp.zeros((5, 5)), 1.0)).any()


def test_fair_weights_of_non_finite_gramians_are_not_finite():
    for bad in (np.nan, np.inf):
        G = jnp.asarray(G_BASE, "float32").at[0, 0].set(bad)
        assert not np.isfinite(fair(G, 1.0)).all()
        assert not np.isfinite(nash(G, 1.0)).all()


@pytest.mark.parametrize("every", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_nash_mtl_solves_only_every_few_calls(every):
    weighting = W.nash_mtl(0.8, update_weights_every=every)
    update = jax.jit(weighting.update)
    gramians = [jnp.asarray(J @ J.T, "float32") for J in generic(3, 8, seed=50)]
    state = weighting.init(3)
    for k, G in enumerate(gramians):
        weights, state = update(G, state)
        used = np.asarray(nash(gramians[k - k % every], 0.0), float)
        assert int(state.count) == k + 1
        np.testing.assert_allclose(state.weights, used, rtol=1e-6)
        # The limit is on the norm with the gradients of the call.
        norm = np.sqrt(used @ np.asarray(G, float) @ used)
        np.testing.assert_allclose(weights, used * min(1, 0.8 / norm), rtol=1e-5)


# --- PCD ---------------------------------------------------------------------------------------


@functools.cache
def pcd_steps(**static):
    """A jitted sequence of calls of PCD; returns all weights and states."""

    def run(gramians, tau, beta, eps):
        weighting = W.pcd(tau, beta, eps, **static)

        def call(state, G):
            weights, state = weighting.update(G, state)
            return state, (weights, state)

        return jax.lax.scan(call, weighting.init(gramians.shape[1]), gramians)[1]

    return jax.jit(run)


def pcd(G, tau=0.02, beta=0.999, eps=1e-8, dtype="float32") -> np.ndarray:
    G = jnp.asarray(G, dtype)[None]
    weights, _ = pcd_steps()(G, jnp.asarray(tau, dtype), beta, eps)
    return np.asarray(weights[0], np.float64)


def pcd_of_rows(J, tau, squares) -> np.ndarray:
    """The update for two or more rows, by enumeration of the active constraints."""
    m = len(J)
    rows = J / np.sqrt(squares)[:, None]
    tau = np.broadcast_to(tau, (m - 1,))
    bound = tau * np.sum(rows[1:] ** 2, axis=1)
    best = None
    for active in range(2 ** (m - 1)):
        A = rows[1:][[bool(active >> j & 1) for j in range(m - 1)]]
        b = bound[[bool(active >> j & 1) for j in range(m - 1)]]
        dual = np.linalg.solve(A @ A.T, b - A @ rows[0]) if len(A) else np.zeros(0)
        d = rows[0] + A.T @ dual
        if (dual >= 0).all() and (rows[1:] @ d >= bound - 1e-12).all():
            best = d
    return best * np.linalg.norm(J[0]) / np.linalg.norm(best)


@pytest.mark.parametrize(
    ("tau", "expected"),
    [(0.02, [1.84806056, 1.09536825]), (0.5, [1.35781654, 1.25336103])],
)
def test_pcd_on_base(tau, expected):
    np.testing.assert_allclose(pcd(G_BASE, tau), expected, rtol=2e-6)
    with jax.enable_x64(True):
        # TorchJD adds 1e-8 to the squares, which are 18 and 38, and rounds to eight digits.
        weights = pcd(G_BASE, tau, dtype="float64")
        np.testing.assert_allclose(weights, expected, rtol=1e-7)
        if tau == 0.02:
            expected = [-0.82003275, 2.94342881, 2.94342881]
            np.testing.assert_allclose(J_BASE.T @ weights, expected, rtol=1e-7)


pcd_sizes = pytest.mark.parametrize("m", [2, 3, pytest.param(5, marks=pytest.mark.slow)])


@pytest.mark.parametrize("tau", [0.0, 0.02, 0.5])
@pcd_sizes
def test_pcd_solves_its_quadratic_program(tau, m):
    for J in generic(m, 8, seed=60 + m):
        expected = pcd_of_rows(J, tau, np.sum(J**2, axis=1))
        weights = pcd(J @ J.T, tau, eps=0.0)
        np.testing.assert_allclose(
            J.T @ weights, expected, atol=2e-5 * np.linalg.norm(J[0]), rtol=0
        )
        assert (weights >= 0).all()


@pytest.mark.slow
def test_pcd_takes_one_tau_per_secondary_task():
    (J,) = generic(4, 1, seed=70)
    J[1:] -= J[0]  # So that constraints are active.
    squares = np.sum(J**2, axis=1)
    tau = np.array([0.0, 0.3, 0.9])
    weights = pcd(J @ J.T, tau, eps=0.0)
    np.testing.assert_allclose(J.T @ weights, pcd_of_rows(J, tau, squares), rtol=1e-4)
    same = pcd(J @ J.T, np.full(3, 0.3), eps=0.0)
    np.testing.assert_allclose(same, pcd(J @ J.T, 0.3, eps=0.0), rtol=1e-6)
    weighting = W.pcd(list(tau))
    found, _ = jax.jit(weighting.update)(jnp.asarray(J @ J.T, "float32"), weighting.init(4))
    np.testing.assert_allclose(found, pcd(J @ J.T, tau), rtol=1e-5)


@pcd_sizes
def test_pcd_is_as_long_as_the_first_row(m):
    for J in generic(m, 8, seed=80 + m, decades=2.0):
        norm = np.linalg.norm(J.T @ pcd(J @ J.T))
        np.testing.assert_allclose(norm, np.linalg.norm(J[0]), rtol=1e-5)


@pytest.mark.parametrize(
    ("J", "expected"),
    [
        # The second row wants the opposite and gets it: nothing of the first is left.
        ([[1.0, 0.0], [-3.0, 0.0]], [-1.0, 0.0]),
        # Two rows that want opposite things: there is no `d`, so the update is the first row.
        ([[0.0, 1.0], [1.0, 0.0], [-1.0, 0.0]], [0.0, 1.0]),
        ([[2.0, 1.0], [1.0, 0.0], [-3.0, 0.0]], [2.0, 1.0]),
        # Nothing to follow.
        ([[0.0, 0.0], [1.0, 2.0]], [0.0, 0.0]),
        # A zero row asks for nothing.
        ([[1.0, 2.0], [0.0, 0.0]], [1.0, 2.0]),
        # No conflict.
        ([[1.0, 2.0], [1.0, 1.0]], [1.0, 2.0]),
        ([[1.0, 2.0]], [1.0, 2.0]),
    ],
)
@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e10])
def test_pcd_at_the_edges(J, expected, scale):
    J, expected = np.array(J) * scale, np.array(expected) * scale
    # In the first case `d` is 1 - 1.02: a Gramian in float32 gives its length to 1e-3 at best.
    update = J.T @ pcd(J @ J.T)
    np.testing.assert_allclose(update, expected, rtol=1e-3, atol=1e-6 * scale)
    with jax.enable_x64(True):
        update = J.T @ pcd(J @ J.T, dtype="float64")
        np.testing.assert_allclose(update, expected, rtol=1e-10, atol=1e-12 * scale)


def test_pcd_knows_whether_its_constraints_can_be_met():
    rng = np.random.default_rng(85)
    for _ in range(15):
        primary = rng.standard_normal((1, 12))
        lengths = 10 ** rng.uniform(-1, 1, (6, 1))
        # A positive combination of the secondary rows is zero: they cannot all improve.
        for rank in (2, 4):
            J = np.vstack([primary, strongly_stationary(rng, 5, 12, rank)]) * lengths
            np.testing.assert_array_equal(pcd(J @ J.T), np.eye(6)[0])
        for rank in (1, 3, 5):
            J = np.vstack([primary, not_stationary(rng, 5, 12, rank)]) * lengths
            assert (J[1:] @ (J.T @ pcd(J @ J.T)) > 0).all()


def test_pcd_scales_with_the_gradients():
    for J in generic(4, 5, seed=90):
        weights = pcd(J @ J.T)
        for exponent in (-33, -7, 33):
            np.testing.assert_array_equal(pcd(J @ J.T * 4.0**exponent), weights)
        for scale in (1e-10, 1e-5, 1e5, 1e10):
            np.testing.assert_allclose(pcd(scale**2 * (J @ J.T)), weights, rtol=2e-5)


def test_pcd_averages_squares_without_bias():
    jacobians = generic(3, 6, seed=100)
    gramians = jnp.asarray(np.stack([J @ J.T for J in jacobians]), "float32")
    beta = 0.7
    weights, states = pcd_steps()(gramians, 0.3, beta, 0.0)
    for k in range(len(jacobians)):
        # A weighted mean of what was seen so far.
        decay = beta ** np.arange(k, -1, -1)
        seen = np.stack([np.sum(J**2, axis=1) for J in jacobians[: k + 1]])
        squares = decay @ seen / decay.sum()
        assert int(states.count[k]) == k + 1
        unbiased = states.squares[k] / (1 - beta ** (k + 1))
        np.testing.assert_allclose(unbiased, squares, rtol=1e-5)
        J = jacobians[k]
        expected = pcd_of_rows(J, 0.3, squares)
        np.testing.assert_allclose(
            J.T @ np.asarray(weights[k], float),
            expected,
            atol=2e-5 * np.linalg.norm(J[0]),
            rtol=0,
        )


def test_non_finite_gradients_leave_the_state_of_pcd_as_it_is():
    weighting = W.pcd()
    update = jax.jit(weighting.update)
    _, state = update(jnp.asarray(G_BASE, "float32"), weighting.init(2))
    for bad in (np.nan, np.inf, -np.inf):
        for place in ((0, 0), (0, 1), (1, 1)):
            G = jnp.asarray(G_BASE, "float32").at[place].set(bad)
            weights, after = update(G, state)
            assert np.isnan(weights).all()
            jax.tree.map(np.testing.assert_array_equal, after, state)
