"""Whole training steps for the shapes of problems that people have, by the documented route.

Run with TorchJD 0.18.0 installed, or without for ours only::

    python -m pip install torch==2.13.0 torchjd==0.18.0 quadprog qpsolvers matplotlib
    python -m tests.benchmarks.shapes --json shapes.json --plot shapes.svg  # --write: the pages

For each shape: `jaxjd.aggregated_value_and_grad` with UPGrad over all parameters, and the same with
``every=10``, beside the plain gradient of the mean of the losses, ``jax.jacrev`` of them, and
TorchJD's ways, all in one run and as in `tests.benchmarks.steps`, which says how it is timed. Of
TorchJD the quickest counts, also where it aggregates the trunk's gradients only (``mtl_backward``).
The figure of ``every=10`` is the mean of one first call and nine between.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from tests.benchmarks import steps
from tests.benchmarks.step_cases import CASES, SHAPES

NAMES = {
    "heads-6": "trunk of 5 x 512, 6 heads, batch 96",
    "heads-8": "trunk of 8 x 1024, 8 heads, batch 32",
    "pinn": "PINN, 3 losses on points of their own",
    "own": "8 batches of 64, written out, 4 x 512",
    "own-384": "8 batches of 64, written out, 4 x 384",
    "stacked": "8 batches of 64, stacked, 4 x 512",
    "cnn-4": "CNN, 4 losses, batch 24",
    "transformer": "transformer of 4 x 256, 6 losses",
    "adapters": "adapters of rank 8 on 6 x 512, 6 losses",
    "mlp-32": "perceptron 8 x 1024, 8 losses, batch 32",
    "mlp-128": "perceptron 8 x 1024, 8 losses, batch 128",
    "mlp-2": "perceptron 8 x 512, 2 losses, batch 128",
    "mlp-32-losses": "perceptron 8 x 512, 32 losses, batch 128",
}
TARGETS = {
    "heads-6": 2.8,
    "heads-8": 2.2,
    "pinn": 1.3,
    "own": 1.5,
    "own-384": 1.5,
    "stacked": 1.3,
    "cnn-4": 2.3,
    "transformer": 2.8,
    "adapters": 3.9,
    "mlp-32": 1.9,
    "mlp-128": 3.4,
    "mlp-2": 1.7,
    "mlp-32-losses": 15.4,
}
ROOT = Path(__file__).parents[2]
PAGES = {ROOT / "README.md": True, ROOT / "docs" / "performance.md": False}
"""Where the tables are, and which is the short one."""
START, END = "<!-- start shapes -->", "<!-- end shapes -->"


def summary(rows: Sequence[steps.Row]) -> dict[str, Any]:
    """One line of the table, of the rows of one shape."""
    found = {row["variant"]: row for row in rows if "error" not in row}
    names = ("jax plain", "jaxjd documented", "jax jacrev")
    plain, ours, jacrev = (found[name] for name in names)
    first, between = (found[f"jaxjd every=10, {call}"]["ratio"] for call in ("first", "between"))
    line = {
        "case": ours["case"],
        "plain_ms": 1e3 * plain["seconds"],
        "ours_ms": 1e3 * ours["seconds"],
        "ours": ours["ratio"],
        "target": TARGETS.get(ours["case"]),
        "every": (first + 9 * between) / 10,
        "jacrev": jacrev["ratio"],
        "temporaries": ours["temporary_mb"] / max(plain["temporary_mb"], 1e-3),
        "compile_s": ours["compile_s"],
        "plain_compile_s": plain["compile_s"],
    }
    peers = [row for row in rows if row["framework"] == "torch" and "error" not in row]
    peers = [row for row in peers if row["group"] != "plain"]
    if peers:
        best = min(peers, key=lambda row: row["seconds"])
        line["torchjd"] = best["variant"].removeprefix("torchjd ")
        line["torchjd_ms"] = 1e3 * best["seconds"]
        line["torchjd_own_ratio"] = best["ratio"]
        line["speedup"] = steps.median_ratio(best["rounds"], ours["rounds"])
    return line


def table(lines: Sequence[dict[str, Any]], short: bool = False) -> str:
    """The lines as a Markdown table; the short one is README's."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "shape": lambda line: NAMES.get(line["case"], line["case"]),
        "plain step, ms": lambda line: f"{line['plain_ms']:.1f}",
        "in plain steps": lambda line: f"{line['ours']:.2f}",
        "wanted": lambda line: "" if line["target"] is None else f"{line['target']:g}",
        "`every=10`": lambda line: f"{line['every']:.2f}",
        "`jax.jacrev`": lambda line: f"{line['jacrev']:.1f}",
        "memory": lambda line: f"{line['temporaries']:.1f}",
        "ms": lambda line: f"{line['ours_ms']:.1f}",
        "TorchJD's best, ms": lambda line: (
            f"{line['torchjd_ms']:.1f} ({line['torchjd']})" if "torchjd" in line else ""
        ),
        "TorchJD's time / ours": lambda line: f"{line['speedup']:.1f}" if "speedup" in line else "",
    }
    if short:
        for name in ("plain step, ms", "wanted", "ms", "TorchJD's best, ms"):
            del columns[name]
    rows = [list(columns), ["---", *["---:"] * (len(columns) - 1)]]
    rows += [[cell(line) for cell in columns.values()] for line in lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def write(lines: Sequence[dict[str, Any]]) -> None:
    """Puts the tables where the pages have marks for them."""
    for page, short in PAGES.items():
        text = page.read_text()
        before, _, rest = text.partition(START)
        _, _, after = rest.partition(END)
        page.write_text(f"{before}{START}\n{table(lines, short)}\n{END}{after}")


def plot(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Bars: how many plain steps of its own framework each way costs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    series = {
        "jaxjd, every call": "ours",
        "jaxjd, every=10": "every",
        "jax.jacrev": "jacrev",
        "TorchJD's best": "torchjd_own_ratio",
    }
    figure, axes = pyplot.subplots(figsize=(8, 0.5 * len(lines) + 1.5), layout="constrained")
    for number, (name, key) in enumerate(series.items()):
        places = [place + 0.2 * (number - 1.5) for place in range(len(lines))]
        lengths = [line.get(key, float("nan")) for line in lines]
        drawn = axes.barh(places, lengths, height=0.19, label=name)
        axes.bar_label(drawn, [f"{x:.1f}" if x == x else "" for x in lengths], fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yticks(range(len(lines)), [NAMES.get(line["case"], line["case"]) for line in lines])
    axes.invert_yaxis()
    axes.set_xlabel("plain gradient steps of the same framework")
    axes.legend()
    figure.savefig(path)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table and writes the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="*", choices=CASES, default=SHAPES, metavar="CASE")
    parser.add_argument("--seconds", type=float, default=6.0, help="of measuring per variant")
    parser.add_argument("--rounds", type=int, default=3, help="into which they are split")
    parser.add_argument("--no-torch", action="store_true", help="ours only")
    parser.add_argument("--from-json", type=Path, help="print and draw what was measured")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    parser.add_argument("--write", action="store_true", help="the tables of README and the guide")
    parser.add_argument("--plot", type=Path, help="where to draw them")
    arguments = parser.parse_args(argv)
    if arguments.from_json:
        result = json.loads(arguments.from_json.read_text())
    else:
        with_torch = not arguments.no_torch and importlib.util.find_spec("torchjd") is not None
        result = {"machine": steps.machine(), "seconds": arguments.seconds, "rows": [], "lines": []}
        with jax.default_matmul_precision(None if jax.default_backend() == "cpu" else "highest"):
            for name in arguments.cases:
                rows = steps.measure(
                    CASES[name], arguments.seconds, arguments.rounds, 1, with_torch
                )
                steps.print_rows(rows)
                result["rows"] += rows
                result["lines"].append(summary(rows))
    print("\n" + table(result["lines"]))
    if arguments.write:
        write(result["lines"])
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.plot:
        plot(result["lines"], arguments.plot)


if __name__ == "__main__":
    # A call returns when it is done, as TorchJD's does.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    main()
