"""Hard Jacobians for every solver: each mixes several ways for a Gramian to be (nearly) singular.

    for m, stack in by_rows(hard()).items():  # shape (k, m, WIDTH), in float64
        ...

Every entry is a float32 number, so float32 and float64 are asked the same question. Zero, repeated,
parallel and opposite rows are so exactly: rows are multiples of 2^-12 or 2^-16, and factors are
small integers or powers of two. The matrices follow from the seed with NumPy alone.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

WIDTH = 20
ROWS = (2, 3, 4, 5, 6, 7, 8)
RADII = (0.0, 0.1, 0.5, 0.9, 1.0, 1.1, 2.0, 5.0, 10.0)  # Of CAGrad's ball.
ANGLES = (0.005, 0.05)  # Radians between a row and one that is nearly parallel or opposite.
_RELATIONS = ("zero", "equal", "parallel", "opposite", "nearly opposite", "nearly parallel")


class Hard(NamedTuple):
    """A Jacobian and how it was made.

    Attributes:
      J: The rows, shape ``(m, n)``, in float64.
      traits: What is special about it, among the relations of one row to another (zero, equal,
        parallel, opposite, nearly opposite, nearly parallel) and "sums to zero", "short mean",
        "scaled".
    """

    J: np.ndarray
    traits: frozenset[str]


def hard(count: int = 560, seed: int = 14, rows: tuple[int, ...] = ROWS) -> list[Hard]:
    """Draws `count` Jacobians, with the numbers of rows in turn and 2 to `WIDTH` columns."""
    rng = np.random.default_rng(seed)
    return [_draw(rng, rows[k % len(rows)]) for k in range(count)]


def by_rows(cases: list[Hard]) -> dict[int, np.ndarray]:
    """Stacks the Jacobians of each number of rows; zero columns change no inner product."""
    groups: dict[int, list[np.ndarray]] = {}
    for J, _ in cases:
        m, n = J.shape
        groups.setdefault(m, []).append(np.pad(J, ((0, 0), (0, max(WIDTH - n, 0)))))
    return {m: np.stack(group) for m, group in groups.items()}


def _draw(rng: np.random.Generator, m: int) -> Hard:
    n = int(rng.integers(2, WIDTH + 1))
    J = rng.standard_normal((m, n))
    traits = set()
    if rng.random() < 0.3:
        J -= 0.95 * J.mean(axis=0)
        traits.add("short mean")
    J = _rounded(J, 12)
    unbalanced = m == 2 or rng.random() < 0.9
    if not unbalanced:
        J[-1] = -J[:-1].sum(axis=0)
        traits.add("sums to zero")
    order = rng.permutation(m)
    for k in range(1, m):
        if rng.random() > unbalanced / np.sqrt(m):
            continue
        i, j = order[k], order[rng.integers(k)]
        relation = _RELATIONS[rng.choice(len(_RELATIONS), p=[0.15, 0.1, 0.1, 0.2, 0.35, 0.1])]
        J[i] = _related(rng, relation, J[j])
        traits.add(relation)
    if rng.random() < 0.4:
        decades = rng.uniform(-3, 3, m) * (rng.random(m) < 0.7)
        J *= 2.0 ** np.round(np.log2(10) * decades)[:, None]
        traits.add("scaled")
    assert np.array_equal(J, J.astype(np.float32))
    return Hard(J, frozenset(traits))


def _rounded(J: np.ndarray, bits: int) -> np.ndarray:
    return np.round(J * 2.0**bits) / 2.0**bits


def _related(rng: np.random.Generator, relation: str, row: np.ndarray) -> np.ndarray:
    if relation == "zero" or not row.any():
        return np.zeros_like(row)
    if relation == "equal":
        return row.copy()
    sign = -1 if "opposite" in relation else 1
    if not relation.startswith("nearly"):
        return sign * row * rng.choice([0.125, 0.5, 1, 2, 3, 8])
    # Turned by an angle towards a direction that is orthogonal to it.
    aside = rng.standard_normal(len(row))
    aside -= row * (row @ aside) / (row @ row)
    aside *= np.linalg.norm(row) / np.linalg.norm(aside)
    angle = np.exp(rng.uniform(*np.log(ANGLES)))
    return (
        sign * rng.choice([0.5, 1, 3]) * _rounded(np.cos(angle) * row + np.sin(angle) * aside, 16)
    )
