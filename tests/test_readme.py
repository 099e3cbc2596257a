"""README.md: its links lead somewhere, its tables are complete, its picture is small."""

from __future__ import annotations

import pathlib
import re

import pytest

import jaxjd
from tests.registry import NAMED, UNWEIGHTED

ROOT = pathlib.Path(jaxjd.__file__).parents[1]
README = (ROOT / "README.md").read_text()
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(text: str) -> set[str]:
    """What GitHub and the documentation make of the headings."""
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_relative_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    links = [link for link in LINK.findall(text) if "://" not in link]
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        assert (ROOT / path).exists(), link
        if anchor:
            assert anchor in anchors((ROOT / path).read_text() if path else text), link


def test_what_the_documentation_includes_has_no_relative_links():
    for part in ("intro", "example"):
        included = README.split(f"<!-- start {part} -->")[1].split(f"<!-- end {part} -->")[0]
        assert all("://" in link for link in LINK.findall(included))


def test_every_method_has_a_row_and_every_scalarizer_a_mention():
    rows = "\n".join(line.split("|")[1] for line in README.splitlines() if line.startswith("| `"))
    for method in (*NAMED, *UNWEIGHTED):
        assert f"`{method.name}`" in rows, method.name
    factories = {name for name in jaxjd.scalarizers.__all__ if name.islower()}
    mentioned = README.split("`jaxjd.scalarizers` combines")[1].split("\n")[0]
    for name in factories:
        assert f"`{name}`" in mentioned, name


def test_the_picture_is_small_and_its_command_is_documented():
    (picture,) = re.findall(r"!\[.*\]\((.+)\)", README)
    assert (ROOT / picture).stat().st_size < 60_000
    assert "python docs/figures/draw.py" in (ROOT / "docs" / "development.md").read_text()
