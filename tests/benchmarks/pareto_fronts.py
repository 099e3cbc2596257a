"""Which methods cover a Pareto front by their preferences.

Run it by `python -m tests.benchmarks.pareto_fronts`. Every member of a population has a preference
of its own; all train in one program. The table gives the hypervolume as a percentage of the true
front's, at the reference point (1.1, 1.1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

import jaxjd

REFERENCE = jnp.array([1.1, 1.1])
STEPS = 1500
MEMBERS = 200


class Problem(NamedTuple):
    """Two losses of `size` variables in a box.

    Attributes:
      losses: The losses of unbounded `z`, of which the variables are a smooth function.
      size: The number of variables.
      start: One start for all members.
      spread: A start for every member, in the order of their weights of the first loss.
      ideal: The smallest value of each loss on the front.
      hypervolume: That of the true front.
    """

    losses: Callable[[jax.Array], jax.Array]
    size: int
    start: Callable[[int], jax.Array]
    spread: Callable[[int], jax.Array]
    ideal: tuple[float, float]
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


def preferences(count: int = MEMBERS) -> jax.Array:
    """Weights of the two losses that sum to one, shape ``(count, 2)``."""
    first = jnp.linspace(0.001, 0.999, count)
    return jnp.stack([first, 1 - first], axis=1)


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
    return {
        "`scalarizers.constant` (linear)": jaxjd.scalarizers.constant,
        "`scalarizers.stch`": lambda p: jaxjd.scalarizers.stch(0.01, p, ideal),
        # A ray in the space of losses: much of a loss where it weighs little.
        "`scalarizers.pbi`": lambda p: jaxjd.scalarizers.pbi(5.0, p[::-1], ideal),
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
    return float(jaxjd.diagnostics.hypervolume(losses, REFERENCE)) / problem.hypervolume


def main() -> None:
    """Prints the table."""
    print("| method, starts | " + " | ".join(PROBLEMS) + " |")
    print("|---" * (1 + len(PROBLEMS)) + "|")
    for kind in ("start", "spread"):
        runs: dict[str, list[str]] = {}
        for problem in PROBLEMS.values():
            starts = getattr(problem, kind)(MEMBERS)
            trained = {
                name: train_scalarized(problem.losses, make)
                for name, make in scalarizers(problem).items()
            } | {name: train_aggregated(problem.losses, make) for name, make in AGGREGATORS.items()}
            for name, train in trained.items():
                found = share(problem, train(preferences(), starts))
                runs.setdefault(name, []).append(f"{100 * found:.1f}")
        for name, shares in runs.items():
            print(f"| {name}, {'one' if kind == 'start' else kind} | " + " | ".join(shares) + " |")


if __name__ == "__main__":
    main()
