"""Measures how long methods take to find their weights inside of a scan, alone and in lanes.

Every step of the scan has another Gramian, of standard normal rows of 4 m entries that share half
of their variance, half of them with the other sign. Several checkouts can be measured in turn, and
so on the same machine in the same run::

    python -m tests.benchmarks.solvers --roots . ../older --json solvers.json
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

TASKS = (2, 3, 4, 8, 16, 32, 64, 128)
ALONE = (3, 16, 64)  # What is measured without lanes only: most of the time is compilation.
LANES = (1, 5, 1000)
METHODS = ("upgrad", "dualproj", "mgda", "cagrad", "pcd", "nash_mtl")
# Elements of the (m, m) matrices of all lanes. UPGrad has m problems in each.
LARGEST = 2**22

MEASURE = """
import json, sys, time
import jax, jax.numpy as jnp, numpy as np
from jaxjd import weightings

METHODS = {
    "upgrad": weightings.upgrad,
    "dualproj": weightings.dualproj,
    "mgda": weightings.mgda,
    "cagrad": lambda: weightings.cagrad(0.5),
    "pcd": weightings.pcd,
    "nash_mtl": weightings.nash_mtl,
}

def gramians(m, lanes, steps):
    rng = np.random.default_rng(m)
    common = rng.standard_normal((lanes, steps, 1, 4 * m)) * rng.choice([-1, 1], (m, 1))
    rows = (common + rng.standard_normal((lanes, steps, m, 4 * m))).astype(np.float32)
    return np.einsum("ltmn,ltpn->ltmp", rows, rows)

def compiled(name, m, lanes, steps):
    weighting = METHODS[name]()
    def run(gramians):
        def step(carry, gramian):
            state, total = carry
            weights, state = weighting.update(gramian, state)[:2]
            return (state, total + weights), None
        start = (weighting.init(m), jnp.zeros((m,)))
        return jax.lax.scan(step, start, gramians)[0][1]
    function = jax.vmap(run) if lanes > 1 else lambda gramians: run(gramians[0])
    shape = jax.ShapeDtypeStruct((lanes, steps, m, m), jnp.float32)
    return jax.jit(function).lower(shape).compile()

def seconds(program, argument, steps):
    walls, cpus, end = [], [], time.perf_counter() + 0.15
    jax.block_until_ready(program(argument))
    while len(walls) < 3 or time.perf_counter() < end:
        wall, cpu = time.perf_counter(), time.process_time()
        jax.block_until_ready(program(argument))
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    # Processor time has a coarse clock, so the mean over the calls.
    return min(walls) / steps * 1e6, sum(cpus) / len(cpus) / steps * 1e6

cases = [tuple(case) for case in json.loads(sys.argv[1])]
found = []
for case in cases:
    _, m, lanes, steps = case
    program = compiled(*case)
    argument = jnp.asarray(gramians(m, lanes, steps))
    found.append(seconds(program, argument, steps))
print(json.dumps(found))
"""


def cases(methods: list[str], tasks: list[int], lanes: list[int]) -> list[tuple]:
    """What to measure: method, number of tasks, number of lanes, steps of the scan."""
    found = []
    for name in methods:
        for m in tasks:
            for number in lanes:
                rows = m if name == "upgrad" else 1
                if number == 1 or (m not in ALONE and number * rows * m * m <= LARGEST):
                    found.append((name, m, number, {1: 20, 5: 10}.get(number, 2)))
    return found


def measure(root: pathlib.Path, chosen: list[tuple]) -> list[tuple[float, float]]:
    """Microseconds of every case's step, of the clock and of all processors, in a new process."""
    environment = os.environ | {
        "PYTHONPATH": str(root.resolve()),
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "0",
    }
    command = [sys.executable, "-c", MEASURE, json.dumps(chosen)]
    # In the checkout: the folder where a process starts comes first among those it imports from.
    done = subprocess.run(command, cwd=root, env=environment, check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout)


def table(results: list[dict]) -> str:
    """One row per case, the time of the clock and of the processors per checkout."""
    roots = list(results[0]["wall_us"])
    heads = [f"{root}, {kind}" for kind in ("us", "CPU us") for root in roots]
    lines = ["| method | losses | lanes | " + " | ".join(heads) + " |"]
    lines.append("|---|" + "---:|" * (2 + len(heads)))
    for row in results:
        times = [row[kind][root] for kind in ("wall_us", "cpu_us") for root in roots]
        cells = " | ".join(f"{time:.0f}" for time in times)
        lines.append(f"| `{row['method']}` | {row['tasks']} | {row['lanes']} | {cells} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--roots", nargs="+", type=pathlib.Path, default=[pathlib.Path()])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--tasks", nargs="+", type=int, default=list(TASKS))
    parser.add_argument("--lanes", nargs="+", type=int, default=list(LANES))
    parser.add_argument("--json", type=pathlib.Path, default=None)
    options = parser.parse_args(arguments)
    chosen = cases(options.methods, options.tasks, options.lanes)
    found = {str(root): measure(root, chosen) for root in options.roots}
    results = [
        {
            "method": name,
            "tasks": m,
            "lanes": lanes,
            "wall_us": {root: times[i][0] for root, times in found.items()},
            "cpu_us": {root: times[i][1] for root, times in found.items()},
        }
        for i, (name, m, lanes, _) in enumerate(chosen)
    ]
    print(table(results))
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs"
    write_json(options.json, {"machine": machine, "per_step": results})


if __name__ == "__main__":
    main()
