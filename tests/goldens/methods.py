"""What is held to what: one row per method and hyper-parameters, for the script and the tests."""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Golden:
    """A method with hyper-parameters, its oracle and its measure of error.

    Attributes:
      name: The public name with the hyper-parameters that are not defaults; the test's id.
      method: The public name in jaxjd.
      oracle: What it is held to: ``"exact"`` (tests/goldens/oracles.py) or ``"TorchJD"``.
      measure: How errors are measured; see `error`.
      hyper: Hyper-parameters that are traced: numbers, or functions of the number of tasks.
      static: Those that are not.
      kind: ``"matrix"`` for one call on each matrix, ``"sequence"`` for calls in a row.
      stat: What it reads: ``"gramian"``, ``"jacobian"`` or ``"cross"``.
      at_least: The smallest number of tasks that it takes.
      problem: The optimality conditions that the result is checked against, see `residual`.
      normwise: Whether rounding is relative to the largest entry of the Gramian, as in an
        eigendecomposition, and not entry by entry, relative to the lengths of the two rows.
      fixed_rank: Whether eigenvalues that are zero to rounding are left out, so that rounding does
        not change the rank.
      tasks: The numbers of tasks that are looked at; all if empty.
    """

    name: str
    method: str
    oracle: str
    measure: str
    hyper: dict[str, Any] = dataclasses.field(default_factory=dict)
    static: dict[str, Any] = dataclasses.field(default_factory=dict)
    kind: str = "matrix"
    stat: str = "gramian"
    at_least: int = 1
    problem: str | None = None
    normwise: bool = False
    fixed_rank: bool = False
    tasks: tuple[int, ...] = ()

    def values(self, m: int) -> dict[str, Any]:
        """The traced hyper-parameters for `m` tasks."""
        return {key: value(m) if callable(value) else value for key, value in self.hyper.items()}

    def applies(self, J: np.ndarray) -> bool:
        m = J.shape[-2]
        return m >= self.at_least and (not self.tasks or m in self.tasks)


def uniform(m: int) -> np.ndarray:
    return np.full(m, 1 / m)


def rising(m: int) -> np.ndarray:
    """Preferences from 1/8 to 2, exactly representable; none is zero."""
    return np.float32(0.125) + np.arange(m, dtype=np.float32) * np.float32(1.875 / max(m - 1, 1))


def one_hot(m: int) -> np.ndarray:
    """The preference for the first task alone."""
    return (np.arange(m) == 0).astype(np.float32)


def tau_vector(m: int) -> np.ndarray:
    """Fractions for the secondary objectives."""
    return np.linspace(0, 0.5, m - 1).astype(np.float32)


def ones(m: int) -> np.ndarray:
    return np.ones(m)


def _rows() -> list[Golden]:
    rows: list[Golden] = []

    def add(name: str, method: str, oracle: str, measure: str, **fields: Any) -> None:
        rows.append(Golden(name, method, oracle, measure, **fields))

    add("mean", "mean", "TorchJD", "weights")
    add("sum", "sum", "TorchJD", "weights")
    add("constant", "constant", "TorchJD", "weights", hyper={"weights": rising})

    for method in ("upgrad", "dualproj"):
        for label, pref in (("", uniform), ("rising", rising), ("one-hot", one_hot)):
            add(
                f"{method}({label})" if label else method,
                method,
                "exact",
                "projection",
                hyper={"pref_vector": pref},
                problem="projection",
            )
        add(
            f"{method}(regularized)",
            f"{method}_regularized",
            "TorchJD",
            "projection",
            hyper={"pref_vector": uniform},
            tasks=(2, 5, 20),
        )
    add("mgda", "mgda", "exact", "min-norm", problem="min-norm")
    for c in (0.0, 0.1, 0.5, 1.0, 2.0):
        add(f"cagrad(c={c})", "cagrad", "exact", "cagrad", hyper={"c": c}, problem="cagrad")
    for label, pref in (("", uniform), ("rising", rising)):
        for mode in ("min", "median", "rmse"):
            inside = ", ".join(filter(None, [label, mode]))
            add(
                f"aligned_mtl({inside})",
                "aligned_mtl",
                "TorchJD",
                "weights",
                hyper={"pref_vector": pref},
                static={"scale_mode": mode},
                normwise=True,
                fixed_rank=True,
            )
    add("imtl_g", "imtl_g", "exact", "rows", fixed_rank=True)
    for label, pref in (("", ones), ("rising", rising)):
        add(
            f"conflict_free({label})" if label else "conflict_free",
            "conflict_free",
            "exact",
            "direction",
            hyper={"pref_vector": pref},
            fixed_rank=True,
        )
    for f, k in ((0, 1), (1, 1), (1, 4), (2, 3)):
        add(
            f"krum({f}, {k})",
            "krum",
            "TorchJD",
            "krum",
            static={"n_byzantine": f, "n_selected": k},
            at_least=max(f + 3, k),
        )
    for trim in (0, 1, 2):
        add(
            f"trimmed_mean({trim})",
            "trimmed_mean",
            "TorchJD",
            "entries",
            static={"trim_number": trim},
            stat="jacobian",
            at_least=2 * trim + 1,
        )
    add("graddrop", "graddrop", "TorchJD", "entries", stat="jacobian")
    add(
        "graddrop(leak)",
        "graddrop",
        "TorchJD",
        "entries",
        hyper={"leak": lambda m: rising(m) / 2},
        stat="jacobian",
    )
    add("pcgrad", "pcgrad", "TorchJD", "rows")
    for alpha in (0.2, 0.5, 1.0, 2.0, 5.0):
        add(
            f"fairgrad(alpha={alpha})",
            "fairgrad",
            "exact",
            "ratio",
            hyper={"alpha": alpha},
            problem="fair",
        )
    for max_norm in (1.0, 0.0):
        add(
            f"nash_mtl(max_norm={max_norm})",
            "nash_mtl",
            "exact",
            "ratio",
            hyper={"max_norm": max_norm},
            problem="fair",
        )
    for label, tau in (("", lambda m: np.full(m - 1, 0.02)), ("tau vector", tau_vector)):
        add(
            f"pcd({label})" if label else "pcd",
            "pcd",
            "exact",
            "primary",
            hyper={"tau": tau, "beta": 0.999, "eps": 1e-8},
        )

    def sequence(name: str, method: str, oracle: str, measure: str, **fields: Any) -> None:
        rows.append(Golden(name, method, oracle, measure, kind="sequence", **fields))

    for gamma, rho in ((0.1, 0.1), (0.001, 0.0), (0.02, 1.0)):
        sequence(
            f"modo(gamma={gamma}, rho={rho})",
            "modo",
            "TorchJD",
            "weights",
            hyper={"gamma": gamma, "rho": rho},
            stat="cross",
        )
    sequence(
        "sdmgrad",
        "sdmgrad",
        "TorchJD",
        "weights",
        hyper={"lr": 10.0, "momentum": 0.5, "lambda_": 0.3, "pref_vector": uniform},
        static={"n_iter": 20},
        stat="cross",
    )
    sequence(
        "sdmgrad(lr=0.1, momentum=0.9, n_iter=7, lambda_=1, rising)",
        "sdmgrad",
        "TorchJD",
        "weights",
        hyper={"lr": 0.1, "momentum": 0.9, "lambda_": 1.0, "pref_vector": lambda m: rising(m) / m},
        static={"n_iter": 7},
        stat="cross",
    )
    for steps, eta in ((0, 1.0), (1, 1.0), (2, 1.0), (3, 0.25)):
        sequence(
            f"excess_mtl(n_warmup_steps={steps}, robust_step_size={eta})",
            "excess_mtl",
            "TorchJD",
            "weights",
            hyper={"robust_step_size": eta},
            static={"n_warmup_steps": steps},
            stat="jacobian",
        )
    for label, alpha, initial in (("imtl_g", 0.9, None), ("aligned_mtl", 0.3, rising)):
        sequence(
            f"cr_mogm({label}, {alpha}{', initial' if initial else ''})",
            f"cr_mogm_{label}",
            "TorchJD",
            "weights",
            hyper={"alpha": alpha} | ({"initial_weights": initial} if initial else {}),
            normwise=label == "aligned_mtl",
        )
    sequence("cr_mogm(upgrad, schedule)", "cr_mogm_upgrad", "TorchJD", "weights")
    sequence("gradvac(eps=0)", "gradvac", "TorchJD", "rows", hyper={"beta": 0.5, "eps": 0.0})
    sequence("gradvac", "gradvac", "exact", "rows", hyper={"beta": 0.5, "eps": 1e-8})
    sequence("gradvac(beta=0.1)", "gradvac", "exact", "rows", hyper={"beta": 0.1, "eps": 1e-8})
    for max_norm, every in ((1.0, 3), (0.5, 1), (0.0, 4)):
        sequence(
            f"nash_mtl(max_norm={max_norm}, update_weights_every={every})",
            "nash_mtl_sequence",
            "exact",
            "ratio",
            hyper={"max_norm": max_norm},
            static={"update_weights_every": every},
        )
    for label, tau, beta, eps in (
        ("", lambda m: np.full(m - 1, 0.02), 0.999, 1e-8),
        ("tau vector, beta=0.9, eps=0", tau_vector, 0.9, 0.0),
        ("tau=0.3, beta=0.5, eps=0.001", lambda m: np.full(m - 1, 0.3), 0.5, 1e-3),
    ):
        sequence(
            f"pcd(calls, {label})" if label else "pcd(calls)",
            "pcd_sequence",
            "exact",
            "primary",
            hyper={"tau": tau, "beta": beta, "eps": eps},
        )
    return rows


GOLDENS = _rows()


def schedule(k: Any) -> Any:
    """The coefficients of the scheduled CR-MOGM, at call `k` from 0."""
    return 1 - 0.5**k


def seed_of(*parts: str) -> int:
    """A seed that tells apart what is drawn for one method on one matrix."""
    return zlib.crc32("/".join(parts).encode())


def row_lengths(J: np.ndarray) -> np.ndarray:
    largest = np.max(np.abs(J), axis=-1, keepdims=True)
    scaled = J / np.where(largest > 0, largest, 1)
    return largest[..., 0] * np.sqrt(np.sum(scaled * scaled, axis=-1))


def _norm(vector: np.ndarray) -> float:
    return float(row_lengths(np.asarray(vector)[None])[0])


def is_regular(J: np.ndarray) -> bool:
    """Whether the Gramian is regular, so that weights are unique."""
    lengths = row_lengths(J)
    units = J / np.where(lengths > 0, lengths, 1)[:, None]
    return np.linalg.matrix_rank(units) == len(J)


def krum_scores(J: np.ndarray, n_byzantine: int) -> np.ndarray:
    """The sums of the distances to the closest rows, whose lowest are selected."""
    J = np.asarray(J, np.longdouble)
    distances = np.sqrt(np.sum((J[:, None] - J[None]) ** 2, axis=2))
    return np.sum(np.sort(distances, axis=1)[:, 1 : len(J) - n_byzantine - 1], axis=1)


def error(golden: Golden, J: np.ndarray, found: np.ndarray, wanted: np.ndarray) -> float:
    """The error of one call's output, in float64; relative to a size of the wanted one.

    The measures, with the rows ``g_i``, the weights `w`, and the update ``J^T w``:

    - ``weights``: the largest difference of a weight, to the largest weight;
    - ``rows``: the same for ``|g_i| w_i``;
    - ``ratio``: the largest relative difference of a weight, each to itself;
    - ``direction``: the difference of the updates, to the update;
    - ``projection``, ``min-norm``, ``cagrad``, ``primary``: as ``rows`` if the Gramian is regular;
      otherwise weights are not unique, and it is the difference of the updates: to
      ``sum_i p_i |g_i|``, to the shortest row, to ``(1 + c) |g_0|``, and to ``|g_1|``;
    - ``krum``: rows may have the same score: how much higher the mean score of the selected rows
      is, to the highest score;
    - ``entries``: the largest difference of an entry of the update, to the largest sum of a
      column's absolute values.
    """
    found, wanted = (np.asarray(x, np.longdouble) for x in (found, wanted))
    if not np.isfinite(found).all():
        return np.inf
    difference = found - wanted

    def relative(numerator: Any, denominator: Any) -> float:
        return float(numerator / denominator if denominator > 0 else numerator)

    if golden.measure == "entries":
        return relative(np.max(np.abs(difference)), np.max(np.sum(np.abs(J), axis=0)))
    if golden.measure == "krum":
        scores = krum_scores(J, golden.static["n_byzantine"])
        num = golden.static["n_selected"]
        valid = np.all((found == 0) | (np.abs(found * num - 1) < 1e-6)) and np.sum(found > 0) == num
        return relative((found - wanted) @ scores, np.max(scores)) if valid else np.inf
    if golden.measure == "weights":
        return relative(np.max(np.abs(difference)), np.max(np.abs(wanted)))
    if golden.measure == "ratio":
        return float(np.max(np.abs(difference / wanted)))
    if measures_update(golden, J):
        return relative(_norm(difference @ J), size_of_update(golden, J, wanted))
    # Weights of zero rows are compared as they are.
    lengths = row_lengths(J)
    lengths = np.where(lengths > 0, lengths, 1)
    return relative(np.max(np.abs(difference) * lengths), np.max(np.abs(wanted) * lengths))


def measures_update(golden: Golden, J: np.ndarray) -> bool:
    """Whether the update is compared, and not the weights."""
    if golden.measure in ("projection", "min-norm", "cagrad", "primary"):
        return not is_regular(J)
    return golden.measure == "direction"


def size_of_update(golden: Golden, J: np.ndarray, wanted: np.ndarray) -> float:
    """What the error of an update is relative to; the longest row where that is zero."""
    lengths = row_lengths(J)
    if golden.measure == "direction":
        size = _norm(np.asarray(wanted) @ J)
    elif golden.measure == "projection":
        size = golden.values(len(J))["pref_vector"] @ lengths
    elif golden.measure == "min-norm":
        size = np.min(lengths[lengths > 0], initial=np.inf)
        size = size if np.isfinite(size) else 0
    elif golden.measure == "cagrad":
        size = (1 + golden.values(len(J))["c"]) * _norm(uniform(len(J)) @ J)
    else:
        assert golden.measure == "primary"
        size = lengths[0]
    return float(size if size > 0 else np.max(lengths))


def rounding(golden: Golden, J: np.ndarray, wanted: np.ndarray, dtype: str) -> float:
    """The error that rounding the exact weights to the dtype may already make."""
    eps = float(np.finfo(dtype).eps)
    if not measures_update(golden, J):
        return eps
    size = size_of_update(golden, J, wanted)
    return eps * float(np.abs(wanted) @ row_lengths(J)) / size if size > 0 else eps


TOLERANCE = {"float32": 2e-5, "float64": 1e-9}
SAFETY = 8
"""How many roundings of the statistic's entries a method may commit: about two each in the
products, in their scaling to unit rows, in a factorization, and in the solution."""
HOPELESS = 0.1
"""From this bound on, the oracle says nothing about the dtype's result."""


def bound(change: float, rounded: float, dtype: str) -> float:
    """The error that is allowed: the tolerance, or what the conditioning permits.

    `change` is the change of the exact output, measured like the error, when the entries of the
    statistic change by one unit of rounding of the dtype: the largest over perturbations that move
    the Gramian's smallest eigenvalue or its eigenvector most, and a random one. `rounded` is the
    error of the exact weights in the dtype.
    """
    return max(TOLERANCE[dtype], SAFETY * change, SAFETY * rounded)
