"""Exact weights, in float64 or better. Every function takes a Jacobian of plain rows.

The inner problems are solved in the space of the gradients, where the Hessian is the identity:
quadprog needs no regularization there, however singular the Gramian is. It tells which constraints
hold with equality; the solution on those is computed once more in extended precision, and its
optimality conditions are checked. Nothing here shares code with jaxjd.
"""

from __future__ import annotations

import mpmath
import numpy as np
import quadprog
import scipy.optimize

WIDE = np.longdouble


class Rows:
    """The unit rows of a Jacobian, their lengths, and their cosines in extended precision."""

    def __init__(self, J: np.ndarray):
        J = np.asarray(J, WIDE)
        largest = np.max(np.abs(J), axis=1)
        scaled = J / np.where(largest > 0, largest, 1)[:, None]
        self.lengths = largest * np.sqrt(np.sum(scaled * scaled, axis=1))
        self.nonzero = self.lengths > 0
        self.inverse = np.where(self.nonzero, 1 / np.where(self.nonzero, self.lengths, 1), 0)
        self.units = J * self.inverse[:, None]
        self.cosines = self.units @ self.units.T
        # The same rows in as few coordinates as they span.
        units = self.units.astype(np.float64)
        self.short = np.linalg.qr(units.T, mode="r").T if J.shape[1] > J.shape[0] else units


def solve_wide(A: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Solves a positive definite system in extended precision."""
    k = len(A)
    A, b = np.array(A, WIDE), np.array(b, WIDE)
    for i in range(k):
        factors = A[i + 1 :, i] / A[i, i]
        A[i + 1 :] -= factors[:, None] * A[i]
        b[i + 1 :] -= factors * b[i]
    x = np.zeros(k, WIDE)
    for i in reversed(range(k)):
        x[i] = (b[i] - A[i, i + 1 :] @ x[i + 1 :]) / A[i, i]
    return x


def closest(
    rows: Rows, coefficients: np.ndarray, bounds: np.ndarray, constrained: np.ndarray | bool = True
) -> np.ndarray | None:
    """Solves ``min |d - a|^2`` subject to ``<u_i, d> >= bounds_i`` for the unit rows ``u_i``.

    `a` is the combination of unit rows with the given coefficients; `constrained` may leave rows
    out. Returns ``x >= 0`` with
    ``d = a + sum_i x_i u_i``, with as few non-zeros as possible, or None if there is no such `d`.
    """
    kept = np.flatnonzero(rows.nonzero & constrained)
    if np.any(bounds[~rows.nonzero] > 0):
        return None
    x = np.zeros(len(coefficients), WIDE)
    if not len(kept):
        return x
    short = rows.short[kept]
    a = (rows.short.T @ coefficients.astype(np.float64)).astype(np.float64)
    scale = max(np.max(np.abs(a)), np.max(np.abs(bounds[kept])).astype(np.float64), 1e-300)
    try:
        *_, active = quadprog.solve_qp(
            np.eye(short.shape[1]),
            a / scale,
            np.ascontiguousarray(short.T),
            (bounds[kept] / scale).astype(np.float64),
        )
        active = kept[active[active > 0] - 1]
    except ValueError:
        if np.any(bounds > 0):
            return None
        # Never infeasible, but quadprog gives up where rounding makes it look so: as a problem of
        # non-negative least squares instead.
        assert not np.any(bounds), "not reached for homogeneous constraints"
        active = kept[scipy.optimize.nnls(short.T, -a / scale, maxiter=10000)[0] > 0]
    linear = rows.cosines @ coefficients - bounds
    size = np.max(np.abs(coefficients)) + np.max(np.abs(bounds))
    return _active_set(rows.cosines, linear, kept, _independent(rows.cosines, active), size)


def _independent(cosines: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Leaves out the unit rows that depend linearly on those before."""
    rest = np.array(cosines, WIDE)
    kept = []
    for i in chosen:
        if rest[i, i] > 1e-15:
            kept.append(i)
            rest -= np.outer(rest[:, i], rest[i]) / rest[i, i]
    return np.array(kept, int)


def _active_set(
    cosines: np.ndarray,
    linear: np.ndarray,
    allowed: np.ndarray,
    active: np.ndarray,
    size: np.floating,
) -> np.ndarray:
    """Solves ``min x^T C x / 2 + q^T x`` over ``x >= 0`` in extended precision.

    Lawson and Hanson's method from a guess of the support: the objective falls at every step.
    """
    x = np.zeros(len(linear), WIDE)
    support = np.isin(np.arange(len(linear)), active)
    for _ in range(10 * len(allowed) + 10):
        while support.any():
            solution = np.zeros_like(x)
            solution[support] = solve_wide(cosines[np.ix_(support, support)], -linear[support])
            negative = support & (solution <= 0)
            if not negative.any():
                x = solution
                break
            steps = np.where(negative, x / np.where(negative, x - solution, 1), 1)
            # Of a wrong guess (x = 0), the worst goes first.
            length = np.min(steps)
            x = np.where(support, x + length * (solution - x), 0)
            gone = negative & (steps <= length)
            if not x.any():
                gone = np.arange(len(x)) == np.argmin(solution)
            x[gone] = 0
            support &= ~gone
        else:
            x = np.zeros_like(x)
        slack = (cosines @ x + linear)[allowed]
        if np.min(slack) >= -1e-15 * (size + np.max(np.abs(x))):
            return x
        support[allowed[np.argmin(slack)]] = True
    raise AssertionError("no active set found")


def project(J: np.ndarray, u: np.ndarray) -> np.ndarray:
    """The weights of the projection of ``J^T u`` onto the dual cone."""
    rows = Rows(J)
    return _project(rows, np.asarray(u, WIDE))


def _project(rows: Rows, u: np.ndarray) -> np.ndarray:
    x = closest(rows, u * rows.lengths, np.zeros(len(u), WIDE))
    assert x is not None
    return u + x * rows.inverse


def upgrad(J: np.ndarray, pref_vector: np.ndarray) -> np.ndarray:
    rows = Rows(J)
    U = np.diag(np.asarray(pref_vector, WIDE))
    return sum(_project(rows, u) for u in U)


def dualproj(J: np.ndarray, pref_vector: np.ndarray) -> np.ndarray:
    return project(J, pref_vector)


def stationary(J: np.ndarray) -> bool:
    """Whether a convex combination of the rows is zero (to rounding)."""
    rows = Rows(J)
    if not rows.nonzero.all():
        return True
    system = np.vstack([rows.short.T, np.ones(len(J))])
    target = np.append(np.zeros(rows.short.shape[1]), 1.0)
    _, distance = scipy.optimize.nnls(system, target, maxiter=10000)
    assert distance < 1e-12 or distance > 1e-6, distance
    return bool(distance < 1e-12)


def mgda(J: np.ndarray) -> np.ndarray:
    """The weights of the point of smallest norm in the convex hull; zeros where it is zero."""
    rows = Rows(J)
    if not rows.nonzero.all():
        return np.zeros(len(J), WIDE)
    bounds = np.min(rows.lengths) * rows.inverse
    x = closest(rows, np.zeros(len(J), WIDE), bounds)
    if x is None or np.sqrt(x @ rows.cosines @ x) > 1e11:
        return np.zeros(len(J), WIDE)
    z = x * rows.inverse
    return z / np.sum(z)


def cagrad(J: np.ndarray, c: float) -> np.ndarray:
    """The weights of CAGrad; of the projection of the mean where no task can be improved."""
    rows = Rows(J)
    m = len(J)
    mean = rows.lengths / m
    products = rows.cosines @ mean
    radius = WIDE(c) * np.sqrt(max(mean @ products, WIDE(0)))
    weights = np.full(m, WIDE(1) / m)
    if radius == 0:
        return weights

    def nearest(t):
        # The bounds are t / |g_i|; a zero row is improved by zero.
        bounds = t * rows.inverse
        return None if t > 0 and not rows.nonzero.all() else closest(rows, mean, bounds)

    def distance(x):
        return np.sqrt(x @ rows.cosines @ x)

    lengths = rows.lengths[rows.nonzero]
    low = np.min((products * rows.lengths)[rows.nonzero])
    low = low if rows.nonzero.all() else min(low, WIDE(0))
    high = np.min((products * rows.lengths)[rows.nonzero] + radius * lengths)
    # Bisection until the constraints that hold with equality stay the same, then in closed form.
    x = nearest(WIDE(0))
    if distance(x) <= radius * (1 + 1e-12):
        low = max(low, WIDE(0))
        if nearest(high * 1e-9) is None:  # Stationary: nothing is better than zero.
            return weights + x * rows.inverse
    else:
        high = min(high, WIDE(0))
    best = nearest(low)
    for _ in range(60):
        t = (low + high) / 2
        x = nearest(t)
        if x is not None and distance(x) <= radius:
            low, best = t, x
        else:
            high = t
    active = np.flatnonzero(best > 0)
    if not len(active):
        return weights
    p = solve_wide(rows.cosines[np.ix_(active, active)], rows.inverse[active])
    q = solve_wide(rows.cosines[np.ix_(active, active)], products[active])
    # |U^T (t p - q)| = radius, for the larger t.
    pp = p @ rows.inverse[active]
    pq, qq = p @ products[active], q @ products[active]
    root = pq * pq - pp * (qq - radius**2)
    polished = best.copy()
    if root >= 0:
        polished[:] = 0
        polished[active] = (pq + np.sqrt(root)) / pp * p - q
    scale = radius + np.max(np.abs(best))
    if root < 0 or np.min(polished) < 0 or np.max(np.abs(polished - best)) > 1e-7 * scale:
        polished = best
    return weights + polished * rows.inverse


def fairgrad(J: np.ndarray, alpha: float) -> np.ndarray:
    """The positive solution of ``G x = x^(-1 / alpha)``, to a residual below 1e-12."""
    rows = Rows(J)
    power = 1 / WIDE(alpha)
    # In units of the rows, z_i = |g_i| x_i: C z = |g_i|^(1/alpha - 1) z^(-1/alpha).
    log_scale = (power - 1) * np.log(rows.lengths)
    y = log_scale / (1 + power)
    shift = np.mean(y)
    log_scale, y = log_scale - (1 + power) * shift, y - shift

    def residual(y):
        # z_i (C z)_i / (|g_i|^(1/alpha - 1) z_i^(1 - 1/alpha)) - 1, the gradient of a convex
        # function of log z divided by a positive diagonal.
        z = np.exp(y)
        return (rows.cosines @ z) * np.exp(power * y - log_scale) - 1

    def objective(y):
        z = np.exp(y)
        quadratic = z @ rows.cosines @ z / 2
        if power == 1:
            return quadratic - np.sum(y)
        return quadratic - np.sum(np.exp(log_scale + (1 - power) * y)) / (1 - power)

    for _ in range(400):
        z = np.exp(y)
        right = np.exp(log_scale + (1 - power) * y)
        gradient = z * (rows.cosines @ z) - right
        # In z the function is convex; its Newton step, taken in log z where it would leave z > 0.
        hessian = rows.cosines * z[:, None] * z[None, :] + np.diag(power * right)
        step = -solve_wide(hessian, gradient)
        length = WIDE(1)
        length = min(length, 1 / np.max(np.abs(step), initial=1e-300))
        slope = gradient @ step
        value = objective(y)
        while True:
            trial = z * (1 + length * step) if np.all(1 + length * step > 0) else None
            if trial is not None:
                new = np.log(trial)
                allowed = 1e-4 * length * slope + 1e-16 * abs(value)
                if objective(new) <= value + allowed or length < 1e-4:
                    break
            length /= 2
        y = new
        if np.max(np.abs(residual(y))) < 1e-16:
            break
    y = y + shift
    if np.max(np.abs(residual(y - shift))) > 1e-13:
        y = _fairgrad_digits(J, alpha, y - np.log(rows.lengths)) + np.log(rows.lengths)
    return np.exp(y) * rows.inverse


def _fairgrad_digits(J: np.ndarray, alpha: float, start: np.ndarray) -> np.ndarray:
    """The logarithm of FairGrad's weights, the same way with 60 digits."""
    with mpmath.workdps(60):
        J = mpmath.matrix(np.asarray(J, np.float64).tolist())
        G = J * J.T
        m, power = G.rows, 1 / mpmath.mpf(float(alpha))
        x = mpmath.matrix([mpmath.exp(float(value)) for value in start])

        def objective(x):
            value = (x.T * G * x)[0] / 2
            if power == 1:
                return value - mpmath.fsum(mpmath.log(entry) for entry in x)
            return value - mpmath.fsum(entry ** (1 - power) for entry in x) / (1 - power)

        for _ in range(300):
            product = G * x
            right = [entry ** (1 - power) for entry in x]
            gradient = mpmath.matrix([x[i] * product[i] - right[i] for i in range(m)])
            if max(abs(gradient[i] / right[i]) for i in range(m)) < mpmath.mpf(10) ** -25:
                return np.array([WIDE(mpmath.nstr(mpmath.log(entry), 25)) for entry in x])
            hessian = mpmath.matrix(m, m)
            for i in range(m):
                for j in range(m):
                    hessian[i, j] = G[i, j] * x[i] * x[j] + (power * right[i] if i == j else 0)
            step = mpmath.lu_solve(hessian, -gradient)
            slope = (gradient.T * step)[0]
            value = objective(x)
            length = min(mpmath.mpf(1), mpmath.mpf("0.95") / max(abs(entry) for entry in step))
            while True:
                trial = mpmath.matrix([x[i] * (1 + length * step[i]) for i in range(m)])
                allowed = slope * length / 10000 + abs(value) * mpmath.mpf(10) ** -50
                if objective(trial) <= value + allowed:
                    break
                length /= 2
            x = trial
    raise AssertionError("Newton's method with 60 digits does not converge")


def pcd_direction(J: np.ndarray, scales: np.ndarray, tau: np.ndarray) -> np.ndarray:
    """PCD's weights for given scales of the rows; the first row is the primary objective."""
    rows = Rows(J)
    if not rows.nonzero[0]:
        return np.zeros(len(J), WIDE)
    scaled = rows.lengths * scales
    first = np.zeros(len(J), WIDE)
    first[0] = scaled[0]
    # A zero row asks for zero, and the primary row for nothing.
    bounds = np.where(rows.nonzero, np.append(WIDE(0), tau * scaled[1:]), 0)
    constrained = np.arange(len(J)) > 0
    x = closest(rows, first, bounds, constrained)
    if x is None:
        weights = np.zeros(len(J), WIDE)
        weights[0] = 1
        return weights
    combined = first + x
    square = combined @ rows.cosines @ combined
    if square <= 1e-28 * np.sum(np.abs(combined)) ** 2:
        return np.zeros(len(J), WIDE)
    return combined * rows.inverse * rows.lengths[0] / np.sqrt(square)


def pcd(sequence: np.ndarray, tau: np.ndarray, beta: float, eps: float) -> np.ndarray:
    """PCD's weights call by call, with `eps` relative to the mean of the averages."""
    average = np.zeros(sequence.shape[1], WIDE)
    outputs = []
    for k, J in enumerate(sequence):
        squares = Rows(J).lengths ** 2
        average = beta * average + (1 - WIDE(beta)) * squares
        corrected = average / (1 - WIDE(beta) ** (k + 1))
        root = np.sqrt(corrected + eps * np.mean(corrected))
        scales = np.where(root > 0, 1 / np.where(root > 0, root, 1), 0)
        outputs.append(pcd_direction(J, scales, np.asarray(tau, WIDE)))
    return np.stack(outputs)


def nash_mtl(sequence: np.ndarray, max_norm: float, every: int) -> np.ndarray:
    """Nash-MTL's weights call by call: solved anew every few calls, clipped at every call."""
    outputs = []
    for k, J in enumerate(sequence):
        if k % every == 0:
            weights = fairgrad(J, 1.0)
        norm = np.sqrt(np.sum((np.asarray(J, WIDE).T @ weights) ** 2))
        clip = max_norm / norm if 0 < max_norm < norm else WIDE(1)
        outputs.append(weights * clip)
    return np.stack(outputs)


def _pseudo_inverse(C: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(C.astype(np.float64))
    kept = values > values[-1] * len(C) * np.finfo(np.float64).eps
    inverse = np.where(kept, 1 / np.where(kept, values, 1), 0)
    return vectors * inverse @ vectors.T


def _refined(C: np.ndarray, b: np.ndarray) -> np.ndarray:
    """``C^+ b``, refined in extended precision where `C` is regular."""
    inverse = _pseudo_inverse(C)
    x = (inverse @ b.astype(np.float64)).astype(WIDE)
    if np.linalg.matrix_rank(C.astype(np.float64), hermitian=True) == len(C):
        for _ in range(3):
            x = x + inverse @ (b - C @ x).astype(np.float64)
    return x


def imtl_g(J: np.ndarray) -> np.ndarray:
    rows = Rows(J)
    if not rows.nonzero.any():
        return np.zeros(len(J), WIDE)
    kept = np.ix_(rows.nonzero, rows.nonzero)
    v = np.zeros(len(J), WIDE)
    v[rows.nonzero] = _refined(rows.cosines[kept], np.ones(kept[0].size, WIDE))
    v = v * rows.inverse * np.min(rows.lengths[rows.nonzero])
    total = np.sum(v)
    if abs(total) <= 1e-12 * np.sum(np.abs(v)):
        return np.zeros(len(J), WIDE)
    return v / total


def conflict_free(J: np.ndarray, pref_vector: np.ndarray) -> np.ndarray:
    """ConFIG's weights: ``d = U^+ p`` with unit rows `U`, scaled to the sum of the projections."""
    rows = Rows(J)
    p = np.where(rows.nonzero, np.asarray(pref_vector, WIDE), 0)
    kept = np.ix_(rows.nonzero, rows.nonzero)
    x = np.zeros(len(J), WIDE)
    if not rows.nonzero.any():
        return x
    x[rows.nonzero] = _refined(rows.cosines[kept], p[rows.nonzero])
    square = x @ rows.cosines @ x
    if square <= 1e-26 * np.sum(np.abs(x)) ** 2:
        return np.zeros(len(J), WIDE)
    products = rows.cosines @ x
    return x * rows.inverse * (rows.lengths @ products) / square


def gradvac(sequence: np.ndarray, orders: np.ndarray, beta: float, eps: float) -> np.ndarray:
    """GradVac's weights call by call, with `eps` added for unit rows."""
    m = sequence.shape[1]
    target = np.zeros((m, m), WIDE)
    outputs = []
    for J, calls in zip(sequence, orders, strict=True):
        rows = Rows(J)
        coefficients = np.diag(rows.lengths)
        for i in range(m):
            c = coefficients[i]
            for j in calls[i]:
                if j == i:
                    continue
                products = rows.cosines @ c
                length = np.sqrt(max(c @ products, WIDE(0)))
                phi = products[j] / length if length > 0 else WIDE(0)
                goal = target[i, j]
                if phi < goal and rows.nonzero[j]:
                    sine = np.sqrt(max(1 - phi * phi, WIDE(0)))
                    goal_sine = np.sqrt(max(1 - goal * goal, WIDE(0)))
                    c[j] += length * (goal * sine - phi * goal_sine) / (goal_sine + eps)
                target[i, j] = (1 - WIDE(beta)) * goal + beta * phi
        weights = np.sum(coefficients, axis=0) * rows.inverse
        outputs.append(np.where(rows.nonzero, weights, 1))
    return np.stack(outputs)
