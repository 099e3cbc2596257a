"""Writes tests/goldens/cagrad.npz: CAGrad's optima on the hard Jacobians of `families`.

    python -m tests.goldens.make_cagrad     # needs clarabel, cvxpy, mpmath, quadprog and scipy

Clarabel solves the cone program in float64. Newton's method on the worst improvement, started from
its optimum, adds the digits that it leaves open, in extended precision, and the optimality
conditions of the result are checked there: `d` is ``g_0`` plus a nonnegative combination of the
rows whose improvement is the smallest, and as long as the ball permits. No case is dropped: one
that fails a check stops the script.
"""

from __future__ import annotations

import pathlib

import cvxpy as cp
import numpy as np
import scipy.optimize

from tests.goldens import families, oracles

PATH = pathlib.Path(__file__).parent / "cagrad.npz"
WIDE = oracles.WIDE
STEP = 1e-9
PROBES = 3


def clarabel(rows: oracles.Rows, c: float) -> float:
    """The largest worst improvement, in units of the longest row's square."""
    lengths = (rows.lengths / np.max(rows.lengths)).astype(np.float64)
    short = rows.short * lengths[:, None]
    mean = np.mean(short, axis=0)
    size = np.linalg.norm(mean)
    unit = np.min(lengths[rows.nonzero])
    if c == 0 or size == 0:
        return float(np.min(short @ mean))
    d, worst = cp.Variable(short.shape[1]), cp.Variable()
    bounds = worst * np.where(rows.nonzero, unit / np.where(rows.nonzero, lengths, 1), 0)
    constraints = [rows.short @ d >= bounds, cp.norm(d - mean / size) <= c]
    if not rows.nonzero.all():
        constraints.append(worst <= 0)
    problem = cp.Problem(cp.Maximize(worst), constraints)
    problem.solve(cp.CLARABEL, tol_gap_abs=1e-13, tol_gap_rel=1e-13, tol_feas=1e-13)
    return float(problem.value) * size * unit


def hull_distance(rows: oracles.Rows) -> float:
    """The distance of the hull of the unit rows from zero; 0 where a row is zero."""
    if not rows.nonzero.all():
        return 0.0
    units = rows.units.astype(np.float64)
    system = np.vstack([units.T, np.ones(len(units))])
    weights, _ = scipy.optimize.nnls(system, np.append(np.zeros(units.shape[1]), 1.0))
    return float(np.linalg.norm(weights @ rows.units) / np.sum(weights))


def optimum(
    rows: oracles.Rows, c: float, stationary: bool, start: float
) -> tuple[np.ndarray, np.floating]:
    """The coefficients `x` of ``d - g_0`` in the unit rows, and the worst improvement.

    Any nonnegative `x` bounds the optimum from above, by ``(<g_0, e> + r |e|) / <x, 1 / |g|>`` with
    ``e = U^T x``. The closest point to ``g_0`` for that bound gives a lower one, until it is met.
    """
    mean = rows.lengths / len(rows.lengths)
    products = rows.cosines @ mean
    radius = WIDE(c) * np.sqrt(max(mean @ products, WIDE(0)))
    nothing = np.zeros(len(mean), WIDE)
    if radius == 0:
        return nothing, np.min(products * rows.lengths)
    x = oracles.closest(rows, mean, nothing)
    within = np.sqrt(x @ rows.cosines @ x) <= radius * (1 + WIDE(1e-15))
    if stationary and within:
        return x, WIDE(0)
    # The largest that one row alone permits.
    tops = np.where(rows.nonzero, (products + radius) * rows.lengths, WIDE(np.inf))
    worst = min(np.min(tops), WIDE(start) + 1e-6 * radius * np.max(rows.lengths))
    if not within:
        worst = min(worst, WIDE(0))
    for _ in range(200):
        x = oracles.closest(rows, mean, worst * rows.inverse)
        assert x is not None
        length = np.sqrt(max(x @ rows.cosines @ x, WIDE(0)))
        push = x @ rows.inverse
        bound = (products @ x + radius * length) / push
        done = abs(length - radius) <= WIDE(1e-16) * radius or bound >= worst
        worst = min(worst, bound)
        if done:
            break
    return x, worst


def residual(rows: oracles.Rows, c: float, x: np.ndarray, worst: np.floating) -> float:
    """How far the optimality conditions are from met, relative to the ball and the terms."""
    mean = rows.lengths / len(rows.lengths)
    radius = c * np.sqrt(max(mean @ rows.cosines @ mean, WIDE(0)))
    slack = rows.cosines @ (mean + x) - worst * rows.inverse
    slack = slack[rows.nonzero]
    active = np.append(np.abs(slack[x[rows.nonzero] > 0]), 0)
    miss = np.sqrt(max(x @ rows.cosines @ x, WIDE(0))) - radius
    miss = max(miss, 0) if worst == 0 else abs(miss)
    size = np.sum(mean + x) + worst * np.max(rows.inverse)
    return float(max(-np.min(slack), np.max(active), miss) / size) if size > 0 else 0.0


def perturbed(rows: oracles.Rows, rng: np.random.Generator) -> oracles.Rows:
    """Rows of the same lengths whose cosines differ by up to `STEP`.

    Where that leaves no cosines of rows, as for a singular `C`, a multiple of the identity does.
    """
    m = len(rows.lengths)
    noise = np.triu(rng.uniform(-1, 1, (m, m)), 1)
    moved = (rows.cosines + STEP * (noise + noise.T)).astype(np.float64)
    moved[~rows.nonzero] = moved[:, ~rows.nonzero] = 0
    values, vectors = np.linalg.eigh(moved + np.diag(1.0 - np.diag(moved)))
    values += max(0, 2 * STEP - values[0])
    factor = (vectors * np.sqrt(values)) @ vectors.T
    return oracles.Rows(np.asarray(factor, WIDE) * rows.lengths[:, None])


def main() -> None:
    cases = families.hard()
    rng = np.random.default_rng(15)
    output: dict[str, list] = {"c": [], "worst": [], "update": [], "hull": [], "change": []}
    largest = 0.0
    for k, (J, traits) in enumerate(cases):
        c = families.RADII[k // len(families.ROWS) % len(families.RADII)]
        rows = oracles.Rows(J)
        m, longest = len(J), np.max(rows.lengths, initial=0) or WIDE(1)
        assert rows.nonzero.any()
        hull = hull_distance(rows)
        assert hull < 1e-14 or hull > 1e-5, (k, hull)
        stationary = hull < 1e-14
        start = clarabel(rows, c)
        x, worst = optimum(rows, c, stationary, start * longest**2)
        size = longest * np.linalg.norm(np.mean(J, axis=0)) or WIDE(1)
        assert abs(worst - start * longest**2) <= 1e-8 * size, (k, traits, worst, start)
        kkt = residual(rows, c, x, worst)
        assert kkt <= 1e-14, (k, traits, kkt)
        largest = max(largest, kkt)
        weights = WIDE(1) / m + x * rows.inverse
        update = (weights @ J.astype(WIDE)).astype(np.float64)
        changes = []
        for _ in range(PROBES):
            other, _ = optimum(perturbed(rows, rng), c, stationary, float(worst))
            change = ((other - x) * rows.inverse) @ J.astype(WIDE)
            changes.append(float(np.linalg.norm(change.astype(np.float64))))
        output["c"].append(c)
        output["worst"].append(float(worst))
        output["update"].append(np.pad(update, (0, families.WIDTH - len(update))))
        output["hull"].append(hull)
        output["change"].append(max(changes) / STEP)
    np.savez_compressed(PATH, **{key: np.array(value) for key, value in output.items()})
    hulls = np.array(output["hull"])
    print(f"{len(cases)} cases, {np.sum(hulls < 1e-14)} stationary, largest residual {largest:.1e}")
    print(f"smallest other hull {np.min(hulls[hulls > 1e-14]):.1e}")
    print(f"{PATH}: {PATH.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
