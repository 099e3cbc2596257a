"""What the methods promise on whole families of Jacobians, in float32.

Aggregates are judged in float64. A weighting only sees the Gramian, and its weights are rounded to
float32, so the aggregate is known up to rounding errors relative to the terms that it is a sum of:
every tolerance here is relative to ``sum_i |w_i| |g_i|``, called `terms`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax import lax

import jaxjd
from jaxjd import weightings as W
from jaxjd.weightings._gradvac import vaccinate
from jaxjd.weightings._pcgrad import project_conflicts
from tests import matrices
from tests.registry import NAMED, Method
from tests.rounding import UNFUSED

hypothesis.settings.register_profile(
    "deterministic", derandomize=True, deadline=None, max_examples=5, database=None
)
deterministic = hypothesis.settings.get_profile("deterministic")


class Case(NamedTuple):
    """A registered method with some hyper-parameters, which its compiled function takes."""

    function: str
    row: Method
    make: Callable[..., jaxjd.Weighting]
    arguments: dict[str, float]


def all_cases() -> dict[str, Case]:
    """All registered methods, except that constant weights fit one number of tasks only."""
    cases = {}
    for row in NAMED:
        if row.name == "aligned_mtl":
            for mode in ("min", "median", "rmse"):
                name = f"aligned_mtl({mode})"
                cases[name] = Case(name, row, functools.partial(W.aligned_mtl, None, mode), {})
        elif row.name == "cagrad":
            for c in (0.0, 0.5, 1.0, 2.0):
                cases[f"cagrad({c:g})"] = Case("cagrad", row, W.cagrad, {"c": c})
        elif row.name == "sdmgrad":
            for lr in (0.5, 10.0):
                cases[f"sdmgrad({lr:g})"] = Case("sdmgrad", row, W.sdmgrad, {"lr": lr})
        elif row.name != "constant":
            cases[row.name] = Case(row.name, row, row.weighting, {})
    return cases


CASES = all_cases()
FUNCTIONS = {case.function: case for case in CASES.values()}


# The width of all Jacobians with so many rows.
SHAPES = {1: 2, 2: 8, 4: 16, 9: 36, 20: 100, 32: 128}
BATCH = 32


class Results(NamedTuple):
    """Jacobians, weights and aggregates, one per leading index, in float64."""

    J: np.ndarray
    weights: np.ndarray
    update: np.ndarray

    @property
    def lengths(self):
        return np.linalg.norm(self.J, axis=2)

    @property
    def terms(self):
        return np.sum(np.abs(self.weights) * self.lengths, axis=1)

    @property
    def norm(self):
        return np.linalg.norm(self.update, axis=1)

    @property
    def improvements(self):
        """<g_i, A> / |g_i|, and zero for a zero row."""
        products = np.einsum("kmn,kn->km", self.J, self.update)
        return np.divide(products, self.lengths, where=self.lengths > 0, out=0 * products)

    @property
    def cosines(self):
        return self.improvements / np.where(self.norm > 0, self.norm, 1)[:, None]


@functools.cache
def compiled(function: str, batched: bool = True):
    """A sequence of calls, or a batch of them; returns the last weights and the last update."""
    _, row, make, _ = FUNCTIONS[function]

    def run(jacobians, arguments):
        _, m, n = jacobians.shape
        weighting = make(**arguments)

        def call(state, jacobian):
            extra = row.extra_args(jacobian)
            weights, state = weighting.update(row.stat_of(jacobian), state, **extra)
            return state, (weights, jaxjd.combine(weights, jacobian))

        state = weighting.init(m, jnp.zeros((n,), jacobians.dtype))
        _, calls = lax.scan(call, state, jacobians)
        return jax.tree.map(lambda leaf: leaf[-1], calls)

    return jax.jit(jax.vmap(run, in_axes=(0, None)) if batched else run)


def padded(J: np.ndarray) -> np.ndarray:
    """Adds zero columns, which change no inner product, up to the one width for its row count."""
    return np.pad(J, ((0, 0), (0, SHAPES[J.shape[0]] - J.shape[1])))


def evaluate(name: str, jacobians, *, dtype=np.float32, order=None, batched=True) -> Results:
    """Runs a method on many Jacobians of one row count, with the rows in the given order.

    A method with a state per task is called twice, first with the rows scaled by other factors.
    """
    function, row, _, arguments = CASES[name]
    run = compiled(function, batched)
    J = np.stack([padded(jacobian) for jacobian in jacobians]).astype(dtype)
    count, m, _ = J.shape
    calls = J[:, None]
    if row.stateful:
        factors = np.linspace(0.5, 1.5, m, dtype=dtype)
        calls = np.stack([J * factors[:, None], J], axis=1)
    if order is not None:
        J, calls = J[:, order], calls[:, :, order]
    arguments = {key: np.asarray(value, dtype) for key, value in arguments.items()}
    if batched:
        calls = np.concatenate([calls, np.repeat(calls[-1:], -count % BATCH, axis=0)])
        parts = [run(chunk, arguments) for chunk in np.split(calls, len(calls) // BATCH)]
        weights, update = (np.concatenate(leaves) for leaves in zip(*parts, strict=True))
    else:
        parts = [run(call, arguments) for call in calls]
        weights, update = (np.stack(leaves) for leaves in zip(*parts, strict=True))
    weights, update = weights[:count], update[:count]
    assert weights.dtype == update.dtype == dtype
    assert weights.shape == J.shape[:2]
    assert update.shape == (count, J.shape[2])
    return Results(*(leaf.astype(np.float64) for leaf in (J, weights, update)))


def of(m: int, cases) -> list[np.ndarray]:
    return [J for J in cases if J.shape[0] == m]


QUICK_AT_20 = {"conflict_free", "dualproj", "mean", "mgda", "nash_mtl", "pcgrad", "random", "sum"}
"""Each row count costs a program per method. By default all methods have 4 rows, and these 20."""


def quick(name: str, m: int) -> pytest.MarkDecorator | tuple[()]:
    return () if m == 4 or (m == 20 and name in QUICK_AT_20) else pytest.mark.slow


def over(names, *counts: int) -> pytest.MarkDecorator:
    """Each method with each row count that it takes."""
    params = []
    for name in names:
        for m in counts:
            if m >= CASES[name].row.min_tasks:
                params.append(pytest.param(name, m, id=f"{name}-{m}", marks=quick(name, m)))
    return pytest.mark.parametrize(("name", "m"), params)


def with_20_rows(*names: str) -> pytest.MarkDecorator:
    """Each method on the families of stationary and other points, which have 20 rows."""
    params = [pytest.param(name, marks=quick(name, 20)) for name in names]
    return pytest.mark.parametrize("name", params)


FAMILIES = matrices.families()
TYPICAL = [J for family in FAMILIES.values() for J in family]
SCALED = [scale * J for J in FAMILIES["normal"] for scale in matrices.SCALES]
DEGENERATE = matrices.degenerate()
EVERYTHING = [*TYPICAL, *SCALED, *DEGENERATE.values()]
ROWS = sorted({J.shape[0] for J in EVERYTHING})


def generic(m: int, count: int, seed: int) -> list[np.ndarray]:
    """Normal Jacobians with rows scaled by 10^U(-1, 1), as far from degenerate as that goes."""
    rng = np.random.default_rng(seed)
    return [matrices.badly_scaled(rng, m, SHAPES[m], 1.0) for _ in range(count)]


QUADRATIC = ["cagrad(0)", "cagrad(0.5)", "cagrad(1)", "cagrad(2)", "dualproj", "mgda", "upgrad"]
"""Methods that solve a quadratic program; their error does not depend on its condition."""

FAIR = ["fairgrad", "nash_mtl"]
"""Methods whose equations have no solution at stationary points, so the weights are not unique."""

CONTINUOUS = [name for name in CASES if name != "sdmgrad(10)"]
"""With SDMGrad's own learning rate, each inner step is close to a step function of its input."""

# How far rounding of generic Jacobians moves the update, relative to `terms`. A small eigenvalue
# of the Gramian costs Aligned-MTL, ConFIG and IMTL-G digits; MoDo and SDMGrad amplify in their
# steps.
TOLERANCES = {
    "aligned_mtl(min)": 1e-3,
    "aligned_mtl(median)": 1e-3,
    "aligned_mtl(rmse)": 1e-3,
    "conflict_free": 1e-5,
    "imtl_g": 1e-4,
    "modo": 1e-5,
    "sdmgrad(0.5)": 1e-5,
}


def assert_close(name: str, a: np.ndarray, b: np.ndarray, results: Results) -> None:
    difference = np.linalg.norm(a - b, axis=1)
    assert (difference <= UNFUSED * TOLERANCES.get(name, 2e-6) * results.terms).all()


@over(CASES, *ROWS)
def test_every_update_is_finite(name, m):
    results = evaluate(name, of(m, EVERYTHING))
    assert np.isfinite(results.weights).all()
    assert np.isfinite(results.update).all()


@over(CASES, *(len(J) for J in FAMILIES["zero"]))
def test_a_zero_jacobian_gives_a_zero_update(name, m):
    (J,) = of(m, FAMILIES["zero"])
    assert not evaluate(name, [J]).update.any()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if case.row.unit and case.row.min_tasks == 1]
)
def test_a_single_row(name):
    results = evaluate(name, [np.array([[3.0, -4.0]]), np.array([[1e-9, 0.0]])])
    factor = 1 + CASES[name].arguments.get("c", 0)  # CAGrad goes to the border of its ball.
    np.testing.assert_allclose(results.weights, factor, rtol=1e-6)
    np.testing.assert_allclose(results.update, factor * results.J[:, 0], rtol=1e-6)


# --- No conflict -------------------------------------------------------------------------------

NON_CONFLICTING = [name for name, case in CASES.items() if case.row.non_conflicting]


@over(NON_CONFLICTING, *ROWS)
def test_no_row_conflicts_by_more_than_rounding(name, m):
    # This bound is what rounding the Gramian and the weights to float32 costs: some ulps of the
    # terms, however short the update itself is.
    results = evaluate(name, of(m, EVERYTHING))
    assert (results.improvements >= -2e-6 * results.terms[:, None]).all()


@with_20_rows(*NON_CONFLICTING)
def test_cosines_are_non_negative_where_all_rows_can_improve(name):
    results = evaluate(name, FAMILIES["free"])
    assert (results.norm > 1e-2 * results.terms).all()
    assert (results.cosines >= -1e-6).all()


@pytest.mark.parametrize(
    "m", [pytest.param(m, marks=() if m == 4 else pytest.mark.slow) for m in (2, 4, 9, 20, 32)]
)
def test_rows_of_very_different_lengths(m):
    """Rows scaled by 10^U(-3, 3): no conflict, and MGDA's bound on the improvements."""
    rng = np.random.default_rng(m)
    count = (400 if m < 10 else 100) // BATCH * BATCH
    for n in (4 * m, 2 * m, m, max(1, m // 2)):
        jacobians = [matrices.badly_scaled(rng, m, n) for _ in range(count)]
        # With fewer columns than tasks, many of the exact updates are zero. With as many, some are
        # so short that rounding shows. Otherwise the promise holds without exception.
        strict = n >= 2 * m
        measured = []
        for name in ("upgrad", "dualproj"):
            results = evaluate(name, jacobians)
            assert np.isfinite(results.update).all()
            relative = results.improvements / results.terms[:, None]
            assert (relative >= -2e-6).all()
            signal = results.norm > 1e-5 * results.terms
            cosines = results.cosines.min(axis=1)[signal]
            if strict:
                assert signal.all()
                assert (cosines >= -1e-6).all()
            measured.append(
                f"{name}: worst cosine {cosines.min():.1e}, below -1e-6 in "
                f"{np.sum(cosines < -1e-6)} of {len(cosines)}, worst improvement relative to the "
                f"terms {relative.min():.1e}"
            )
        results = evaluate("mgda", jacobians)
        assert np.isfinite(results.update).all()
        assert (results.improvements >= -2e-6 * results.terms[:, None]).all()
        applies = results.norm**2 > 1e-5 * results.lengths.min(axis=1) ** 2
        products = (results.improvements * results.lengths).min(axis=1)[applies]
        shortfall = 1 - products / results.norm[applies] ** 2
        if strict:
            assert applies.all()
            assert (shortfall <= 1e-4).all()
        measured.append(
            f"mgda: shortfall {shortfall.max():.1e}, above 1e-4 in {np.sum(shortfall > 1e-4)} of "
            f"{len(shortfall)}"
        )
        print(f"m={m}, n={n}:", "; ".join(measured))


# --- Scale and order ---------------------------------------------------------------------------

HOMOGENEOUS = [name for name, case in CASES.items() if case.row.homogeneous]


@over(HOMOGENEOUS, *ROWS)
def test_powers_of_two_scale_every_update_exactly(name, m):
    # Scaling by a power of two rounds nothing, so A(cJ) = c A(J) must hold bit for bit: whatever is
    # absolute in a method shows here. These are 1e-10, 8e-3, 2 and 1e10.
    within_range = [J for key, J in DEGENERATE.items() if key not in ("tiny_row", "huge_row")]
    jacobians = of(m, [*TYPICAL, *within_range])
    expected = evaluate(name, jacobians).update
    for exponent in (-33, -7, 1, 15, 33):  # 2^15 is a usual scale of losses.
        scaled = evaluate(name, [J * 2.0**exponent for J in jacobians]).update
        np.testing.assert_array_equal(scaled, expected * 2.0**exponent)


@over([name for name in HOMOGENEOUS if name in CONTINUOUS], 4, 9)
def test_updates_scale_with_the_jacobian(name, m):
    jacobians = generic(m, BATCH, seed=0)
    results = evaluate(name, jacobians)
    for scale in (1e-10, 1e-5, 1e5, 1e10):
        scaled = evaluate(name, [scale * J for J in jacobians])
        assert_close(name, scaled.update / scale, results.update, results)


EQUIVARIANT = [
    name for name in CONTINUOUS if CASES[name].row.equivariant and not CASES[name].row.random
]


@over(EQUIVARIANT, 4, 9, 20)
def test_the_order_of_the_tasks_does_not_matter(name, m):
    typical = FAMILIES["free"] if name in FAIR else TYPICAL
    jacobians = of(m, typical) + generic(m, 20, {4: 1, 9: 2, 20: 3}[m])
    if name in QUADRATIC:  # Others decide on a rank, which is not continuous.
        jacobians += of(m, DEGENERATE.values())
    results = evaluate(name, jacobians)
    for order in (np.arange(m)[::-1], np.random.default_rng(13).permutation(m)):
        permuted = evaluate(name, jacobians, order=order)
        assert_close(name, permuted.update, results.update, results)


@pytest.mark.parametrize("method", ["pcgrad", "gradvac"])
def test_the_order_of_the_tasks_does_not_matter_but_for_that_of_the_projections(method):
    rng = np.random.default_rng(14)
    m = 5
    target = rng.uniform(-0.5, 0.5, (m, m))
    if method == "pcgrad":
        weights = lambda G, target, orders: (project_conflicts(G, orders), target)
    else:
        weights = lambda G, target, orders: vaccinate(G, target, orders, 0.5, 1e-8)
    weights = jax.jit(weights)
    with jax.enable_x64(True):
        for J in [rng.standard_normal((m, 4)) for _ in range(5)]:
            G = J @ J.T
            orders = np.stack([rng.permutation(m) for _ in range(m)])
            order = rng.permutation(m)
            rank = np.argsort(order)
            w, next_target = weights(G, target, orders)
            permuted, permuted_target = weights(
                G[np.ix_(order, order)], target[np.ix_(order, order)], rank[orders[order]]
            )
            np.testing.assert_allclose(permuted, np.asarray(w)[order], rtol=1e-10)
            np.testing.assert_allclose(
                permuted_target, np.asarray(next_target)[np.ix_(order, order)], rtol=1e-10
            )


@over(["upgrad", "mean", "sum"], 4, 9)
def test_linear_under_scaling_of_the_rows(name, m):
    rng = np.random.default_rng(15)
    J = np.stack([padded(J) for J in [*generic(m, 20, 4), *of(m, FAMILIES["normal"])]])
    for _ in range(5):
        c_1, c_2 = rng.uniform(0, 1, (2, m, 1))
        a, b = rng.uniform(0, 1, 2)
        mixed, first, second = (evaluate(name, c * J) for c in (a * c_1 + b * c_2, c_1, c_2))
        difference = np.linalg.norm(mixed.update - a * first.update - b * second.update, axis=1)
        assert (difference <= 1e-5 * mixed.terms).all()


def test_constant_weights_are_linear():
    update = jax.jit(W.constant([0.1, -2.0, 3.0]).update)
    for G in (np.eye(3), np.zeros((3, 3)), np.full((3, 3), 1e30)):
        weights, _ = update(jnp.asarray(G, jnp.float32), ())
        np.testing.assert_allclose(weights, [0.1, -2.0, 3.0], rtol=1e-7)


# --- Stationarity ------------------------------------------------------------------------------


@with_20_rows("upgrad", "dualproj", "mean", "sum", "random")
@pytest.mark.parametrize("family", ["weak", "free"])
def test_updates_vanish_only_at_strongly_stationary_points(name, family):
    results = evaluate(name, FAMILIES[family])
    assert (results.norm > 2e-2 * results.lengths.max(axis=1)).all()


@with_20_rows("mgda", "cagrad(0.5)", "cagrad(1)", "cagrad(2)", "imtl_g")
def test_updates_vanish_only_at_stationary_points(name):
    results = evaluate(name, FAMILIES["free"])
    assert (results.norm > 1e-2 * results.lengths.max(axis=1)).all()


@with_20_rows("upgrad", "dualproj", "mgda", "cagrad(1)", "cagrad(2)")
def test_updates_vanish_at_strongly_stationary_points(name):
    results = evaluate(name, FAMILIES["strong"])
    assert (results.norm <= 1e-5 * results.terms).all()


@with_20_rows(*FAIR)
def test_fair_updates_vanish_at_strongly_stationary_points(name):
    strong = evaluate(name, FAMILIES["strong"])
    assert (strong.norm <= 0.03 * np.sqrt(strong.J.shape[1])).all()


@over(FAIR, *ROWS)
def test_fair_updates_are_never_long(name, m):
    # For alpha = 1 the norm of the solution is sqrt(m), wherever there is one.
    results = evaluate(name, of(m, EVERYTHING))
    assert (results.norm <= np.sqrt(m) * (1 + 1e-4)).all()


def test_mgda_vanishes_at_weakly_stationary_points():
    results = evaluate("mgda", FAMILIES["weak"])
    assert (results.norm <= 1e-5 * results.terms).all()


# --- What the optimum satisfies ----------------------------------------------------------------


@over(["cagrad(0.5)", "cagrad(1)", "cagrad(2)"], 4, 9, 20)
def test_cagrad_closes_the_duality_gap(name, m):
    # For d in the ball and w on the simplex, min_i <g_i, d> <= <g_0, g_w> + c |g_0| |g_w|.
    if m == 20:
        jacobians = FAMILIES["free"]
    else:
        jacobians = generic(m, 24, 5) + (FAMILIES["normal"][-2:] if m == 9 else [])
    results = evaluate(name, jacobians)
    mean = results.J.mean(axis=1)
    radius = CASES[name].arguments["c"] * np.linalg.norm(mean, axis=1)
    scale = radius * np.linalg.norm(mean, axis=1)
    distance = np.linalg.norm(results.update - mean, axis=1)
    assert (distance <= radius * (1 + 1e-4)).all()
    w = np.maximum(results.weights - 1 / m, 0)
    w /= w.sum(axis=1, keepdims=True)
    g_w = np.einsum("km,kmn->kn", w, results.J)
    lower = np.einsum("kmn,kn->km", results.J, results.update).min(axis=1)
    upper = np.sum(mean * g_w, axis=1) + radius * np.linalg.norm(g_w, axis=1)
    assert (np.abs(upper - lower) <= 1e-4 * scale).all()


@pytest.mark.parametrize("name", ["upgrad", "dualproj", "mgda", "cagrad(0.5)"])
def test_equal_rows_count_as_one(name):
    rng = np.random.default_rng(16)
    rows = rng.standard_normal((2, 8))
    results = evaluate(name, [rows[[0, 1, 1, 0]], rows[[0, 0, 1, 1]], rows[[1, 0, 1, 0]]])
    np.testing.assert_allclose(results.update[1:], results.update[[0, 0]], rtol=1e-5, atol=1e-6)


# --- Numbers -----------------------------------------------------------------------------------

# Random draws depend on the dtype.
SAME_IN_FLOAT64 = [name for name in CONTINUOUS if not CASES[name].row.random]


@over(SAME_IN_FLOAT64, 9)
def test_float32_agrees_with_float64(name, m):
    results = evaluate(name, generic(m, BATCH, seed=6))
    with jax.enable_x64(True):
        exact = evaluate(name, results.J, dtype=np.float64)
    assert_close(name, results.update, exact.update, results)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONTINUOUS)
def test_vmap_is_a_loop(name):
    jacobians = generic(4, 10, 7)
    if name in QUADRATIC:
        jacobians += DEGENERATE.values()
    results = evaluate(name, jacobians)
    looped = evaluate(name, jacobians, batched=False)
    assert_close(name, results.update, looped.update, results)


small_integers = st.lists(
    st.lists(st.integers(-2, 2), min_size=12, max_size=12), min_size=BATCH, max_size=BATCH
).map(lambda batch: [np.array(entries, float).reshape(4, 3) for entries in batch])
"""A batch of four rows in three dimensions: zero, equal, opposite and dependent rows come up all
the time."""


@pytest.mark.parametrize("name", CASES)
@hypothesis.settings(deterministic)
@hypothesis.given(jacobians=small_integers)
def test_rows_of_small_integers(name, jacobians):
    results = evaluate(name, jacobians)
    assert np.isfinite(results.weights).all()
    if CASES[name].row.non_conflicting:
        assert (results.improvements >= -2e-6 * results.terms[:, None]).all()
    if CASES[name].row.homogeneous:
        scaled = evaluate(name, [J * 2.0**20 for J in jacobians])
        np.testing.assert_array_equal(scaled.update, results.update * 2.0**20)
