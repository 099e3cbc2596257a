"""Puts the committed results into the tables of the documentation.

``python -m tests.benchmarks.published`` writes them; tests/test_published.py fails where a page
says anything else than the results.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.benchmarks import iwrm, landscape, pareto_fronts, trajectories
from tests.pages import DOCS, with_table

RESULTS = Path(__file__).parent / "results"
PAGES = {
    DOCS / "published-problems.md": ("landscape", "trajectories", "three losses", "iwrm"),
    DOCS / "pareto-fronts.md": ("two losses",),
}
"""The tables of every page."""


def read(name: str) -> Any:
    """The committed results of one benchmark."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(name: str) -> str:
    """The table that a page marks with this name."""
    if name == "two losses":
        return pareto_fronts.table(read("pareto_fronts"), pareto_fronts.PROBLEMS)
    if name == "three losses":
        return pareto_fronts.table(read("pareto_fronts"), pareto_fronts.THREE_LOSSES)
    module = {"landscape": landscape, "trajectories": trajectories, "iwrm": iwrm}[name]
    return module.table(read(name))


def filled(page: Path) -> str:
    """The text of a page with every table between its marks."""
    text = page.read_text()
    for name in PAGES[page]:
        text = with_table(text, name, table(name))
    return text


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page))
