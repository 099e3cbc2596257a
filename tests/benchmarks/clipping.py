"""What the sum of clipped gradients of examples costs, in units of the plain step.

The plain step is the gradient of the mean of the losses. Beside `jaxjd`'s engine there are the
gradients of all examples by `jax.vmap`, clipped by hand, and clipped by optax's
`differentially_private_aggregate` (without noise: it draws random numbers all the same)::

    python -m tests.benchmarks.clipping --json tests/benchmarks/results/clipping.json --write

Time is that of all processors, not of the clock, so that other load changes it little; it is the
least of the rounds, in which all steps take turns. Operations are the multiplications in products
and convolutions, loops counted as often as they run; memory is what the compiled program asks for
besides its arguments and results.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import platform
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

import jaxjd
from tests.benchmarks.files import write_json
from tests.benchmarks.step_cases import Case, make_numbers
from tests.benchmarks.step_jax import make_model
from tests.jaxprs import multiplications
from tests.pages import write_table

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "clipping.md"
CLIP_NORM = 1.0
CASES = {
    "tiny": Case("tiny", "examples", batch=5, m=5, depth=2, width=16, inputs=8),
    **{
        f"MLP of 8 x 512, batch {n}": Case("mlp", "examples", n, n, depth=9, width=512, inputs=512)
        for n in (128, 256)
    },
    **{f"CNN, batch {n}": Case("cnn", "cnn", n, n) for n in (64, 128)},
}

Step = Callable[..., tuple[jax.Array, Any]]


def plain(loss: Callable[..., jax.Array]) -> Step:
    """The losses and the gradient of their mean."""

    def step(params: Any, *batch: Any) -> tuple[jax.Array, Any]:
        def mean(params: Any) -> tuple[jax.Array, jax.Array]:
            losses = jax.vmap(lambda *example: loss(params, *example))(*batch)
            return losses.mean(), losses

        gradient, losses = jax.grad(mean, has_aux=True)(params)
        return losses, gradient

    return step


def by_hand(loss: Callable[..., jax.Array], clip_norm: Any) -> Callable[..., tuple]:
    """What the engine returns, from the gradients of all examples."""

    def step(params: Any, *batch: Any) -> tuple[jax.Array, Any, jax.Array]:
        axes = (None, *[0] * len(batch))
        losses, rows = jax.vmap(jax.value_and_grad(loss), in_axes=axes)(params, *batch)
        norms = jax.vmap(optax.tree.norm)(rows)
        scales = jnp.minimum(1, clip_norm / jnp.maximum(norms, 1e-30))
        return losses, jax.tree.map(lambda rows: jnp.tensordot(scales, rows, 1), rows), norms

    return step


def by_optax(loss: Callable[..., jax.Array]) -> Step:
    tx = optax.contrib.differentially_private_aggregate(CLIP_NORM, 0.0, key=jax.random.key(0))

    def step(params: Any, *batch: Any) -> tuple[jax.Array, Any]:
        axes = (None, *[0] * len(batch))
        losses, rows = jax.vmap(jax.value_and_grad(loss), in_axes=axes)(params, *batch)
        mean, _ = tx.update(rows, tx.init(params))
        return losses, jax.tree.map(lambda leaf: leaf * len(losses), mean)

    return step


def problem(case: Case) -> tuple[Callable[..., jax.Array], Any, tuple]:
    """The loss of an example, parameters and a batch."""
    params, data = jax.device_put(make_numbers(case))
    return make_model(case).example, params, (data["inputs"], data["targets"])


def steps_of(loss: Callable[..., jax.Array]) -> dict[str, Step]:
    engine = jaxjd.per_example_value_and_clipped_grad
    return {
        "plain": plain(loss),
        "jaxjd": engine(loss, CLIP_NORM),
        "jaxjd, 32 at a time": engine(loss, CLIP_NORM, chunk_size=32),
        "vmap of grad, by hand": by_hand(loss, CLIP_NORM),
        "vmap of grad, optax": by_optax(loss),
    }


def measure(name: str, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """One row per step.

    Raises:
      RuntimeError: If two steps disagree.
    """
    loss, params, batch = problem(CASES[name])
    steps = steps_of(loss)
    programs = {key: jax.jit(step).lower(params, *batch).compile() for key, step in steps.items()}
    wanted = programs["vmap of grad, by hand"](params, *batch)[1]
    for key, program in programs.items():
        found = program(params, *batch)[1]
        error = optax.tree.norm(optax.tree.sub(found, wanted)) / optax.tree.norm(wanted)
        if key != "plain" and not error <= 1e-5:
            raise RuntimeError(f"{name}, {key}: another sum, the difference is {error:.1e}.")
    del wanted, found  # They are as large as the parameters.

    def cpu_seconds(program: Any) -> float:
        count, start = 0, time.process_time()
        while count == 0 or time.process_time() - start < seconds:
            jax.block_until_ready(program(params, *batch))
            count += 1
        return (time.process_time() - start) / count

    times = [
        {key: cpu_seconds(program) for key, program in programs.items()} for _ in range(rounds)
    ]
    rows = []
    for key, program in programs.items():
        analysis = program.cost_analysis()
        rows.append(
            {
                "case": name,
                "step": key,
                "cpu_s": min(of_round[key] for of_round in times),
                "multiplications": multiplications(jax.make_jaxpr(steps[key])(params, *batch)),
                "bytes_accessed": analysis["bytes accessed"],
                "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """One line per row, in units of the plain step of the same case."""
    base = {row["case"]: row for row in rows if row["step"] == "plain"}
    lines = [
        "| case | step | CPU time | in plain steps | multiplications | temporaries |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        unit = base[row["case"]]
        lines.append(
            f"| {row['case']} | {row['step']} | {1000 * row['cpu_s']:.0f} ms "
            f"| {row['cpu_s'] / unit['cpu_s']:.2f} "
            f"| {row['multiplications'] / unit['multiplications']:.2f} "
            f"| {row['temporary_bytes'] / 1e6:.0f} MB |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = [name for name in CASES if name != "tiny"]
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=names)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each step in a round")
    parser.add_argument("--note", default="", help="on the machine, for the result")
    parser.add_argument("--json", type=pathlib.Path, default=None)
    parser.add_argument("--write", action="store_true", help="also write docs/clipping.md")
    options = parser.parse_args(arguments)
    rows = [row for name in options.cases for row in measure(name, options.rounds, options.seconds)]
    print(table(rows))
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs"
    result = {"machine": machine, "jax": jax.__version__, "note": options.note, "rows": rows}
    write_json(options.json, result)
    if options.write:
        write_table(PAGE, "clipping", table(rows))


if __name__ == "__main__":
    main()
