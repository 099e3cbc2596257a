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


@functools.cache
def cases(golden: Golden) -> list[Case]:
    arrays, result = load(), []
    if golden.kind == "matrix":
        inputs = [(name, J[None]) for name, J in jacobians().items() if golden.applies(J)]
    else:
        inputs = [
            (f"{label}, {m} tasks", pairs)
            for m in SEQUENCE_TASKS
            for label, pairs in zip(
                ("plain", "badly scaled", "shrinking"),
                arrays[f"pairs/{m}"].astype(np.float64),
                strict=True,
            )
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
    "upgrad_regularized": lambda **kwargs: weightings.upgrad(
        projector=regularized_projector(), **kwargs
    ),
    "dualproj_regularized": lambda **kwargs: weightings.dualproj(
        projector=regularized_projector(), **kwargs
    ),
    "cr_mogm_imtl_g": lambda **kwargs: weightings.cr_mogm(weightings.imtl_g(), **kwargs),
    "cr_mogm_aligned_mtl": lambda **kwargs: weightings.cr_mogm(weightings.aligned_mtl(), **kwargs),
    "cr_mogm_upgrad": lambda: weightings.cr_mogm(
        weightings.upgrad(projector=regularized_projector()), schedule
    ),
}


@functools.cache
def _compiled(method: str, static: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    """The jitted run of a batch of sequences of calls.

    It takes the inputs ``(batch, calls, m, n)``, or pairs ``(batch, calls, 2, m, n)``, the traced
    hyper-parameters and what was drawn, and returns what each call returns.
    """

    def make(hyper: dict[str, jax.Array]) -> jaxjd.Weighting:
        factory = FACTORIES.get(method) or getattr(weightings, method.removesuffix("_sequence"))
        return factory(**hyper, **dict(static))

    def call(inputs: jax.Array, state: Any, hyper: dict[str, jax.Array], drawn: Any) -> Any:
        first = inputs[0] if inputs.ndim == 3 else inputs
        if method == "pcgrad":
            return project_conflicts(jaxjd.gramian(inputs), drawn), state
        if method == "gradvac":
            return vaccinate(jaxjd.gramian(first), state, drawn, hyper["beta"], hyper["eps"])
        if method == "graddrop":
            from jaxjd.aggregators._graddrop import drop_signs

            return drop_signs(inputs, drawn, hyper.get("leak")), state
        if method == "trimmed_mean":
            aggregator = jaxjd.trimmed_mean(**dict(static))
            return aggregator.update(inputs, aggregator.init(inputs[0]))
        if method in ("upgrad", "dualproj"):
            # The projection of every row is looked at as well.
            rows = []

            def projector(U: jax.Array, G: jax.Array) -> jax.Array:
                rows.append(exact_projector()(U, G))
                return rows[0]

            weighting = getattr(weightings, method)(projector=projector, **hyper)
            weights, state = weighting.update(jaxjd.gramian(inputs), state)
            return (weights, rows[0]), state
        weighting = make(hyper)
        if isinstance(weighting, jaxjd.JacobianWeighting):
            stat = first
        elif isinstance(weighting, jaxjd.CrossGramianWeighting):
            stat = jaxjd.cross_gramian(inputs[0], inputs[1])
        else:
            stat = jaxjd.gramian(first)
        return weighting.update(stat, state)

    def initial(inputs: jax.Array, hyper: dict[str, jax.Array]) -> Any:
        m, params = inputs.shape[-2], inputs[(0,) * (inputs.ndim - 1)]
        if method == "gradvac":
            return jnp.zeros((m, m), inputs.dtype)
        if method in ("pcgrad", "graddrop", "trimmed_mean", "upgrad", "dualproj"):
            return ()
        return make(hyper).init(m, params)

    @jax.jit
    def run(inputs: jax.Array, hyper: dict[str, jax.Array], drawn: Any) -> Any:
        def sequence(inputs: jax.Array, drawn: Any) -> Any:
            state = initial(inputs, hyper)
            if len(inputs) == 1:
                drawn = jax.tree.map(lambda x: x[0], drawn)
                output, _ = call(inputs[0], state, hyper, drawn)
                return jax.tree.map(lambda x: x[None], output)

            def step(state: Any, now: Any) -> Any:
                output, state = call(now[0], state, hyper, now[1])
                return state, output

            return jax.lax.scan(step, state, (inputs, drawn))[1]

        return jax.vmap(sequence)(inputs, drawn)

    return run


def _drawn(golden: Golden, group: list[Case], width: int) -> Any:
    arrays = load()
    if golden.method == "pcgrad":
        return np.stack([arrays[f"orders/pcgrad/{case.name}"][None].astype(int) for case in group])
    if golden.method == "graddrop":
        draws = [arrays[f"uniforms/{case.name}"][None] for case in group]
        return np.stack([np.pad(draw, ((0, 0), (0, width - draw.shape[1]))) for draw in draws])
    if golden.method == "gradvac":
        return arrays[f"orders/gradvac/{group[0].num_tasks}"].astype(int)
    return ()


@functools.cache
def ours(golden: Golden, dtype: str) -> dict[str, Any]:
    """What jaxjd returns for each case, in float64: weights, or updates of what has none.

    For the projections it is a pair: the weights, and the weights of every projected row.
    """
    result = {}
    groups: dict[int, list[Case]] = {}
    for case in cases(golden):
        groups.setdefault(case.num_tasks, []).append(case)
    with jax.enable_x64(dtype == "float64"):
        run = _compiled(golden.method, tuple(golden.static.items()))
        for m, group in groups.items():
            # Columns of zeros change nothing: one shape for all matrices of m rows.
            width = max(case.inputs.shape[-1] for case in group)
            inputs = [
                np.pad(
                    case.inputs,
                    [(0, 0)] * (case.inputs.ndim - 1) + [(0, width - case.inputs.shape[-1])],
                )
                for case in group
            ]
            hyper = {
                key: jnp.asarray(np.asarray(value, np.float64), DTYPES[dtype])
                for key, value in golden.values(m).items()
            }
            drawn = _drawn(golden, group, width)
            if golden.method == "graddrop":
                drawn = jnp.asarray(drawn, DTYPES[dtype])
            outputs = run(jnp.asarray(np.stack(inputs), DTYPES[dtype]), hyper, drawn)
            assert all(leaf.dtype == DTYPES[dtype] for leaf in jax.tree.leaves(outputs))
            for k, case in enumerate(group):
                output = jax.tree.map(lambda x, k=k: np.asarray(x[k], np.float64), outputs)
                if golden.measure == "entries":
                    output = output[:, : case.inputs.shape[-1]]
                result[case.name] = output
    return result


def weights_of(output: Any) -> np.ndarray:
    return output[0] if isinstance(output, tuple) else output


def _worst(golden: Golden, case: Case, found: np.ndarray) -> float:
    calls = zip(case.jacobians, found, case.wanted, strict=True)
    return max(error(golden, *call) for call in calls)


def errors(golden: Golden, dtype: str) -> Iterator[tuple[Case, float]]:
    """The error of every case that has a solution."""
    found = ours(golden, dtype)
    for case in cases(golden):
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
