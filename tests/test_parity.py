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
from tests.goldens.methods import GOLDENS, HOPELESS, Golden, row_lengths

DTYPES = ["float32", "float64"]
EPS = float(np.finfo(np.float32).eps)
AVAILABLE = [golden for golden in GOLDENS if compare.public(golden)]


def goldens(*problems: str | None) -> list:
    chosen = [golden for golden in AVAILABLE if not problems or golden.problem in problems]
    return [pytest.param(golden, id=golden.name) for golden in chosen]


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("golden", goldens())
def test_oracle(golden: Golden, dtype: str):
    failures, known = [], 0
    for case, error in compare.errors(golden, dtype):
        bound = case.bound(dtype)
        known += bound < HOPELESS
        if not (error <= bound or bound >= HOPELESS):
            failures.append(f"{case.name}: {error:.1e}, allowed {bound:.1e}")
    assert known
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("golden", goldens("projection", "min-norm"))
def test_optimality(golden: Golden, dtype: str):
    found = compare.ours(golden, dtype)
    failures = []
    for case in compare.cases(golden):
        residual = compare.residual(golden, case, found[case.name])
        if not residual <= {"float32": 1e-5, "float64": 1e-9}[dtype]:
            failures.append(f"{case.name}: {residual:.1e}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("golden", goldens("fair"))
def test_fairness(golden: Golden):
    found = compare.ours(golden, "float32")
    failures = []
    for case in compare.cases(golden):
        if not case.exists:
            continue
        J, weights = case.jacobians[0], found[case.name][0]
        if golden.values(len(J)).get("max_norm"):
            assert np.linalg.norm(weights @ J) <= 1 + 1e-5
            continue
        residual = compare.residual(golden, case, found[case.name])
        # Rounding the weights to float32 already moves the products G x by as much.
        x = np.float32(case.wanted[0]).astype(np.float64)
        products = np.abs(J @ J.T) @ x
        representable = EPS * np.max(products / (J @ (J.T @ case.wanted[0])))
        if not residual <= max(1e-5, representable):
            failures.append(f"{case.name}: {residual:.1e}, representable {representable:.1e}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("golden", goldens("cagrad"))
def test_objective_of_cagrad(golden: Golden):
    c = golden.hyper["c"]
    column = [other.hyper["c"] for other in GOLDENS if other.method == "cagrad"].index(c)
    found = compare.ours(golden, "float32")
    failures = []
    for case, optima in zip(compare.cases(golden), compare.load()["clarabel"], strict=True):
        J = case.jacobians[0]
        lengths, weights = row_lengths(J), found[case.name][0]
        d, mean = weights @ J, np.mean(J, axis=0)
        radius = c * np.linalg.norm(mean)
        outside = np.linalg.norm(d - mean) - radius
        # By how much a row is improved less than the optimum, in units of the row.
        short = np.max((optima[column] - J @ d)[lengths > 0] / lengths[lengths > 0], initial=0)
        # Weights of float32 cannot place d closer than this.
        representable = EPS * np.abs(weights) @ lengths
        allowed = max(1e-6 * (1 + c) * np.linalg.norm(mean), representable)
        if not max(outside, short) <= allowed:
            failures.append(f"{case.name}: {outside:.1e}, {short:.1e}, allowed {allowed:.1e}")
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
