"""Certificates: residuals that are small for right answers and large for wrong ones."""

from __future__ import annotations

import collections
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxjd
from jaxjd import diagnostics, linalg, weightings
from jaxjd.solvers import residuals
from jaxjd.weightings import _pcd
from tests.goldens.families import by_rows, hard
from tests.jaxprs import equations
from tests.matrices import G_BASE, J_BASE, badly_scaled, degenerate, families

WIDTH = 20

SOLVERS = {
    "upgrad": weightings.upgrad,
    "upgrad(regularized)": lambda: weightings.upgrad(projector=linalg.regularized_projector()),
    "dualproj": weightings.dualproj,
    "mgda": weightings.mgda,
    "mgda(l2)": lambda: weightings.mgda("l2"),
    "cagrad(0.5)": lambda: weightings.cagrad(0.5),
    "cagrad(2)": lambda: weightings.cagrad(2.0),
    "nash_mtl": weightings.nash_mtl,
    "fairgrad(2)": lambda: weightings.fairgrad(2.0),
    "pcd": weightings.pcd,
    "conflict_free": weightings.conflict_free,
    "imtl_g": weightings.imtl_g,
}


@functools.cache
def stack(m: int) -> np.ndarray:
    """All Jacobians of m rows, padded with columns of zeros: shape (k, m, n)."""
    rng = np.random.default_rng(5)
    found = [J for family in families().values() for J in family]
    if m == 4:
        found += [*degenerate().values(), *(badly_scaled(rng, m, 8) for _ in range(4))]
    found = [J for J in found if len(J) == m]
    width = max(WIDTH, *(J.shape[1] for J in found))
    padded = [np.pad(J, ((0, 0), (0, width - J.shape[1]))) for J in found]
    if m == 4:
        padded += list(by_rows(hard(rows=(4,), count=80))[4])
    return np.stack(padded)


@functools.cache
def solved(name: str):
    """The weights and the residuals of a stack of Gramians, compiled."""
    weighting = SOLVERS[name]()

    def solve(G):
        state = weighting.init(G.shape[0])
        weights, _ = weighting.update(G, state)
        return weights, diagnostics.solver_residual(weighting, G, state)

    return jax.jit(jax.vmap(solve))


@functools.cache
def answers(name: str, m: int, dtype: str):
    Js = stack(m)
    G = np.einsum("kin,kjn->kij", Js, Js).astype(dtype)
    with jax.enable_x64(dtype == "float64"):
        weights, residual = solved(name)(jnp.asarray(G))
    return G.astype(np.float64), np.asarray(weights, np.float64), np.asarray(residual, np.float64)


def unit_cosines(G: np.ndarray) -> np.ndarray:
    lengths = np.sqrt(np.diagonal(G, axis1=-2, axis2=-1))
    lengths = np.where(lengths > 0, lengths, 1)
    return G / lengths[..., :, None] / lengths[..., None, :]


@functools.cache
def smallest(m: int, dtype: str) -> np.ndarray:
    """The smallest eigenvalue, of unit rows, of any set of rows; those below rounding are zero."""
    cosines = unit_cosines(answers("nash_mtl", m, dtype)[0])
    found = np.ones(len(cosines))
    for subset in itertools.product([False, True], repeat=m):
        rows = np.flatnonzero(subset)
        if len(rows) > 1:
            values = np.linalg.eigvalsh(cosines[:, rows[:, None], rows[None, :]])
            kept = np.where(values > 8 * m * np.finfo(dtype).eps, values, 1)
            found = np.minimum(found, kept.min(axis=1))
    return found


def cases(names: tuple[str, ...], always: dict[str, tuple[str, ...]]) -> list:
    """All methods in both dtypes, all but a few of them slow: most of the time is compilation."""
    return [
        pytest.param(name, dtype, marks=() if name in always[dtype] else pytest.mark.slow)
        for name in names
        for dtype in ("float32", "float64")
    ]


EQUATIONS = ("nash_mtl", "fairgrad(2)", "conflict_free", "imtl_g")
PROGRAMS = tuple(name for name in SOLVERS if name not in EQUATIONS)


@pytest.mark.parametrize(
    ("name", "dtype"),
    cases(PROGRAMS, {"float32": ("upgrad", "mgda", "cagrad(2)"), "float64": ()}),
)
def test_programs_are_solved_to_rounding(name, dtype):
    _, weights, residual = answers(name, 4, dtype)
    assert np.isfinite(weights).all()
    assert (residual >= 0).all()
    # A solution is as long as 1 / sigma, and its products are rounded relative to that. In float64
    # more may be left next to exactly opposite rows.
    bound = 32 * 4 * np.finfo(dtype).eps / np.sqrt(smallest(4, dtype))
    bound = np.maximum(bound, 1e-9)
    assert (residual <= bound).all(), np.flatnonzero(residual > bound)


@pytest.mark.slow
@pytest.mark.parametrize("m", [9, 20])
@pytest.mark.parametrize("name", ["upgrad", "dualproj", "mgda", "cagrad(0.5)", "cagrad(2)"])
def test_programs_of_more_rows_are_solved_to_rounding(name, m):
    _, weights, residual = answers(name, m, "float32")
    assert np.isfinite(weights).all()
    assert (residual >= 0).all()
    assert (residual <= 64 * m * np.finfo("float32").eps).all()


@pytest.mark.parametrize(
    ("name", "dtype"),
    cases(EQUATIONS, {"float32": ("nash_mtl", "conflict_free", "imtl_g"), "float64": ()}),
)
def test_equations_are_solved_to_rounding_or_have_no_solution(name, dtype):
    G, weights, residual = answers(name, 4, dtype)
    assert np.isfinite(weights).all()
    assert (residual >= 0).all()
    # An equation is solved to the condition number.
    eps = np.finfo(dtype).eps
    bound = 32 * 4 * eps / smallest(4, dtype)
    cosines, squares = unit_cosines(G), np.diagonal(G, axis1=1, axis2=2)
    nonzero = squares > 0
    if name in ("conflict_free", "imtl_g"):
        # Cosines that no combination has are those of the normal equations: twice the power.
        wanted = nonzero.astype(float)[..., None]
        projector = np.linalg.pinv(cosines, rcond=8 * 4 * eps, hermitian=True) @ cosines
        missing = np.abs(projector @ wanted - wanted).max(axis=(1, 2)) > np.sqrt(eps)
        bound = np.where(missing, bound / smallest(4, dtype), bound)
        assert (residual <= bound).all(), np.flatnonzero(residual > bound)
        return
    # No solution exists where zero is in the convex hull of the rows that are not zero; next to
    # that, rounding decides.
    exact = unit_cosines(np.einsum("kin,kjn->kij", stack(4), stack(4)))
    hull = np.array(
        [hull_square(C[n][:, n]) if n.any() else 1 for C, n in zip(exact, nonzero, strict=True)]
    )
    solvable = hull > 1e3 * 4 * eps
    if name != "nash_mtl":  # The terms of unit rows differ by |g|^((1 - p) / (1 + p)), p = 1/2.
        spread = squares.max(axis=1) / np.min(squares, axis=1, where=nonzero, initial=np.inf)
        bound = bound * np.maximum(spread, 1) ** (1 / 3)
    assert solvable.sum() > 40
    assert (residual <= bound)[solvable].all(), np.flatnonzero(solvable & (residual > bound))
    # For a pair 1e-7 rad from opposite (5.8e-15) there is one, which float64 finds.
    none = hull < np.finfo(np.float64).eps
    assert none.sum() > 15
    assert (residual[none] > 0.4).all(), np.flatnonzero(none & (residual <= 0.4))


def hull_square(cosines: np.ndarray) -> float:
    """The squared distance of zero from the hull, by all sets that may hold the nearest point."""
    m, best = len(cosines), np.inf
    for subset in itertools.product([False, True], repeat=m):
        rows = np.flatnonzero(subset)
        if len(rows) == 0:
            continue
        block = cosines[np.ix_(rows, rows)]
        border = np.ones((len(rows) + 1, len(rows) + 1))
        border[1:, 1:], border[0, 0] = block, 0
        w = np.linalg.lstsq(border, np.eye(len(rows) + 1)[0], rcond=1e-6)[0][1:]
        if (w >= -1e-6).all() and abs(w.sum() - 1) < 1e-6:
            best = min(best, w @ block @ w)
    return max(best, 0)


# A Jacobian of long and short rows with conflicts, where all four rows matter to every method.
J_WRONG = np.array(
    [[-4.0, 1.0, 1.0, 0.0], [6.0, 1.0, 1.0, 1.0], [0.0, 20.0, -10.0, 5.0], [0.3, 0.0, -0.1, -0.2]]
)
G_WRONG = J_WRONG @ J_WRONG.T


def corrupted(x: np.ndarray) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    swapped = x.copy()
    swapped[..., [0, 1]] = swapped[..., [1, 0]]
    scaled = x.copy()
    scaled[..., 1] *= 1.3
    negative = x.copy()
    negative[..., 2] = -x[..., 1]
    return {
        "perturbed": x * (1 + 0.1 * rng.uniform(0.5, 1, x.shape) * rng.choice([-1, 1], x.shape)),
        "swapped": swapped,
        "scaled": scaled,
        "negative": negative,
        "zero": np.zeros_like(x),
    }


def certificate_of(name):
    """The answer, as the residual reads it, and the residual as a function of the answer."""
    G = jnp.asarray(G_WRONG)
    if name == "dual cone":
        U = jnp.eye(4) / 4
        return linalg.project_onto_dual_cone(U, G), lambda V: linalg.dual_cone_residual(V, U, G)
    if name == "min norm":
        return linalg.min_norm_weights(G), lambda w: linalg.min_norm_residual(w, G)
    if name == "simplex":
        x = jnp.array([0.4, 0.9, -0.3, 0.6])
        return linalg.project_onto_simplex(x), lambda w: linalg.simplex_residual(w, x)
    weighting = SOLVERS[name]()
    weights, _, certificate = weighting.update.solve(G, weighting.init(4))
    fn, (_, *data) = certificate.func, certificate.args
    return weights, lambda w: fn(w, *data)


@pytest.mark.parametrize(
    "name",
    ["dual cone", "min norm", "simplex", "nash_mtl", "imtl_g"]
    + [
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("cagrad(2)", "conflict_free", "fairgrad(2)", "pcd")
    ],
)
@pytest.mark.slow
def test_wrong_answers_have_a_large_residual(name):
    with jax.enable_x64():
        answer, residual = certificate_of(name)
        residual = jax.jit(residual)
        assert (residual(answer) < 1e-10).all()
        for kind, wrong in corrupted(np.asarray(answer)).items():
            found = residual(jnp.asarray(wrong))
            # Some rows of a batch may be no worse, where two equal weights are swapped.
            assert jnp.max(found) > 5e-3, (kind, found)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
def test_weights_that_cancel_are_no_solution_of_cagrad(dtype):
    """Large weights along two opposite rows, as a solver that runs off returns them."""
    J = np.array([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.3, 1.0, 0.0]])
    with jax.enable_x64(dtype == "float64"):
        G = np.asarray(J @ J.T, dtype)
        residual = jax.jit(lambda w: residuals.worst_case_residual(w, G, 2.0))
        # The update is [0, 0.25, 0]: the part of the mean along the opposite rows is taken out.
        right = np.asarray([0.25, 0.325, 0.25, 0.25], dtype)
        assert residual(right) < 32 * np.finfo(dtype).eps
        off = np.asarray([3.5e5, 3.5e5, 0.25, 0.448], dtype)
        off[0] -= np.asarray(0.1564, dtype)
        assert residual(off) > 0.05
        assert residual(right + np.asarray([0.02, 0, 0, 0], dtype)) > 0.01
        # A zero row has no part in the update.
        assert residual(np.where(np.arange(4) == 2, 0, right).astype(dtype)) < 1


def test_rows_of_all_lengths_count_alike():
    """A violation is as large for a row of length 1e-3 as for one of length 1e3."""
    with jax.enable_x64():
        scale = jnp.array([1e3, 1.0, 1e-3, 1.0])
        G = jnp.asarray(G_WRONG)
        scaled = G * scale[:, None] * scale[None, :]
        U, wrong = jnp.eye(4) / 4, jnp.eye(4) / 4 + 0.01
        np.testing.assert_allclose(
            linalg.dual_cone_residual(wrong / scale[None, :], U / scale[None, :], scaled),
            linalg.dual_cone_residual(wrong, U, G),
            rtol=1e-9,
        )
        weights = fair = jnp.array([0.3, 0.2, 0.1, 0.4])
        np.testing.assert_allclose(
            residuals.fairness_residual(weights / scale, scaled, 1.0),
            residuals.fairness_residual(fair, G, 1.0),
            rtol=1e-9,
        )
        for factor in (1e-8, 1e8):
            np.testing.assert_allclose(
                linalg.min_norm_residual(weights, factor * G),
                linalg.min_norm_residual(weights, G),
                rtol=1e-9,
            )


@pytest.mark.slow
def test_zero_rows():
    G = jnp.diag(jnp.array([1.0, 0.0]))
    u = jnp.array([0.5, 0.5])
    assert linalg.dual_cone_residual(u, u, G) == 0
    assert linalg.dual_cone_residual(jnp.array([0.5, 1e6]), u, G) > 1  # It keeps its weight.
    assert linalg.min_norm_residual(jnp.array([0.0, 1.0]), G) == 0
    assert linalg.min_norm_residual(jnp.array([0.1, 0.9]), G) == 1
    zeros = jnp.zeros((2, 2))
    assert linalg.min_norm_residual(u, zeros) == 0
    assert linalg.dual_cone_residual(u, u, zeros) == 0
    assert residuals.worst_case_residual(u, zeros, 2.0) == 0
    assert residuals.fairness_residual(0 * u, zeros, 1.0) == 0
    assert residuals.fairness_residual(u, zeros, 1.0) == 1
    assert residuals.cosine_residual(0 * u, zeros, jnp.ones(2)) == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_not_certified(bad):
    G = jnp.asarray(G_BASE, jnp.float32).at[0, 0].set(bad)
    w = jnp.array([0.6, 0.4])
    assert jnp.isnan(linalg.min_norm_residual(w, G))
    assert jnp.isnan(linalg.dual_cone_residual(w, w, G))
    assert jnp.isnan(linalg.simplex_residual(w, w.at[0].set(bad)))
    assert jnp.isnan(residuals.fairness_residual(w, G, 1.0))
    assert jnp.isnan(residuals.cosine_residual(w, G, jnp.ones(2)))
    assert jnp.isnan(residuals.worst_case_residual(w, G, 1.0))
    assert jnp.isnan(linalg.min_norm_residual(w.at[0].set(jnp.nan), jnp.eye(2)))


def test_solutions():
    G = jnp.asarray(G_BASE, jnp.float32)
    U = jnp.eye(2)[None] / 2
    solution = linalg.solve_dual_cone(U, G)
    np.testing.assert_array_equal(solution.x, linalg.project_onto_dual_cone(U, G))
    assert solution.residual.shape == (1, 2)
    assert (solution.residual < 1e-6).all()
    solution = linalg.solve_min_norm(G)
    np.testing.assert_array_equal(solution.x, linalg.min_norm_weights(G))
    assert solution.residual.shape == ()
    solution = linalg.solve_simplex(jnp.array([[3.0, 1.0], [0.2, 0.1]]))
    assert solution.residual.shape == (2,)
    assert (solution.residual < 1e-6).all()


def all_aggregators():
    by_label = {"a": jaxjd.upgrad(), "b": jaxjd.mgda()}
    return {
        **{name: jaxjd.weighted(make(), num_tasks=2) for name, make in SOLVERS.items()},
        "grouped": jaxjd.grouped(weightings.upgrad(), jaxjd.labels.by_tensor),
        "partition": jaxjd.partition(by_label, {"a": "a", "b": "b"}),
        "cr_mogm": jaxjd.weighted(weightings.cr_mogm(weightings.mgda()), num_tasks=2),
        "moco": jaxjd.moco(projection="simplex", num_tasks=2),
        "momentum_conflict_free": jaxjd.momentum_conflict_free(num_tasks=2),
    }


PARAMS = {"a": jnp.zeros(3), "b": jnp.zeros(2)}
JACOBIAN = {"a": jnp.asarray(J_BASE, jnp.float32), "b": jnp.eye(2)}


def primitives(aggregator) -> collections.Counter:
    state = aggregator.init(PARAMS)
    found = equations(lambda J: aggregator.update(J, state, PARAMS), JACOBIAN)
    return collections.Counter(equation.primitive.name for equation in found)


def test_an_update_does_not_trace_its_certificate(monkeypatch):
    def asked(*args):
        raise AssertionError("asked for the certificate")

    monkeypatch.setattr(residuals, "_known", asked)
    monkeypatch.setattr(_pcd, "_residual", asked)
    for aggregator in all_aggregators().values():
        state = aggregator.init(PARAMS)
        jax.eval_shape(lambda J: aggregator.update(J, state, PARAMS), JACOBIAN)  # noqa: B023
        asking = lambda J: diagnostics.solver_residual(aggregator, J, state)  # noqa: B023
        with pytest.raises(AssertionError, match="asked"):
            jax.eval_shape(asking, JACOBIAN)


def test_an_update_is_not_larger_for_its_certificate():
    def plain(G):
        return linalg.project_onto_dual_cone(jnp.full((2,), 0.5), G)

    def update(G):
        return weightings.dualproj().update(G, ())[0]

    assert len(list(equations(update, jnp.eye(2)))) <= len(list(equations(plain, jnp.eye(2))))


def test_monitored_solves_once():
    inside = primitives(diagnostics.monitored(jaxjd.mean(), num_tasks=2))
    min_norm = [e.primitive.name for e in equations(linalg.min_norm_weights, jnp.eye(2))].count(
        "while"
    )
    for name, aggregator in all_aggregators().items():
        whole = primitives(diagnostics.monitored(aggregator, num_tasks=2))
        alone = primitives(aggregator)
        # What proves that nothing better exists for CAGrad and PCD is a problem of its own.
        more = min_norm if name.startswith(("cagrad", "pcd")) else 0
        assert whole["while"] == alone["while"] + inside["while"] + more, name
        assert whole["eigh"] <= alone["eigh"] + inside["eigh"], name


def first_square(gramian):
    return gramian[0, 0]


@jaxjd.Certified
def unsolved(gramian, state, **extra_args):
    """Weights without a solver, whose residual is the first entry of the Gramian."""
    return gramian[0], state, jax.tree_util.Partial(first_square, gramian)


UNSOLVED = jaxjd.Weighting(weightings.mean().init, unsolved)


def test_wrappers_pass_the_certificate_on():
    def found(aggregator):
        return float(diagnostics.solver_residual(aggregator, JACOBIAN, aggregator.init(PARAMS)))

    one = jaxjd.weighted(UNSOLVED)
    labels = {"a": "a", "b": "b"}
    assert found(one) == 19
    assert found(jaxjd.weighted(weightings.cr_mogm(UNSOLVED), num_tasks=2)) == 19
    assert found(jaxjd.grouped(UNSOLVED, jaxjd.labels.by_tensor)) == 18
    assert found(jaxjd.partition({"a": jaxjd.mean(), "b": one}, labels)) == 1
    assert found(jaxjd.partition({"a": one, "b": one}, labels)) == 18
    assert found(jaxjd.mean()) == -1
    assert found(jaxjd.grouped(weightings.mean(), jaxjd.labels.by_tensor)) == -1
    assert found(optax.chain(one, optax.identity())) == -1  # Not jaxjd's to know.


@pytest.mark.slow
def test_monitored_keeps_the_residual():
    partition = jaxjd.partition(
        {"a": jaxjd.mean(), "b": diagnostics.monitored(jaxjd.weighted(UNSOLVED), num_tasks=2)},
        {"a": "a", "b": "b"},
    )
    monitored = diagnostics.monitored(partition, num_tasks=2)

    @jax.jit
    def step(J):
        state = monitored.init(PARAMS)
        _, after = monitored.update(J, state, PARAMS)
        slope = jax.grad(lambda J: jnp.sum(monitored.update(J, state, PARAMS)[0]["b"]))(J)
        return state, after, slope

    before, after, slope = step(JACOBIAN)
    assert before.solver_residual == 0
    found = diagnostics.summary(after)
    assert found["solver_residual"] == 1
    assert found["b/solver_residual"] == 1
    # The residual is nothing that derivatives pass through.
    assert jnp.isfinite(slope["b"]).all()


def test_what_has_no_certificate():
    G = jnp.asarray(G_BASE, jnp.float32)
    for weighting in (
        weightings.mean(),
        weightings.pcgrad(0),
        weightings.upgrad(projector=lambda U, G: U),  # Nobody knows what it solves.
    ):
        assert diagnostics.solver_residual(weighting, G, weighting.init(2)) == -1
    every = weightings.nash_mtl(update_weights_every=2)
    assert 0 <= diagnostics.solver_residual(every, G, every.init(2)) < 1e-5
    state = every.init(2)._replace(count=jnp.asarray(1), weights=jnp.ones(2))
    assert diagnostics.solver_residual(every, G, state) == -1  # The weights are those before.
    flat = weightings.flattening(weightings.mgda())
    assert 0 <= diagnostics.solver_residual(flat, G, flat.init((2,))) < 1e-6
