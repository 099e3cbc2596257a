"""Tables of the documentation that programs write, each between two marks in its page."""

from __future__ import annotations

import pathlib

DOCS = pathlib.Path(__file__).parents[1] / "docs"


def table_in(text: str, name: str) -> str:
    """What the text of a page has between the marks of this name."""
    return _parts(text, name)[1]


def with_table(text: str, name: str, table: str) -> str:
    """The text of a page with a table between the marks of this name."""
    before, _, after = _parts(text, name)
    return f"{before}\n{table}\n{after}"


def write_table(page: pathlib.Path, name: str, table: str) -> None:
    """Puts a table between the marks of this name."""
    page.write_text(with_table(page.read_text(), name, table))


def _parts(text: str, name: str) -> tuple[str, str, str]:
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    before, rest = text.split(begin)
    table, after = rest.split(end)
    return before + begin, table, end + after
