"""Measures what methods add to the compile time of a training step, in CPU seconds.

The step is Adam on a perceptron of three layers of 64 units, with its Jacobian in the form
``"auto"``; it is compared with the same step with `mean`. Several checkouts can be measured in
turn, and so on the same machine in the same run::

    python -m tests.benchmarks.compile_time --roots . ../older --json compile_time.json
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import subprocess
import sys

from tests.benchmarks.files import write_json

TASKS = (2, 3, 8)
ROUNDS = 3

MEASURE = """
import json, sys, time
import jax, jax.numpy as jnp, optax
import jaxjd

def seconds(aggregator, m):
    params = [(jnp.ones((64, 64)), jnp.ones(64)) for _ in range(3)]
    optimizer = optax.chain(aggregator, optax.adam(1e-3))

    def losses(params, x):
        for kernel, bias in params:
            x = jnp.tanh(x @ kernel + bias)
        return jnp.mean(x[:, :m] ** 2, axis=0)

    def step(params, state, x):
        value, jacobian = jaxjd.value_and_jacobian(losses, form="auto")(params, x)
        updates, state = optimizer.update(jacobian, state, params)
        return optax.apply_updates(params, updates), state, value

    lowered = jax.jit(step).lower(params, optimizer.init(params), jnp.ones((32, 64)))
    start = time.process_time()
    lowered.compile()
    return time.process_time() - start

def methods(m):
    return {
        "mean": jaxjd.mean(),
        "upgrad": jaxjd.upgrad(),
        "dualproj": jaxjd.dualproj(),
        "mgda": jaxjd.mgda(),
        "pcd": jaxjd.pcd(num_tasks=m),
        "cagrad": jaxjd.cagrad(0.5),
        "nash_mtl": jaxjd.nash_mtl(num_tasks=m),
        "fairgrad": jaxjd.fairgrad(2.0),
        "conflict_free": jaxjd.conflict_free(),
        "imtl_g": jaxjd.imtl_g(),
    }

seconds(jaxjd.mean(), 2)  # What the first program of a process costs more.
tasks = json.loads(sys.argv[1])
print(json.dumps({m: {name: seconds(a, m) for name, a in methods(m).items()} for m in tasks}))
"""


def measure(root: pathlib.Path, tasks: list[int]) -> dict[str, dict[str, float]]:
    """The CPU seconds of every method's step, by the number of tasks, in a fresh process."""
    environment = os.environ | {
        "PYTHONPATH": str(root.resolve()),
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "0",
    }
    command = [sys.executable, "-c", MEASURE, json.dumps(tasks)]
    # In the checkout: the folder where a process starts comes first among those it imports from.
    done = subprocess.run(command, cwd=root, env=environment, check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout)


def added(rounds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """The least of every method over the rounds, above the least of `mean`."""
    least = {
        m: {name: min(found[m][name] for found in rounds) for name in rounds[0][m]}
        for m in rounds[0]
    }
    return {
        m: {name: of_m[name] - of_m["mean"] for name in of_m if name != "mean"}
        for m, of_m in least.items()
    }


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """One row per method, one column per checkout and number of tasks."""
    columns = [(root, m) for root in results for m in results[root]]
    lines = ["| method | " + " | ".join(f"{root}, {m} losses" for root, m in columns) + " |"]
    lines.append("|---|" + "---:|" * len(columns))
    for name in next(iter(next(iter(results.values())).values())):
        cells = [f"{results[root][m][name]:.2f}" for root, m in columns]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--roots", nargs="+", type=pathlib.Path, default=[pathlib.Path()])
    parser.add_argument("--tasks", nargs="+", type=int, default=list(TASKS))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=pathlib.Path, default=None)
    options = parser.parse_args(arguments)
    rounds = [
        {str(root): measure(root, options.tasks) for root in options.roots}
        for _ in range(options.rounds)
    ]
    results = {root: added([found[root] for found in rounds]) for root in rounds[0]}
    print(table(results))
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs"
    write_json(options.json, {"machine": machine, "rounds": options.rounds, "added_s": results})


if __name__ == "__main__":
    main()
