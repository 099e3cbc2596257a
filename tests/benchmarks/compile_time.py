"""Measures what methods add to the compile time of a training step, in CPU seconds.

The step is Adam on a perceptron of three layers of 64 units, with its Jacobian in the form
``"auto"``; it is compared with the same step with `mean`. Then, for `partition` into many groups
with UPGrad beside `grouped`, of matrices and vectors of 16 units and three losses, the whole
program of the update is traced and compiled. With libtpu the steps are compiled for a TPU as well,
which need not exist. Several checkouts can be measured in turn, and so on the same machine in the
same run::

    python -m tests.benchmarks.compile_time --roots . ../older --json compile_time.json
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import pathlib
import platform
import subprocess
import sys
from typing import Any

from tests.benchmarks.files import write_json

TASKS = (2, 3, 8)
GROUPS = (60, 200)
ROUNDS = 3

MEASURE = """
import json, sys, time
import jax, jax.numpy as jnp, optax
import jaxjd

device, tasks, groups = json.loads(sys.argv[1])
sharding = None
if device == "tpu":
    from jax.experimental import topologies
    chip = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
    sharding = jax.sharding.SingleDeviceSharding(chip)

def seconds(fn, *args):
    args = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), args
    )
    start = time.process_time()
    lowered = jax.jit(fn).lower(*args)
    traced = time.process_time()
    lowered.compile()
    return {"trace": traced - start, "compile": time.process_time() - traced}

def step_seconds(aggregator, m):
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

    return seconds(step, params, optimizer.init(params), jnp.ones((32, 64)))["compile"]

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
        "monitored(upgrad)": jaxjd.diagnostics.monitored(jaxjd.upgrad(), m),
    }

def group_seconds(size):
    params = {f"{n:03}": {"w": jnp.ones((16, 16)), "b": jnp.ones(16)} for n in range(size)}
    jacobian = jax.tree.map(lambda leaf: jnp.ones((3, *leaf.shape)), params)
    by_layer = jaxjd.labels.by_layer
    ways = {
        "partition": jaxjd.partition({label: jaxjd.upgrad() for label in params}, by_layer),
        "grouped": jaxjd.grouped(jaxjd.weightings.upgrad(), by_layer),
    }
    return {
        name: seconds(tx.update, jacobian, tx.init(params), params) for name, tx in ways.items()
    }

step_seconds(jaxjd.mean(), 2)  # What the first program of a process costs more.
print(json.dumps({
    "steps": {m: {name: step_seconds(a, m) for name, a in methods(m).items()} for m in tasks},
    "groups": {size: group_seconds(size) for size in groups},
}))
"""


def measure(
    root: pathlib.Path, device: str, tasks: list[int], groups: list[int]
) -> dict[str, dict[str, Any]]:
    """The CPU seconds of a checkout, in a fresh process.

    Args:
      root: The checkout.
      device: What to compile for, "cpu" or "tpu".
      tasks: Numbers of tasks.
      groups: Numbers of groups.

    Returns:
      The seconds of every method's step by the number of tasks, ``"steps"``, and those of every way
      of grouping by the number of groups, ``"groups"``, apart for tracing and compiling.
    """
    environment = os.environ | {
        "PYTHONPATH": str(root.resolve()),
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "0",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    }
    command = [sys.executable, "-c", MEASURE, json.dumps([device, tasks, groups])]
    # In the checkout: the folder where a process starts comes first among those it imports from.
    done = subprocess.run(command, cwd=root, env=environment, check=True, stdout=subprocess.PIPE)
    # The compiler for TPUs may print something first.
    return json.loads(done.stdout.decode().splitlines()[-1])


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
    for name in next(iter(next(iter(results.values())).values()), ()):
        cells = [f"{results[root][m][name]:.2f}" for root, m in columns]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def table_of_groups(results: dict[str, dict[str, dict[str, dict[str, float]]]]) -> str:
    """One row per number of groups and way of grouping, two columns per checkout."""
    lines = ["| groups | " + " | ".join(f"{root}, tracing | compiling" for root in results) + " |"]
    lines.append("|---|" + "---:|" * 2 * len(results))
    for size, ways in next(iter(results.values())).items():
        for name in ways:
            found = [results[root][size][name] for root in results]
            cells = [f"{part[kind]:.2f}" for part in found for kind in ("trace", "compile")]
            lines.append(f"| {size}, `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Prints and writes the tables."""
    devices = ["cpu", "tpu"] if importlib.util.find_spec("libtpu") else ["cpu"]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--roots", nargs="+", type=pathlib.Path, default=[pathlib.Path()])
    parser.add_argument("--tasks", nargs="*", type=int, default=list(TASKS))
    parser.add_argument("--groups", nargs="*", type=int, default=list(GROUPS), help="on CPUs only")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of the steps; of groups one")
    parser.add_argument("--devices", nargs="+", choices=["cpu", "tpu"], default=devices)
    parser.add_argument("--json", type=pathlib.Path, default=None)
    options = parser.parse_args(arguments)
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs"
    result: dict[str, Any] = {"machine": machine, "rounds": options.rounds}
    for device in options.devices:
        rounds = [
            {str(root): measure(root, device, options.tasks, []) for root in options.roots}
            for _ in range(options.rounds)
        ]
        steps = {root: added([found[root]["steps"] for found in rounds]) for root in rounds[0]}
        print(f"Added by methods, for a {device.upper()}:\n\n{table(steps)}\n")
        result["added_s" if device == "cpu" else f"added_{device}_s"] = steps
    if "cpu" in options.devices:
        groups = {
            str(root): measure(root, "cpu", [], options.groups)["groups"] for root in options.roots
        }
        print(f"Whole updates of many groups, for a CPU:\n\n{table_of_groups(groups)}")
        result["groups_s"] = groups
    write_json(options.json, result)


if __name__ == "__main__":
    main()
