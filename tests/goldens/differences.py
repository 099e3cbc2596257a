"""Where jaxjd returns other numbers than TorchJD on purpose, one small example each.

Run it where torchjd[full]==0.18.0 is installed: ``python -m tests.goldens.differences`` runs the
page's TorchJD code and prints the table, ``--write`` also puts the table into docs/from-torchjd.md.
tests/test_docs.py computes our column again, which needs neither PyTorch nor TorchJD.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxjd
from jaxjd import weightings
from tests.pages import DOCS, write_table

PAGE = DOCS / "from-torchjd.md"

SMALL = np.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]], np.float32)


class Difference(NamedTuple):
    """One question that is put to both libraries.

    Attributes:
      method: Which method.
      question: What is computed, in words.
      theirs: TorchJD's numbers: it is given the module `torchjd.aggregation`, and a function from
        arrays to tensors.
      ours: Ours.
      reason: Why they differ.
    """

    method: str
    question: str
    theirs: Callable[[Any, Callable], list[float]]
    ours: Callable[[], list[float]]
    reason: str


def weights_of(weighting: Any, jacobian: np.ndarray) -> list[float]:
    """Our weights on the Gramian of one Jacobian."""
    gramian = jaxjd.gramian(jnp.asarray(jacobian))
    weights, _ = weighting.update(gramian, weighting.init(len(jacobian)))
    return weights.tolist()


def on_gramian(name: str, jacobian: np.ndarray, **arguments: Any) -> Callable:
    """TorchJD's weights on the Gramian of one Jacobian."""

    def theirs(aggregation: Any, tensor: Callable) -> list[float]:
        rows = tensor(jacobian)
        return getattr(aggregation, name)(**arguments)(rows @ rows.T).tolist()

    return theirs


def badly_scaled() -> np.ndarray:
    """Twenty Jacobians of five normal rows each, with lengths over four orders of magnitude."""
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((20, 5, 20))
    return (rows * 10 ** generator.uniform(-2, 2, (20, 5, 1))).astype(np.float32)


def smallest_cosine(weights: np.ndarray, jacobians: np.ndarray) -> list[float]:
    """The smallest cosine of an update with a row of its Jacobian."""
    rows = jacobians.astype(np.float64)
    updates = np.einsum("km,kmn->kn", np.asarray(weights, np.float64), rows)
    units = rows / np.linalg.norm(rows, axis=2, keepdims=True)
    cosines = np.einsum("kmn,kn->km", units, updates / np.linalg.norm(updates, axis=1)[:, None])
    return [float(np.min(cosines))]


def their_smallest_cosine(aggregation: Any, tensor: Callable) -> list[float]:
    weighting = aggregation.UPGradWeighting()
    jacobians = badly_scaled()
    weights = [weighting(tensor(J) @ tensor(J).T).tolist() for J in jacobians]
    return smallest_cosine(np.array(weights), jacobians)


def our_smallest_cosine() -> list[float]:
    jacobians = badly_scaled()
    gramians = jnp.einsum("kmn,kln->kml", jacobians, jacobians, precision="highest")
    weights, _ = jax.vmap(weightings.upgrad().update, (0, None))(gramians, ())
    return smallest_cosine(np.asarray(weights), jacobians)


def normal(m: int, n: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((m, n)).astype(np.float32)


def length(weights: list[float], jacobian: np.ndarray) -> list[float]:
    return [float(np.linalg.norm(np.asarray(weights) @ jacobian.astype(np.float64)))]


def three_calls() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((3, 3, 1000)).astype(np.float32)


def their_excess_mtl(aggregation: Any, tensor: Callable) -> list[float]:
    weighting = aggregation.ExcessMTLWeighting()
    return [x for J in three_calls() for x in weighting(tensor(J)).tolist()]


def our_excess_mtl() -> list[float]:
    weighting = weightings.excess_mtl()
    state = weighting.init(3, jnp.zeros(1000))
    found: list[float] = []
    for jacobian in three_calls():
        weights, state = weighting.update(jnp.asarray(jacobian), state)
        found += weights.tolist()
    return found


def their_nash_mtl(jacobian: np.ndarray) -> Callable:
    return lambda aggregation, tensor: aggregation.NashMTL(2, max_norm=0.0)(
        tensor(jacobian)
    ).tolist()


def our_nash_mtl(jacobian: np.ndarray) -> list[float]:
    return (np.array(weights_of(weightings.nash_mtl(max_norm=0.0), jacobian)) @ jacobian).tolist()


DIFFERENCES = (
    Difference(
        "UPGrad",
        "weights, $J$",
        on_gramian("UPGradWeighting", SMALL),
        lambda: weights_of(weightings.upgrad(), SMALL),
        "no regularization: 10/9 and 15/19",
    ),
    Difference(
        "DualProj",
        "weights, $J$",
        on_gramian("DualProjWeighting", SMALL),
        lambda: weights_of(weightings.dualproj(), SMALL),
        "no regularization: 11/18 and 1/2",
    ),
    Difference(
        "UPGrad",
        "weights, $10^{-3} J$",
        on_gramian("UPGradWeighting", SMALL / 1000),
        lambda: weights_of(weightings.upgrad(), SMALL / 1000),
        "TorchJD takes a Gramian with a trace below `norm_eps` for zero, and returns the mean",
    ),
    Difference(
        "CAGrad, c = 0.5",
        "weights, $10^{-3} J$",
        on_gramian("CAGradWeighting", SMALL / 1000, c=0.5),
        lambda: weights_of(weightings.cagrad(c=0.5), SMALL / 1000),
        "the same `norm_eps`; the update is zero, and training stops",
    ),
    Difference(
        "UPGrad",
        "smallest cosine of an update with a row, 20 Jacobians of 5 × 20 with rows scaled by "
        "$10^{U(-2, 2)}$",
        their_smallest_cosine,
        our_smallest_cosine,
        "the regularization hides short rows; the exact update conflicts with none",
    ),
    Difference(
        "MGDA",
        "length of the update, normal 20 × 30 Jacobian",
        lambda aggregation, tensor: length(
            on_gramian("MGDAWeighting", normal(20, 30))(aggregation, tensor), normal(20, 30)
        ),
        lambda: length(weights_of(weightings.mgda(), normal(20, 30)), normal(20, 30)),
        "TorchJD stops after 100 Frank-Wolfe steps; the method asks for the minimum",
    ),
    Difference(
        "Nash-MTL, `max_norm=0`",
        "update, $J$",
        their_nash_mtl(SMALL),
        lambda: our_nash_mtl(SMALL),
        "no difference at this scale",
    ),
    Difference(
        "Nash-MTL, `max_norm=0`",
        "update, $10^{-4} J$; the equations have the same solution",
        their_nash_mtl(SMALL / 10_000),
        lambda: our_nash_mtl(SMALL / 10_000),
        "Newton's method at any scale in place of at most 20 outer iterations",
    ),
    Difference(
        "FairGrad, α = 1",
        "weights, $10^{-4} J$",
        on_gramian("FairGradWeighting", SMALL / 10_000, alpha=1.0),
        lambda: weights_of(weightings.fairgrad(alpha=1.0), SMALL / 10_000),
        "Newton's method at any scale in place of least squares from a fixed start",
    ),
    Difference(
        "ExcessMTL",
        "weights in the first three calls, normal 3 × 1000 Jacobians",
        their_excess_mtl,
        our_excess_mtl,
        "the first call's risk is the baseline, as in the authors' code, not a step of its own; "
        "TorchJD's weights do not leave the corner again",
    ),
)


def text(values: list[float]) -> str:
    """Numbers as they stand in the table, in groups of three where there are more than three."""
    shown = [f"{value:.5g}" for value in values]
    if len(shown) == 1:
        return shown[0]
    groups = [shown] if len(shown) <= 3 else [shown[k : k + 3] for k in range(0, len(shown), 3)]
    return "; ".join(f"[{', '.join(group)}]" for group in groups)


def table() -> list[str]:
    import torch
    from torchjd import aggregation

    warnings.simplefilter("ignore")
    lines = ["| method | what | TorchJD 0.18.0 | jaxjd | why |", "|---|---|---|---|---|"]
    for row in DIFFERENCES:
        theirs, ours = row.theirs(aggregation, torch.tensor), row.ours()
        lines.append(
            f"| {row.method} | {row.question} | {text(theirs)} | {text(ours)} | {row.reason} |"
        )
    return lines


def run_their_step() -> None:
    """Runs the TorchJD code of the page."""
    code = re.search(r"```python\n(import torch\n.*?)```", PAGE.read_text(), re.DOTALL)
    exec(code[1], {"__name__": "page"})


def main() -> None:
    run_their_step()
    lines = table()
    print("\n".join(lines))
    if "--write" in sys.argv:
        write_table(PAGE, "differences", "\n".join(lines))


if __name__ == "__main__":
    main()
