"""Which methods cover a Pareto front by their preferences.

Run::

    python -m tests.benchmarks.pareto_fronts --json tests/benchmarks/results/pareto_fronts.json

Every member of a population has a preference of its own; all train in one program. The tables give
the hypervolume as a percentage of the true front's, at a reference point of 1.1 in every loss: for
two losses 200 members and the whole front, for three losses 136 members and the 136 points of the
front on the same rays.
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
from tests.benchmarks.files import read_json, write_json

REFERENCE = jnp.array([1.1, 1.1])
STEPS = 1500
MEMBERS = 200


class Problem(NamedTuple):
    """Two or three losses of `size` variables in a box.

    Attributes:
      losses: The losses of unbounded `z`, of which the variables are a smooth function.
      size: The number of variables.
      start: One start for all members.
      spread: A start for every member, in the order of their weights of the first loss.
      ideal: The smallest value of each loss on the front.
      hypervolume: That of the true front, or of its points on the rays for three losses.
    """

    losses: Callable[[jax.Array], jax.Array]
    size: int
    start: Callable[[int], jax.Array]
    spread: Callable[[int], jax.Array]
    ideal: tuple[float, ...]
    hypervolume: float


def _zdt(
    second: Callable[[jax.Array, jax.Array], jax.Array], lowest: float, hypervolume: float
) -> Problem:
    """Zitzler, Deb and Thiele (2000): 30 variables in [0, 1], ``x = sin(z)^2``."""

    def losses(z: jax.Array) -> jax.Array:
        g = 1 + 9 * jnp.mean(jnp.sin(z[1:]) ** 2)
        # The square root of the first variable is differentiable in z.
        return jnp.stack([jnp.sin(z[0]) ** 2, second(jnp.abs(jnp.sin(z[0])), g)])

    def start(count: int) -> jax.Array:
        return jnp.arcsin(jnp.sqrt(jnp.full((count, 30), 0.3)))

    def spread(count: int) -> jax.Array:
        return start(count).at[:, 0].set(jnp.arcsin(jnp.sqrt(jnp.linspace(0.98, 0.02, count))))

    return Problem(losses, 30, start, spread, (0.0, lowest), hypervolume)


def _vlmop2() -> Problem:
    """Van Veldhuizen and Lamont (1999), after Fonseca and Fleming: two variables in [-2, 2]."""

    def losses(z: jax.Array) -> jax.Array:
        x = 2 * jnp.sin(z)
        squares = [jnp.sum((x - sign / jnp.sqrt(2.0)) ** 2) for sign in (1, -1)]
        return 1 - jnp.exp(-jnp.stack(squares))

    def start(count: int) -> jax.Array:
        return jnp.arcsin(jnp.broadcast_to(jnp.array([0.4, -0.3]), (count, 2)))

    def spread(count: int) -> jax.Array:
        first = jnp.linspace(1.0, -1.0, count)
        return jnp.arcsin(jnp.stack([first, first / 2], axis=1) / 2)

    return Problem(losses, 2, start, spread, (0.0, 0.0), 0.55212)


PROBLEMS = {
    "ZDT1": _zdt(lambda root, g: g - jnp.sqrt(g) * root, 0.0, 0.87667),
    "ZDT2": _zdt(lambda root, g: g - root**4 / g, 0.0, 0.54333),
    "ZDT3": _zdt(
        lambda root, g: g - jnp.sqrt(g) * root - root**2 * jnp.sin(10 * jnp.pi * root**2),
        -0.78,
        1.33176,
    ),
    "VLMOP2": _vlmop2(),
}


def _dtlz(number: int, hypervolume: float, reach: float | None = None) -> Problem:
    """Deb, Thiele, Laumanns and Zitzler (2002): variables in [0, 1], ``x = sin(z)^2``.

    The first two variables say where on the front a point is, the others how far from it. Those
    start at 0.3 and 0.7, or at most `reach` from their best value, 0.5.
    """
    size = 7 if number == 1 else 12

    def losses(z: jax.Array) -> jax.Array:
        x = jnp.sin(z) ** 2
        place, offsets = x[:2], x[2:] - 0.5
        if number == 1:
            waves = offsets**2 - jnp.cos(20 * jnp.pi * offsets)
            far = 100 * (len(offsets) + jnp.sum(waves))
            first, second = place
            plane = [first * second, first * (1 - second), 1 - first]
            return 0.5 * (1 + far) * jnp.stack(plane)
        far = jnp.sum(offsets**2)
        (a, b), (c, d) = jnp.cos(place * jnp.pi / 2), jnp.sin(place * jnp.pi / 2)
        return (1 + far) * jnp.stack([a * b, a * d, c])

    def start(count: int) -> jax.Array:
        offset = 0.2 if reach is None else reach
        signs = jnp.where(jnp.arange(size - 2) % 2 == 0, -1.0, 1.0)
        x = jnp.concatenate([jnp.array([0.4, 0.6]), 0.5 + offset * signs])
        return jnp.broadcast_to(jnp.arcsin(jnp.sqrt(x)), (count, size))

    def spread(count: int) -> jax.Array:
        # Golden-ratio points of the unit square.
        index = jnp.arange(1.0, count + 1)
        square = jnp.stack([0.7548777 * index, 0.5698403 * index], axis=1) % 1.0
        x = 0.05 + 0.9 * square
        return start(count).at[:, :2].set(jnp.arcsin(jnp.sqrt(x)))

    return Problem(losses, size, start, spread, (0.0, 0.0, 0.0), hypervolume)


THREE_LOSSES = {
    "DTLZ2": _dtlz(2, 0.75677),
    "DTLZ1": _dtlz(1, 1.30581),
    "DTLZ1, from within 0.04": _dtlz(1, 1.30581, 0.04),
}
"""Hypervolumes as pymoo 0.6 has them for 136 points of the front."""


def preferences(count: int = MEMBERS) -> jax.Array:
    """Weights of the two losses that sum to one, shape ``(count, 2)``."""
    first = jnp.linspace(0.001, 0.999, count)
    return jnp.stack([first, 1 - first], axis=1)


def simplex_lattice(divisions: int = 15) -> jax.Array:
    """All triples of multiples of one over `divisions` that sum to one: 136 of 15 (Das, Dennis)."""
    steps = range(divisions + 1)
    triples = [(i, j, divisions - i - j) for i in steps for j in steps if i + j <= divisions]
    points = jnp.maximum(jnp.array(triples) / divisions, 1e-3)
    return points / points.sum(axis=1, keepdims=True)


def _optimizer(steps: int) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(0.05, steps))


def train_scalarized(
    losses: Callable[[jax.Array], jax.Array],
    scalarizer_of: Callable[[jax.Array], jaxjd.Scalarizer],
    steps: int = STEPS,
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """A function of all preferences and starts that returns everybody's final losses."""
    tx = _optimizer(steps)

    def train(preference: jax.Array, start: jax.Array) -> jax.Array:
        scalarizer = scalarizer_of(preference)
        loss = lambda z: scalarizer.apply(losses(z), ())

        def step(carry: Any, _: None) -> Any:
            z, state = carry
            updates, state = tx.update(jax.grad(loss)(z), state, z)
            return (optax.apply_updates(z, updates), state), None

        (z, _), _ = lax.scan(step, (start, tx.init(start)), length=steps)
        return losses(z)

    return jax.jit(jax.vmap(train))


def train_aggregated(
    losses: Callable[[jax.Array], jax.Array],
    aggregator_of: Callable[[jax.Array], jaxjd.Aggregator],
    steps: int = STEPS,
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The same for an aggregator of the Jacobian."""

    def train(preference: jax.Array, start: jax.Array) -> jax.Array:
        tx = optax.chain(aggregator_of(preference), _optimizer(steps))

        def step(carry: Any, _: None) -> Any:
            z, state = carry
            updates, state = tx.update(jax.jacrev(losses)(z), state, z)
            return (optax.apply_updates(z, updates), state), None

        (z, _), _ = lax.scan(step, (start, tx.init(start)), length=steps)
        return losses(z)

    return jax.jit(jax.vmap(train))


def scalarizers(problem: Problem) -> dict[str, Callable[[jax.Array], jaxjd.Scalarizer]]:
    """The scalarizers with preferences."""
    ideal = jnp.array(problem.ideal)
    # A ray in the space of losses: much of a loss where it weighs little.
    inverse = (
        (lambda p: p[::-1]) if len(problem.ideal) == 2 else (lambda p: (1 / p) / jnp.sum(1 / p))
    )
    return {
        "`scalarizers.constant` (linear)": jaxjd.scalarizers.constant,
        "`scalarizers.stch`": lambda p: jaxjd.scalarizers.stch(0.01, p, ideal),
        "`scalarizers.pbi`": lambda p: jaxjd.scalarizers.pbi(5.0, inverse(p), ideal),
        "`scalarizers.cosmos`": lambda p: jaxjd.scalarizers.cosmos(2.0, p),
    }


AGGREGATORS: dict[str, Callable[[jax.Array], jaxjd.Aggregator]] = {
    "`upgrad`": jaxjd.upgrad,
    "`dualproj`": jaxjd.dualproj,
    "`aligned_mtl`": jaxjd.aligned_mtl,
    "`conflict_free`": jaxjd.conflict_free,
    "`mgda` (no preferences)": lambda p: jaxjd.mgda(),
}


def share(problem: Problem, losses: jax.Array) -> float:
    """The hypervolume of a population as a share of the front's."""
    if losses.shape[1] == 3:
        return volume(np.asarray(losses, float)) / problem.hypervolume
    return float(jaxjd.diagnostics.hypervolume(losses, REFERENCE)) / problem.hypervolume


def behind(losses: Any, front: np.ndarray) -> Any:
    """The share of the front's range by which all losses could be lower, negative beyond it.

    `losses` is ``(..., m)``, of NumPy or JAX, `front` is ``(points, m)``.
    """
    span = (front.max(0) - front.min(0)).astype(losses.dtype)
    lead = (None,) * losses.ndim
    gains = (losses[..., None, :] - front.astype(losses.dtype)[lead[1:]]) / span[lead]
    return gains.min(-1).max(-1)


def volume(losses: np.ndarray, reference: float = 1.1) -> float:
    """The hypervolume of three losses: slices along the third, each an area."""
    losses = losses[np.argsort(losses[:, 2])]
    heights = np.diff(np.minimum(np.append(losses[:, 2], reference), reference))
    total = 0.0
    for count, height in enumerate(heights, start=1):
        if height > 0:
            total += height * _area(losses[:count, :2], reference)
    return total


def _area(losses: np.ndarray, reference: float) -> float:
    losses = np.minimum(losses[np.argsort(losses[:, 0])], reference)
    widths = np.diff(np.append(losses[:, 0], reference))
    return float(np.sum(widths * (reference - np.minimum.accumulate(losses[:, 1]))))


def measure(problem: Problem) -> dict[str, dict[str, float]]:
    """The share of every method, from both kinds of starts."""
    wanted = preferences() if len(problem.ideal) == 2 else 1 / simplex_lattice()
    wanted /= wanted.sum(axis=1, keepdims=True)
    trained = {
        name: train_scalarized(problem.losses, make) for name, make in scalarizers(problem).items()
    } | {name: train_aggregated(problem.losses, make) for name, make in AGGREGATORS.items()}
    found: dict[str, dict[str, float]] = {"start": {}, "spread": {}}
    for name, train in trained.items():
        for kind, shares in found.items():
            starts = getattr(problem, kind)(len(wanted))
            shares[name] = share(problem, train(wanted, starts))
    return found


def table(result: dict[str, Any], problems: dict[str, Problem]) -> str:
    """The results of some of the problems in Markdown."""
    lines = [
        "| method, starts | " + " | ".join(problems) + " |",
        "|---" * (1 + len(problems)) + "|",
    ]
    for kind, word in (("start", "one"), ("spread", "spread")):
        columns = [result[problem][kind] for problem in problems]
        for name in columns[0]:
            cells = [f"{100 * column[name]:.1f}" for column in columns]
            lines.append(f"| {name}, {word} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Trains all populations, prints the tables, and writes what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--losses", type=int, choices=[2, 3], help="only problems of so many")
    parser.add_argument("--json", type=Path, help="results; those of other problems stay")
    options = parser.parse_args(arguments)
    result: dict[str, Any] = read_json(options.json, {})
    families = {2: PROBLEMS, 3: THREE_LOSSES}
    for problems in [families[options.losses]] if options.losses else families.values():
        for name, problem in problems.items():
            result[name] = measure(problem)
        print(table(result, problems), flush=True)
    write_json(options.json, result)


if __name__ == "__main__":
    main()
