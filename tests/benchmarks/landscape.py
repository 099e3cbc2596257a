"""The two-task landscape of CAGrad, Nash-MTL and FAMO, with every method.

Run::

    python -m tests.benchmarks.landscape \\
        --json tests/benchmarks/results/landscape.json --figure docs/figures/landscape.png

Two losses of two parameters, with a logarithmic cusp between most starting points and the Pareto
front (Liu et al., NeurIPS 2021; here scaled by 0.1 in the first loss, as in Navon et al., ICML 2022
and Liu et al., NeurIPS 2023). Each method makes 50,000 steps of Adam at a learning rate of 0.001,
in float32, from the five published starts and from 1,000 starts around them; all starts of a method
are one program (`jax.vmap` of `jax.lax.scan`).

How far a point is from the front is the largest share of the front's range by which both losses
could be lower at the same time; it is zero on the front. A run has reached it below 1 %.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import jaxjd
from jaxjd import scalarizers
from tests.benchmarks.files import read_json, save, write_json
from tests.benchmarks.pareto_fronts import behind

SCALE = 0.1
STARTS = np.array([[-8.5, 7.5], [0.0, 0.0], [9.0, 9.0], [-7.5, -0.5], [9.0, -1.0]], np.float32)
STEPS, EVERY = 50_000, 100
LEARNING_RATE = 1e-3
PERTURBED, SPREAD, TOGETHER = 1000, 0.5, 50
REACHED = 0.01

PUBLISHED_SECONDS = {
    "mean": 33,
    "mgda": 60,
    "pcgrad": 54,
    "cagrad": 89,
    "nash_mtl": 995,
    "famo": 39,
}
"""For 50,000 steps of one run on a CPU, read off a figure of the FAMO paper."""

PUBLISHED_REACHED = {
    "mean": "4 of 5 (FAMO, 50,000 steps)",
    "mgda": "5 of 5 (Nash-MTL, 35,000; FAMO, 50,000)",
    "pcgrad": "4 of 5 (Nash-MTL, 35,000); 5 of 5 (FAMO, 50,000)",
    "cagrad": "4 of 5 (Nash-MTL, 35,000); 5 of 5 (FAMO, 50,000)",
    "nash_mtl": "5 of 5 (Nash-MTL, 35,000; FAMO, 50,000)",
    "famo": "5 of 5 (FAMO, 50,000)",
    "conflict_free": "5 of 5 (ConFIG, 50,000)",
}
"""Starts that reach the front, from captions, text and figures of the papers."""


def losses_fn(x: jax.Array) -> jax.Array:
    """The two losses at a point."""
    x1, x2 = x
    log = lambda value: jnp.log(jnp.maximum(jnp.abs(value), 5e-6)) + 6
    f1 = log(0.5 * (-x1 - 7) - jnp.tanh(-x2))
    f2 = log(0.5 * (-x1 + 3) + jnp.tanh(-x2) + 2)
    c1, c2 = jnp.maximum(jnp.tanh(0.5 * x2), 0), jnp.maximum(jnp.tanh(-0.5 * x2), 0)
    s1 = ((-x1 + 7) ** 2 + 0.1 * (-x2 - 8) ** 2) / 10 - 20
    s2 = ((-x1 - 7) ** 2 + 0.1 * (-x2 - 8) ** 2) / 10 - 20
    return jnp.stack([SCALE * (f1 * c1 + s1 * c2), f2 * c1 + s2 * c2])


def front() -> np.ndarray:
    """Points of the Pareto front in the space of losses, in order; from a grid in float64."""
    x1, x2 = np.meshgrid(np.linspace(-7, 7, 1401), np.linspace(-9, -7.8, 601), indexing="ij")
    c2 = np.tanh(-0.5 * x2)
    s1 = ((7 - x1) ** 2 + 0.1 * (x2 + 8) ** 2) / 10 - 20
    s2 = ((x1 + 7) ** 2 + 0.1 * (x2 + 8) ** 2) / 10 - 20
    points = np.stack([SCALE * s1 * c2, s2 * c2], -1).reshape(-1, 2)
    points = points[np.argsort(points[:, 0], kind="stable")]
    lowest = np.minimum.accumulate(points[:, 1])
    best = np.concatenate([[True], points[1:, 1] < lowest[:-1]])
    return points[best][:: max(1, int(best.sum()) // 700)]


FRONT = front()


def distance(losses: jax.Array) -> jax.Array:
    """The share of the front's range by which both losses could be lower, shape ``()``."""
    return behind(losses, FRONT)


class Program(NamedTuple):
    """A method as ``init(x, key) -> state`` and ``step(x, state) -> (x, state)``."""

    init: Callable[[jax.Array, jax.Array], Any]
    step: Callable[[jax.Array, Any], tuple[jax.Array, Any]]


def aggregated(make: Callable[[jax.Array], Any]) -> Program:
    """Adam on the update of an aggregator; random ones get the key."""
    chain = lambda key: optax.chain(make(key), optax.adam(LEARNING_RATE))
    engine = jaxjd.value_and_jacobian(losses_fn)

    def step(x: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        _, jacobian = engine(x)
        # The landscape has no noise: the two batches of the methods that take two are the same.
        # MoCo gets no losses: it would scale by them, and they are negative here.
        extra = {"cross_jacobians": (jacobian, jacobian)}
        updates, state = chain(0).update(jacobian, state, x, **extra)
        return optax.apply_updates(x, updates), state

    return Program(lambda x, key: chain(key).init(x), step)


def scalarized(make: Callable[[], jaxjd.Scalarizer]) -> Program:
    """Adam on the gradient of the combined loss, and on what the scalarizer learns with it."""
    scalarizer, adam = make(), optax.adam(LEARNING_RATE)
    learned = make in (scalarizers.uw, scalarizers.imtl_l)
    after_step = make is _famo

    def init(x: jax.Array, key: jax.Array) -> Any:
        del key
        state = scalarizer.init(2)
        return state, adam.init((x, state) if learned else x)

    def step(x: jax.Array, carry: Any) -> tuple[jax.Array, Any]:
        state, optimizer = carry
        loss = lambda x, state: scalarizer.apply(losses_fn(x), state)
        if learned:
            gradients = jax.grad(loss, argnums=(0, 1))(x, state)
            updates, optimizer = adam.update(gradients, optimizer)
            x, state = optax.apply_updates((x, state), updates)
            return x, (state, optimizer)
        before = losses_fn(x)
        updates, optimizer = adam.update(jax.grad(loss)(x, state), optimizer)
        x = optax.apply_updates(x, updates)
        if after_step:
            state = scalarizer.update(losses_fn(x), state, previous_losses=before)
        return x, (state, optimizer)

    return Program(init, step)


def _famo() -> jaxjd.Scalarizer:
    # Bounds below both losses everywhere, and no decay, as in the authors' code.
    return scalarizers.famo([-21 * SCALE, -21.0], weight_decay=0.0)


def _stch() -> jaxjd.Scalarizer:
    return scalarizers.stch(0.1, weights=[1 / SCALE, 1.0], reference=[-21 * SCALE, -21.0])


METHODS: dict[str, Callable[[], Program]] = {
    "mean": lambda: aggregated(lambda key: jaxjd.mean()),
    "upgrad": lambda: aggregated(lambda key: jaxjd.upgrad()),
    "dualproj": lambda: aggregated(lambda key: jaxjd.dualproj()),
    "mgda": lambda: aggregated(lambda key: jaxjd.mgda()),
    "cagrad": lambda: aggregated(lambda key: jaxjd.cagrad(0.5)),
    "nash_mtl": lambda: aggregated(lambda key: jaxjd.nash_mtl(num_tasks=2)),
    "fairgrad": lambda: aggregated(lambda key: jaxjd.fairgrad(1.0)),
    "imtl_g": lambda: aggregated(lambda key: jaxjd.imtl_g()),
    "aligned_mtl": lambda: aggregated(lambda key: jaxjd.aligned_mtl()),
    "conflict_free": lambda: aggregated(lambda key: jaxjd.conflict_free()),
    "momentum_conflict_free": lambda: aggregated(
        lambda key: jaxjd.momentum_conflict_free(num_tasks=2)
    ),
    "pcgrad": lambda: aggregated(lambda key: jaxjd.pcgrad(key=key)),
    "gradvac": lambda: aggregated(lambda key: jaxjd.gradvac(key=key, num_tasks=2)),
    "graddrop": lambda: aggregated(lambda key: jaxjd.graddrop(key=key)),
    "random": lambda: aggregated(lambda key: jaxjd.random(key=key)),
    "pcd": lambda: aggregated(lambda key: jaxjd.pcd(num_tasks=2)),
    "excess_mtl": lambda: aggregated(lambda key: jaxjd.excess_mtl(num_tasks=2)),
    "sdmgrad": lambda: aggregated(lambda key: jaxjd.sdmgrad(num_tasks=2)),
    "modo": lambda: aggregated(lambda key: jaxjd.modo(num_tasks=2)),
    "stch": lambda: aggregated(lambda key: jaxjd.stch()),
    "moco": lambda: aggregated(lambda key: jaxjd.moco(num_tasks=2)),
    "stch (losses)": lambda: scalarized(_stch),
    "uw": lambda: scalarized(scalarizers.uw),
    "imtl_l": lambda: scalarized(scalarizers.imtl_l),
    "famo": lambda: scalarized(_famo),
}
"""All methods that are defined for two losses of any sign, with their defaults but where shown."""


def simulate(program: Program, starts: jax.Array, keys: jax.Array) -> tuple[Any, ...]:
    """Runs all starts; returns paths, losses on them and the distance of every hundredth point."""

    def run(start: jax.Array, key: jax.Array) -> tuple[Any, ...]:
        def some(carry: Any, _: None) -> tuple[Any, Any]:
            carry = lax.fori_loop(0, EVERY, lambda _, c: program.step(*c), carry)
            losses = losses_fn(carry[0])
            return carry, (carry[0], losses, distance(losses))

        _, found = lax.scan(some, (start, program.init(start, key)), length=STEPS // EVERY)
        return found

    return jax.vmap(run)(starts, keys)


def measure(name: str, seed: int) -> dict[str, Any]:
    """Runs one method from the five starts, alone and together."""
    program = METHODS[name]()
    keys = jax.random.split(jax.random.key(seed), len(STARTS))
    run = jax.jit(lambda starts, keys: simulate(program, starts, keys))

    def timed(starts: Any, keys: jax.Array) -> tuple[Any, float, float]:
        began = time.perf_counter()
        compiled = run.lower(starts, keys).compile()
        compile_s = time.perf_counter() - began
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            found = jax.block_until_ready(compiled(starts, keys))
            seconds.append(time.perf_counter() - began)
        return jax.tree.map(np.asarray, found), float(np.median(seconds)), compile_s

    starts = jnp.asarray(STARTS)
    _, one_s, _ = timed(starts[:1], keys[:1])
    (paths, losses, distances), five_s, compile_s = timed(starts, keys)
    return {
        "seconds_one": one_s,
        "seconds_five": five_s,
        "compile_s": compile_s,
        "reached": [bool(d < REACHED) for d in distances[:, -1]],
        "distance": [round(float(d), 6) for d in distances[:, -1]],
        "losses": np.round(losses[:, -1].astype(float), 4).tolist(),
        "points": np.round(paths[:, -1].astype(float), 4).tolist(),
        "path": np.round(paths[:, ::5].astype(float), 3).tolist(),
    }


def measure_perturbed(name: str, seed: int, count: int = PERTURBED) -> dict[str, Any]:
    """Runs one method from many starts around the five."""
    program = METHODS[name]()
    key = jax.random.key(seed)
    noise = jax.random.normal(jax.random.fold_in(key, 1), (count, 2))
    starts = jnp.repeat(jnp.asarray(STARTS), count // len(STARTS), 0) + SPREAD * noise
    keys = jax.random.split(jax.random.fold_in(key, 2), count)

    def one(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        return simulate(program, *jax.tree.map(lambda leaf: leaf[None], pair))[2][0]

    # In parts, so that a start whose Gramian is difficult holds up few others.
    run = jax.jit(lambda *pair: lax.map(one, pair, batch_size=TOGETHER))
    close = np.asarray(run(starts, keys)) < REACHED
    steps = np.where(close.any(1), (close.argmax(1) + 1.0) * EVERY, np.inf)
    median = float(np.median(steps))
    return {
        "perturbed": count,
        "share": float(close[:, -1].mean()),
        "share_by_start": close[:, -1].reshape(len(STARTS), -1).mean(1).tolist(),
        "median_steps": median if np.isfinite(median) else None,
    }


def table(result: dict[str, Any]) -> str:
    """The results in Markdown, methods that reach the front from most starts first."""
    lines = [
        "| method | starts that reach the front | published | perturbed starts | median steps |"
        " 50,000 steps, one start | five starts | published |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(result["rows"], key=lambda row: (-row["share"], row["method"])):
        name, steps = row["method"], row["median_steps"]
        perturbed = f"{100 * row['share']:.1f} % of {row.get('perturbed', PERTURBED):,}"
        published = PUBLISHED_SECONDS.get(name)
        lines.append(
            f"| {name} | {sum(row['reached'])} of {len(row['reached'])} "
            f"| {PUBLISHED_REACHED.get(name, '')} | {perturbed} "
            f"| {'' if steps is None else f'{steps:,.0f}'} | {row['seconds_one']:.3f} s "
            f"| {row['seconds_five']:.3f} s | {'' if published is None else f'{published} s'} |"
        )
    return "\n".join(lines)


def figure(result: dict[str, Any], path: Path) -> None:
    """Draws the paths of every method over the mean of the losses."""
    from matplotlib.figure import Figure

    rows = result["rows"]
    columns = 5
    height = -(-len(rows) // columns)
    canvas = Figure(figsize=(2.2 * columns, 2.1 * height), layout="constrained")
    axes = canvas.subplots(height, columns, sharex=True, sharey=True).ravel()
    grid = np.linspace(-11, 11, 160)
    points = jnp.asarray(np.stack(np.meshgrid(grid, grid), -1).reshape(-1, 2), jnp.float32)
    level = np.asarray(jax.vmap(losses_fn)(points) / jnp.array([[SCALE, 1.0]])).mean(1)
    for axis, row in zip(axes, rows, strict=False):
        axis.contour(
            grid, grid, level.reshape(160, 160), 12, cmap="Greys_r", linewidths=0.5, alpha=0.6
        )
        axis.plot([-7, 7], [-8.36, -8.36], color="0.5", linewidth=2)
        for start, path_, reached in zip(STARTS, row["path"], row["reached"], strict=True):
            x, y = np.vstack([start[None], path_]).T
            color = "tab:blue" if reached else "tab:red"
            axis.plot(x, y, color=color, linewidth=0.9)
            axis.plot(x[:1], y[:1], ".", color="black", markersize=4)
            axis.plot(x[-1:], y[-1:], "*", color=color, markersize=6)
        axis.set_title(row["method"], fontsize=8)
        axis.set(xticks=[], yticks=[], xlim=(-11, 11), ylim=(-11, 11))
    for axis in axes[len(rows) :]:
        axis.set_axis_off()
    save(canvas, path, dpi=80)


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints the table, and writes what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", choices=["all", "starts", "perturbed"], default="all")
    parser.add_argument("--perturbed", type=int, default=PERTURBED, help="how many of them")
    parser.add_argument("--json", type=Path, help="results; those of other methods and parts stay")
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args(arguments)
    earlier = read_json(options.json, {"rows": []})
    rows: dict[str, dict[str, Any]] = {row["method"]: row for row in earlier["rows"]}
    for name in options.methods:
        row = rows.setdefault(name, {"method": name})
        if options.part in ("all", "starts"):
            row.update(measure(name, options.seed))
        if options.part in ("all", "perturbed"):
            row.update(measure_perturbed(name, options.seed, options.perturbed))
        print({key: value for key, value in row.items() if key != "path"}, flush=True)
        result = {
            "machine": platform.machine(),
            "jax": jax.__version__,
            "steps": STEPS,
            "rows": [rows[name] for name in METHODS if name in rows],
        }
        write_json(options.json, result)
    if not all({"share", "path"} <= set(row) for row in result["rows"]):
        return  # A part is still to be measured.
    print(table(result))
    if options.figure:
        figure(result, options.figure)


if __name__ == "__main__":
    main()
