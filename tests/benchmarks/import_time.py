"""Times ``import jaxjd`` against ``import optax``, each in fresh processes, in turn.

Run it on an idle machine::

    python -m tests.benchmarks.import_time --runs 15 --out import_time.json
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import time


def seconds(module: str) -> float:
    """Returns the wall time of a process that imports one module."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    return time.perf_counter() - start


def main() -> None:
    """Prints and writes the medians and the ratio of the pairs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--out", type=pathlib.Path, default=None)
    options = parser.parse_args()
    for module in ("optax", "jaxjd"):
        seconds(module)  # Fills the caches of the file system.
    pairs = [(seconds("jaxjd"), seconds("optax")) for _ in range(options.runs)]
    result = {
        "runs": options.runs,
        "jaxjd_seconds": statistics.median(ours for ours, _ in pairs),
        "optax_seconds": statistics.median(theirs for _, theirs in pairs),
        "ratio": statistics.median(ours / theirs for ours, theirs in pairs),
    }
    print(
        f"import jaxjd {result['jaxjd_seconds']:.3f} s, import optax "
        f"{result['optax_seconds']:.3f} s, median ratio of the pairs {result['ratio']:.3f}"
    )
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
