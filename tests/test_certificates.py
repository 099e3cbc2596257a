"""Certificates: residuals that are small for right answers and large for wrong ones."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxjd
from jaxjd import diagnostics, linalg, weightings
from jaxjd.linalg import residuals
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
