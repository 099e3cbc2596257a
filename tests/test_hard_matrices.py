"""Every solver on Jacobians made to be hard: `tests.goldens.families`.

Optimality is evaluated in float64 from the rows, never from a Gramian. Rounding the Gramian and the
weights to a dtype costs ulps of `terms`, the sum ``sum_i |w_i| |g_i|`` that the update is; where
more is lost, the bound says what.
"""

from __future__ import annotations

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxjd
from jaxjd import weightings as W
from tests.goldens import families

CASES = families.hard()
GROUPS = families.by_rows(CASES)
ULPS = 64


def of_rows(m: int) -> list[int]:
    return [k for k, case in enumerate(CASES) if len(case.J) == m]


def each_m(*default: int) -> pytest.MarkDecorator:
    """Some numbers of rows by default, the others as slow tests: each is a program to compile."""
    slow = lambda m: () if m in default else pytest.mark.slow
    return pytest.mark.parametrize("m", [pytest.param(m, marks=slow(m)) for m in families.ROWS])


@functools.cache
def goldens() -> dict[str, np.ndarray]:
    with np.load(pathlib.Path(families.__file__).parent / "cagrad.npz") as file:
        return dict(file)


@functools.cache
def compiled(make):
    def run(jacobian, argument):
        m = jacobian.shape[0]
        weighting = make(argument)
        return weighting.update(jaxjd.gramian(jacobian), weighting.init(m, jacobian[0]))[0]

    return jax.jit(jax.vmap(run))


class Batch:
    """The weights of a method for all Jacobians of `m` rows, and what follows from the rows."""

    def __init__(self, run, m: int, dtype: str, arguments: np.ndarray):
        self.J = GROUPS[m]
        self.eps = float(np.finfo(dtype).eps)
        with jax.enable_x64(dtype == "float64"):
            weights = run(jnp.asarray(self.J, dtype), jnp.asarray(arguments, dtype))
            assert weights.dtype == dtype
        self.weights = np.asarray(weights, np.float64)
        assert np.isfinite(self.weights).all()
        self.lengths = np.linalg.norm(self.J, axis=2)
        self.nonzero = self.lengths > 0
        inverse = np.divide(1, self.lengths, where=self.nonzero, out=np.zeros_like(self.lengths))
        self.inverse = inverse
        self.units = self.J * inverse[:, :, None]
        self.update = np.einsum("k...m,kmn->k...n", self.weights, self.J)
        self.terms = np.einsum("k...m,km->k...", np.abs(self.weights), self.lengths)
        self.improvements = np.einsum("kmn,k...n->k...m", self.units, self.update)
        self.hull = goldens()["hull"][of_rows(m)]


PLAIN = {
    "aligned_mtl": W.aligned_mtl,
    "conflict_free": W.conflict_free,
    "dualproj": W.dualproj,
    "imtl_g": W.imtl_g,
    "mgda": W.mgda,
    "nash_mtl": lambda: W.nash_mtl(max_norm=0.0),
    "pcd": W.pcd,
    "upgrad": W.upgrad,
}
PLAIN = {name: functools.partial(lambda make, _: make(), make) for name, make in PLAIN.items()}


def solved(make, m: int, dtype: str = "float32", argument: float = 0.0) -> Batch:
    return Batch(compiled(make), m, dtype, np.full(len(GROUPS[m]), argument))


# --- CAGrad against Clarabel --------------------------------------------------------------------


def test_the_goldens_mix_what_is_hard():
    golden = goldens()
    assert len(CASES) == len(golden["c"]) >= 500
    assert set(golden["c"]) == set(families.RADII)
    for trait in ("zero", "opposite", "nearly opposite", "equal", "parallel", "scaled"):
        assert sum(trait in traits for _, traits in CASES) > 50
    # On both sides of stationarity, and next to it.
    hull = golden["hull"]
    assert np.sum(hull < 1e-14) > 100
    assert np.sum(hull > 1e-14) > 100
    assert np.sum((hull > 1e-14) & (hull < 5e-3)) > 10


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@each_m(3)
def test_cagrad(m: int, dtype: str):
    golden = {key: value[of_rows(m)] for key, value in goldens().items()}
    c = golden["c"]
    batch = Batch(compiled(W.cagrad), m, dtype, c)
    eps, terms = batch.eps, batch.terms
    # A Gramian knows squared distances, to an ulp; what is closer to zero counts as stationary.
    known = (batch.hull < 1e-14) | (batch.hull**2 > 32 * eps)
    assert np.sum(~known) <= 0.1 * len(known)
    mean = batch.J.mean(axis=1)
    radius = c * np.linalg.norm(mean, axis=1)
    outside = np.linalg.norm(batch.update - mean, axis=1) - radius
    assert (outside <= 512 * eps * terms).all()
    short = golden["worst"][:, None] * batch.inverse - batch.improvements
    short = np.max(short, axis=1, where=batch.nonzero, initial=0)
    assert (short <= 512 * eps * terms)[known].all()
    # The goldens' change is that for an ulp of the cosines. A rounding of `C x + q` shifts weight
    # between rows that are `angle` apart, which moves the update by the rounding over the angle.
    ball = (1 + c) * batch.lengths.mean(axis=1)
    error = np.linalg.norm(batch.update - golden["update"], axis=1)
    close = ["nearly" in " ".join(CASES[k].traits) for k in of_rows(m)]
    shifted = np.where(close, 4 / families.ANGLES[0], ULPS) * (terms + ball)
    allowed = eps * (16 * golden["change"] + shifted)
    assert (error <= allowed)[known].all(), np.flatnonzero(known & (error > allowed))


def cagrad(jacobians: list[np.ndarray], c: float, dtype: str) -> np.ndarray:
    """Updates, by the programs that the goldens are compared with."""
    m, n = jacobians[0].shape
    J = np.pad(np.stack(jacobians), ((0, 0), (0, 0), (0, families.WIDTH - n)))
    repeated = np.resize(J, GROUPS[m].shape)
    with jax.enable_x64(dtype == "float64"):
        arguments = jnp.full(len(repeated), c, dtype)
        weights = np.asarray(compiled(W.cagrad)(jnp.asarray(repeated, dtype), arguments))
    return np.einsum("km,kmn->kn", weights[: len(J)].astype(np.float64), J)[:, :n]


@pytest.mark.parametrize("c", [1.0, 2.0])
@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
def test_cagrad_with_a_zero_row_and_opposite_rows_is_the_projection_of_the_mean(dtype, c):
    J = np.array([[1.0, 0, 0], [-1, 0, 0], [0, 0, 0], [0.3, 1, 0]])
    (update,) = cagrad([J], c, dtype)
    np.testing.assert_allclose(update, [0, 0.25, 0], atol=ULPS * float(np.finfo(dtype).eps))


@pytest.mark.parametrize("angle", [0.01, 0.005])
def test_cagrad_next_to_a_weakly_stationary_point(angle):
    pair = [[1.0, 0, 0], [-np.cos(angle), np.sin(angle), 0]]
    J = [np.array([*pair, third], np.float32) for third in ([0.0, 0, 1], [0.5, 1, 0.5])]
    update, exact = cagrad(J, 1.0, "float32"), cagrad(J, 1.0, "float64")
    assert (exact[:, 1] > 0.3).all()
    # An ulp of a cosine next to -1 is that much of the squared distance of the hull from zero.
    allowed = 2 * float(np.finfo(np.float32).eps) / (angle / 2) ** 2
    np.testing.assert_allclose(update, exact, atol=allowed)
    assert (np.einsum("kmn,kn->km", J, update) >= -allowed * angle).all()


# --- The others: their conditions of optimality --------------------------------------------------


@functools.cache
def projections():
    def run(jacobian, _):
        m = jacobian.shape[0]
        U = jnp.eye(m, dtype=jacobian.dtype) / m
        return jaxjd.linalg.project_onto_dual_cone(U, jaxjd.gramian(jacobian))

    return jax.jit(jax.vmap(run))


@each_m(3)
@pytest.mark.parametrize("method", ["dualproj", "upgrad"])
def test_projections_onto_the_dual_cone(method, m):
    if method == "dualproj":
        batch = solved(PLAIN["dualproj"], m)
        start = np.full(batch.weights.shape, 1 / m)
    else:  # The projections that `upgrad` is the sum of.
        batch = Batch(projections(), m, "float32", np.zeros(len(GROUPS[m])))
        start = np.broadcast_to(np.eye(m) / m, batch.weights.shape)
        upgrad = solved(PLAIN["upgrad"], m)
        error = np.abs(upgrad.weights - batch.weights.sum(axis=1)) * upgrad.lengths
        assert (error <= ULPS * batch.eps * batch.terms.sum(axis=1)[:, None]).all()
    lengths = batch.lengths.reshape(len(batch.J), *(1,) * (start.ndim - 2), m)
    pushes = (batch.weights - start) * lengths
    rounding = ULPS * batch.eps * batch.terms[..., None]
    assert (pushes >= -rounding).all()
    assert (batch.improvements >= -rounding).all()
    assert (np.abs(pushes * batch.improvements) <= rounding * batch.terms[..., None]).all()


@each_m(3)
def test_mgda_is_the_smallest_point_of_the_hull(m):
    batch = solved(PLAIN["mgda"], m)
    assert (batch.weights >= 0).all()
    np.testing.assert_allclose(batch.weights.sum(axis=1), 1, rtol=1e-5)
    square = np.sum(batch.update**2, axis=1)
    short = square[:, None] - batch.improvements * batch.lengths
    # Next to singular matrices the solution that the weights are made of is long compared with
    # them, and the solver aims two of its ulps to the inside, which the bounds of long rows need.
    assert (short <= 2 * ULPS * batch.eps * batch.terms[:, None] * batch.lengths).all()


@each_m(3)
def test_pcd(m):
    tau = 0.02
    batch = solved(PLAIN["pcd"], m)
    squares = batch.lengths**2
    scales = np.sqrt(squares + 1e-8 * squares.mean(axis=1, keepdims=True))
    first = np.zeros(m)
    first[0] = 1
    kept = (batch.weights == first).all(axis=1)
    primary = batch.lengths[:, 0]
    norm = np.linalg.norm(batch.update, axis=1)
    rounding = ULPS * batch.eps * batch.terms
    # A Gramian tells squared lengths.
    missed = np.minimum(np.abs(norm**2 - primary**2), norm**2)
    assert (missed <= rounding * batch.terms).all()
    # The first weight tells how long the direction was before it took the primary row's length.
    solution = ~kept & (batch.weights[:, 0] > 0) & (primary > 0)
    assert np.any(solution)
    shrink = np.where(solution, batch.weights[:, 0] * scales[:, 0], 1)[:, None]
    slack = batch.improvements / shrink - tau * batch.lengths / scales
    slack, pushes = slack[:, 1:], (batch.weights * batch.lengths / shrink)[:, 1:]
    # What the method itself takes for a constraint that is met.
    loose = np.sqrt(batch.eps) + rounding[:, None] / shrink
    met = (slack >= -2 * loose) | ~batch.nonzero[:, 1:]
    assert met[solution].all()
    assert (pushes >= 0)[solution].all()
    assert (pushes * slack <= 2 * loose * (1 + pushes))[solution].all()


@each_m(3)
@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_fairness(alpha, m):
    batch = solved(W.fairgrad, m, argument=alpha)
    gains = batch.improvements * batch.lengths
    # Products are known to rounding relative to their terms; where a gain is less, nothing is.
    cosines = np.abs(batch.units @ batch.units.transpose(0, 2, 1))
    sums = np.einsum("kij,kj->ki", cosines, batch.weights * batch.lengths) * batch.lengths
    exists = batch.hull**2 > 256 * batch.eps
    assert np.sum(exists) > 5
    residual = np.abs(gains * batch.weights ** (1 / alpha) - 1)[exists]
    allowed = ULPS * batch.eps * (sums * batch.weights ** (1 / alpha))[exists]
    assert (residual <= allowed).all()
    if alpha == 1:
        nash = solved(PLAIN["nash_mtl"], m)
        change = np.linalg.norm(nash.update - batch.update, axis=1)
        assert (change <= ULPS * batch.eps * batch.terms).all()


@each_m(3)
@pytest.mark.parametrize("method", ["conflict_free", "imtl_g"])
def test_equal_improvements(method, m):
    batch = solved(PLAIN[method], m)
    smallest = np.linalg.eigvalsh(batch.units @ batch.units.transpose(0, 2, 1))[:, 0]
    regular = smallest > 256 * batch.eps
    assert regular.any()
    spread = np.ptp(batch.improvements, axis=1)[regular]
    allowed = ULPS * batch.eps / smallest[regular] * batch.terms[regular]
    assert (spread <= allowed).all()


@each_m(3)
def test_aligned_mtl_is_no_longer_than_its_scale(m):
    batch = solved(PLAIN["aligned_mtl"], m)
    largest = np.linalg.norm(batch.J, ord=2, axis=(1, 2))
    norm = np.linalg.norm(batch.update, axis=1)
    assert (norm <= largest / np.sqrt(m) + ULPS * batch.eps * batch.terms).all()
