"""The Jacobians of the goldens. Every entry is a float32 number.

Where a matrix is meant to be singular or stationary it is so exactly, not to rounding: its entries
are small integers, times powers of two. Then float32 and float64 are asked the same question.
"""

from __future__ import annotations

import numpy as np

Case = tuple[str, str, np.ndarray]


def _integers(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(-4, 5, shape).astype(np.float64)


def _rounded(J: np.ndarray) -> np.ndarray:
    return J.astype(np.float32).astype(np.float64)


def normal(rng: np.random.Generator, m: int, n: int) -> np.ndarray:
    """No structure."""
    return _rounded(rng.standard_normal((m, n)))


def low_rank(rng: np.random.Generator, m: int, n: int, rank: int) -> np.ndarray:
    """Integers, of a given rank."""
    return _integers(rng, m, rank) @ _integers(rng, rank, n)


def strong(rng: np.random.Generator, m: int, n: int, rank: int) -> np.ndarray:
    """A positive combination of the rows is zero."""
    left = _integers(rng, m - 1, rank)
    positive = rng.integers(1, 3, m - 1)
    left = np.vstack([left, -positive @ left])
    return left if rank == n else left @ _integers(rng, rank, n)


def weak(rng: np.random.Generator, m: int, n: int, rank: int) -> np.ndarray:
    """A convex combination of the rows is zero, but no positive combination is.

    Half of the rows are balanced by themselves; the others share a direction that improves them.
    """
    half = max(2, m // 2)
    balanced = np.hstack([np.zeros((half, 1)), strong(rng, half, rank - 1, rank - 1)])
    improving = rng.integers(1, 5, (m - half, 1)).astype(np.float64)
    left = np.vstack([balanced, np.hstack([improving, _integers(rng, m - half, rank - 1)])])
    left = left if rank == n else left @ _integers(rng, rank, n)
    return left[rng.permutation(m)]


def free(rng: np.random.Generator, m: int, n: int, rank: int) -> np.ndarray:
    """One direction improves all tasks; the rows may conflict."""
    left = np.hstack([rng.integers(1, 4, (m, 1)).astype(np.float64), _integers(rng, m, rank - 1)])
    return left if rank == n else left @ _integers(rng, rank, n)


def conflicting(rng: np.random.Generator, m: int, n: int) -> np.ndarray:
    """Regular, with a mean gradient that is short: most rows conflict."""
    J = rng.standard_normal((m, n))
    return _rounded(J - 0.95 * J.mean(axis=0))


def badly_scaled(rng: np.random.Generator, J: np.ndarray, decades: float) -> np.ndarray:
    """Rows times 10^U(-decades, decades), rounded to powers of two."""
    exponents = np.round(np.log2(10) * rng.uniform(-decades, decades, (len(J), 1)))
    return J * 2.0**exponents


def cases() -> list[Case]:
    """All cases: name, family and matrix."""
    rng = np.random.default_rng(2026)
    base = np.array([[-4.0, 1, 1], [6, 1, 1]])
    krum = np.array([[1.0, 1, 1], [1, 0, 1], [75, -666, 23], [1, 2, 3], [2, 0, 1]])
    normal_5 = normal(rng, 5, 12)
    spread = conflicting(rng, 20, 50)
    twins = np.array([[3.0, 1, 0, 0], [-3, -1, 2.0**-10, 0], [0, 1, 1, 1]])
    listed = [
        ("1x1", "regular", np.array([[-2.5]])),
        ("1x200", "regular", normal(rng, 1, 200)),
        ("1x5 times 2^-27", "scale", normal(rng, 1, 5) * 2.0**-27),
        ("1x1 zero", "zero", np.zeros((1, 1))),
        ("J_base", "regular", base),
        ("J_base times 2^-27", "scale", base * 2.0**-27),
        ("J_base times 2^-13", "scale", base * 2.0**-13),
        ("J_base times 2^13", "scale", base * 2.0**13),
        ("J_base times 2^27", "scale", base * 2.0**27),
        ("2x1 opposite", "strong", np.array([[2.0], [-3.0]])),
        ("2x3 duplicate", "singular", np.array([[1.0, 2, -1], [1, 2, -1]])),
        ("2x3 zero row", "zero", np.array([[1.0, 2, -1], [0, 0, 0]])),
        ("2x5 badly scaled", "badly scaled", badly_scaled(rng, conflicting(rng, 2, 5), 3)),
        ("3x3", "regular", normal(rng, 3, 3)),
        ("3x200", "regular", normal(rng, 3, 200)),
        ("3x10 conflicting", "regular", conflicting(rng, 3, 10)),
        ("3x2 triangle", "strong", np.array([[1.0, 0], [0, 1], [-1, -1]])),
        ("3x2 cone", "free", np.array([[1.0, 0], [-1, 3], [2, -1]])),
        ("3x2 half-plane", "weak", np.array([[1.0, 0], [-1, 0], [0, 1]])),
        ("3x8 rank 1", "singular", np.outer([1.0, 2, 3], _integers(rng, 8))),
        ("3x8 stationary", "strong", strong(rng, 3, 8, 2)),
        ("3x4 nearly opposite", "nearly singular", twins),
        ("3x5 badly scaled", "badly scaled", badly_scaled(rng, conflicting(rng, 3, 5), 3)),
        ("3x5 zero", "zero", np.zeros((3, 5))),
        ("J_Krum", "free", krum),
        ("5x12", "regular", normal_5),
        ("5x5", "regular", normal(rng, 5, 5)),
        ("5x3", "free", free(rng, 5, 3, 3)),
        ("5x11 rank 3", "free", free(rng, 5, 11, 3)),
        ("5x11 rank 2", "singular", low_rank(rng, 5, 11, 2)),
        ("5x20 stationary", "strong", strong(rng, 5, 20, 4)),
        ("5x3 stationary", "strong", strong(rng, 5, 3, 3)),
        ("5x20 weakly stationary", "weak", weak(rng, 5, 20, 3)),
        ("5x12 equal and opposite", "weak", normal_5[[0, 0, 1, 0, 0]] * [[1], [-1], [1], [1], [0]]),
        ("5x12 zero rows", "zero", normal_5 * [[1], [0], [1], [1], [0]]),
        ("5x8 badly scaled", "badly scaled", badly_scaled(rng, conflicting(rng, 5, 8), 2)),
        ("5x8 very badly scaled", "badly scaled", badly_scaled(rng, conflicting(rng, 5, 8), 3)),
        ("5x3 badly scaled", "badly scaled", badly_scaled(rng, free(rng, 5, 3, 3), 2)),
        ("20x100", "regular", normal(rng, 20, 100)),
        ("20x30", "regular", normal(rng, 20, 30)),
        ("20x10", "free", free(rng, 20, 10, 10)),
        ("20x10 rank 5", "free", free(rng, 20, 10, 5)),
        ("20x10 stationary", "strong", strong(rng, 20, 10, 10)),
        ("20x100 stationary", "strong", strong(rng, 20, 100, 19)),
        ("20x10 weakly stationary", "weak", weak(rng, 20, 10, 7)),
        ("20x100 weakly stationary", "weak", weak(rng, 20, 100, 18)),
        ("20x50 badly scaled", "badly scaled", badly_scaled(rng, spread, 2)),
        ("20x50 very badly scaled", "badly scaled", badly_scaled(rng, spread, 3)),
        ("64x200", "regular", normal(rng, 64, 200)),
        ("64x200 conflicting", "regular", conflicting(rng, 64, 200)),
        ("64x200 badly scaled", "badly scaled", badly_scaled(rng, normal(rng, 64, 200), 2)),
        ("64x200 rank 40", "free", free(rng, 64, 200, 40)),
        ("64x20", "free", free(rng, 64, 20, 20)),
        ("64x200 stationary", "strong", strong(rng, 64, 200, 63)),
    ]
    names = [name for name, _, _ in listed]
    assert len(set(names)) == len(names)
    for name, _, J in listed:
        assert np.array_equal(J, _rounded(J)), name
    return sorted(listed, key=lambda case: len(case[2]))


def sequences(num_calls: int = 8) -> dict[int, np.ndarray]:
    """Pairs of Jacobians call by call: shape ``(sequences, calls, 2, m, n)`` per number of tasks.

    The two of a pair are two noisy samples of one Jacobian, as from two batches. There is a plain
    sequence, one of badly scaled rows, and one whose Jacobians shrink by a decade every call.
    """
    rng = np.random.default_rng(2027)
    result = {}
    for m, n in ((3, 7), (20, 30)):
        plain, scaled, shrinking = (
            conflicting(rng, m, n)[None, None] + 0.7 * rng.standard_normal((num_calls, 2, m, n))
            for _ in range(3)
        )
        scaled = badly_scaled(rng, scaled.transpose(2, 0, 1, 3).reshape(m, -1), 1)
        scaled = scaled.reshape(m, num_calls, 2, n).transpose(1, 2, 0, 3)
        shrinking = shrinking * 2.0 ** (-3 * np.arange(num_calls))[:, None, None, None]
        result[m] = _rounded(np.stack([plain, scaled, shrinking]))
    return result
