"""Writes parity.npz: ``python -m tests.goldens.make``, from the root of the repository.

Needs torchjd[full]==0.18.0, quadprog, scipy and cvxpy. It holds, in float64 unless said otherwise:

- ``names``, ``families``: of the matrices, in the order in which everything is flattened;
- ``shapes``, ``entries``: the matrices, shape ``(k, 2)`` and float32 entries, flattened;
- ``stationary``: whether a convex combination of the rows is zero;
- ``pairs/<m>``: sequences of pairs of Jacobians, float32, ``(sequences, calls, 2, m, n)``;
- ``wanted/<golden>``: what jaxjd is held to: weights, or updates of what has no weights; NaN where
  nothing exists. Flattened over the matrices that have enough tasks; sequences are flattened over
  3 and 20 tasks, each ``(sequences, calls, m)``;
- ``torchjd/<golden>``: what TorchJD returned, the same way;
- ``change/<golden>``: how much the exact output changes, measured like an error, when the statistic
  changes by one rounding of its entries in float32 and float64, shape ``(2, cases)``;
- ``orders/..``, ``uniforms/..``: what TorchJD drew;
- ``clarabel``: the optimal value of CAGrad's problem by Clarabel, ``(matrices, settings)``;
- ``random/levels``, ``random/quantiles``: of one of three weights of TorchJD's ``Random``.
"""

from __future__ import annotations

import functools
import pathlib
import sys
import time

import cvxpy as cp
import numpy as np

from tests.goldens import matrices, oracles, originals
from tests.goldens.methods import GOLDENS, Golden, error, seed_of

PATH = pathlib.Path(__file__).parent / "parity.npz"
PROBES = 3
# One rounding of float32; for float64, from it and a smaller change, by a power law: an oracle
# that is itself computed in float64 cannot resolve less.
STEPS = (2.0**-23, 2.0**-40)


def perturbed(golden: Golden, stats: np.ndarray, step: float, probe: int) -> np.ndarray:
    """Perturbs the statistic: every entry relative to the largest value that it could have.

    The first two perturbations of a Gramian are the worst for the smallest eigenvalue that is not
    zero, and its eigenvector; the third and those of other statistics are random.
    """
    rng = np.random.default_rng(probe)
    if golden.stat == "jacobian":
        return stats * (1 + step * rng.uniform(-1, 1, stats.shape))
    if golden.stat == "cross":
        sizes = np.sqrt(np.max(np.abs(stats), axis=2, keepdims=True))
        sizes = np.maximum(sizes, np.sqrt(np.max(np.abs(stats), axis=1))[:, :, None])
        noise = step * rng.uniform(-1, 1, stats.shape)
        return stats + noise * sizes * sizes.transpose(0, 2, 1)
    options = step, probe, golden.normwise, golden.fixed_rank
    return np.stack([_perturbed_factor(J.tobytes(), J.shape, *options) for J in stats])


@functools.cache
def _perturbed_factor(
    data: bytes, shape: tuple, step: float, probe: int, normwise: bool, fixed_rank: bool
) -> np.ndarray:
    """A factor of the perturbed Gramian, or of the closest semi-definite matrix."""
    J = np.frombuffer(data).reshape(shape)
    rows = oracles.Rows(J)
    matrix, scales = rows.cosines.astype(np.float64), rows.lengths.astype(np.float64)
    if normwise:
        largest = np.max(scales) or 1.0
        matrix, scales = (J / largest) @ (J / largest).T, np.full(len(J), largest)
    values, vectors = np.linalg.eigh(matrix)
    first = np.argmax(values > 1e-12 * values[-1])
    signs, null = np.sign(vectors[:, first]), np.sign(vectors[:, 0])
    worst = np.outer(signs, signs)
    # The smallest eigenvalue but zero, the way it mixes with the null space if there is one.
    other = -worst if first == 0 else (np.outer(signs, null) + np.outer(null, signs)) / 2
    random = np.random.default_rng(probe).uniform(-1, 1, matrix.shape)
    noise = [worst, other, np.tril(random) + np.tril(random, -1).T][probe]
    if fixed_rank:
        basis = vectors[:, first:] if values[-1] > 0 else vectors[:, :0]
        noise = basis @ (basis.T @ noise @ basis) @ basis.T
    values, vectors = np.linalg.eigh(matrix + step * noise)
    return vectors * np.sqrt(np.maximum(values, 0)) * scales[:, None]


def exact(golden: Golden, stats: np.ndarray, orders: np.ndarray | None, missing: bool):
    """The exact weights call by call; NaN where there are none."""
    m = stats.shape[1]
    hyper = {k: np.asarray(v, np.float64) for k, v in golden.values(m).items()}
    if golden.method in ("fairgrad", "nash_mtl", "nash_mtl_sequence") and missing:
        return np.full(stats.shape[:2], np.nan)
    match golden.method:
        case "gradvac":
            return oracles.gradvac(stats, orders, **hyper)
        case "pcd" | "pcd_sequence":
            return oracles.pcd(stats, **hyper)
        case "nash_mtl" | "nash_mtl_sequence":
            every = golden.static.get("update_weights_every", 1)
            return oracles.nash_mtl(stats, hyper["max_norm"], every)
    solve = getattr(oracles, golden.method)
    return np.stack([solve(J, **hyper) for J in stats])


def worst(golden: Golden, jacobians: np.ndarray, found: np.ndarray, wanted: np.ndarray) -> float:
    """The largest error over the calls."""
    errors = [error(golden, *call) for call in zip(jacobians, found, wanted, strict=True)]
    return max(errors)


def change(golden: Golden, jacobians, stats, wanted, solve) -> tuple[float, float]:
    """The change of the output for one rounding in float32 and in float64."""
    try:
        found = [
            max(
                worst(golden, jacobians, solve(perturbed(golden, stats, step, probe)), wanted)
                for probe in range(PROBES)
            )
            for step in STEPS
        ]
    except AssertionError:  # The perturbed problem is beyond the oracle.
        return np.inf, np.inf
    coarse, fine = found
    # Between a jump (0) and a smooth output (1).
    if min(coarse, fine) <= 0:
        return coarse, fine
    order = np.clip(np.log(coarse / fine) / np.log(STEPS[0] / STEPS[1]), 0, 1)
    return coarse, fine * (2.0**-52 / STEPS[1]) ** order


def clarabel(J: np.ndarray, c: float) -> float:
    """The optimum of CAGrad's problem: the largest worst improvement in the ball."""
    rows = oracles.Rows(J)
    if not rows.nonzero.any():
        return 0.0
    short = rows.short * (rows.lengths / np.max(rows.lengths)).astype(np.float64)[:, None]
    mean = np.mean(short, axis=0)
    size = np.linalg.norm(mean)
    if size == 0 or c == 0:
        return float(np.min(short @ mean)) * float(np.max(rows.lengths)) ** 2
    d, worst_case = cp.Variable(short.shape[1]), cp.Variable()
    smallest = float(np.min(rows.lengths[rows.nonzero]) / np.max(rows.lengths))
    # In units of the mean gradient and the shortest row.
    problem = cp.Problem(
        cp.Maximize(worst_case),
        [short @ d / smallest >= worst_case, cp.norm(d - mean / size) <= c],
    )
    problem.solve(cp.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
    return float(problem.value) * size * smallest * float(np.max(rows.lengths)) ** 2


def main() -> None:
    cases = matrices.cases()
    sequences = matrices.sequences()
    stationary = np.array([oracles.stationary(J) for _, _, J in cases])
    for (name, family, _), is_stationary in zip(cases, stationary, strict=True):
        if family in ("strong", "weak", "zero"):
            assert is_stationary, name
        if family in ("regular", "free", "scale", "badly scaled", "nearly singular"):
            assert not is_stationary, name
    arrays: dict[str, np.ndarray] = {
        "names": np.array([name for name, _, _ in cases]),
        "families": np.array([family for _, family, _ in cases]),
        "shapes": np.array([J.shape for _, _, J in cases], np.int32),
        "entries": np.concatenate([J.ravel() for _, _, J in cases]).astype(np.float32),
        "stationary": stationary,
    }
    for m, pairs in sequences.items():
        arrays[f"pairs/{m}"] = pairs.astype(np.float32)
        arrays[f"orders/gradvac/{m}"] = np.stack(
            [
                originals.randperm_orders(
                    m, pairs.shape[1], seed_of("gradvac", str(m), str(k)), without_self=True
                )
                for k in range(len(pairs))
            ]
        ).astype(np.uint8)
    for name, _, J in cases:
        m, n = J.shape
        arrays[f"orders/pcgrad/{name}"] = originals.randperm_orders(
            m, 1, seed_of("pcgrad", name), without_self=False
        )[0].astype(np.uint8)
        arrays[f"uniforms/{name}"] = originals.uniforms(n, seed_of("graddrop", name))
    levels = np.linspace(0.05, 0.95, 19)
    arrays["random/levels"] = levels
    arrays["random/quantiles"] = originals.softmax_quantiles(3, levels)

    only = sys.argv[1:]
    if only:  # Recomputes some methods only.
        with np.load(PATH) as old:
            kept = dict(old)
        for key, value in arrays.items():
            same = np.array_equal(kept[key], value, equal_nan=value.dtype.kind == "f")
            assert same, f"{key} changed: write everything"
        arrays = kept
    for golden in GOLDENS:
        if only and golden.method not in only:
            continue
        start = time.perf_counter()
        wanted, theirs, changes = [], [], []
        if golden.kind == "matrix":
            inputs = [
                (J[None], J[None], name, missing)
                for (name, _, J), missing in zip(cases, stationary, strict=True)
                if golden.applies(J)
            ]
        else:
            inputs = []
            for m, pairs in sequences.items():
                for k, sequence in enumerate(pairs):
                    stats = sequence[:, 0]
                    if golden.stat == "cross":
                        stats = sequence[:, 0] @ sequence[:, 1].transpose(0, 2, 1)
                    inputs.append((sequence[:, 0], stats, (m, k), False))
        for jacobians, stats, name, missing in inputs:
            if golden.kind == "matrix":
                seed, orders = seed_of(golden.method, name), None
            else:
                seed = seed_of(golden.method, str(name[0]), str(name[1]))
                orders = arrays[f"orders/gradvac/{name[0]}"][name[1]]

            def solve(stats, golden=golden, orders=orders, missing=missing, seed=seed):
                if golden.oracle == "exact":
                    return exact(golden, stats, orders, missing)
                return originals.run(golden, stats, seed)

            try:
                result = solve(stats)
                moved = (np.nan, np.nan)
                if np.isfinite(result).all():
                    moved = change(golden, jacobians, stats, result, solve)
            except AssertionError as failure:
                print(f"  {golden.name} on {name}: {failure!r}")
                raise
            wanted.append(result)
            theirs.append(originals.run(golden, stats, seed))
            changes.append(moved)
        arrays[f"wanted/{golden.name}"] = np.concatenate(
            [np.asarray(w, np.float64).ravel() for w in wanted]
        )
        arrays[f"torchjd/{golden.name}"] = np.concatenate([t.ravel() for t in theirs])
        arrays[f"change/{golden.name}"] = np.array(changes, np.float32).T
        seconds = time.perf_counter() - start
        print(f"{golden.name}: {len(inputs)} cases, {seconds:.1f} s", flush=True)
    if not only or "cagrad" in only:
        settings = [golden.hyper["c"] for golden in GOLDENS if golden.method == "cagrad"]
        arrays["clarabel"] = np.array([[clarabel(J, c) for c in settings] for _, _, J in cases])
    np.savez_compressed(PATH, **arrays)
    print(f"{PATH}: {PATH.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
