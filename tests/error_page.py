"""Writes the tables of docs/errors.md from the rows of test_errors.py.

``python -m tests.error_page`` rewrites the page; a test fails where it differs.
"""

from __future__ import annotations

import pathlib
import re

from tests import test_errors
from tests.test_errors import Case

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "errors.md"
SECTIONS = {
    "Jacobians": test_errors.JACOBIANS,
    "States, and arguments of the wrong kind": test_errors.STATES,
    "Factories": test_errors.FACTORIES,
    "Hyper-parameters": test_errors.HYPERPARAMETERS,
    "Statistics and extra arguments": test_errors.STATS,
    "Groups": test_errors.LABELS,
    "Engines": test_errors.ENGINES,
    "Solvers": test_errors.SOLVERS,
    "Chain links and training states": test_errors.LINKS,
    "Models of flax nnx": test_errors.NNX,
}
MARK = "<!-- {} of the table, which `python -m tests.error_page` writes -->"


def message_of(bad: Case) -> str:
    """The text of the error, without what changes from run to run."""
    try:
        bad.run()
    except ValueError as error:
        text = re.sub(r" at 0x[0-9a-f]+", "", str(error))
        return re.sub(r"\s+", " ", text).replace("|", "\\|")
    raise AssertionError(f"{bad.name}: no error")


def one_of_each(cases: list[Case]) -> list[tuple[str, str]]:
    """One row for all cases that differ in a method or a number only."""
    rows = {}
    for bad in cases:
        message = message_of(bad)
        kind = bad.name.split(":")[0]
        template = re.sub(r"`[^`]*`|'[^']*'|-?\d[\d.e-]*|nan|\w*State", "", message)
        rows.setdefault((kind, template), (bad.name, message))
    return list(rows.values())


def render() -> str:
    """The sections with their tables."""
    lines = []
    for title, cases in SECTIONS.items():
        lines += [f"## {title}", "", "| what | the error |", "|---|---|"]
        lines += [f"| {name} | {fence(message)} |" for name, message in one_of_each(cases)]
        lines += [""]
    return "\n".join(lines)


def fence(text: str) -> str:
    """The text as code that may hold backticks."""
    return f"`` {text} ``"


def parts(text: str) -> tuple[str, str, str]:
    """What is before, in and after the tables."""
    first, last = MARK.format("Start"), MARK.format("End")
    before, rest = text.split(first)
    tables, after = rest.split(last)
    return before + first, tables.strip("\n"), last + after


def main() -> None:
    """Rewrites the page."""
    before, _, after = parts(PAGE.read_text())
    PAGE.write_text(f"{before}\n\n{render()}\n{after}")


if __name__ == "__main__":
    main()
