"""Runs jaxjd on the goldens and measures it: what test_parity.py checks and report.py prints."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxjd
from jaxjd import weightings
from jaxjd.linalg import exact_projector, regularized_projector
from jaxjd.weightings._gradvac import vaccinate
from jaxjd.weightings._pcgrad import project_conflicts
from tests.goldens.methods import Golden, bound, error, rounding, row_lengths, schedule

DTYPES = {"float32": jnp.float32, "float64": jnp.float64}
SEQUENCE_TASKS = (3, 20)
SEQUENCES = ("plain", "badly scaled", "shrinking")
TASKS = (1, 2, 3, 5, 20, 64)
"""The numbers of tasks of all matrices."""


@functools.cache
def load() -> dict[str, np.ndarray]:
    with np.load(pathlib.Path(__file__).parent / "parity.npz") as file:
        return dict(file)


@functools.cache
def jacobians() -> dict[str, np.ndarray]:
    """The matrices by name, in float64."""
    arrays, place = load(), 0
    result = {}
    for name, (m, n) in zip(arrays["names"], arrays["shapes"], strict=True):
        entries = arrays["entries"][place : place + m * n]
        result[str(name)] = entries.reshape(m, n).astype(np.float64)
        place += m * n
    return result


@dataclasses.dataclass(frozen=True)
class Case:
    """One matrix or sequence of a golden.

    Attributes:
      name: The matrix's name, or that of the sequence.
      jacobians: The Jacobian of each call, shape ``(calls, m, n)``.
      inputs: What jaxjd's weighting is made from, the same for matrices and for sequences except
        for cross-Gramians, which need the second Jacobian as well: ``(calls, 2, m, n)``.
      wanted: The oracle's output, shape ``(calls, m)``, or ``(calls, n)`` without weights.
      theirs: TorchJD's output, shaped like it; ``(calls, n)`` for ConFIG.
      change32: The change of the exact output for one rounding in float32.
      change64: The same for float64.
    """

    name: str
    jacobians: np.ndarray
    inputs: np.ndarray
    wanted: np.ndarray
    theirs: np.ndarray
    change32: float
    change64: float

    @property
    def num_tasks(self) -> int:
        return self.jacobians.shape[1]

    @property
    def exists(self) -> bool:
        """Whether there is a solution."""
        return bool(np.isfinite(self.wanted).all())

    def bound(self, golden: Golden, dtype: str) -> float:
        """The error that is allowed."""
        change = self.change32 if dtype == "float32" else self.change64
        if golden.measure == "entries":
            return bound(change, 0.0, dtype)
        calls = zip(self.jacobians, self.wanted, strict=True)
        return bound(change, max(rounding(golden, *call, dtype) for call in calls), dtype)


def cases(golden: Golden, tasks: tuple[int, ...] = TASKS) -> list[Case]:
    """The cases with so many tasks, in the order of the arrays."""
    return [case for case in _cases(golden) if case.num_tasks in tasks]


@functools.cache
def _cases(golden: Golden) -> list[Case]:
    arrays, result = load(), []
    if golden.kind == "matrix":
        inputs = [(name, J[None]) for name, J in jacobians().items() if golden.applies(J)]
    else:
        inputs = [
            (f"{label}, {m} tasks", pairs)
            for m in SEQUENCE_TASKS
            for label, pairs in zip(SEQUENCES, arrays[f"pairs/{m}"].astype(np.float64), strict=True)
        ]
    wanted, theirs = arrays[f"wanted/{golden.name}"], arrays[f"torchjd/{golden.name}"]
    changes, place, their_place = arrays[f"change/{golden.name}"], 0, 0
    for k, (name, stack) in enumerate(inputs):
        first = stack if golden.kind == "matrix" else stack[:, 0]
        calls, m, n = first.shape
        size = n if golden.measure == "entries" else m
        part = slice(place, place + calls * size)
        place += calls * size
        # TorchJD's ConFIG returns no weights, but the update.
        their_size = n if golden.method == "conflict_free" else size
        their_part = slice(their_place, their_place + calls * their_size)
        their_place += calls * their_size
        outputs = wanted[part].reshape(calls, size), theirs[their_part].reshape(calls, -1)
        result.append(Case(name, first, stack, *outputs, *map(float, changes[:, k])))
    assert place == len(wanted)
    assert their_place == len(theirs)
    return result


def public(golden: Golden) -> bool:
    """Whether jaxjd has the method."""
    name = golden.method.removesuffix("_sequence")
    name = name.removesuffix("_regularized")
    return hasattr(jaxjd, name) or name.startswith("cr_mogm")


# How each golden's weighting is made, where it is not the factory of that name.
FACTORIES: dict[str, Callable[..., jaxjd.Weighting]] = {
    "upgrad_regularized": lambda **kwargs: weightings.upgrad(projector=_projector(True), **kwargs),
    "dualproj_regularized": lambda **kwargs: weightings.dualproj(
        projector=_projector(True), **kwargs
    ),
    "cr_mogm_imtl_g": lambda **kwargs: weightings.cr_mogm(weightings.imtl_g(), **kwargs),
    "cr_mogm_aligned_mtl": lambda **kwargs: weightings.cr_mogm(weightings.aligned_mtl(), **kwargs),
    "cr_mogm_upgrad": lambda: weightings.cr_mogm(
        weightings.upgrad(projector=_projector(True)), schedule
    ),
}


PROJECTING = ("upgrad_regularized", "dualproj_regularized", "cr_mogm_upgrad")


@functools.cache
def _projector(regularized: bool) -> Callable[..., jax.Array]:
    """One program for all weightings that project, which are called outside of jit."""
    solve = jax.jit(regularized_projector() if regularized else exact_projector())

    def projector(U: jax.Array, G: jax.Array) -> jax.Array:
        # Each row is a problem by itself: a single one is solved beside rows of zeros.
        square = U if U.ndim == 2 else jnp.zeros_like(G).at[0].set(U)
        return solve(square, G) if U.ndim == 2 else solve(square, G)[0]

    return projector


_gramian = jax.jit(jaxjd.gramian)
_cross_gramian = jax.jit(jaxjd.cross_gramian)


def _make(method: str, hyper: dict[str, Any], static: dict[str, Any]) -> jaxjd.Weighting:
    factory = FACTORIES.get(method) or getattr(weightings, method.removesuffix("_sequence"))
    return factory(**hyper, **static)


@functools.cache
def _compiled(method: str, static: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    """The jitted call of a method, for every matrix of a shape and for calls in a row.

    It takes the statistic, the state, the traced hyper-parameters and what was drawn, and returns
    the output and the next state.
    """

    def call(stat: jax.Array, state: Any, hyper: dict[str, jax.Array], drawn: Any) -> Any:
        if method == "pcgrad":
            return project_conflicts(stat, drawn), state
        if method == "gradvac":
            return vaccinate(stat, state, drawn, hyper["beta"], hyper["eps"])
        if method == "graddrop":
            from jaxjd.aggregators._graddrop import drop_signs

            return drop_signs(stat, drawn, hyper.get("leak")), state
        if method == "trimmed_mean":
            aggregator = jaxjd.trimmed_mean(**dict(static))
            return aggregator.update(stat, aggregator.init(stat[0]))
        return _make(method, hyper, dict(static)).update(stat, state)

    return jax.jit(call)


def _project(method: str, gramian: jax.Array, hyper: dict[str, jax.Array]) -> Any:
    """The weights, and the projection of every row, which is looked at as well."""
    rows = []

    def projector(U: jax.Array, G: jax.Array) -> jax.Array:
        rows.append(_projector(False)(U, G))
        return rows[0]

    weights, _ = getattr(weightings, method)(projector=projector, **hyper).update(gramian, ())
    return weights, rows[0]


def _initial(method: str, m: int, width: int, hyper: dict[str, jax.Array], golden: Golden) -> Any:
    dtype = jax.tree.leaves(hyper)[0].dtype if hyper else jnp.zeros(()).dtype
    if method == "gradvac":
        return jnp.zeros((m, m), dtype)
    if method in ("pcgrad", "graddrop", "trimmed_mean", "upgrad", "dualproj"):
        return ()
    return _make(method, hyper, golden.static).init(m, jnp.zeros((width,), dtype))


def _drawn(golden: Golden, case: Case, width: int) -> Any:
    """What the method would draw, one leading index per call."""
    arrays = load()
    if golden.method == "pcgrad":
        return arrays[f"orders/pcgrad/{case.name}"][None].astype(int)
    if golden.method == "graddrop":
        draws = arrays[f"uniforms/{case.name}"][None]
        return np.pad(draws, ((0, 0), (0, width - draws.shape[1])))
    if golden.method == "gradvac":
        number = SEQUENCES.index(case.name.partition(",")[0])
        return arrays[f"orders/gradvac/{case.num_tasks}"][number].astype(int)
    return ()


@functools.cache
def _width(m: int) -> int:
    """Columns of zeros change nothing: one shape for all matrices of m rows."""
    widths = [J.shape[1] for J in jacobians().values() if len(J) == m]
    if m in SEQUENCE_TASKS:
        widths.append(load()[f"pairs/{m}"].shape[-1])
    return max(widths)


def _run(golden: Golden, case: Case, dtype: str) -> Any:
    """Calls the method as often as the case asks for; the outputs have a leading axis of calls."""
    method, m, width = golden.method, case.num_tasks, _width(case.num_tasks)
    cast = lambda array: jnp.asarray(np.asarray(array, np.float64), DTYPES[dtype])
    hyper = {key: cast(value) for key, value in golden.values(m).items()}
    state = _initial(method, m, width, hyper, golden)
    drawn = _drawn(golden, case, width)
    outputs = []
    for k, matrices in enumerate(case.inputs):
        padding = [(0, 0)] * (matrices.ndim - 1) + [(0, width - matrices.shape[-1])]
        J = cast(np.pad(matrices, padding))
        first = J[0] if J.ndim == 3 else J
        if golden.stat == "cross":
            stat = _cross_gramian(J[0], J[1])
        else:
            stat = first if golden.stat == "jacobian" else _gramian(first)
        if method in ("upgrad", "dualproj"):
            output = _project(method, stat, hyper)
        elif method in PROJECTING:
            output, state = _make(method, hyper, golden.static).update(stat, state)
        else:
            now = jax.tree.map(lambda draws, k=k: draws[k], drawn)
            now = cast(now) if method == "graddrop" else now
            run = _compiled(method.removesuffix("_sequence"), tuple(golden.static.items()))
            output, state = run(stat, state, hyper, now)
        assert all(leaf.dtype == DTYPES[dtype] for leaf in jax.tree.leaves(output))
        outputs.append(jax.tree.map(lambda x: np.asarray(x, np.float64), output))
    result = jax.tree.map(lambda *calls: np.stack(calls), *outputs)
    return result[:, : case.inputs.shape[-1]] if golden.measure == "entries" else result


@functools.cache
def _ours(golden: Golden, dtype: str, m: int) -> dict[str, Any]:
    with jax.enable_x64(dtype == "float64"):
        return {case.name: _run(golden, case, dtype) for case in cases(golden, (m,))}


def ours(golden: Golden, dtype: str, tasks: tuple[int, ...] = TASKS) -> dict[str, Any]:
    """What jaxjd returns for each case, in float64: weights, or updates of what has none.

    For the projections it is a pair: the weights, and the weights of every projected row.
    """
    return {name: output for m in tasks for name, output in _ours(golden, dtype, m).items()}


def weights_of(output: Any) -> np.ndarray:
    return output[0] if isinstance(output, tuple) else output


def _worst(golden: Golden, case: Case, found: np.ndarray) -> float:
    calls = zip(case.jacobians, found, case.wanted, strict=True)
    return max(error(golden, *call) for call in calls)


def errors(
    golden: Golden, dtype: str, tasks: tuple[int, ...] = TASKS
) -> Iterator[tuple[Case, float]]:
    """The error of every case that has a solution."""
    found = ours(golden, dtype, tasks)
    for case in cases(golden, tasks):
        if case.exists:
            yield case, _worst(golden, case, weights_of(found[case.name]))


def distance(golden: Golden, case: Case) -> float:
    """The error of TorchJD's output in float64; infinite where it failed."""
    theirs = case.theirs
    if golden.method == "conflict_free" and case.exists:
        size = np.linalg.norm(case.wanted[0] @ case.jacobians[0])
        return float(np.linalg.norm(theirs[0] - case.wanted[0] @ case.jacobians[0]) / (size or 1))
    return _worst(golden, case, theirs)


def residual(golden: Golden, case: Case, found: Any) -> tuple[float, float]:
    """How far one call's result is from the optimality conditions of its problem.

    Returns the residual and the size that it is relative to, both computed in float64.

    - ``projection``: for the projection ``d = J^T v`` of ``J^T u``, and unit rows: of
      ``v - u >= 0``, ``<g_i, d> >= 0``, and one of the two being zero, the largest
      violation ``|min(v_i - u_i, <g_i, d>)|``; relative to ``sum_i |v_i| |g_i|``, over which
      float32 spreads its rounding.
    - ``min-norm``: the same of ``w >= 0`` and ``<g_i, d> >= |d|^2``, relative to
      ``sum_i w_i |g_i|``; and of the sum of the weights, which is one.
    - ``fair``: the largest ``|x_i (G x)_i^alpha - 1|``.
    """
    J = case.jacobians[0]
    lengths = row_lengths(J)
    inverse = np.where(lengths > 0, 1 / np.where(lengths > 0, lengths, 1), 0)
    if golden.problem == "projection":
        _, V = found
        pref = golden.values(len(J))["pref_vector"]
        U = np.diag(pref) if golden.method == "upgrad" else pref[None]
        worst = 0.0
        for u, v in zip(U, V.reshape(U.shape), strict=True):
            gain, slack = (v - u) * lengths, (J @ (J.T @ v)) * inverse
            size = np.abs(v) @ lengths
            violation = np.max(np.abs(np.minimum(gain, slack)))
            worst = max(worst, violation / size if size > 0 else violation)
        return worst
    weights = weights_of(found)[0]
    if golden.problem == "min-norm":
        d = weights @ J
        size = weights @ lengths
        slack = (J @ d) * inverse - d @ d * inverse
        violation = np.max(np.abs(np.minimum(weights * lengths, slack))[lengths > 0], initial=0)
        relative = violation / size if size > 0 else violation
        return max(relative, abs(np.sum(weights) - 1), -np.min(weights))
    assert golden.problem == "fair"
    power = golden.values(len(J)).get("alpha", 1.0)
    products = J @ (J.T @ weights)
    return float(np.max(np.abs(weights ** (1 / power) * products - 1)))
