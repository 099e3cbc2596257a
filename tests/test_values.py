"""Every method's numbers: closed forms, independent NumPy implementations, and known digits."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxjd
from jaxjd import weightings as W
from jaxjd.linalg import regularized_projector
from jaxjd.weightings._gradvac import vaccinate
from jaxjd.weightings._pcgrad import project_conflicts, random_orders
from tests.matrices import G_BASE, J_BASE

DTYPES = [np.float32, np.float64]


def x64(dtype) -> jax.enable_x64:
    """A context in which arrays of this dtype exist."""
    return jax.enable_x64(dtype == np.float64)


def array(values, dtype=np.float32) -> jax.Array:
    return jnp.asarray(np.asarray(values, dtype))


def statistic(weighting: jaxjd.Weighting, jacobian: jax.Array) -> jax.Array:
    """What a weighting reads, with one batch for both where it wants two."""
    if isinstance(weighting, jaxjd.JacobianWeighting):
        return jacobian
    return jaxjd.gramian(jacobian)


def cagrad_on_base(c: float) -> list[float]:
    """The optimum for J_BASE, where d = g_0 + x_1 g_1 + x_2 g_2 and g_0 = (1, 1, 1).

    Up to c = 1 / sqrt(3) only the first task is pushed; from c = sqrt(3/8) on, d_1 = 0 and the
    ball's boundary determines the rest.
    """
    if c <= 3**-0.5:
        return [0.5 + c * (3 / 18) ** 0.5, 0.5]
    assert c >= 0.375**0.5
    z = ((3 * c**2 - 1) / 2) ** 0.5
    return [0.5 + (6 * z + 1) / 10, 0.5 + (4 * z - 1) / 10]


def aligned_on_base(mode: str) -> np.ndarray:
    values, vectors = np.linalg.eigh(G_BASE)
    scale = {"min": values[0], "median": values[0], "rmse": values.mean()}[mode]
    return np.sqrt(scale) * vectors @ np.diag(values**-0.5) @ vectors.T @ [0.5, 0.5]


IMTL_G = np.array([18**-0.5, 38**-0.5]) / (18**-0.5 + 38**-0.5)

# name: (weighting, weights of the first call on J_BASE, agreement in float64)
FIRST_CALL = {
    "mean": (W.mean(), [0.5, 0.5], 1e-14),
    "sum": (W.sum(), [1, 1], 1e-14),
    "constant": (W.constant([1.0, 2.0]), [1, 2], 1e-14),
    "upgrad": (W.upgrad(), [10 / 9, 15 / 19], 1e-14),
    "upgrad_pref": (W.upgrad([1.0, 0.0]), [1, 11 / 19], 1e-14),
    "upgrad_regularized": (W.upgrad(None, regularized_projector()), [1.11092105, 0.78943103], 5e-9),
    "upgrad_unregularized": (
        W.upgrad(None, regularized_projector(norm_eps=0, reg_eps=0)),
        [10 / 9, 15 / 19],
        1e-14,
    ),
    "dualproj": (W.dualproj(), [11 / 18, 1 / 2], 1e-14),
    "dualproj_pref": (W.dualproj([0.25, 0.75]), [11 / 12, 0.75], 1e-14),
    "dualproj_regularized": (W.dualproj(None, regularized_projector()), [0.61092105, 0.5], 5e-9),
    "mgda": (W.mgda(), [3 / 5, 2 / 5], 1e-14),
    "pcgrad": (W.pcgrad(), [20 / 9, 30 / 19], 1e-14),
    "gradvac": (W.gradvac(), [20 / 9, 30 / 19], 1e-14),
    "gradvac_eps": (W.gradvac(eps=0.0), [20 / 9, 30 / 19], 1e-14),
    "imtl_g": (W.imtl_g(), IMTL_G, 1e-14),
    "imtl_g_digits": (W.imtl_g(), [0.59233032, 0.40766968], 5e-9),
    "aligned_mtl": (W.aligned_mtl(), aligned_on_base("min"), 1e-14),
    "aligned_mtl_digits": (W.aligned_mtl(), [0.55907192, 0.40826107], 5e-9),
    "aligned_mtl_median": (
        W.aligned_mtl(scale_mode="median"),
        aligned_on_base("median"),
        1e-14,
    ),
    "aligned_mtl_rmse": (W.aligned_mtl(scale_mode="rmse"), aligned_on_base("rmse"), 1e-14),
    "aligned_mtl_rmse_digits": (
        W.aligned_mtl(scale_mode="rmse"),
        [1.51086564, 1.10330640],
        5e-9,
    ),
    "cagrad_0": (W.cagrad(0.0), [0.5, 0.5], 1e-14),
    "cagrad_0.5": (W.cagrad(0.5), cagrad_on_base(0.5), 1e-13),
    "cagrad_1": (W.cagrad(1.0), [1.2, 0.8], 1e-13),
    "cagrad_2": (W.cagrad(2.0), cagrad_on_base(2), 1e-13),
    "cagrad_2_digits": (W.cagrad(2.0), [2.00712345, 1.33807466], 1e-5),
    "excess_mtl": (W.excess_mtl(), [0.5, 0.5], 1e-14),
    "modo": (W.modo(), [1, 0], 1e-14),
    "sdmgrad": (W.sdmgrad(), [3 / 26, 23 / 26], 1e-14),
    "cr_mogm": (W.cr_mogm(W.mgda()), [3 / 5, 2 / 5], 1e-14),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("name", FIRST_CALL)
def test_first_call_on_base(name, dtype):
    weighting, expected, tolerance = FIRST_CALL[name]
    aggregator = jaxjd.weighted(weighting, num_tasks=2)

    @jax.jit
    def run(jacobian):
        params = jnp.zeros_like(jacobian[0])
        extra = {}
        if isinstance(weighting, jaxjd.CrossGramianWeighting):
            extra["cross_jacobians"] = (jacobian, jacobian)
        weights, _ = weighting.update(
            statistic(weighting, jacobian), weighting.init(2, params), **extra
        )
        update, state = aggregator.update(jacobian, aggregator.init(params), params, **extra)
        return weights, update, state.weights

    with x64(dtype):
        weights, update, logged = run(array(J_BASE, dtype))
    assert weights.dtype == update.dtype == logged.dtype == dtype
    if dtype == np.float32:
        tolerance = max(tolerance, 1e-6)
    np.testing.assert_allclose(weights, expected, rtol=0, atol=tolerance)
    np.testing.assert_array_equal(logged, weights)
    np.testing.assert_allclose(update, expected @ J_BASE, rtol=0, atol=10 * tolerance)


def test_regularized_projector_counts_a_small_gramian_as_zero():
    update = jax.jit(W.upgrad(None, regularized_projector()).update)
    # The trace is below norm_eps: no row can be told from zero, and the preferences are returned.
    np.testing.assert_array_equal(update(array(G_BASE * 1e-6), ())[0], array([0.5, 0.5]))
    # Above it only the ratios matter.
    np.testing.assert_allclose(
        update(array(G_BASE * 1e-5), ())[0], [1.11092105, 0.78943103], rtol=1e-6
    )


# --- PCGrad and GradVac ------------------------------------------------------------------------


def pcgrad_reference(J: np.ndarray, orders: np.ndarray) -> np.ndarray:
    """The sum of the projected gradients."""
    total = np.zeros(J.shape[1])
    for i, order in enumerate(orders):
        c = J[i].copy()
        for j in order:
            if j != i and c @ J[j] < 0:
                c -= (c @ J[j]) / (J[j] @ J[j]) * J[j]
        total += c
    return total


def gradvac_reference(J: np.ndarray, target: np.ndarray, orders: np.ndarray, beta, eps):
    """The sum of the vaccinated gradients, and the next targets."""
    target = target.copy()
    total = np.zeros(J.shape[1])
    for i, order in enumerate(orders):
        c = J[i].copy()
        for j in order:
            if j == i:
                continue
            unit = J[j] / np.linalg.norm(J[j])
            phi = c @ unit / np.linalg.norm(c)
            goal = target[i, j]
            if phi < goal:
                sine, goal_sine = np.sqrt(1 - phi**2), np.sqrt(1 - goal**2)
                factor = (goal * sine - phi * goal_sine) / (goal_sine + eps)
                c = c + np.linalg.norm(c) * factor * unit
            target[i, j] = (1 - beta) * goal + beta * phi
        total += c
    return total, target


def draw_orders(rng: np.random.Generator, m: int) -> np.ndarray:
    return np.stack([rng.permutation(m) for _ in range(m)])


jitted_project_conflicts = jax.jit(project_conflicts)
jitted_vaccinate = jax.jit(vaccinate)


def test_pcgrad_for_given_orders():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        for _ in range(20):
            J = rng.standard_normal((5, 4)) * 10 ** rng.uniform(-2, 2, (5, 1))
            orders = draw_orders(rng, 5)
            weights = np.asarray(jitted_project_conflicts(jnp.asarray(J @ J.T), orders))
            expected = pcgrad_reference(J, orders)
            scale = np.abs(weights) @ np.linalg.norm(J, axis=1)
            np.testing.assert_allclose(weights @ J, expected, rtol=0, atol=1e-13 * scale)


@pytest.mark.parametrize(("beta", "eps"), [(0.5, 1e-8), (0.01, 0.0), (0.0, 1e-8), (1.0, 1e-8)])
def test_gradvac_over_several_calls_for_given_orders(beta, eps):
    rng = np.random.default_rng(1)
    target = expected_target = np.zeros((5, 5))
    drift = rng.standard_normal((5, 6))
    with jax.enable_x64(True):
        for call in range(12):
            # Rows that keep some of their cosines, so that the targets come to matter.
            J = (drift + rng.standard_normal((5, 6))) * 10 ** rng.uniform(-2, 2, (5, 1))
            orders = draw_orders(rng, 5)
            weights, target = jitted_vaccinate(jnp.asarray(J @ J.T), target, orders, beta, eps)
            expected, expected_target = gradvac_reference(J, expected_target, orders, beta, eps)
            weights = np.asarray(weights)
            scale = np.abs(weights) @ np.linalg.norm(J, axis=1)
            np.testing.assert_allclose(weights @ J, expected, rtol=0, atol=1e-12 * scale)
            np.testing.assert_allclose(target, expected_target, rtol=0, atol=1e-12)
            if call == 0:
                first = jitted_project_conflicts(jnp.asarray(J @ J.T), orders)
                bound = 1e-7 if eps else 1e-13
                np.testing.assert_allclose(weights, first, rtol=bound, atol=0)
    assert (np.diagonal(target) == 0).all()


def test_gradvac_of_two_rows_over_several_calls():
    # Each row has one other row to meet, so the order does not matter.
    weighting = W.gradvac(beta=0.5)
    step = jax.jit(weighting.update)
    rng = np.random.default_rng(2)
    target = np.zeros((2, 2))
    with jax.enable_x64(True):
        state = weighting.init(2, jnp.zeros(3))
        for _ in range(8):
            J = rng.standard_normal((2, 3)) + [[2, 0, 0], [1, 1, 0]]
            weights, state = step(jnp.asarray(J @ J.T), state)
            expected, target = gradvac_reference(J, target, np.array([[0, 1], [0, 1]]), 0.5, 1e-8)
            np.testing.assert_allclose(weights @ J, expected, rtol=1e-11)
            np.testing.assert_allclose(state.target, target, rtol=1e-12)


def test_orders_are_uniformly_distributed_permutations():
    orders = jax.vmap(lambda key: random_orders(key, 3))(jax.random.split(jax.random.key(0), 4000))
    orders = np.asarray(orders).reshape(-1, 3)
    assert (np.sort(orders, axis=1) == [0, 1, 2]).all()
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 6
    np.testing.assert_allclose(counts / len(orders), 1 / 6, atol=0.012)  # About 3.5 deviations.


def test_pcgrad_and_gradvac_draw_new_orders_at_every_call():
    rng = np.random.default_rng(3)
    J = rng.standard_normal((5, 3))
    G = array(J @ J.T)
    for weighting in (W.pcgrad(key=7), W.gradvac(key=7, beta=0.0)):
        update = jax.jit(weighting.update)
        state, again = weighting.init(5), weighting.init(5)
        seen = []
        for _ in range(4):
            weights, state = update(G, state)
            repeated, again = update(G, again)
            np.testing.assert_array_equal(weights, repeated)
            seen.append(np.asarray(weights))
        assert len(np.unique(np.round(seen, 4), axis=0)) > 1


# --- SDMGrad and MoDo --------------------------------------------------------------------------


def test_modo_alternates_on_base():
    weighting = W.modo()
    update = jax.jit(weighting.update)
    state = weighting.init(2)
    for expected in ([1, 0], [0, 1], [1, 0]):
        weights, state = update(array(G_BASE), state)
        np.testing.assert_allclose(weights, expected, atol=1e-7)
        np.testing.assert_array_equal(state.weights, weights)


def simplex_reference(x: np.ndarray) -> np.ndarray:
    """The projection onto the simplex by bisection on the threshold."""
    low, high = x.min() - 1, x.max()
    for _ in range(200):
        threshold = (low + high) / 2
        if np.maximum(x - threshold, 0).sum() > 1:
            low = threshold
        else:
            high = threshold
    return np.maximum(x - (low + high) / 2, 0)


def test_modo_recurrence_on_cross_gramians_that_are_not_symmetric():
    weighting = W.modo(gamma=0.1, rho=0.05)
    update = jax.jit(weighting.update)
    rng = np.random.default_rng(4)
    with jax.enable_x64(True):
        state = weighting.init(3)
        expected = np.full(3, 1 / 3)
        for _ in range(10):
            A = rng.standard_normal((3, 3))
            weights, state = update(jnp.asarray(A), state)
            expected = simplex_reference(expected - 0.1 * (A @ expected + 0.05 * expected))
            np.testing.assert_allclose(weights, expected, atol=1e-13)


def test_sdmgrad_sequence():
    weighting = W.sdmgrad(n_iter=1)
    update = jax.jit(weighting.update)
    state = weighting.init(3)
    weights, state = update(array(np.diag([1, 0.25, 0])), state)
    np.testing.assert_allclose(weights, np.array([1, 1, 11]) / 13, atol=1e-6)
    np.testing.assert_allclose(state.weights, [0, 0, 1], atol=1e-6)
    weights, state = update(array(np.eye(3)), state)
    np.testing.assert_allclose(weights, np.array([6, 6, 1]) / 13, atol=1e-6)


def test_sdmgrad_preference():
    weighting = W.sdmgrad(n_iter=1, pref_vector=[0.0, 0.0, 1.0])
    weights, _ = weighting.update(array(np.diag([1, 0.25, 0])), weighting.init(3))
    np.testing.assert_allclose(weights, [0, 0, 1], atol=1e-6)


def sdmgrad_reference(A, w, lr, momentum, n_iter, lambda_, preferred):
    """The weights that SDMGrad returns, and its inner weights."""
    scale = np.mean(np.sqrt(np.maximum(np.diagonal(A), 0)))
    A = A / scale**2
    velocity = np.zeros_like(w)
    for _ in range(n_iter):
        velocity = momentum * velocity + A @ (w + lambda_ * preferred)
        w = simplex_reference(w - lr * velocity)
    return (w + lambda_ * preferred) / (1 + lambda_), w


def test_sdmgrad_recurrence_on_cross_gramians_that_are_not_symmetric():
    preferred = np.array([0.5, 0.2, 0.3])
    # A small learning rate: the map from w to w is then no step function.
    weighting = W.sdmgrad(0.2, 0.5, 7, 0.6, preferred)
    update = jax.jit(weighting.update)
    rng = np.random.default_rng(5)
    with jax.enable_x64(True):
        state = weighting.init(3)
        inner = np.full(3, 1 / 3)
        for _ in range(10):
            A = rng.standard_normal((3, 3)) + np.eye(3)
            weights, state = update(jnp.asarray(A), state)
            expected, inner = sdmgrad_reference(A, inner, 0.2, 0.5, 7, 0.6, preferred)
            np.testing.assert_allclose(weights, expected, atol=1e-6)  # pref_vector is float32.
            np.testing.assert_allclose(state.weights, inner, atol=1e-6)


# --- ExcessMTL ---------------------------------------------------------------------------------


def excess_mtl_reference(jacobians, step_size, n_warmup_steps):
    """The weights of every call; risks are relative, without any epsilon."""
    m = jacobians[0].shape[0]
    log_weights = np.full(m, -np.log(m))
    squares = np.zeros_like(jacobians[0])
    risks = []
    for J in jacobians:
        squares = squares + J**2
        terms = np.divide(J**2, np.sqrt(squares), where=squares > 0, out=np.zeros_like(J))
        risks.append(terms.sum(axis=1))
        calls = max(1, n_warmup_steps)
        if len(risks) > calls:
            baseline = np.mean(risks[:calls], axis=0)
            log_weights = log_weights + step_size * risks[-1] / baseline
            log_weights = log_weights - np.log(np.sum(np.exp(log_weights)))
        yield np.exp(log_weights)


@pytest.mark.parametrize("n_warmup_steps", [0, 1, 3])
def test_excess_mtl_over_several_calls(n_warmup_steps):
    rng = np.random.default_rng(6)
    jacobians = [rng.standard_normal((3, 7)) * [[1.0], [100.0], [0.01]] for _ in range(7)]
    for J in jacobians:
        J[:, 6] = 0  # A parameter that no task uses.
    # The statistic is a pytree here: the split over leaves must not matter.
    params = {"a": np.zeros(4), "b": (np.zeros((1, 2)), np.zeros(()))}
    split = lambda J: {"a": J[:, :4], "b": (J[:, None, 4:6], J[:, 6])}
    with jax.enable_x64(True):
        weighting = W.excess_mtl(0.7, n_warmup_steps)
        update = jax.jit(weighting.update)
        state = weighting.init(3, params)
        expected = excess_mtl_reference(jacobians, 0.7, n_warmup_steps)
        for call, (J, weights_expected) in enumerate(zip(jacobians, expected, strict=True)):
            weights, state = update(jax.tree.map(jnp.asarray, split(J)), state)
            np.testing.assert_allclose(weights, weights_expected, rtol=1e-12)
            if call < max(1, n_warmup_steps):
                np.testing.assert_allclose(weights, 1 / 3, rtol=1e-12)
        assert np.ptp(weights) > 0.01
        np.testing.assert_allclose(
            state.squares["b"][0][:, 0, :], sum(J**2 for J in jacobians)[:, 4:6]
        )


def test_excess_mtl_never_ends_on_one_task():
    # Ten calls with a risk ratio of 1e4 between the tasks: the weights have moved, but can return.
    weighting = W.excess_mtl()
    update = jax.jit(weighting.update)
    state = weighting.init(2, jnp.zeros(2))
    for J in [np.eye(2)] + 10 * [np.diag([100.0, 0.01])] + 300 * [np.diag([1e-3, 10.0])]:
        weights, state = update(array(J), state)
        assert np.isfinite(np.asarray(state.log_weights)).all()
    assert weights[1] > 0.9


# --- CR-MOGM -----------------------------------------------------------------------------------


def diagonal_weighting() -> jaxjd.Weighting:
    """Weights that are the diagonal of the Gramian plus the number of earlier calls."""

    def init(num_tasks=None, params=None):
        return jnp.zeros((), jnp.int32)

    def update(stat, state, **extra_args):
        return jnp.diagonal(stat) + state.astype(stat.dtype), state + 1

    return jaxjd.Weighting(init, update)


@pytest.mark.parametrize("initial_weights", [None, [2.0, -1.0]])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9, 1.0, "schedule"])
def test_cr_mogm_recurrence(alpha, initial_weights):
    schedule = lambda count: 1 - 0.5 ** (count + 1.0)
    coefficient = schedule if alpha == "schedule" else lambda count: alpha
    weighting = W.cr_mogm(
        diagonal_weighting(), schedule if alpha == "schedule" else alpha, initial_weights
    )
    update = jax.jit(weighting.update)
    diagonals = np.random.default_rng(7).uniform(0, 3, (6, 2)).astype(np.float32)
    for _ in range(2):  # The second time is a restart.
        state = weighting.init(2)
        smoothed = initial_weights
        for count, diagonal in enumerate(diagonals):
            wrapped = diagonal + count
            if smoothed is None:
                smoothed = wrapped
            smoothed = (
                coefficient(count) * np.asarray(smoothed) + (1 - coefficient(count)) * wrapped
            )
            weights, state = update(array(np.diag(diagonal)), state)
            np.testing.assert_allclose(weights, smoothed, rtol=1e-6)
            np.testing.assert_array_equal(state.weights, weights)
        assert state.count == state.inner == 6
        if alpha == 0:
            np.testing.assert_array_equal(weights, array(diagonals[-1] + 5))
        if alpha == 1:
            first = diagonals[0] if initial_weights is None else initial_weights
            np.testing.assert_allclose(weights, first, rtol=1e-6)


def test_cr_mogm_schedule_of_the_learning_rate():
    # alpha_k = 1 - lr_k / lr_0: no smoothing while the learning rate is that of the start.
    learning_rate = lambda count: 0.1 * jnp.where(count < 2, 1.0, 0.5)
    weighting = W.cr_mogm(W.upgrad(), lambda k: 1 - learning_rate(k) / learning_rate(0))
    update = jax.jit(weighting.update)
    state = weighting.init(2)
    for G, expected in [
        (np.eye(2), [0.5, 0.5]),
        (G_BASE, [10 / 9, 15 / 19]),
        (np.eye(2), [29 / 36, 49 / 76]),
    ]:
        weights, state = update(array(G), state)
        np.testing.assert_allclose(weights, expected, rtol=1e-6)


def test_cr_mogm_keeps_the_kind_of_the_weighting():
    for weighting in (W.mean(), W.excess_mtl(), W.modo()):
        assert type(W.cr_mogm(weighting)) is type(weighting)
    # Around weightings of a Jacobian and of a cross-Gramian, through the aggregator.
    J = array(J_BASE)
    aggregator = jaxjd.weighted(W.cr_mogm(W.excess_mtl(), 0.5), num_tasks=2)
    update, _ = aggregator.update(J, aggregator.init(J[0]))
    np.testing.assert_allclose(update, [1, 1, 1], rtol=1e-6)
    aggregator = jaxjd.weighted(W.cr_mogm(W.modo(), 0.5), num_tasks=2)
    state = aggregator.init(J[0])
    for expected in ([1, 0], [0.5, 0.5], [0.75, 0.25]):
        _, state = aggregator.update(J, state, cross_jacobians=(J, J))
        np.testing.assert_allclose(state.weights, expected, atol=1e-6)


# --- Random ------------------------------------------------------------------------------------


def test_random_is_the_softmax_of_standard_normal_noise():
    m, draws = 4, 20_000
    weighting = W.random()

    @jax.jit
    @jax.vmap
    def two_calls(key):
        first, state = weighting.update(jnp.eye(m), W.RandomState(key=key))
        second, _ = weighting.update(jnp.eye(m), state)
        return first, second

    first, second = map(np.asarray, two_calls(jax.random.split(jax.random.key(0), draws)))
    for weights in (first, second):
        assert (weights > 0).all()
        np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-6)
        np.testing.assert_allclose(weights.mean(axis=0), 1 / m, atol=0.006)
        # Logits without their common part: log w_i - log w_j is normal with variance 2.
        for i, j in [(0, 1), (1, 2), (2, 3)]:
            z = np.log(weights[:, i] / weights[:, j]) / 2**0.5
            np.testing.assert_allclose(z.mean(), 0, atol=0.04)
            np.testing.assert_allclose(z.var(), 1, atol=0.05)
            np.testing.assert_allclose((z**4).mean(), 3, atol=0.3)
            np.testing.assert_allclose(np.mean(np.abs(z) < 1), 0.6827, atol=0.02)
    correlation = np.corrcoef(first[:, 0], second[:, 0])[0, 1]
    assert abs(correlation) < 0.04


# --- Flattening --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def upgrad_of_six():
    return jax.jit(W.upgrad().update)


def test_flattening_of_ones():
    weighting = W.flattening(W.upgrad())
    weights, state = jax.jit(weighting.update)(jnp.ones((2, 3, 3, 2)), weighting.init((2, 3)))
    assert state == ()
    np.testing.assert_allclose(weights, np.full((2, 3), 1 / 6), rtol=1e-6)


@pytest.mark.parametrize("shape", [(6,), (2, 3), (3, 2), (2, 1, 3)])
def test_flattening_is_the_weighting_of_the_flat_gramian(shape, upgrad_of_six):
    J = np.random.default_rng(8).standard_normal((6, 4)).astype(np.float32)
    tensor = J.reshape(*shape, 4)
    k = len(shape)
    # The second group of task axes is in reverse order.
    generalized = np.moveaxis(
        np.tensordot(tensor, tensor, axes=(-1, -1)), range(k, 2 * k), range(2 * k - 1, k - 1, -1)
    )
    assert generalized.shape == shape + shape[::-1]
    weighting = W.flattening(W.upgrad())
    weights, _ = jax.jit(weighting.update)(jnp.asarray(generalized), weighting.init(shape))
    flat, _ = upgrad_of_six(jnp.asarray(J @ J.T), ())
    assert weights.shape == shape
    assert np.ptp(flat) > 0.1
    np.testing.assert_allclose(weights, np.reshape(flat, shape), rtol=1e-4)


def test_flattening_with_state():
    weighting = W.cr_mogm(W.flattening(W.cr_mogm(diagonal_weighting(), 0.5)), 0.5)
    state = weighting.init((2, 3))
    assert state.weights.shape == (2, 3)
    assert state.inner.weights.shape == (6,)
    G = np.diag(np.arange(6.0)).reshape(2, 3, 2, 3).transpose(0, 1, 3, 2)
    weights, state = weighting.update(array(G), state)
    np.testing.assert_allclose(weights, [[0, 1, 2], [3, 4, 5]])


# --- Identities --------------------------------------------------------------------------------


@functools.cache
def jitted(name: str):
    weightings = {
        "upgrad": W.upgrad(),
        "upgrad_ones": W.upgrad([1.0, 1.0]),
        "dualproj": W.dualproj(),
        "mgda": W.mgda(),
        "pcgrad": W.pcgrad(),
        "gradvac": W.gradvac(),
        "imtl_g": W.imtl_g(),
        "cagrad": W.cagrad(0.4),
        "cagrad_0": W.cagrad(0.0),
        "aligned_mtl": W.aligned_mtl(),
        "aligned_mtl_median": W.aligned_mtl(scale_mode="median"),
        "aligned_mtl_rmse": W.aligned_mtl(scale_mode="rmse"),
    }
    weighting = weightings[name]

    @jax.jit
    def weights(G):
        return weighting.update(G, weighting.init(G.shape[0], G[0]))[0]

    return weights


def pairs_of_rows(count: int = 20) -> list[np.ndarray]:
    rng = np.random.default_rng(9)
    return [rng.standard_normal((2, 3)) * 10 ** rng.uniform(-2, 2, (2, 1)) for _ in range(count)]


def test_pcgrad_of_two_rows_is_twice_upgrad():
    with jax.enable_x64(True):
        for J in pairs_of_rows():
            G = jnp.asarray(J @ J.T)
            expected = 2 * jitted("upgrad")(G)
            for name in ("pcgrad", "gradvac", "upgrad_ones"):
                np.testing.assert_allclose(jitted(name)(G), expected, rtol=1e-7)


def test_mgda_of_two_rows_has_a_closed_form():
    with jax.enable_x64(True):
        for J in pairs_of_rows():
            G = J @ J.T
            difference = G[0, 0] - 2 * G[0, 1] + G[1, 1]
            first = np.clip((G[1, 1] - G[0, 1]) / difference, 0, 1)
            np.testing.assert_allclose(
                jitted("mgda")(jnp.asarray(G)), [first, 1 - first], rtol=1e-12, atol=1e-15
            )


def test_imtl_g_projects_equally_onto_all_rows():
    rng = np.random.default_rng(10)
    with jax.enable_x64(True):
        for _ in range(10):
            J = rng.standard_normal((3, 5)) * 10 ** rng.uniform(-2, 2, (3, 1))
            w = np.asarray(jitted("imtl_g")(jnp.asarray(J @ J.T)))
            np.testing.assert_allclose(w.sum(), 1, rtol=1e-12)
            projections = J @ (w @ J) / np.linalg.norm(J, axis=1)
            np.testing.assert_allclose(projections, projections[0], rtol=1e-9)


@pytest.mark.parametrize("mode", ["aligned_mtl", "aligned_mtl_median", "aligned_mtl_rmse"])
def test_aligned_mtl_against_numpy(mode):
    rng = np.random.default_rng(11)
    with jax.enable_x64(True):
        for rank in (3, 2, 1):
            # Rank-deficient Gramians too: eigenvalues that are zero to rounding do not count.
            J = rng.standard_normal((3, rank)) @ rng.standard_normal((rank, 5))
            values, vectors = np.linalg.eigh(J @ J.T)
            values, vectors = values[3 - rank :], vectors[:, 3 - rank :]
            scale = {
                "aligned_mtl": values[0],
                "aligned_mtl_median": values[(rank - 1) // 2],
                "aligned_mtl_rmse": values.mean(),
            }[mode]
            expected = np.sqrt(scale) * vectors @ (vectors.T @ np.full(3, 1 / 3) / np.sqrt(values))
            np.testing.assert_allclose(jitted(mode)(jnp.asarray(J @ J.T)), expected, rtol=1e-9)


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_orthogonal_rows_of_one_length(scale):
    G = array(np.eye(3) * scale)
    for name in ["upgrad", "dualproj", "mgda", "imtl_g", "cagrad_0"] + [
        "aligned_mtl",
        "aligned_mtl_median",
        "aligned_mtl_rmse",
    ]:
        np.testing.assert_allclose(jitted(name)(G), np.full(3, 1 / 3), rtol=1e-6)
    for name in ("pcgrad", "gradvac"):
        np.testing.assert_allclose(jitted(name)(G), np.ones(3), rtol=1e-6)
    # g_w is the mean gradient, so the step is 1 + c times the mean.
    np.testing.assert_allclose(jitted("cagrad")(G), np.full(3, 1.4 / 3), rtol=1e-6)


def test_rows_without_conflict_are_left_alone():
    rng = np.random.default_rng(12)
    J = np.abs(rng.standard_normal((3, 5)))
    G = array(J @ J.T)
    for name in ("upgrad", "dualproj"):
        np.testing.assert_array_equal(jitted(name)(G), np.full(3, 1 / 3, np.float32))
    np.testing.assert_array_equal(jitted("pcgrad")(G), np.ones(3, np.float32))
