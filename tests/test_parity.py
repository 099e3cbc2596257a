"""Every method against its oracle: TorchJD 0.18.0 where it is exact, the exact solution elsewhere.

The oracles' numbers are in tests/goldens/parity.npz, written by tests/goldens/make.py. What counts
as an error, and how much of it the conditioning permits, is in tests/goldens/methods.py; the
results are in the table of docs/parity.md.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxjd import weightings
from tests.goldens import compare
from tests.goldens.methods import GOLDENS, HOPELESS, SAFETY, Golden, row_lengths

DTYPES = ["float32", "float64"]
EPS = float(np.finfo(np.float32).eps)
AVAILABLE = [golden for golden in GOLDENS if compare.public(golden)]


def quick_tasks(golden: Golden) -> tuple[int, ...]:
    """What is looked at by default: 3 tasks, or 5 where the golden has none of 3."""
    has_three = any(golden.applies(J) for J in compare.jacobians().values() if len(J) == 3)
    return (3,) if has_three or golden.kind == "sequence" else (5,)


def goldens(*problems: str | None) -> pytest.MarkDecorator:
    """The goldens of these problems, with the numbers of tasks that they are looked at with."""
    params = []
    for golden in AVAILABLE:
        if not problems or golden.problem in problems:
            quick = quick_tasks(golden)
            rest = tuple(m for m in compare.TASKS if m not in quick)
            params.append(pytest.param(golden, quick, id=golden.name))
            slow = pytest.param(golden, rest, id=f"{golden.name}, rest", marks=pytest.mark.slow)
            params.append(slow)
    return pytest.mark.parametrize(("golden", "tasks"), params)


def test_goldens_cover_what_they_should():
    matrices = compare.jacobians()
    shapes = [J.shape for J in matrices.values()]
    assert len(matrices) >= 40
    assert min(shapes) == (1, 1)
    assert max(shapes) == (64, 200)
    families = set(compare.load()["families"])
    assert {"regular", "singular", "strong", "weak", "free", "badly scaled", "scale"} <= families
    largest = [np.max(np.abs(J)) for J in matrices.values() if J.any()]
    assert min(largest) < 2e-8
    assert max(largest) > 1e8
    for golden in GOLDENS:
        if golden.kind == "sequence":
            assert all(len(case.jacobians) >= 6 for case in compare.cases(golden))


def in_both_dtypes() -> list:
    """All goldens in both dtypes. By default in the one whose programs other tests need as well."""
    params = []
    for golden in AVAILABLE:
        quick = quick_tasks(golden)
        rest = tuple(m for m in compare.TASKS if m not in quick)
        for dtype in DTYPES:
            wanted = {"projection": DTYPES, "min-norm": DTYPES, "fair": ["float32"]}
            wanted["cagrad"] = ["float32"]
            marks = () if dtype in wanted.get(golden.problem, ["float64"]) else pytest.mark.slow
            name = f"{golden.name}-{dtype}"
            params.append(pytest.param(golden, quick, dtype, id=name, marks=marks))
            name = f"{golden.name}, rest-{dtype}"
            params.append(pytest.param(golden, rest, dtype, id=name, marks=pytest.mark.slow))
    return params


@pytest.mark.parametrize(("golden", "tasks", "dtype"), in_both_dtypes())
def test_oracle(golden: Golden, tasks: tuple[int, ...], dtype: str):
    failures, known = [], 0
    for case, error in compare.errors(golden, dtype, tasks):
        bound = case.bound(golden, dtype)
        known += bound < HOPELESS
        if not (error <= bound or bound >= HOPELESS):
            failures.append(f"{case.name}: {error:.1e}, allowed {bound:.1e}")
    assert known
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("dtype", DTYPES)
@goldens("projection", "min-norm")
def test_optimality(golden: Golden, tasks: tuple[int, ...], dtype: str):
    found = compare.ours(golden, dtype, tasks)
    failures = []
    for case in compare.cases(golden, tasks):
        residual = compare.residual(golden, case, found[case.name])
        if not residual <= {"float32": 1e-5, "float64": 1e-9}[dtype]:
            failures.append(f"{case.name}: {residual:.1e}")
    assert not failures, "\n".join(failures)


@goldens("fair")
def test_fairness(golden: Golden, tasks: tuple[int, ...]):
    found = compare.ours(golden, "float32", tasks)
    failures = []
    for case in compare.cases(golden, tasks):
        if not case.exists:
            continue
        J, weights = case.jacobians[0], found[case.name][0]
        if golden.values(len(J)).get("max_norm"):
            # The norm is known from a Gramian: rounding its entries moves w^T G w by as much.
            slack = max(1e-5, EPS * (np.abs(weights) @ row_lengths(J)) ** 2)
            if not np.linalg.norm(weights @ J) <= 1 + slack:
                failures.append(f"{case.name}: {np.linalg.norm(weights @ J):.7f}")
            continue
        residual = compare.residual(golden, case, found[case.name])
        # Rounding the weights to float32 already moves the products G x by as much.
        wanted = case.wanted[0]
        products = J @ (J.T @ wanted)
        representable = EPS * np.max((np.abs(J @ J.T) @ wanted) / products)
        allowed = max(1e-5 if golden.method == "nash_mtl" else 2e-5, SAFETY * representable)
        if not (residual <= allowed or allowed >= HOPELESS):
            failures.append(f"{case.name}: {residual:.1e}, representable {representable:.1e}")
    assert not failures, "\n".join(failures)


@goldens("fair")
def test_fairness_without_a_solution(golden: Golden, tasks: tuple[int, ...]):
    families = dict(zip(compare.load()["names"], compare.load()["families"], strict=True))
    found = compare.ours(golden, "float32", tasks)
    failures = []
    for case in compare.cases(golden, tasks):
        if case.exists:
            continue
        J, weights = case.jacobians[0], found[case.name][0]
        assert np.isfinite(weights).all(), case.name
        # The update is a sum that cancels.
        relative = np.linalg.norm(weights @ J) / (np.abs(weights) @ row_lengths(J) or 1)
        if families[case.name] == "strong" and not relative <= 1e-3:
            failures.append(f"{case.name}: {relative:.1e}")
    assert not failures, "\n".join(failures)


@goldens("cagrad")
def test_objective_of_cagrad(golden: Golden, tasks: tuple[int, ...]):
    c = golden.hyper["c"]
    column = [other.hyper["c"] for other in GOLDENS if other.method == "cagrad"].index(c)
    found = compare.ours(golden, "float32", tasks)
    optima, stationary = compare.load()["clarabel"][:, column], compare.load()["stationary"]
    families = dict(zip(compare.load()["names"], compare.load()["families"], strict=True))
    failures = []
    for case, optimum, is_stationary in zip(compare.cases(golden), optima, stationary, strict=True):
        if case.num_tasks not in tasks or families[case.name] == "nearly singular":
            # Its Gramian rounds to that of opposite rows, whose optimum for c >= 1 is another one.
            continue
        J, weights = case.jacobians[0], found[case.name][0]
        lengths, mean = row_lengths(J), np.mean(J, axis=0)
        radius = c * np.linalg.norm(mean)
        push = np.maximum(weights - 1 / len(J), 0)
        d = weights @ J
        summands = np.abs(weights) @ lengths
        outside = (np.linalg.norm(d - mean) - radius) / (summands or 1)
        if radius == 0 or (is_stationary and optimum >= -1e-9 * radius * np.max(lengths)):
            # Not all tasks can be improved: d is in the ball and worsens none.
            slack = (J @ d)[lengths > 0] / lengths[lengths > 0] / (summands or 1)
            worst = 0 if radius == 0 else -np.min(slack, initial=0)
            good = max(outside, worst) <= 1e-5
        else:
            # The problem over the simplex, whose minimum is the best worst improvement.
            simplex = push / np.sum(push)
            direction = simplex @ J
            objective = mean @ direction + radius * np.linalg.norm(direction)
            size = np.linalg.norm(mean) * (simplex @ lengths)
            worst = (objective - optimum) / (size if size > 0 else np.max(lengths) ** 2)
            # The weights are rounded with 1 / m added to the point of the simplex.
            allowed = max(1e-6, EPS * summands / (push @ lengths))
            good = abs(outside) <= 1e-5 and abs(worst) <= allowed
        if not good:
            failures.append(f"{case.name}: outside {outside:.1e}, short by {worst:.1e}")
    assert not failures, "\n".join(failures)


def test_random_has_the_distribution_of_the_original():
    draws = 20_000
    levels, quantiles = (compare.load()[f"random/{name}"] for name in ("levels", "quantiles"))
    weighting = weightings.random(key=1)

    @jax.jit
    def draw():
        def step(state, _):
            weights, state = weighting.update(jax.numpy.eye(3), state)
            return state, weights

        return jax.lax.scan(step, weighting.init(3), length=draws)[1]

    weights = np.asarray(draw())
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-6)
    for task in range(3):
        shares = [np.mean(weights[:, task] <= quantile) for quantile in quantiles]
        # Five standard deviations of a share, and of the quantile's own 200,000 draws.
        deviations = np.sqrt(levels * (1 - levels) * (1 / draws + 1 / 200_000))
        np.testing.assert_array_less(np.abs(shares - levels), 5 * deviations)
