"""Derivatives through one or two updates: finite and right at the points where data puts them.

Entries of exactly zero, rows of exactly zero (a hinge that is met) and equal rows are ordinary:
a root or a quotient behind a selection makes reverse mode NaN there. Where a method has a
derivative, both modes are those of central differences in float64; where it has a kink, they are
finite. Both modes agree everywhere.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.registry import NAMED, UNWEIGHTED, VARIANTS, M, Method

METHODS = NAMED + UNWEIGHTED + VARIANTS
SIZE = 4
STEP = 1e-6
LOSSES = np.array([0.7, 1.3, 2.1])
KINKS = {
    "aligned_mtl": {"zero row", "equal rows"},
    "cagrad": {"zero row"},
    "cagrad(rescale)": {"zero row"},
    "conflict_free": {"zero row", "equal rows"},
    "db_mtl": {"zero row"},
    "dualproj": {"zero row"},
    "excess_mtl": {"zero row"},
    "fairgrad": {"zero row"},
    "graddrop": {"zero entries", "zero row"},
    "gradvac": {"zero row"},
    "imtl_g": {"zero row", "equal rows"},
    "mgda": {"zero row", "equal rows"},
    "mgda(loss+)": {"zero row"},
    "moco": {"zero row"},
    "moco(simplex)": {"zero row"},
    "momentum_conflict_free": {"zero entries", "zero row", "equal rows"},
    "nash_mtl": {"zero row"},
    "nash_mtl(every 2)": {"zero row"},
    "pcd": {"zero row"},
    "pcgrad": {"zero row", "equal rows"},
    "trimmed_mean": {"zero entries"},
    "upgrad": {"zero row", "equal rows"},
}
"""Where a method has no derivative, which the test proves; what is returned there is finite."""
QUICK = {"gradnorm", "gradvac", "moco", "momentum_conflict_free"}
"""Of these, roots made reverse mode NaN; the others are slow, and the longest with all rows."""
LONG = {"gradvac", "moco", "momentum_conflict_free"}


def points(m: int) -> dict[str, np.ndarray]:
    generic = np.random.default_rng(3).standard_normal((M, SIZE))[:m]
    if m == 1:
        return {"one row": generic}
    entries, row, repeated = generic.copy(), generic.copy(), generic.copy()
    entries[:, 0] = 0
    row[1] = 0
    repeated[2] = repeated[0]
    return {"generic": generic, "zero entries": entries, "zero row": row, "equal rows": repeated}


def probe(method: Method, m: int):
    """The second update, its derivative along a direction, and its pull-back; on a batch."""
    aggregator = method.aggregator(m)

    def update(jacobian):
        state = aggregator.init(jnp.zeros(SIZE))
        for scale in (1.0, 0.8) if method.stateful else (1.0,):
            rows = scale * jacobian
            extra = method.extra_args(rows)
            if method.losses:
                extra["losses"] = jnp.asarray(LOSSES[:m]) * scale
            found, state = aggregator.update(rows, state, **extra)
        return found

    def differentiate(jacobian, direction, cotangent):
        value, tangent = jax.jvp(update, (jacobian,), (direction,))
        (gradient,) = jax.vjp(update, jacobian)[1](cotangent)
        return value, tangent, gradient

    return jax.jit(jax.vmap(differentiate))


def cases():
    for method in METHODS:
        for m in (M, 1):
            quick = method.name in QUICK and (m == 1 or method.name not in LONG)
            marks = () if quick else pytest.mark.slow
            yield pytest.param(method, m, id=f"{method.name}-{m}", marks=marks)


@pytest.mark.parametrize(("method", "m"), list(cases()))
def test_derivatives_of_updates(method, m):
    if m < method.min_tasks or (m == 1 and "weights" in method.required):
        pytest.skip("It needs more tasks.")
    with jax.enable_x64(True):
        named = points(m)
        rng = np.random.default_rng(5)
        J = np.stack(list(named.values()))
        D, c = rng.standard_normal(J.shape), rng.standard_normal((len(J), SIZE))
        fn = probe(method, m)
        value, tangent, gradient = map(np.asarray, fn(J, D, c))
        ahead, behind = (np.asarray(fn(J + s * STEP * D, D, c)[0]) for s in (1, -1))
        difference = (ahead - behind) / (2 * STEP)
        # Where there is a derivative, it sums to zero over directions that do; one-sided
        # differences along some such directions, mixed in sign in every entry, do not at a kink.
        excess = 0
        for E in rng.standard_normal((2, *J.shape)):
            E = E - E.mean(axis=1, keepdims=True)
            turned = (np.asarray(fn(J + STEP * F, D, c)[0]) for F in (D, E, -(D + E)))
            excess += np.abs(sum((there - value) / STEP for there in turned))
    for k, name in enumerate(named):
        assert np.isfinite(value[k]).all()
        assert np.isfinite(tangent[k]).all(), f"forward mode, {name}"
        assert np.isfinite(gradient[k]).all(), f"reverse mode, {name}"
        forward, reverse = c[k] @ tangent[k], np.sum(gradient[k] * D[k])
        size = 1e-3 + np.linalg.norm(c[k]) * np.linalg.norm(tangent[k])
        assert abs(forward - reverse) < 1e-9 * size, name
        scale = 1 + np.abs(tangent[k]).max()
        if name in KINKS.get(method.name, ()):
            assert excess[k].max() > 1e-4 * scale, f"no kink, {name}"
        else:
            np.testing.assert_allclose(tangent[k] / scale, difference[k] / scale, atol=1e-6)
