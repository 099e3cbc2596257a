"""Every weighting against TorchJD's on the same input, in one process.

Run with TorchJD 0.18.0 and its solvers installed::

    python -m pip install torch==2.13.0 torchjd==0.18.0 quadprog qpsolvers cvxpy ecos scipy
    python -m tests.benchmarks.weightings --json weightings.json

Every cell is the median time of a call. The two libraries take turns in short blocks, so that noise
of the machine hits both; both use all cores; inputs are float32. Ours is one jitted call, dispatch
and the wait for the result included; TorchJD's is the call that its user makes. What TorchJD reads
as a Jacobian (ConFIG, Nash-MTL, ExcessMTL, the aggregators without weights), ours reads as one too.

TorchJD's calls return when they are done. JAX by default hands a call to another thread and returns
at once, which costs about 50 microseconds when the caller then waits for it; so
``jax_cpu_enable_async_dispatch`` is off, unless ``--async-dispatch`` is given. In a training loop
the whole step is one call, and the weighting costs what the table of `lax.scan` says.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxjd
from jaxjd import weightings

SIZES = (2, 4, 8, 16, 32, 64, 128)
COLUMNS = 1000
NOT_COUNTED = ("mean", "sum", "constant")


class Pair(NamedTuple):
    """One method in both libraries.

    Attributes:
      name: The public name, with what is not the default.
      ours: ``m -> weighting or aggregator``.
      theirs: ``m -> TorchJD's object``, or its class name where the number of tasks is not needed.
      reads: "gramian", "cross" or "jacobian": the input of both.
      at_least: The smallest number of tasks that the method is defined for.
    """

    name: str
    ours: Callable[[int], Any]
    theirs: Callable[[Any, int], Any]
    reads: str = "gramian"
    at_least: int = 2


PAIRS = (
    Pair("mean", lambda m: weightings.mean(), lambda t, m: t.MeanWeighting()),
    Pair("sum", lambda m: weightings.sum(), lambda t, m: t.SumWeighting()),
    Pair(
        "constant",
        lambda m: weightings.constant(jnp.full((m,), 0.5)),
        lambda t, m: t.ConstantWeighting(_torch().full((m,), 0.5)),
    ),
    Pair("random", lambda m: weightings.random(), lambda t, m: t.RandomWeighting()),
    Pair("upgrad", lambda m: weightings.upgrad(), lambda t, m: t.UPGradWeighting()),
    Pair("dualproj", lambda m: weightings.dualproj(), lambda t, m: t.DualProjWeighting()),
    Pair("mgda", lambda m: weightings.mgda(), lambda t, m: t.MGDAWeighting()),
    Pair("cagrad", lambda m: weightings.cagrad(c=0.5), lambda t, m: t.CAGradWeighting(c=0.5)),
    Pair("pcgrad", lambda m: weightings.pcgrad(), lambda t, m: t.PCGradWeighting()),
    Pair("gradvac", lambda m: weightings.gradvac(), lambda t, m: t.GradVacWeighting()),
    Pair("imtl_g", lambda m: weightings.imtl_g(), lambda t, m: t.IMTLGWeighting()),
    Pair("aligned_mtl", lambda m: weightings.aligned_mtl(), lambda t, m: t.AlignedMTLWeighting()),
    Pair(
        "fairgrad",
        lambda m: weightings.fairgrad(alpha=1.0),
        lambda t, m: t.FairGradWeighting(alpha=1.0),
    ),
    Pair("nash_mtl", lambda m: weightings.nash_mtl(), lambda t, m: t.NashMTL(m), "jacobian"),
    Pair("pcd", lambda m: weightings.pcd(), lambda t, m: t.PCDWeighting()),
    Pair(
        "krum",
        lambda m: weightings.krum(n_byzantine=1),
        lambda t, m: t.KrumWeighting(n_byzantine=1),
        at_least=4,
    ),
    Pair(
        "cr_mogm(upgrad)",
        lambda m: weightings.cr_mogm(weightings.upgrad()),
        lambda t, m: t.CRMOGMWeighting(t.UPGradWeighting()),
    ),
    Pair("modo", lambda m: weightings.modo(), lambda t, m: t.MoDoWeighting(), "cross"),
    Pair("sdmgrad", lambda m: weightings.sdmgrad(), lambda t, m: t.SDMGradWeighting(), "cross"),
    Pair(
        "excess_mtl",
        lambda m: weightings.excess_mtl(),
        lambda t, m: t.ExcessMTLWeighting(),
        "jacobian",
    ),
    Pair("conflict_free", lambda m: jaxjd.conflict_free(), lambda t, m: t.ConFIG(), "jacobian"),
    Pair("graddrop", lambda m: jaxjd.graddrop(num_tasks=m), lambda t, m: t.GradDrop(), "jacobian"),
    Pair(
        "trimmed_mean",
        lambda m: jaxjd.trimmed_mean(1),
        lambda t, m: t.TrimmedMean(1),
        "jacobian",
        at_least=4,
    ),
)


def _torch() -> Any:
    import torch

    return torch


class Inputs(NamedTuple):
    """The same numbers for both libraries."""

    jacobian: np.ndarray
    gramian: np.ndarray
    cross: np.ndarray


def make_inputs(m: int) -> Inputs:
    """Independent normal rows that all lean a little against their mean, so that they conflict."""
    generator = np.random.default_rng(m)
    jacobian = generator.standard_normal((m, COLUMNS)).astype(np.float32)
    other = (jacobian + generator.standard_normal((m, COLUMNS))).astype(np.float32)
    return Inputs(jacobian, jacobian @ jacobian.T, jacobian @ other.T)


def our_call(pair: Pair, m: int, inputs: Inputs) -> Callable[[], Any]:
    """One jitted call of ours, its state threaded through."""
    method = pair.ours(m)
    if isinstance(method, jaxjd.Weighting):
        state = method.init(m, jnp.zeros((COLUMNS,)))
        reads_jacobian = isinstance(method, jaxjd.JacobianWeighting)

        @jax.jit
        def update(stat: jax.Array, state: Any) -> tuple[jax.Array, Any]:
            if pair.reads == "jacobian" and not reads_jacobian:
                stat = jaxjd.gramian(stat)
            return method.update(stat, state)

    else:
        state = method.init(jnp.zeros((COLUMNS,)))
        update = jax.jit(lambda stat, state: method.update(stat, state))
    stat = jnp.asarray(getattr(inputs, pair.reads))
    box = [state]

    def call() -> Any:
        weights, box[0] = update(stat, box[0])
        return weights.block_until_ready()

    return call


def their_call(pair: Pair, m: int, inputs: Inputs) -> Callable[[], Any]:
    """TorchJD's call."""
    from torchjd import aggregation

    method = pair.theirs(aggregation, m)
    stat = _torch().from_numpy(getattr(inputs, pair.reads))
    return lambda: method(stat)


def block_seconds(call: Callable[[], Any], number: int) -> list[float]:
    """The seconds of each of `number` calls in a row."""
    times = []
    for _ in range(number):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def paired_medians(
    calls: tuple[Callable[[], Any], ...], seconds: float, block: float = 0.02
) -> list[float]:
    """The median seconds of calls that take turns in short blocks.

    A block is about `block` seconds long, as a training loop calls one library over and over; the
    first call of each block is left out, because the other library's threads may still be spinning.
    """
    for call in calls:
        call()
    lengths = [max(1, int(block / max(min(block_seconds(call, 2)), 1e-7))) for call in calls]
    times: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 3:
        for call, length, record in zip(calls, lengths, times, strict=True):
            call()
            record += block_seconds(call, length)
    return [statistics.median(record) for record in times]


def scan_seconds(pair: Pair, m: int, inputs: Inputs, seconds: float) -> float:
    """The time of one update of ours inside a `lax.scan`, where a training loop has it."""
    method = pair.ours(m)
    if not isinstance(method, jaxjd.Weighting):
        return math.nan
    stat = jnp.asarray(getattr(inputs, pair.reads))
    state = method.init(m, jnp.zeros((COLUMNS,)))
    reads_jacobian = isinstance(method, jaxjd.JacobianWeighting)

    def step(carry: tuple, scale: jax.Array) -> tuple[tuple, jax.Array]:
        # Changes a little from step to step, so that nothing can be hoisted out of the loop.
        read = stat * scale
        if pair.reads == "jacobian" and not reads_jacobian:
            read = jaxjd.gramian(read)
        weights, state = method.update(read, carry[0])
        return (state,), weights

    @jax.jit
    def run(state: Any, scales: jax.Array) -> jax.Array:
        return lax.scan(step, (state,), scales)[1]

    scales = 1 + jnp.linspace(0, 1e-3, 2)
    run(state, scales).block_until_ready()
    start = time.perf_counter()
    run(state, scales).block_until_ready()
    length = int(np.clip(0.05 * 2 / (time.perf_counter() - start), 4, 2000))
    scales = 1 + jnp.linspace(0, 1e-3, length)
    (median,) = paired_medians((lambda: run(state, scales).block_until_ready(),), seconds)
    return median / length


def groups_seconds(seconds: float, groups: int = 200, m: int = 4) -> dict[str, float]:
    """UPGrad on `groups` Gramians: one `vmap` of ours against one call of TorchJD's per group."""
    from torchjd import aggregation

    generator = np.random.default_rng(0)
    jacobians = generator.standard_normal((groups, m, 20)).astype(np.float32)
    gramians = jacobians @ jacobians.transpose(0, 2, 1)
    weighting = weightings.upgrad()
    update = jax.jit(jax.vmap(lambda gramian: weighting.update(gramian, ())[0]))
    ours_in = jnp.asarray(gramians)
    theirs_in = [_torch().from_numpy(gramian) for gramian in gramians]
    theirs = aggregation.UPGradWeighting()
    medians = paired_medians(
        (
            lambda: update(ours_in).block_until_ready(),
            lambda: [theirs(gramian) for gramian in theirs_in],
        ),
        seconds,
    )
    return {"groups": groups, "m": m, "ours": medians[0], "theirs": medians[1]}


def measure(pair: Pair, m: int, seconds: float, scan: bool) -> dict[str, Any]:
    """One cell of the table."""
    inputs = make_inputs(m)
    ours, theirs = paired_medians((our_call(pair, m, inputs), their_call(pair, m, inputs)), seconds)
    return {
        "method": pair.name,
        "m": m,
        "ours": ours,
        "theirs": theirs,
        "ratio": theirs / ours,
        "scan": scan_seconds(pair, m, inputs, seconds / 4) if scan else math.nan,
    }


def print_table(cells: list[dict[str, Any]], sizes: tuple[int, ...], key: str, unit: float) -> None:
    """Prints one row per method and one column per number of tasks."""
    print(f"{'':18}" + "".join(f"{m:>9}" for m in sizes))
    for name in dict.fromkeys(cell["method"] for cell in cells):
        row = {cell["m"]: cell[key] * unit for cell in cells if cell["method"] == name}
        print(f"{name:18}" + "".join(f"{row[m]:9.1f}" if m in row else " " * 9 for m in sizes))


def main() -> None:
    """Prints the tables and writes the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="*", help="only these (default: all)")
    parser.add_argument("--sizes", nargs="*", type=int, default=list(SIZES))
    parser.add_argument("--seconds", type=float, default=1.0, help="of measuring per cell")
    parser.add_argument(
        "--scan",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure inside lax.scan as well",
    )
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    parser.add_argument("--async-dispatch", action="store_true", help="JAX's default dispatch")
    arguments = parser.parse_args()
    jax.config.update("jax_cpu_enable_async_dispatch", arguments.async_dispatch)
    warnings.filterwarnings("ignore")

    sizes = tuple(arguments.sizes)
    cells = []
    for pair in PAIRS:
        if arguments.methods and pair.name not in arguments.methods:
            continue
        for m in sizes:
            if m >= pair.at_least:
                cells.append(measure(pair, m, arguments.seconds, arguments.scan))
                cell = cells[-1]
                print(
                    f"{pair.name:18} m={m:<4} ours {cell['ours'] * 1e6:10.1f} us, "
                    f"TorchJD {cell['theirs'] * 1e6:12.1f} us, ratio {cell['ratio']:8.1f}, "
                    f"in a scan {cell['scan'] * 1e6:10.1f} us",
                    flush=True,
                )
    groups = groups_seconds(arguments.seconds)

    print("\nTorchJD's time / ours")
    print_table(cells, sizes, "ratio", 1.0)
    print("\nours inside lax.scan, microseconds")
    print_table(cells, sizes, "scan", 1e6)
    counted = [cell["ratio"] for cell in cells if cell["method"] not in NOT_COUNTED]
    if counted:
        geometric_mean = math.exp(statistics.fmean(math.log(ratio) for ratio in counted))
        below = [
            f"{cell['method']} m={cell['m']}: {cell['ratio']:.2f}"
            for cell in cells
            if cell["ratio"] < 1 and cell["method"] not in NOT_COUNTED
        ]
        print(
            f"\ngeometric mean of {len(counted)} cells {geometric_mean:.1f}, "
            f"smallest {min(counted):.2f}; below 1: {', '.join(below) or 'none'}"
        )
    print(
        f"{groups['groups']} Gramians of m = {groups['m']}: "
        f"one vmap {groups['ours'] * 1e6:.0f} us, "
        f"TorchJD's {groups['groups']} calls {groups['theirs'] * 1e6:.0f} us, "
        f"ratio {groups['theirs'] / groups['ours']:.0f}"
    )
    if arguments.json:
        import importlib.metadata

        versions = {
            name: importlib.metadata.version(name) for name in ("jax", "torch", "torchjd", "jaxjd")
        }
        result = {
            "versions": versions,
            "async_dispatch": arguments.async_dispatch,
            "cells": cells,
            "groups": groups,
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
