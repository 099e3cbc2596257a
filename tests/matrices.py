"""Families of Jacobians for the tests, as plain NumPy arrays in float64.

The families are those that TorchJD tests its aggregators on, with the same shapes, ranks and
scales, and the degenerate Jacobians that training can meet.
"""

from __future__ import annotations

import numpy as np


def gaussian(seed: int, *shape: int) -> np.ndarray:
    """Normal numbers in float32. Each shape that JAX draws is a program to compile."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


J_BASE = np.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
G_BASE = J_BASE @ J_BASE.T

# (rows, columns, rank)
NORMAL_DIMS = [(1, 1, 1), (4, 3, 1), (4, 3, 2), (4, 3, 3), (9, 11, 5), (9, 11, 9)]
ZERO_DIMS = [(1, 1), (4, 3), (9, 11)]
STATIONARITY_DIMS = [(20, 10, 10), (20, 10, 5), (20, 10, 1), (20, 100, 1), (20, 100, 19)]
SCALES = [0.0, 1e-10, 1e3, 1e5, 1e10, 1e15]


def _orthonormal(rng: np.random.Generator, size: int, rank: int, within=()) -> np.ndarray:
    """Draws `rank` orthonormal columns, orthogonal to each vector of `within`."""
    raw = rng.standard_normal((size, rank))
    for vector in within:
        unit = vector / np.linalg.norm(vector)
        raw = raw - np.outer(unit, unit @ raw)
    basis, _ = np.linalg.qr(raw)
    return basis


def _with_left_vectors(rng: np.random.Generator, left: np.ndarray, n: int) -> np.ndarray:
    """Draws a matrix with n columns and the given left singular vectors."""
    rank = left.shape[1]
    # Bounded away from zero: the rank is meant to be the rank.
    values = 0.1 + np.abs(rng.standard_normal(rank))
    return left @ np.diag(values) @ _orthonormal(rng, n, rank).T


def normal(rng: np.random.Generator, m: int, n: int, rank: int) -> np.ndarray:
    """No structure but the rank."""
    return _with_left_vectors(rng, _orthonormal(rng, m, rank), n)


def strongly_stationary(rng: np.random.Generator, m: int, n: int, rank: int) -> np.ndarray:
    """A positive combination of the rows is zero."""
    positive = rng.uniform(0.1, 1, m)
    return _with_left_vectors(rng, _orthonormal(rng, m, min(rank, m - 1), [positive]), n)


def strictly_weakly_stationary(rng: np.random.Generator, m: int, n: int, rank: int) -> np.ndarray:
    """A convex combination of the rows is zero, but no positive combination is.

    The first half of the rows is balanced by itself; the others share a direction that all of them
    improve along.
    """
    balanced = np.where(np.arange(m) < m // 2, rng.uniform(0.1, 1, m), 0)
    improving = np.where(np.arange(m) < m // 2, 0, rng.uniform(0.1, 1, m))
    improving /= np.linalg.norm(improving)
    others = _orthonormal(rng, m, min(rank, m - 1) - 1, [balanced, improving])
    return _with_left_vectors(rng, np.column_stack([improving, others]), n)


def not_stationary(rng: np.random.Generator, m: int, n: int, rank: int) -> np.ndarray:
    """No convex combination of the rows is zero: all improve along one direction."""
    improving = rng.uniform(0.1, 1, m)
    improving /= np.linalg.norm(improving)
    others = _orthonormal(rng, m, rank - 1, [improving])
    return _with_left_vectors(rng, np.column_stack([improving, others]), n)


def badly_scaled(rng: np.random.Generator, m: int, n: int, decades: float = 3.0) -> np.ndarray:
    """Normal rows times 10^U(-decades, decades)."""
    return rng.standard_normal((m, n)) * 10 ** rng.uniform(-decades, decades, (m, 1))


def families(seed: int = 0) -> dict[str, list[np.ndarray]]:
    """Returns all families of typical matrices by name."""
    rng = np.random.default_rng(seed)
    return {
        "zero": [np.zeros(dims) for dims in ZERO_DIMS],
        "normal": [normal(rng, *dims) for dims in NORMAL_DIMS],
        "strong": [strongly_stationary(rng, *dims) for dims in STATIONARITY_DIMS],
        "weak": [strictly_weakly_stationary(rng, *dims) for dims in STATIONARITY_DIMS],
        "free": [not_stationary(rng, *dims) for dims in STATIONARITY_DIMS],
    }


def degenerate(seed: int = 0) -> dict[str, np.ndarray]:
    """Returns Jacobians of four rows and eight columns at the edges of what a method may assume."""
    rng = np.random.default_rng(seed)
    J = rng.standard_normal((4, 8))
    cases = {
        "zero": np.zeros_like(J),
        "one_zero_row": J * [[1], [0], [1], [1]],
        "one_nonzero_row": J * [[0], [0], [1], [0]],
        "two_zero_rows": J * [[0], [1], [1], [0]],
        "duplicate_rows": J[[0, 1, 1, 2]],
        "all_rows_equal": J[[0, 0, 0, 0]],
        "opposite_rows": np.stack([J[0], -J[0], J[1], J[2]]),
        "two_opposite_pairs": np.stack([J[0], -J[0], J[1], -J[1]]),
        "opposite_and_scaled": np.stack([J[0], -1e-3 * J[0], 1e3 * J[0], J[1]]),
        "parallel_rows": J[[0, 0, 0, 0]] * [[1.0], [2.0], [1e-3], [1e3]],
        "nearly_duplicate": np.stack([J[0], J[0] + 1e-7 * J[1], J[2], J[3]]),
        "nearly_opposite": np.stack([J[0], -J[0] + 1e-7 * J[1], J[2], J[3]]),
        "orthogonal": np.eye(4, 8),
        "one_column": J * np.eye(1, 8),
        "tiny_row": J * [[1], [1e-15], [1], [1]],
        "huge_row": J * [[1], [1e15], [1], [1]],
        "sums_to_zero": np.vstack([J[:3], -J[:3].sum(axis=0)]),
    }
    return cases
