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
from tests.registry import slow_but


def array(values, dtype=np.float32) -> jax.Array:
    return jnp.asarray(np.asarray(values, dtype))


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

# Hyper-parameters are arguments of the compiled step, so that it is compiled once per method.
FACTORIES = {
    "mean": W.mean,
    "sum": W.sum,
    "constant": W.constant,
    "upgrad": W.upgrad,
    "upgrad_regularized": lambda **eps: W.upgrad(projector=regularized_projector(**eps)),
    "upgrad_pref": W.upgrad,
    "dualproj": W.dualproj,
    "dualproj_pref": W.dualproj,
    "dualproj_regularized": lambda **eps: W.dualproj(projector=regularized_projector(**eps)),
    "mgda": W.mgda,
    "pcgrad": W.pcgrad,
    "gradvac": W.gradvac,
    "imtl_g": W.imtl_g,
    "aligned_mtl": W.aligned_mtl,
    "aligned_mtl_median": lambda: W.aligned_mtl(scale_mode="median"),
    "aligned_mtl_rmse": lambda: W.aligned_mtl(scale_mode="rmse"),
    "cagrad": W.cagrad,
    "excess_mtl": W.excess_mtl,
    "modo": W.modo,
    "sdmgrad": W.sdmgrad,
    "cr_mogm": lambda: W.cr_mogm(W.imtl_g()),
}

EXACT, DIGITS = (1e-14, 1e-6), (5e-9, 1e-6)
REGULARIZED, UNREGULARIZED = {"norm_eps": 1e-4, "reg_eps": 1e-4}, {"norm_eps": 0.0, "reg_eps": 0.0}

# (method, hyper-parameters, weights of the first call on J_BASE, agreement in float64 and float32)
FIRST_CALL = [
    ("mean", {}, [0.5, 0.5], (0, 0)),
    ("sum", {}, [1, 1], (0, 0)),
    ("constant", {"weights": [1.0, 2.0]}, [1, 2], (0, 0)),
    ("upgrad", {}, [10 / 9, 15 / 19], EXACT),
    ("upgrad_pref", {"pref_vector": [1.0, 1.0]}, [20 / 9, 30 / 19], EXACT),
    ("upgrad_pref", {"pref_vector": [1.0, 0.0]}, [1, 11 / 19], EXACT),
    ("upgrad_regularized", REGULARIZED, [1.11092105, 0.78943103], DIGITS),
    ("upgrad_regularized", UNREGULARIZED, [10 / 9, 15 / 19], EXACT),
    ("dualproj", {}, [11 / 18, 1 / 2], EXACT),
    ("dualproj_pref", {"pref_vector": [0.25, 0.75]}, [11 / 12, 0.75], EXACT),
    ("dualproj_regularized", REGULARIZED, [0.61092105, 0.5], DIGITS),
    ("dualproj_regularized", UNREGULARIZED, [11 / 18, 1 / 2], EXACT),
    ("mgda", {}, [3 / 5, 2 / 5], EXACT),
    ("pcgrad", {}, [20 / 9, 30 / 19], EXACT),
    ("gradvac", {"eps": 1e-8}, [20 / 9, 30 / 19], (3e-8, 1e-6)),
    ("gradvac", {"eps": 0.0}, [20 / 9, 30 / 19], EXACT),
    ("imtl_g", {}, IMTL_G, EXACT),
    ("aligned_mtl", {}, aligned_on_base("min"), EXACT),
    ("aligned_mtl_median", {}, aligned_on_base("median"), EXACT),
    ("aligned_mtl_rmse", {}, aligned_on_base("rmse"), EXACT),
    ("cagrad", {"c": 0.0}, [0.5, 0.5], (0, 0)),
    ("cagrad", {"c": 0.5}, cagrad_on_base(0.5), (1e-13, 5e-6)),
    ("cagrad", {"c": 1.0}, cagrad_on_base(1), (1e-13, 5e-6)),
    ("cagrad", {"c": 2.0}, cagrad_on_base(2), (1e-13, 1e-5)),
    ("excess_mtl", {}, [0.5, 0.5], (1e-15, 1e-7)),
    ("modo", {}, [1, 0], (1e-15, 1e-7)),
    ("sdmgrad", {}, [3 / 26, 23 / 26], (1e-15, 1e-7)),
    ("cr_mogm", {}, IMTL_G, EXACT),
]


@functools.cache
def first_call(name: str):
    @jax.jit
    def run(jacobian, hyperparameters):
        weighting = FACTORIES[name](**hyperparameters)
        aggregator = jaxjd.weighted(weighting, num_tasks=2)
        cross = isinstance(weighting, jaxjd.CrossGramianWeighting)
        extra_args = {"cross_jacobians": (jacobian, jacobian)} if cross else {}
        state = aggregator.init(jacobian[0])
        update, state = aggregator.update(jacobian, state, **extra_args)
        return update, state.weights

    return run


def test_closed_forms_have_the_known_digits():
    for closed_form, digits, tolerance in [
        (IMTL_G, [0.59233032, 0.40766968], 5e-9),
        (aligned_on_base("min"), [0.55907192, 0.40826107], 5e-9),
        (aligned_on_base("rmse"), [1.51086564, 1.10330640], 5e-9),
        # Digits of an iterative solver.
        (cagrad_on_base(0.5), [0.70412415, 0.5], 5e-9),
        (cagrad_on_base(1), [1.19997864, 0.79996796], 5e-5),
        (cagrad_on_base(2), [2.00712345, 1.33807466], 1e-5),
    ]:
        np.testing.assert_allclose(closed_form, digits, rtol=0, atol=tolerance)


QUICK_IN_FLOAT32 = {
    "constant",
    "excess_mtl",
    "mean",
    "modo",
    "pcgrad",
    "sum",
    "upgrad",
}


def first_calls() -> list:
    """The methods in float64, and some in float32: a program each. `test_parity.py` asks both."""
    params = []
    for name in FACTORIES:
        for dtype, quick in (
            (np.float32, name in QUICK_IN_FLOAT32),
            (np.float64, name not in ("dualproj_regularized", "upgrad_pref")),
        ):
            marks = () if quick else pytest.mark.slow
            params.append(pytest.param(name, dtype, id=f"{name}-{dtype.__name__}", marks=marks))
    return params


@pytest.mark.parametrize(("name", "dtype"), first_calls())
def test_first_call_on_base(name, dtype):
    cases = [case for case in FIRST_CALL if case[0] == name]
    assert cases
    with jax.enable_x64(dtype == np.float64):
        for _, hyperparameters, expected, tolerances in cases:
            tolerance = tolerances[dtype == np.float32]
            arguments = {key: array(value, dtype) for key, value in hyperparameters.items()}
            update, weights = first_call(name)(array(J_BASE, dtype), arguments)
            assert update.dtype == weights.dtype == dtype
            np.testing.assert_allclose(weights, expected, rtol=0, atol=tolerance)
            np.testing.assert_allclose(update, expected @ J_BASE, rtol=0, atol=10 * tolerance)


def test_regularized_projector_counts_a_small_gramian_as_zero():
    weights = lambda scale: first_call("upgrad_regularized")(array(J_BASE * scale), {})[1]
    # The trace is below norm_eps: no row can be told from zero, and the preferences are returned.
    np.testing.assert_array_equal(weights(1e-3), array([0.5, 0.5]))
    # Above it only the ratios matter.
    np.testing.assert_allclose(weights(3e-3), [1.11092105, 0.78943103], rtol=1e-6)


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
            J = rng.standard_normal((2, 3)) + np.array([[2, 0, 0], [1, 1, 0]])
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
    # Ten calls with a risk ratio of 1e4 between the tasks, then ten the other way round: the
    # weights of the first calls are 1 and 0 to rounding, but they can return.
    weighting = W.excess_mtl()
    update = jax.jit(weighting.update)
    state = weighting.init(2, jnp.zeros(2))
    for J in [np.eye(2), *10 * [np.diag([100.0, 0.01])], *10 * [np.diag([0.1, 1e3])]]:
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
            np.testing.assert_allclose(weights, smoothed, rtol=1e-6, atol=1e-6)
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
    update, _ = jax.jit(aggregator.update)(J, aggregator.init(J[0]))
    np.testing.assert_allclose(update, [1, 1, 1], rtol=1e-6)
    aggregator = jaxjd.weighted(W.cr_mogm(W.modo(), 0.5), num_tasks=2)
    state, step = aggregator.init(J[0]), jax.jit(aggregator.update)
    for expected in ([1, 0], [0.5, 0.5], [0.75, 0.25]):
        _, state = step(J, state, cross_jacobians=(J, J))
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


def test_flattening_of_ones():
    weighting = W.flattening(W.upgrad())
    weights, state = jax.jit(weighting.update)(jnp.ones((2, 3, 3, 2)), weighting.init((2, 3)))
    assert state == ()
    np.testing.assert_allclose(weights, np.full((2, 3), 1 / 6), rtol=1e-6)


def test_flattening_is_the_weighting_of_the_flat_gramian():
    J = np.random.default_rng(8).standard_normal((6, 8)).astype(np.float32)
    flat, _ = jax.jit(W.imtl_g().update)(jnp.asarray(J @ J.T), ())
    assert np.ptp(flat) > 0.1
    weighting = W.flattening(W.imtl_g())
    update = jax.jit(weighting.update)
    for shape in [(6,), (2, 3), (3, 2), (2, 1, 3)]:
        tensor = J.reshape(*shape, 8)
        k = len(shape)
        # The second group of task axes is in reverse order.
        generalized = np.moveaxis(
            np.tensordot(tensor, tensor, axes=(-1, -1)),
            range(k, 2 * k),
            range(2 * k - 1, k - 1, -1),
        )
        assert generalized.shape == shape + shape[::-1]
        weights, _ = update(jnp.asarray(generalized), weighting.init(shape))
        assert weights.shape == shape
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
        "dualproj": W.dualproj(),
        "mgda": W.mgda(),
        "pcgrad": W.pcgrad(),
        "gradvac": W.gradvac(),
        "imtl_g": W.imtl_g(),
        "cagrad": W.cagrad(0.4),
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
            expected = 2 * first_call("upgrad")(J, {})[1]
            for name, arguments in (("pcgrad", {}), ("gradvac", {"eps": np.float64(1e-8)})):
                np.testing.assert_allclose(first_call(name)(J, arguments)[1], expected, rtol=1e-7)


def test_mgda_of_two_rows_has_a_closed_form():
    with jax.enable_x64(True):
        for J in pairs_of_rows():
            G = J @ J.T
            difference = G[0, 0] - 2 * G[0, 1] + G[1, 1]
            first = np.clip((G[1, 1] - G[0, 1]) / difference, 0, 1)
            np.testing.assert_allclose(
                first_call("mgda")(J, {})[1], [first, 1 - first], rtol=1e-12, atol=1e-15
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


OF_ORTHOGONAL_ROWS = {
    **dict.fromkeys(["upgrad", "dualproj", "mgda", "imtl_g"], 1 / 3),
    **dict.fromkeys(["aligned_mtl", "aligned_mtl_median", "aligned_mtl_rmse"], 1 / 3),
    **dict.fromkeys(["pcgrad", "gradvac"], 1),
    "cagrad": 1.4 / 3,  # g_w is the mean gradient, so the step is 1 + c times the mean.
}


# By default those that other tests compile, too.
@pytest.mark.parametrize(
    "name", slow_but(set(OF_ORTHOGONAL_ROWS) - {"cagrad", "gradvac", "mgda"}, OF_ORTHOGONAL_ROWS)
)
def test_orthogonal_rows_of_one_length(name):
    with jax.enable_x64(True):
        for scale in (1e-8, 1.0, 1e8):
            weights = jitted(name)(jnp.asarray(np.eye(3) * scale))
            np.testing.assert_allclose(weights, np.full(3, OF_ORTHOGONAL_ROWS[name]), rtol=1e-12)


def test_rows_without_conflict_are_left_alone():
    rng = np.random.default_rng(12)
    J = np.abs(rng.standard_normal((3, 5)))
    with jax.enable_x64(True):
        G = jnp.asarray(J @ J.T)
        for name in ("upgrad", "dualproj"):
            np.testing.assert_array_equal(jitted(name)(G), np.full(3, 1 / 3))
        np.testing.assert_allclose(jitted("pcgrad")(G), np.ones(3), rtol=1e-15)
