"""Whole aggregated training steps, side by side with TorchJD's.

Run with TorchJD 0.18.0 installed, or without for ours only::

    python -m pip install torch==2.13.0 torchjd==0.18.0 quadprog qpsolvers matplotlib
    python -m tests.benchmarks.steps --json steps.json --plot steps.svg
    python -m tests.benchmarks.steps --grid --json grid.json

A step is the losses, their Gramian or Jacobian, UPGrad's weights and the combined gradient; there
is no optimizer on either side. Its ratio is to the plain step of the same framework, the gradient
of the mean of the losses. Both sides have the same parameters and batch, float32, and all cores.
Variants that do not give the same gradient are not timed.

Times are medians. In every round all of ours take turns in short blocks, and then TorchJD's
variants run one after the other, each in a process of its own that waits meanwhile; figures are
medians over rounds, ratios medians of the rounds' ratios. The first step of each block is left out,
because another variant had the caches. Measure on a quiet machine: PyTorch's threads wait for one
another at every product, and suffer more from other load than XLA's.

Memory of ours is what the compiled program asks for next to its inputs and outputs; TorchJD's is
the peak of its process' resident set over the steps, less what it was before the first, so
the gradients are in it. On a GPU it is the peak of PyTorch's
allocator instead. Compile times are those of tracing, lowering and compiling, the median of up to
three times from empty caches.

TorchJD's variants: ``autojac`` is ``backward`` (``mtl_backward`` where there are heads) and
``jac_to_grad``; ``autojac gramian`` has ``optimize_gramian_computation=True``;
``autojac sequential`` has that and ``parallel_chunk_size=1``; ``autogram`` is the engine, with
``batch_dim=0`` where losses belong to examples, which is faster there, and ``batch_dim=None``
elsewhere, where nothing else is valid. Heads get the gradient of the sum of the losses, but with
``autogram`` that of the weighted sum.

neural-tangents (0.6.5, the last release) is no peer: it does not import with jax 0.10.
``neural_tangents/_src/empirical.py`` imports ``Jaxpr``, ``JaxprEqn``, ``Literal``, ``Value`` and
``Var`` from ``jax.core``, which does not have them any more, and ``safe_map`` and ``safe_zip`` from
``jax.util``, which is gone. Of its algorithms, Jacobian contraction is the dense form and
NTK-vector products is ``"products"``; structured derivatives resembles the factored form.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tests.benchmarks.step_cases import CASES, NAMES, Case, make_numbers, torchjd_variants_of
from tests.benchmarks.step_jax import (
    Variant,
    grid_variants_of,
    shape_variants_of,
    shared,
    variants_of,
)

MEGABYTE = 1e6
AGREEMENT = 1e-4
# TorchJD regularizes the projection, and so has other weights in the third digit.
PEER_AGREEMENT = {"losses": 1e-3, "norm": 2e-2}
BLOCK = 0.1

Row = dict[str, Any]


class Target(NamedTuple):
    """A bound on one figure of a case.

    Attributes:
      case: The name of the case.
      figure: "ratio", "speedup", "temporary_mb", "temporary_ratio" or "compile_ratio".
      bound: The bound.
      variant: The variant that it is about.
    """

    case: str
    figure: str
    bound: float
    variant: str = "jaxjd auto"

    @property
    def at_least(self) -> bool:
        return self.figure == "speedup"


TARGETS = (
    Target("a-32", "ratio", 2.5),
    Target("a-32", "temporary_mb", 12),
    Target("a-32", "speedup", 5),
    Target("a-32", "compile_ratio", 3),
    Target("a-128", "ratio", 4),
    Target("a-128", "temporary_mb", 40),
    Target("a-128", "speedup", 5),
    Target("a-128", "compile_ratio", 3),
    Target("b-2", "ratio", 1.5),
    Target("b-32", "ratio", 14),
    Target("b-32", "speedup", 3),
    *(
        Target(case, figure, bound)
        for case in ("d-16", "d-32", "d-64", "d-mlp")
        for figure, bound in (("ratio", 1.4), ("temporary_ratio", 1.5), ("speedup", 1))
    ),
    Target("features-32", "ratio", 1.3, "jaxjd features"),
    Target("features-128", "ratio", 1.3, "jaxjd features"),
)
GRID_BOUND = 1.1
WIDTHS, BATCHES, TASKS = (64, 256, 1024), (4, 32, 256, 2048), (2, 8, 32)


class Program:
    """A compiled step with its arguments.

    Attributes:
      variant: What it does.
      compile_s: The seconds of tracing, lowering and compiling, the median.
      losses: The losses.
      gradient: The gradient, until it has been compared.
      norm: The length of its shared part.
      difference: How far it is from that of the group's first, relative.
    """

    def __init__(self, variant: Variant, numbers: tuple, compiles: int) -> None:
        self.variant, self.numbers = variant, numbers
        times: list[float] = []
        while len(times) < compiles and sum(times) < 10:
            if compiles > 1:
                jax.clear_caches()
            start = time.perf_counter()
            self.compiled = jax.jit(variant.step).lower(*numbers).compile()
            times.append(time.perf_counter() - start)
        self.compile_s = statistics.median(times)
        self.losses, self.gradient = self()[:2]
        self.norm = norm(shared(self.gradient))
        self.difference = math.nan

    def __call__(self) -> Any:
        return jax.block_until_ready(self.compiled(*self.numbers))

    @property
    def temporary_mb(self) -> float:
        analysis = self.compiled.memory_analysis()
        return math.nan if analysis is None else analysis.temp_size_in_bytes / MEGABYTE


def timed(program: Program) -> float:
    start = time.perf_counter()
    program()
    return time.perf_counter() - start


def take_turns(programs: Sequence[Program], seconds: float) -> list[float]:
    """The median seconds of each program, in blocks by turns, about `seconds` for each."""
    times: list[list[float]] = [[] for _ in programs]
    spent = [0.0] * len(programs)
    while min(spent) < seconds:
        for number, program in enumerate(programs):
            if spent[number] >= seconds:
                continue
            found = [timed(program)]
            if found[0] < 1:  # Longer ones have no use of what caches held before.
                spent[number] += found.pop()
            end = time.perf_counter() + min(BLOCK, seconds - spent[number])
            while not found or time.perf_counter() < end:
                found.append(timed(program))
            spent[number] += sum(found)
            times[number] += found
    return [statistics.median(found) for found in times]


def norm(tree: Any) -> float:
    return math.sqrt(sum(float(jnp.vdot(leaf, leaf)) for leaf in jax.tree.leaves(tree)))


def compile_all(variants: Iterable[Variant], numbers: tuple, compiles: int) -> list[Program]:
    """Compiles variants and compares the gradients in each group.

    Raises:
      RuntimeError: If two of a group disagree.
    """
    programs, references = [], {}
    jax.jit(lambda x: x @ x).lower(jnp.ones((8, 8))).compile()  # The compiler starts up.
    for variant in variants:
        program = Program(variant, numbers, compiles)
        reference = references.setdefault(variant.group, program)
        apart = jax.tree.map(jnp.subtract, program.gradient, reference.gradient)
        program.difference = norm(apart) / norm(reference.gradient)
        if not program.difference <= AGREEMENT:
            raise RuntimeError(
                f"{variant.name} and {reference.variant.name} disagree: the difference is "
                f"{program.difference:.1e} of the gradient, at most {AGREEMENT:.0e} is expected."
            )
        programs.append(program)
    for program in programs:
        del program.gradient
    return programs


class Peer:
    """One of TorchJD's variants in a process of its own."""

    def __init__(self, case: Case, name: str, group: str) -> None:
        self.name, self.group, self.error = name, group, None
        self.rounds: list[float] = []
        self.memory: dict[str, float] = {}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.step_torchjd", case.name, name],
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.first = self.answer()

    def answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        found = json.loads(line) if line else {"error": f"ended with {self.process.wait()}"}
        self.error = found.get("error")
        return found

    def check(self, programs: Sequence[Program]) -> None:
        """Compares the losses and the length of the gradient with ours."""
        ours = next((p for p in programs if p.variant.group == self.group), None)
        if self.error or ours is None:
            return
        pairs = zip(self.first["losses"], ours.losses.tolist(), strict=True)
        losses = max(abs(theirs - own) / abs(own) for theirs, own in pairs)
        norm = abs(self.first["norm"] / ours.norm - 1)
        for name, value in (("losses", losses), ("norm", norm)):
            if not value <= PEER_AGREEMENT[name]:
                self.error = f"{name} differ from ours by {value:.1e}"

    def run(self, seconds: float) -> None:
        if self.error:
            return
        print(seconds, file=self.process.stdin, flush=True)
        found = self.answer()
        if not self.error:
            self.rounds.append(statistics.median(found["times"]))
            self.memory = {key: found[key] for key in ("before_mb", "peak_mb")}

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def row(self) -> Row:
        row = {"framework": "torch", "variant": f"torchjd {self.name}", "group": self.group}
        if self.error:
            return row | {"error": self.error}
        temporary = self.memory["peak_mb"] - self.memory["before_mb"]
        return row | self.memory | {"temporary_mb": temporary, "rounds": self.rounds}


def measure(case: Case, seconds: float, rounds: int, compiles: int, with_torch: bool) -> list[Row]:
    """All variants of one case."""
    numbers = jax.device_put(make_numbers(case))
    variants = shape_variants_of(case) if case.is_shape else variants_of(case)
    programs = compile_all(variants, numbers, compiles)
    ours: list[list[float]] = []
    peers: list[Peer] = []
    try:
        if with_torch:
            for name, group in torchjd_variants_of(case).items():
                peers.append(Peer(case, name, group))
                peers[-1].check(programs)
        for _ in range(rounds):
            ours.append(take_turns(programs, seconds / rounds))
            for peer in peers:
                peer.run(seconds / rounds)
    finally:
        for peer in peers:
            peer.close()
    rows = [
        {
            "framework": "jax",
            "variant": program.variant.name,
            "group": program.variant.group,
            "rounds": list(times),
            "temporary_mb": program.temporary_mb,
            "compile_s": program.compile_s,
            "difference": program.difference,
        }
        for program, times in zip(programs, zip(*ours, strict=True), strict=True)
    ]
    rows += [peer.row() for peer in peers]
    add_ratios(rows)
    return [{"case": case.name, **row} for row in rows]


def median_ratio(times: Sequence[float], others: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def add_ratios(rows: list[Row]) -> None:
    """Adds every row's figures relative to the plain step and to TorchJD's best.

    The speed-up of a plain step is PyTorch's plain step over it.
    """
    valid = [row for row in rows if "error" not in row]
    plain = {row["framework"]: row for row in valid if row["variant"].endswith(" plain")}
    best: dict[str, Row] = {}
    for row in valid:
        row["seconds"] = statistics.median(row["rounds"])
        own = plain.get(row["framework"])
        if own is not None:
            row["ratio"] = median_ratio(row["rounds"], own["rounds"])
            for figure, key in (("temporary", "temporary_mb"), ("compile", "compile_s")):
                if row.get(key) and own.get(key):
                    row[f"{figure}_ratio"] = row[key] / own[key]
        if row["framework"] == "torch":
            best[row["group"]] = min(
                best.get(row["group"], row), row, key=lambda row: row["seconds"]
            )
    for row in valid:
        whole = "without" not in row["variant"]
        if row["framework"] == "jax" and row["group"] in best and whole:
            row["speedup"] = median_ratio(best[row["group"]]["rounds"], row["rounds"])


def cell(row: Row, key: str, form: str, scale: float = 1.0) -> str:
    value = row.get(key)
    width = int(form.split(".")[0])
    return " " * width if value is None else f"{value * scale:{form}}"


def print_rows(rows: list[Row]) -> None:
    header = ("ms", "x plain", "TorchJD best/", "MB", "x plain", "compile s", "x plain")
    print(f"\n{rows[0]['case']:40}" + "".join(f"{name:>14}" for name in header))
    for row in rows:
        if "error" in row:
            print(f"  {row['variant']:38}  failed: {row['error'][:100]}")
            continue
        cells = (
            cell(row, "seconds", "14.2f", 1e3),
            cell(row, "ratio", "14.2f"),
            cell(row, "speedup", "14.2f"),
            cell(row, "temporary_mb", "14.1f"),
            cell(row, "temporary_ratio", "14.2f"),
            cell(row, "compile_s", "14.2f"),
            cell(row, "compile_ratio", "14.1f"),
        )
        print(f"  {row['variant']:38}" + "".join(cells))
    sys.stdout.flush()


def check_targets(rows: list[Row]) -> list[dict[str, Any]]:
    """Compares the figures with the targets and prints what was met."""
    found = []
    by_name = {(row["case"], row["variant"]): row for row in rows}
    for target in TARGETS:
        value = by_name.get((target.case, target.variant), {}).get(target.figure)
        if value is None:
            continue
        met = value >= target.bound if target.at_least else value <= target.bound
        found.append({**target._asdict(), "value": value, "met": met})
        print(
            f"{'met   ' if met else 'missed'}  {target.case:14} {target.variant:16} "
            f"{target.figure:16} {value:9.2f}, at {'least' if target.at_least else 'most'} "
            f"{target.bound:g}"
        )
    return found


def measure_grid(seconds: float, rounds: int, cells: Iterable[tuple[int, int, int]]) -> list[Row]:
    """The choice of ``"auto"`` against both forms, for MLPs of four layers.

    Programs that are the same are timed once.
    """
    rows = []
    for width, batch, m in cells:
        case = Case(f"{width}/{batch}/{m}", "mlp", batch=batch, m=m, depth=4, width=width)
        numbers = jax.device_put(make_numbers(case))
        variants = grid_variants_of(case)
        texts = [jax.jit(variant.step).lower(*numbers).as_text() for variant in variants]
        places = [texts.index(text) for text in texts]
        distinct = sorted(set(places))
        programs = compile_all([variants[place] for place in distinct], numbers, compiles=1)
        found = [take_turns(programs, seconds / rounds) for _ in range(rounds)]
        columns = [[times[distinct.index(place)] for times in found] for place in places]
        medians = [statistics.median(column) for column in columns]
        best = min((0, 1), key=medians.__getitem__)
        row = {
            "width": width,
            "batch": batch,
            "m": m,
            **{v.name: median for v, median in zip(variants, medians, strict=True)},
            "auto is": variants[places[2]].name if places[2] != 2 else "its own",
            "ratio": median_ratio(columns[2], columns[best]),
            "rounds": dict(zip((v.name for v in variants), columns, strict=True)),
        }
        rows.append(row)
        print(
            f"width {width:5} batch {batch:5} m {m:3}   "
            + "".join(f"{name} {row[name] * 1e3:10.3f} ms   " for name in ("dense", "factored"))
            + f"auto {row['auto'] * 1e3:10.3f} ms ({row['auto is']:8}), of the best "
            + f"{row['ratio']:5.2f}",
            flush=True,
        )
    return rows


def report_grid(rows: list[Row]) -> None:
    worst = sorted(rows, key=lambda row: -row["ratio"])
    above = [row for row in worst if row["ratio"] > GRID_BOUND]
    print(
        f"\n{'missed' if above else 'met'}: auto is at most {GRID_BOUND:g} times the best in "
        f"{len(rows) - len(above)} of {len(rows)} cells. The worst:"
    )
    for row in worst[:5]:
        print(f"  width {row['width']} batch {row['batch']} m {row['m']}: {row['ratio']:.2f}")


def plot(rows: list[Row], path: Path) -> None:
    """Bars: steps of their own framework's plain step that each case costs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = list(dict.fromkeys(row["case"] for row in rows))

    def least(case: str, keep: Any) -> float:
        found = [r["ratio"] for r in rows if r["case"] == case and "ratio" in r and keep(r)]
        return min(found, default=math.nan)

    ours = ("jaxjd auto", "jaxjd features")
    dense = ("jax jacrev", "jax vmap of grad", "jax jacrev at the features")

    def theirs(row: Row) -> bool:
        return row["framework"] == "torch" and row["group"] in ("together", "features")

    bars = {
        "jaxjd": [least(case, lambda row: row["variant"] in ours) for case in cases],
        "plain JAX, the Jacobian": [
            least(case, lambda row: row["variant"] in dense) for case in cases
        ],
        "TorchJD's best": [
            least(
                case,
                lambda row: (
                    row["framework"] == "torch" and row["group"] in ("together", "features")
                ),
            )
            for case in cases
        ],
    }
    figure, axes = pyplot.subplots(figsize=(1.2 * len(cases) + 2, 4), layout="constrained")
    for number, (name, heights) in enumerate(bars.items()):
        places = [place + 0.27 * (number - 1) for place in range(len(cases))]
        drawn = axes.bar(places, heights, width=0.25, label=name)
        labels = ["" if math.isnan(height) else f"{height:.1f}" for height in heights]
        axes.bar_label(drawn, labels, fontsize=7)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_yscale("log")
    axes.set_xticks(range(len(cases)), cases)
    axes.set_ylabel("steps of the same framework's plain gradient")
    axes.legend()
    figure.savefig(path)
    pyplot.close(figure)


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    versions = {}
    for name in ("jax", "jaxlib", "jaxjd", "torch", "torchjd"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    device = jax.devices()[0]
    return {
        "versions": versions,
        "platform": platform.platform(),
        "device": device.device_kind,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the tables and writes the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="*", choices=CASES, metavar="CASE", help=" ".join(NAMES))
    parser.add_argument("--seconds", type=float, default=6.0, help="of measuring per variant")
    parser.add_argument("--rounds", type=int, default=3, help="into which they are split")
    parser.add_argument("--compiles", type=int, default=3, help="of which the median is taken")
    parser.add_argument("--grid", action="store_true", help="auto's choices over a grid instead")
    parser.add_argument("--no-torch", action="store_true", help="ours only")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    parser.add_argument("--plot", type=Path, help="where to draw them")
    arguments = parser.parse_args(argv)
    if min(arguments.seconds, arguments.rounds, arguments.compiles) <= 0:
        parser.error("--seconds, --rounds and --compiles must be positive.")
    # On GPUs no products in TF32, which is TorchJD's default as well.
    with jax.default_matmul_precision(None if jax.default_backend() == "cpu" else "highest"):
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    found = machine()
    print(", ".join(f"{name} {version}" for name, version in found["versions"].items() if version))
    print(f"{found['device']}, {found['cores']} cores, {found['platform']}")
    print(f"load of the last minute: {found['load']:.2f}", flush=True)
    result: dict[str, Any] = {"machine": found, "seconds": arguments.seconds, "rows": []}
    if arguments.grid:
        grid = [(width, batch, m) for width in WIDTHS for batch in BATCHES for m in TASKS]
        result["grid"] = measure_grid(arguments.seconds, arguments.rounds, grid)
        report_grid(result["grid"])
    else:
        with_torch = not arguments.no_torch and importlib.util.find_spec("torchjd") is not None
        if not with_torch:
            print("Without TorchJD: ours only.")
        for name in arguments.cases or NAMES:
            rows = measure(
                CASES[name], arguments.seconds, arguments.rounds, arguments.compiles, with_torch
            )
            result["rows"] += rows
            print_rows(rows)
        print()
        result["targets"] = check_targets(result["rows"])
        if arguments.plot:
            plot(result["rows"], arguments.plot)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    # A call returns when it is done, as TorchJD's does.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    main()
