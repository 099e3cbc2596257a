"""Prints how far each method is from its oracle; ``--write`` puts the table into docs/parity.md.

Run ``python -m tests.goldens.report`` from the root of the repository.
"""

from __future__ import annotations

import sys

import numpy as np

from tests.goldens import compare
from tests.goldens.methods import GOLDENS, HOPELESS, TOLERANCE, Golden
from tests.pages import DOCS, write_table

EXACT = {
    "upgrad": "exact projections",
    "dualproj": "exact projection",
    "mgda": "exact minimum norm",
    "cagrad": "exact maximum",
    "imtl_g": "formula in extended precision",
    "conflict_free": "formula in extended precision",
    "fairgrad": "root to 25 digits",
    "nash_mtl": "root to 25 digits",
    "pcd": "exact projection",
    "gradvac": "formula in extended precision",
}


def number(x: float) -> str:
    if x == 0:
        return "0"
    if not np.isfinite(x):
        return "fails"
    return f"{x:.0e}".replace("e-0", "e-").replace("e+0", "e+").replace("e+", "e")


def label(golden: Golden) -> str:
    return golden.method.replace("_sequence", " (calls in a row)")


def table() -> list[str]:
    lines = [
        "| method | settings | oracle | cases | float64 | float32 "
        "| TorchJD, median | TorchJD, worst |",
        "|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str], list[Golden]] = {}
    for golden in GOLDENS:
        groups.setdefault((label(golden), golden.oracle), []).append(golden)
    for (name, oracle), group in groups.items():
        if not compare.public(group[0]):
            print(f"{name}: not in jaxjd", file=sys.stderr)
            continue
        distances, cells, count = [], [], 0
        for golden in group:
            for case in compare.cases(golden):
                if case.exists:
                    count += 1
                    distances.append(compare.distance(golden, case))
        for dtype in ("float64", "float32"):
            held, largest, loose, hopeless = 0, 0.0, 0, 0
            for golden in group:
                for case, error in compare.errors(golden, dtype):
                    allowed = case.bound(golden, dtype)
                    if allowed <= TOLERANCE[dtype]:
                        held, largest = held + 1, max(largest, error)
                    elif allowed < HOPELESS:
                        loose += 1
                    else:
                        hopeless += 1
            cells.append(f"{number(largest)} ({held} / {loose} / {hopeless})")
        distances = np.nan_to_num(np.array(distances), nan=np.inf, posinf=np.inf)
        failed = int(np.sum(~np.isfinite(distances)))
        finite = distances[np.isfinite(distances)]
        worst = number(np.max(finite)) + (f", {failed} failed" if failed else "")
        held_to = "TorchJD" if oracle == "TorchJD" else EXACT[group[0].method.split("_seq")[0]]
        row = [f"`{name}`", str(len(group)), held_to, str(count), *cells]
        lines.append("| " + " | ".join([*row, number(np.median(distances)), worst]) + " |")
    return lines


def main() -> None:
    lines = table()
    print("\n".join(lines))
    if "--write" in sys.argv:
        write_table(DOCS / "parity.md", "table", "\n".join(lines))


if __name__ == "__main__":
    main()
