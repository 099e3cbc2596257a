"""Runs the numeric tests as other processors, optimizations and thread counts would.

Run ``python -m tests.cpu_matrix`` from the root of the repository; ``--list`` names the cells,
``--cells 'SSE4_2-*' AVX2-O3-2`` chooses some, and what follows ``--`` goes to pytest: ``-- -m ''``
adds the slow tests. Each cell is one pytest process over the numeric files. The exit status is 1 if
any test of any cell fails.
"""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import os
import pathlib
import re
import resource
import subprocess
import sys

import jax

FILES = (
    "batching",
    "certificates",
    "derivatives",
    "fairness",
    "hard_matrices",
    "parity",
    "precision",
    "properties",
    "scalarizers",
    "solvers",
    "source_documents",
    "values",
    "values_more",
)
NEEDS_DEVICES = ("tests/test_scalarizers.py::test_explicit_mesh",)
INSTRUCTIONS = ("SSE4_2", "AVX", "AVX2", "AVX512")
LEVELS = (0, 3)
THREADS = (1, 2)
CELLS = {
    f"{isa}-O{level}-{threads}": (isa, level, threads)
    for isa, level, threads in itertools.product(INSTRUCTIONS, LEVELS, THREADS)
}


def environment(isa: str, level: int, threads: int) -> dict[str, str]:
    """The variables that make this machine such a one."""
    flags = f"--xla_cpu_max_isa={isa} --xla_backend_optimization_level={level}"
    if level == 0:
        flags += " --xla_llvm_disable_expensive_passes=true"
    # XLA's pool has a thread for each device at least, so only one device can have one thread.
    return {
        **os.environ,
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "NPROC": str(threads),
    }


def run(name: str, options: list[str]) -> tuple[bool, str, list[str]]:
    """Runs a cell: whether it passed, pytest's last line, and the tests that failed."""
    root = pathlib.Path(__file__).parents[1]
    paths = [f"tests/test_{file}.py" for file in FILES]
    command = [sys.executable, "-m", "pytest", "-n=0", "-q", "-rfE", "--tb=short", *paths]
    command += [f"--deselect={test}" for test in NEEDS_DEVICES] + options
    process = subprocess.run(
        command, cwd=root, env=environment(*CELLS[name]), capture_output=True, text=True
    )
    lines = process.stdout.strip().splitlines() or process.stderr.strip().splitlines()[-1:] or [""]
    failed = [line for line in lines if re.match("(FAILED|ERROR) ", line)]
    if process.returncode:
        print(process.stdout, process.stderr, sep="\n", flush=True)
    return process.returncode == 0, lines[-1].strip("= "), failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cells", nargs="+", default=["*"], help="names or patterns of cells")
    parser.add_argument("--list", action="store_true", help="print the names of the cells")
    parser.add_argument("pytest", nargs="*", help="arguments of pytest, after --")
    arguments = parser.parse_args()
    chosen = [
        name for name in CELLS if any(fnmatch.fnmatch(name, cell) for cell in arguments.cells)
    ]
    if not chosen:
        parser.error(f"no cell is called {', '.join(arguments.cells)}: see --list")
    if arguments.list:
        print("\n".join(chosen))
        return 0
    rows, good = [], True
    for name in chosen:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        passed, summary, failed = run(name, arguments.pytest)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        good &= passed
        rows.append(f"{name:12} {'passed' if passed else 'FAILED'} {seconds:6.0f} s  {summary}")
        rows += [f"    {line}" for line in failed]
        print(rows[-1 - len(failed)], flush=True)
    print(f"\nCells of jax {jax.__version__}, with CPU seconds:", *rows, sep="\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
