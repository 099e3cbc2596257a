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

hypothesis.settings.register_profile(
    "deterministic", derandomize=True, deadline=None, max_examples=100, database=None
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
SHAPES = {1: 2, 4: 8, 9: 36, 20: 100}
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
def compiled(function: str):
    """A batch of sequences of calls; returns the weights and the update of the last ones."""
    _, row, make, _ = FUNCTIONS[function]

    def run(jacobians, arguments):
        _, m, n = jacobians.shape
        weighting = make(**arguments)

        def call(state, jacobian):
            weights, state = weighting.update(row.stat_of(jacobian), state)
            return state, (weights, jaxjd.combine(weights, jacobian))

        state = weighting.init(m, jnp.zeros((n,), jacobians.dtype))
        _, calls = lax.scan(call, state, jacobians)
        return jax.tree.map(lambda leaf: leaf[-1], calls)

    return jax.jit(jax.vmap(run, in_axes=(0, None)))


def padded(J: np.ndarray) -> np.ndarray:
    """Adds zero columns, which change no inner product, up to the one width for its row count."""
    return np.pad(J, ((0, 0), (0, SHAPES[J.shape[0]] - J.shape[1])))


def evaluate(name: str, jacobians, *, dtype=np.float32, order=None) -> Results:
    """Runs a method on many Jacobians of one row count, with the rows in the given order.

    A method with a state per task is called twice, first with the rows scaled by other factors.
    """
    function, row, _, arguments = CASES[name]
    J = np.stack([padded(jacobian) for jacobian in jacobians]).astype(dtype)
    count, m, _ = J.shape
    calls = J[:, None]
    if row.stateful:
        factors = np.linspace(0.5, 1.5, m, dtype=dtype)
        calls = np.stack([J * factors[:, None], J], axis=1)
    if order is not None:
        J, calls = J[:, order], calls[:, :, order]
    calls = np.concatenate([calls, np.repeat(calls[-1:], -count % BATCH, axis=0)])
    arguments = {key: np.asarray(value, dtype) for key, value in arguments.items()}
    chunks = []
    for start in range(0, len(calls), BATCH):
        weights, update = compiled(function)(calls[start : start + BATCH], arguments)
        assert weights.dtype == update.dtype == dtype
        chunks.append((np.asarray(weights), np.asarray(update)))
    weights, update = (np.concatenate(leaves)[:count] for leaves in zip(*chunks, strict=True))
    assert weights.shape == J.shape[:2]
    assert update.shape == (count, J.shape[2])
    return Results(*(leaf.astype(np.float64) for leaf in (J, weights, update)))


def by_rows(cases) -> dict[int, list[np.ndarray]]:
    groups: dict[int, list[np.ndarray]] = {}
    for J in cases:
        groups.setdefault(J.shape[0], []).append(J)
    return groups


FAMILIES = matrices.families()
TYPICAL = [J for family in FAMILIES.values() for J in family]
SCALED = [scale * J for J in FAMILIES["normal"] for scale in matrices.SCALES]
DEGENERATE = matrices.degenerate()
EVERYTHING = by_rows([*TYPICAL, *SCALED, *DEGENERATE.values()])


def generic(m: int, count: int, seed: int) -> list[np.ndarray]:
    """Normal Jacobians with rows scaled by 10^U(-1, 1), as far from degenerate as that goes."""
    rng = np.random.default_rng(seed)
    return [matrices.badly_scaled(rng, m, SHAPES[m], 1.0) for _ in range(count)]
