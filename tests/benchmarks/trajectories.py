"""The trajectories of the UPGrad paper: which aggregators stop before the Pareto front.

Run::

    python -m tests.benchmarks.trajectories \\
        --json tests/benchmarks/results/trajectories.json --figure docs/figures/trajectories.png

Two convex problems of two parameters (Quinton and Rey, "Jacobian Descent for Multi-Objective
Optimization", 2024), with the starting points, learning rates and numbers of steps of the authors'
repository, https://github.com/TorchJD/trajectories: the element-wise quadratic ``[x1^2, x2^2]``,
whose Pareto set is the origin while all points of both axes are Pareto stationary, and a pair of
convex quadratic forms, whose Pareto set is a curve. Plain gradient descent on what each aggregator
returns. A run has arrived when both losses could be lower by less than 0.2 % of their range on the
Pareto front; where the front is a single point, by less than 0.2 % of the losses at the start.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import jaxjd
from tests.benchmarks.files import save, write_json
from tests.benchmarks.pareto_fronts import behind

ARRIVED = 0.002
_ANGLE = np.pi / 16


def _form(angle: float, lengths: tuple[float, float]) -> np.ndarray:
    """A positive definite matrix with these axes."""
    cos, sin = np.cos(angle), np.sin(angle)
    root = np.array([[cos, -sin], [sin, cos]]) * np.array(lengths)
    return root @ root.T


_FORMS = np.stack([_form(_ANGLE, (1.0, 0.1)), _form(-_ANGLE, (3**0.5, 0.1))])
_CENTRES = np.array([[1.0, 0.0], [-1.0, 0.0]])


def _quadratic_forms(x: jax.Array) -> jax.Array:
    offsets = x[None] - jnp.asarray(_CENTRES, x.dtype)
    return jnp.einsum("ti,tij,tj->t", offsets, jnp.asarray(_FORMS, x.dtype), offsets)


def _curve() -> np.ndarray:
    """The Pareto set of the quadratic forms: the minima of all weighted sums."""
    first = np.linspace(0, 1, 2001)
    weights = np.stack([first, 1 - first], axis=1)
    sums = np.einsum("kt,tij->kij", weights, _FORMS)
    right = np.einsum("kt,tij,tj->ki", weights, _FORMS, _CENTRES)
    return np.linalg.solve(sums, right[..., None])[..., 0]


class Problem(NamedTuple):
    """Two losses, their Pareto set and how the paper descends.

    Attributes:
      losses_fn: The losses at a point.
      starts: The starting points.
      steps: The number of steps.
      learning_rate: That of most aggregators.
      pareto_set: Points of the Pareto set, in order.
    """

    losses_fn: Callable[[jax.Array], jax.Array]
    starts: np.ndarray
    steps: int
    learning_rate: float
    pareto_set: np.ndarray


PROBLEMS = {
    "element-wise quadratic": Problem(
        lambda x: x**2,
        np.array([[3, -2], [0, -3], [-4, 4], [-3, 4], [-3.5, -0.75]], np.float32),
        50,
        0.075,
        np.zeros((1, 2)),
    ),
    "convex quadratic forms": Problem(
        _quadratic_forms,
        np.array([[0.5, 0.5], [-1, 7], [0, 0], [1, 6]], np.float32),
        500,
        0.05,
        _curve(),
    ),
}

PUBLISHED = {
    "mean": (5, 4),
    "mgda": (1, 4),
    "dualproj": (5, 4),
    "graddrop": (5, 4),
    "imtl_g": (5, 3),
    "cagrad": (4, 4),
    "random": (5, 4),
    "nash_mtl": (4, 4),
    "aligned_mtl": (2, 2),
    "upgrad": (5, 4),
}
"""Starts of each problem that arrive, read off the figures of the authors' repository."""

LEARNING_RATES = {"nash_mtl": 2.0, "imtl_g": 2.0, "graddrop": 0.5, "pcgrad": 0.5}
"""What the paper multiplies the learning rate by, where that is not one."""

METHODS: dict[str, Callable[[jax.Array], Any]] = {
    "mean": lambda key: jaxjd.mean(),
    "mgda": lambda key: jaxjd.mgda(),
    "dualproj": lambda key: jaxjd.dualproj(),
    "graddrop": lambda key: jaxjd.graddrop(key=key),
    "imtl_g": lambda key: jaxjd.imtl_g(),
    "cagrad": lambda key: jaxjd.cagrad(0.5),
    "random": lambda key: jaxjd.random(key=key),
    "nash_mtl": lambda key: jaxjd.nash_mtl(num_tasks=2),
    "aligned_mtl": lambda key: jaxjd.aligned_mtl(),
    "upgrad": lambda key: jaxjd.upgrad(),
    "pcgrad": lambda key: jaxjd.pcgrad(key=key),
    "gradvac": lambda key: jaxjd.gradvac(key=key, num_tasks=2),
    "fairgrad": lambda key: jaxjd.fairgrad(1.0),
    "conflict_free": lambda key: jaxjd.conflict_free(),
    "pcd": lambda key: jaxjd.pcd(num_tasks=2),
}


def gap(points: np.ndarray, problem: Problem) -> np.ndarray:
    """The share by which both losses could be lower, of points of shape ``(starts, ..., 2)``."""
    values = lambda x: np.asarray(jax.vmap(problem.losses_fn)(jnp.asarray(x, jnp.float32)), float)
    losses = values(points.reshape(-1, 2)).reshape(points.shape)
    front = values(problem.pareto_set)
    if len(front) == 1:  # No loss is negative: what both have lost is what the larger has.
        return (losses / losses[:, :1].max(-1, keepdims=True)).max(-1)
    return np.maximum(behind(losses, front), 0)


def descend(name: str, problem: Problem) -> np.ndarray:
    """All points from all starts, shape ``(starts, steps + 1, 2)``."""
    rate = problem.learning_rate * LEARNING_RATES.get(name, 1.0)
    engine = jaxjd.value_and_jacobian(problem.losses_fn)

    def run(start: jax.Array, key: jax.Array) -> jax.Array:
        tx = optax.chain(METHODS[name](key), optax.sgd(rate))

        def step(carry: Any, _: None) -> Any:
            x, state = carry
            updates, state = tx.update(engine(x)[1], state, x)
            x = optax.apply_updates(x, updates)
            return (x, state), x

        _, path = lax.scan(step, (start, tx.init(start)), length=problem.steps)
        return jnp.concatenate([start[None], path])

    keys = jax.random.split(jax.random.key(0), len(problem.starts))
    return np.asarray(jax.jit(jax.vmap(run))(jnp.asarray(problem.starts), keys))


def measure(name: str) -> dict[str, Any]:
    """One method on both problems."""
    row: dict[str, Any] = {"method": name}
    for title, problem in PROBLEMS.items():
        paths = descend(name, problem)
        gaps = gap(paths, problem)
        # One last point says little about a path that jumps: the largest of the last tenth.
        late = gaps[:, -(problem.steps // 10) :].max(1)
        row[title] = {
            "arrived": [bool(share < ARRIVED) for share in gaps[:, -1]],
            "gap": [float(f"{share:.2g}") for share in gaps[:, -1]],
            "late": [float(f"{share:.2g}") for share in late],
            "path": np.round(paths[:, :: problem.steps // 50].astype(float), 3).tolist(),
        }
    return row


def table(result: dict[str, Any]) -> str:
    """The results in Markdown."""
    lines = [
        "| method | element-wise quadratic: starts that arrive | published "
        "| quadratic forms: starts that arrive | published | largest gap of the last 50 steps |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        cells = [f"`{row['method']}`"]
        for title, published in zip(PROBLEMS, PUBLISHED.get(row["method"], ("", "")), strict=True):
            arrived = row[title]["arrived"]
            cells += [f"{sum(arrived)} of {len(arrived)}", str(published)]
        cells.append(f"{100 * max(row['convex quadratic forms']['late']):.1f} %")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(result: dict[str, Any], path: Path) -> None:
    """Draws the paths of every method on both problems."""
    from matplotlib.figure import Figure

    rows, columns = result["rows"], 8
    height = -(-len(rows) // columns)
    canvas = Figure(figsize=(1.6 * columns, 3.4 * height), layout="constrained")
    axes = canvas.subplots(2 * height, columns)
    for axis in axes.ravel():
        axis.set_axis_off()
    for index, row in enumerate(rows):
        for down, (title, problem) in enumerate(PROBLEMS.items()):
            axis = axes[2 * (index // columns) + down, index % columns]
            axis.set_axis_on()
            axis.plot(*problem.pareto_set.T, "k*" if down == 0 else "k-", linewidth=2)
            for points, arrived in zip(row[title]["path"], row[title]["arrived"], strict=True):
                x, y = np.array(points).T
                axis.plot(x, y, color="tab:blue" if arrived else "tab:red", linewidth=0.9)
                axis.plot(x[:1], y[:1], "k.", markersize=4)
            axis.set(xticks=[], yticks=[])
            if down == 0:
                axis.axhline(0, color="0.8", linewidth=0.5, zorder=0)
                axis.axvline(0, color="0.8", linewidth=0.5, zorder=0)
                axis.set(xlim=(-5, 5), ylim=(-5, 5))
                axis.set_title(row["method"], fontsize=8)
            else:
                axis.set(xlim=(-1.3, 1.3), ylim=(-0.4, 7.5))
    save(canvas, path, dpi=75)


def main(arguments: list[str] | None = None) -> None:
    """Runs all methods, prints the table, and writes what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args(arguments)
    result = {"jax": jax.__version__, "rows": [measure(name) for name in options.methods]}
    print(table(result))
    write_json(options.json, result)
    if options.figure:
        figure(result, options.figure)


if __name__ == "__main__":
    main()
