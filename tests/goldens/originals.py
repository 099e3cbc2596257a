"""Runs TorchJD 0.18.0 in float64 on plain matrices."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
import torchjd
from torchjd import aggregation as A

from tests.goldens.methods import Golden, schedule

assert torchjd.__version__ == "0.18.0" if hasattr(torchjd, "__version__") else True

_EPSILON_FREE = 2.0**30
"""TorchJD adds absolute epsilons in methods that do not depend on the scale: on a Jacobian times
this, they are below rounding."""


def _tensor(x: Any) -> torch.Tensor:
    return torch.from_numpy(np.asarray(x, np.float64))


def _gramian(J: np.ndarray) -> torch.Tensor:
    return _tensor(J) @ _tensor(J).T


def randperm_orders(m: int, calls: int, seed: int, *, without_self: bool) -> np.ndarray:
    """The orders that TorchJD draws after ``torch.manual_seed(seed)``, shape ``(calls, m, m)``.

    PCGrad permutes all tasks and skips the task itself; GradVac permutes the others. For the latter
    the task itself is put first, where it is skipped.
    """
    torch.manual_seed(seed)
    orders = np.empty((calls, m, m), np.int64)
    for call in orders:
        for i in range(m):
            if without_self:
                others = np.delete(np.arange(m), i)
                call[i] = [i, *others[torch.randperm(m - 1).numpy()]]
            else:
                call[i] = torch.randperm(m).numpy()
    return orders


def uniforms(n: int, seed: int) -> np.ndarray:
    """The uniform numbers that TorchJD's GradDrop draws after ``torch.manual_seed(seed)``."""
    torch.manual_seed(seed)
    return torch.rand(n, dtype=torch.float64).numpy()


def softmax_quantiles(m: int, levels: np.ndarray, draws: int = 200_000) -> np.ndarray:
    """Quantiles of one weight of `Random`, shape like `levels`."""
    torch.manual_seed(0)
    weighting = A.RandomWeighting()
    matrix = torch.zeros(m, 1, dtype=torch.float64)
    weights = np.stack([weighting(matrix)[0].numpy() for _ in range(draws)])
    return np.quantile(weights, levels)


def _weighting(golden: Golden, m: int) -> Any:
    """The weighting, and how its input is made of a Jacobian."""
    hyper = {k: _tensor(v) if np.ndim(v) else float(v) for k, v in golden.values(m).items()}
    static = golden.static
    pref = {"pref_vector": hyper["pref_vector"]} if "pref_vector" in hyper else {}
    match golden.method:
        case "mean":
            return A.MeanWeighting()
        case "sum":
            return A.SumWeighting()
        case "constant":
            return A.ConstantWeighting(hyper["weights"])
        case "upgrad" | "upgrad_regularized":
            return A.UPGradWeighting(**pref)
        case "dualproj" | "dualproj_regularized":
            return A.DualProjWeighting(**pref)
        case "mgda":
            return A.MGDAWeighting()
        case "cagrad":
            return A.CAGradWeighting(c=hyper["c"])
        case "aligned_mtl":
            return A.AlignedMTLWeighting(**pref, **static)
        case "imtl_g":
            return A.IMTLGWeighting()
        case "krum":
            return A.KrumWeighting(**static)
        case "pcgrad":
            return A.PCGradWeighting()
        case "gradvac":
            return A.GradVacWeighting(**hyper)
        case "fairgrad":
            return A.FairGradWeighting(**hyper)
        case "nash_mtl" | "nash_mtl_sequence":
            return A.NashMTL(n_tasks=m, **hyper, **static).weighting
        case "pcd" | "pcd_sequence":
            return A.PCDWeighting(**hyper)
        case "modo":
            return A.MoDoWeighting(**hyper)
        case "sdmgrad":
            return A.SDMGradWeighting(**hyper, **static)
        case "excess_mtl":
            # By design, no warm-up means a baseline from the first call.
            steps = max(1, static["n_warmup_steps"])
            return A.ExcessMTLWeighting(**hyper, n_warmup_steps=steps)
        case "cr_mogm_imtl_g":
            return A.CRMOGMWeighting(A.IMTLGWeighting(), **hyper)
        case "cr_mogm_aligned_mtl":
            return A.CRMOGMWeighting(A.AlignedMTLWeighting(), **hyper)
        case "cr_mogm_upgrad":
            return A.CRMOGMWeighting(A.UPGradWeighting())
        case "conflict_free":
            return A.ConFIG(**pref)
        case "trimmed_mean":
            return A.TrimmedMean(**static)
        case "graddrop":
            return A.GradDrop(leak=hyper.get("leak"))
    raise ValueError(golden.method)


def run(golden: Golden, stats: np.ndarray, seed: int) -> np.ndarray:
    """TorchJD's output for the statistics call by call.

    `stats` has shape ``(calls, m, n)`` for a Jacobian each, or ``(calls, m, m)`` for a
    cross-Gramian. The result has shape ``(calls, m)``, or ``(calls, n)`` for what has no weights.
    """
    weighting = _weighting(golden, stats.shape[1])
    torch.manual_seed(seed)
    outputs = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for k, stat in enumerate(stats):
            if golden.method == "cr_mogm_upgrad":
                weighting.alpha = float(schedule(k))
            if golden.method == "excess_mtl":
                argument = _tensor(stat * _EPSILON_FREE)
            elif golden.method == "sdmgrad":
                argument = _tensor(stat * _EPSILON_FREE**2)
            elif (
                golden.stat == "cross"
                or isinstance(weighting, A.Aggregator)
                or golden.method.startswith("nash_mtl")
            ):
                argument = _tensor(stat)
            elif golden.stat == "gramian":
                argument = _gramian(stat)
            else:
                argument = _tensor(stat)
            try:
                outputs.append(np.array(weighting(argument).detach().numpy(), np.float64))
            except Exception as failure:  # Solvers and linear algebra fail in many ways.
                print(f"    TorchJD fails on {golden.name}: {type(failure).__name__}: {failure}")
                size = stat.shape[1] if isinstance(weighting, A.Aggregator) else stat.shape[0]
                outputs.append(np.full(size, np.nan))
    return np.stack(outputs)
