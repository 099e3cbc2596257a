"""Every method has a page in the documentation, and the page says what it should."""

from __future__ import annotations

import doctest
import inspect
import pathlib
import re

import pytest

import jaxjd
from jaxjd import scalarizers, weightings
from tests.registry import NAMED, UNWEIGHTED, M, example_params

DOCS = pathlib.Path(__file__).parents[1] / "docs"
SECTIONS = [
    "Formula",
    "Paper",
    "Example",
    "Arguments",
    "State",
    "Cost",
    "When to use it",
    "When not to use it",
    "Differences",
]
NO_PAPER = {"mean", "sum", "constant", "flattening"}
LONGEST = 8


def functions(module) -> dict[str, object]:
    """The public functions of a module by their names."""
    found = {name: getattr(module, name) for name in module.__all__}
    return {name: value for name, value in found.items() if inspect.isfunction(value)}


METHODS = {**functions(weightings), **functions(jaxjd.aggregators)}
METHODS.pop("weighted")
PAGES = {path.stem: path for path in (DOCS / "methods").glob("*.md")}
SCALARIZER_PAGES = {
    name: path
    for path in (DOCS / "scalarizers").glob("*.md")
    for name in re.findall(
        r"\{func\}`jaxjd\.scalarizers\.(\w+)`", path.read_text().split("\n## ")[0]
    )
}
STATES = {
    value.__name__: value
    for value in [
        *(getattr(weightings, name) for name in weightings.__all__),
        *(getattr(jaxjd.aggregators, name) for name in jaxjd.aggregators.__all__),
    ]
    if hasattr(value, "_fields")
}


def sections(path: pathlib.Path) -> dict[str, str]:
    """The text below each heading of a page; that of the title has the key ''."""
    parts = re.split(r"^## (.+)$", path.read_text(), flags=re.MULTILINE)
    return dict(zip(["", *parts[1::2]], parts[::2], strict=True))


def initial_state(name: str) -> object:
    """The state with default arguments, of the weighting where there is one."""
    for method in NAMED + UNWEIGHTED:
        if method.name == name:
            if method.weighting is None:
                return method.aggregator(M).init(example_params())
            return method.weighting().init(M, example_params())
    return METHODS[name](weightings.mean()).init(M)


def test_every_method_has_a_page_and_every_page_a_method():
    assert set(PAGES) == set(METHODS)
    assert {method.name for method in NAMED + UNWEIGHTED} < set(METHODS)
    assert set(SCALARIZER_PAGES) == set(functions(scalarizers))
    assert set(SCALARIZER_PAGES.values()) == set((DOCS / "scalarizers").glob("*.md"))


def test_the_tables_lead_to_the_pages():
    text = (DOCS / "methods.md").read_text()
    assert set(re.findall(r"^\| \[`(\w+)`\]\(methods/\1\.md\)", text, re.MULTILINE)) == set(METHODS)
    text = (DOCS / "scalarizers.md").read_text()
    links = set(re.findall(r"\[`(\w+)`\]\(scalarizers/([\w-]+)\.md\)", text))
    assert links == {(name, path.stem) for name, path in SCALARIZER_PAGES.items()}


def test_the_calls_in_the_tables_are_all_that_is_needed():
    text = (DOCS / "methods.md").read_text()
    calls = dict(re.findall(r"^\| \[`(\w+)`\][^|]+\| `(.+?)` \|", text, re.MULTILINE))
    assert set(calls) == set(METHODS)
    for name, call in calls.items():
        known = {name: METHODS[name], "weighting": weightings.pcgrad(), "m": M}
        if name in functions(jaxjd):
            made = eval(call, known | {name: getattr(jaxjd, name)})
            made.init(example_params())
        else:
            eval(call, known).init(M)
        if "num_tasks" in call:
            with pytest.raises(ValueError, match="num_tasks"):
                getattr(jaxjd, name)()


@pytest.mark.parametrize(
    "path",
    sorted({*PAGES.values(), *SCALARIZER_PAGES.values()}),
    ids=lambda p: p.parent.name + p.stem,
)
def test_pages_have_all_sections(path):
    found = sections(path)
    assert list(found) == ["", *SECTIONS]
    for title, text in found.items():
        assert text.strip(), f"{path.name}: nothing below '{title}'"
    if path.stem not in NO_PAPER or path.parent.name == "scalarizers":
        assert "<https://" in found["Paper"]
    examples = doctest.DocTestParser().get_examples(found["Example"])
    lines = sum(len(example.source.splitlines()) for example in examples)
    assert 0 < lines <= LONGEST
    assert any(example.want for example in examples)
    assert "\n- *" in found["When not to use it"]


@pytest.mark.parametrize("name", METHODS)
def test_pages_of_methods_fit_the_code(name):
    found = sections(PAGES[name])
    for module, prefix in ((jaxjd, "jaxjd"), (weightings, "jaxjd.weightings")):
        assert (f"{{func}}`{prefix}.{name}`" in found[""]) == (name in functions(module))
    assert re.search(rf"jaxjd\.(weightings\.)?{name}\(", found["Example"])
    check_arguments([METHODS[name]], found["Arguments"])
    if "num_tasks=None`: required" in found["Arguments"].replace(" (aggregator only)", ""):
        with pytest.raises(ValueError, match="num_tasks"):
            METHODS[name]()

    state = initial_state(name)
    named = set(re.findall(r"`(\w+State)`", found["State"]))
    if state == ():
        assert re.match(r"\s*(None|That of the wrapped)", found["State"])
    elif type(state).__name__ in STATES:
        assert type(state).__name__ in named
    else:
        assert found["State"].strip() == "None."
    for state_name in named:
        for field in STATES[state_name]._fields:
            assert f"`{field}`" in found["State"], f"{state_name}.{field}"


def test_every_state_is_on_one_page():
    named = [
        state for path in PAGES.values() for state in re.findall(r"`(\w+State)`", path.read_text())
    ]
    assert sorted(set(named)) == sorted(STATES)


@pytest.mark.parametrize("path", sorted(set(SCALARIZER_PAGES.values())), ids=lambda p: p.stem)
def test_pages_of_scalarizers_fit_the_code(path):
    found = sections(path)
    names = [name for name, other in SCALARIZER_PAGES.items() if other == path]
    assert any(f"jaxjd.scalarizers.{name}(" in found["Example"] for name in names)
    check_arguments([getattr(scalarizers, name) for name in names], found["Arguments"])
    for state_name in re.findall(r"`(\w+State)`", found["State"]):
        for field in getattr(scalarizers, state_name)._fields:
            assert f"`{field}`" in found["State"], f"{state_name}.{field}"
    for name in names:
        states = [state for state in scalarizers.__all__ if state.lower() == f"{name}state"]
        assert all(f"`{state}`" in found["State"] for state in states)


def check_arguments(factories, text):
    """Every argument is in the list with its default, and the list has no others."""
    expected = set()
    for factory in factories:
        for argument in inspect.signature(factory).parameters.values():
            required = argument.default is inspect.Parameter.empty
            expected.add(argument.name if required else f"{argument.name}={argument.default!r}")
    listed = re.findall(r"^- ((?:`[^`]+`(?:, )?)+)", text, re.MULTILINE)
    assert {entry for group in listed for entry in re.findall(r"`([^`]+)`", group)} == expected
