"""How often an update conflicts with a task, and how much: the methods on the same Jacobians.

Run::

    python -m tests.benchmarks.conflict
    python -m tests.benchmarks.conflict --write

The first prints the table, the second also puts it into docs/choosing.md; tests/test_docs.py
computes some of its rows again. There are 1,000 Jacobians of 4 tasks and 8 parameters with normal
entries, as they are ("alike"), and with the length of each row times a factor of 10^U(-1, 1)
("apart"). Rows are independent, so there is always a direction that improves all tasks. The methods
that learn from call to call are left out. Nothing is trained here, and an update that conflicts
with a task in one step may still be the better one in the end.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import jaxjd
from tests.pages import DOCS, write_table

DRAWS, TASKS, SIZE = 1000, 4, 8
# A cosine below this is no rounding error.
CONFLICT = -1e-4

METHODS: dict[str, Callable] = {
    "mean": lambda key: jaxjd.mean(),
    "random": lambda key: jaxjd.random(key=key),
    "graddrop": lambda key: jaxjd.graddrop(key=key),
    "trimmed_mean(1)": lambda key: jaxjd.trimmed_mean(trim_number=1),
    "stch": lambda key: jaxjd.stch(),
    "pcgrad": lambda key: jaxjd.pcgrad(key=key),
    "aligned_mtl": lambda key: jaxjd.aligned_mtl(),
    "imtl_g": lambda key: jaxjd.imtl_g(),
    "cagrad(0.5)": lambda key: jaxjd.cagrad(c=0.5),
    "cagrad(1)": lambda key: jaxjd.cagrad(c=1.0),
    "pcd": lambda key: jaxjd.pcd(num_tasks=TASKS),
    "upgrad": lambda key: jaxjd.upgrad(),
    "dualproj": lambda key: jaxjd.dualproj(),
    "mgda": lambda key: jaxjd.mgda(),
    "nash_mtl": lambda key: jaxjd.nash_mtl(),
    "fairgrad(2)": lambda key: jaxjd.fairgrad(alpha=2.0),
    "conflict_free": lambda key: jaxjd.conflict_free(),
}


def jacobians() -> tuple[np.ndarray, np.ndarray]:
    """The Jacobians with rows of lengths alike and apart, shape ``(DRAWS, TASKS, SIZE)`` each."""
    generator = np.random.default_rng(0)
    alike = generator.standard_normal((DRAWS, TASKS, SIZE)).astype(np.float32)
    factors = 10 ** generator.uniform(-1, 1, (DRAWS, TASKS, 1))
    return alike, (alike * factors).astype(np.float32)


def cosines(make: Callable, found: np.ndarray) -> np.ndarray:
    """The cosines of every update with the rows of its Jacobian, shape ``(len(found), TASKS)``."""

    def update(jacobian: jax.Array, key: jax.Array) -> jax.Array:
        aggregator = make(key)
        return aggregator.update(jacobian, aggregator.init(jnp.zeros(SIZE)))[0]

    # The same draws for both kinds.
    keys = jnp.concatenate([jax.random.split(jax.random.key(0), DRAWS)] * (len(found) // DRAWS))
    updates = np.asarray(jax.jit(jax.vmap(update))(jnp.asarray(found), keys), np.float64)
    products = np.einsum("kmn,kn->km", found.astype(np.float64), updates)
    lengths = np.linalg.norm(found, axis=2) * np.linalg.norm(updates, axis=1)[:, None]
    return products / np.where(lengths > 0, lengths, 1)


def row_of(name: str) -> list[float]:
    """The share of updates with a conflict in percent and the median of the smallest cosine."""
    smallest = cosines(METHODS[name], np.concatenate(jacobians())).min(axis=1)
    figures = []
    for half in np.split(smallest, 2):
        figures += [100 * float(np.mean(half < CONFLICT)), float(np.median(half))]
    return figures


def table() -> list[str]:
    lines = [
        "| method | lengths alike: updates with a conflict | smallest cosine, median "
        "| lengths apart: updates with a conflict | smallest cosine, median |",
        "|---|---|---|---|---|",
    ]
    for name in METHODS:
        share, median, share_2, median_2 = row_of(name)
        lines.append(
            f"| `{name}` | {share:.1f} % | {median:.2f} | {share_2:.1f} % | {median_2:.2f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="also write docs/choosing.md")
    arguments = parser.parse_args()
    lines = table()
    print("\n".join(lines))
    if arguments.write:
        write_table(DOCS / "choosing.md", "conflicts", "\n".join(lines))


if __name__ == "__main__":
    main()
