"""The pages of the documentation say what is there: names, arguments and numbers."""

from __future__ import annotations

import inspect
import json
import pathlib
import pkgutil
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxjd
from jaxjd import weightings as W
from tests import registry
from tests.benchmarks import conflict
from tests.goldens.differences import DIFFERENCES
from tests.pages import DOCS, table_in

TORCHJD = json.loads((pathlib.Path(__file__).parent / "torchjd_names.json").read_text())
MODULES = [module for module in TORCHJD if module != "version"]
# What says nothing by its name, because it is a part of how the counterpart is used.
OURS = {"num_tasks"}


def rows_of(text: str) -> list[list[str]]:
    """The cells of the rows of Markdown tables, without the heads."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    heads = {i - 1 for i, line in enumerate(lines) if set(line) <= set("|- ")}
    return [row for i, row in enumerate(rows) if i not in heads and i - 1 not in heads]


def code_of(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def section(page: str, head: str) -> str:
    """The text of a page under one heading."""
    return re.split(r"^#+ ", page.split(f"# {head}\n")[1], maxsplit=1, flags=re.MULTILINE)[0]


FOLDERS = [DOCS, DOCS / "api", DOCS / "methods", DOCS / "scalarizers"]
PAGES = [path for folder in FOLDERS for path in sorted(folder.glob("*.md"))]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(DOCS)))
def test_pages_can_be_read_where_nothing_is_built(path):
    """GitHub shows neither a link without a text nor a directive, and only committed pictures."""
    page = path.read_text()
    assert "[](" not in page
    assert "```{figure}" not in page
    for picture in re.findall(r"!\[[^]]+\]\(([^)]+)\)", page):
        assert (path.parent / picture).exists(), picture


@pytest.fixture(scope="module")
def from_torchjd():
    return (DOCS / "from-torchjd.md").read_text()


def test_the_names_are_those_of_the_release(from_torchjd):
    assert TORCHJD["version"] == "0.18.0"
    assert f"TorchJD](https://github.com/SimplexLab/TorchJD) {TORCHJD['version']}" in from_torchjd
    assert sum(len(TORCHJD[module]) for module in MODULES) > 60


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_of_torchjd_has_a_row(from_torchjd, module):
    rows = rows_of(section(from_torchjd, module))
    listed = [name for row in rows for name in code_of(row[0])]
    assert sorted(listed) == sorted(TORCHJD[module])
    for row in rows:
        assert len(row) == 3
        assert row[1] == "no counterpart" or all(
            name.startswith("jaxjd.") for name in code_of(row[1])
        )


def arguments_of(value: object) -> list[str]:
    return [name for name in inspect.signature(value).parameters if name not in OURS]


@pytest.mark.parametrize("module", MODULES)
def test_the_rows_name_every_argument_that_differs(from_torchjd, module):
    for first, second, third in rows_of(section(from_torchjd, module)):
        said = " ".join(code_of(third))
        for name in code_of(first):
            if module == "torchjd" and name in TORCHJD["torchjd.autojac"]:
                continue
            theirs = TORCHJD[module][name]
            ours = [pkgutil.resolve_name(one) for one in code_of(second)]
            known = {argument for one in ours for argument in arguments_of(one)}
            wanted = set(theirs["parameters"]) - known | set(theirs["methods"]) - {"update"}
            methods = module in ("torchjd.aggregation", "torchjd.scalarization")
            if methods and all(inspect.isfunction(one) for one in ours):
                wanted |= known - set(theirs["parameters"])
            missing = {one for one in wanted if not re.search(rf"\b{one}\b", said)}
            assert not missing, f"{name}: the row does not say what became of {missing}"


def test_rows_without_remarks_have_the_same_arguments(from_torchjd):
    found = 0
    for module in MODULES:
        for first, second, third in rows_of(section(from_torchjd, module)):
            if third.startswith("the same arguments"):
                wanted = TORCHJD[module][code_of(first)[0]]["parameters"]
                assert arguments_of(pkgutil.resolve_name(code_of(second)[0]))[: len(wanted)] == (
                    wanted
                ), first
                found += 1
    assert found > 12


def names_in(page: str) -> set[str]:
    """The names of jaxjd that a page mentions, in text or in code."""
    return set(re.findall(r"(?<![\w./-])jaxjd(?:\.[A-Za-z_]\w*)+", page))


@pytest.mark.parametrize("page", ["from-torchjd.md", "choosing.md"])
def test_every_name_of_jaxjd_in_the_page_exists(page):
    names = names_in((DOCS / page).read_text())
    assert len(names) > 10
    for name in names:
        pkgutil.resolve_name(name)


def test_every_method_of_ours_that_torchjd_lacks_is_named(from_torchjd):
    named = {name.split(".")[-1] for name in names_in(from_torchjd)}
    assert set(jaxjd.weightings.__all__) - named <= {
        name for name in jaxjd.weightings.__all__ if name.endswith("State")
    }
    assert {"graddrop", "trimmed_mean", "momentum_conflict_free"} <= named


@pytest.mark.slow
def test_our_column_of_the_differences_is_what_is_computed(from_torchjd):
    rows = rows_of(table_in(from_torchjd, "differences"))
    assert [(row[0], row[1], row[4]) for row in rows] == [
        (one.method, one.question, one.reason) for one in DIFFERENCES
    ]
    for row, difference in zip(rows, DIFFERENCES, strict=True):
        shown = [float(number) for number in re.findall(r"[-+.e\d]+", row[3])]
        # Five digits are shown; cosines are small numbers that float32 makes from large ones.
        np.testing.assert_allclose(
            difference.ours(), shown, rtol=1e-4, atol=1e-5, err_msg=difference.question
        )


@pytest.fixture(scope="module")
def methods():
    """The rows of the two tables of all methods: of scalarizers and of aggregators."""
    rows = rows_of(section((DOCS / "choosing.md").read_text(), "All methods"))
    assert {len(row) for row in rows} == {5, 7}
    return [row for row in rows if len(row) == 5], [row for row in rows if len(row) == 7]


def test_every_method_has_a_row(methods):
    for rows, public in zip(
        methods,
        (
            {name for name in jaxjd.scalarizers.__all__ if not name.endswith("State")},
            {row.name for row in registry.NAMED + registry.UNWEIGHTED},
        ),
        strict=True,
    ):
        listed = [name for row in rows for name in code_of(row[0])]
        assert sorted(listed) == sorted(public)


def test_the_rows_promise_what_the_property_tests_check(methods):
    always = {name for row in methods[1] if row[1] == "always" for name in code_of(row[0])}
    assert always == {row.name for row in registry.NAMED if row.non_conflicting}


def test_the_rows_give_the_class_of_cost_by_what_is_read(methods):
    stats = {row.name: row.stat for row in registry.NAMED}
    classes = {"gramian": "Gramian", "cross": "Gramian, twice", "jacobian": "Jacobian"}
    for row in methods[1]:
        for name in code_of(row[0]):
            assert row[2].startswith(classes[stats[name]] if name in stats else ("Jac", "**one**"))


def size_of(state: object) -> int:
    """How many numbers are in a state, without its keys."""
    leaves = jax.tree.leaves(state)
    return sum(x.size for x in leaves if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key))


def test_the_rows_give_the_size_of_the_state(methods):
    m, n = 20, 1000
    sizes = {"none": 0, "key": 0, "key, $m^2$": m**2, "$m$": m, "$m$ parameters": m, "$2 m$": 2 * m}
    sizes |= {"$3 m$": 3 * m, "$4 m$": 4 * m, "$m n$": m * n, "$(m + 2) n$": (m + 2) * n}
    weightings = {row.name: row.weighting for row in registry.NAMED}
    aggregators = {row.name: row.aggregator for row in registry.UNWEIGHTED}
    arguments = {"constant": [[1.0] * m], "stch": [0.1], "pbi": [1.0, [1.0] * m]}
    arguments["cosmos"] = [1.0, [1.0] * m]
    for kind, rows in enumerate(methods):
        for row in rows:
            declared = sizes[row[3 + kind].split(";")[0]]
            for name in code_of(row[0]):
                if kind == 0:
                    made = getattr(jaxjd.scalarizers, name)(*arguments.get(name, []))
                    state = jax.eval_shape(lambda made=made: made.init(m))
                elif name in weightings:
                    made = weightings[name]() if name != "constant" else W.constant([1.0] * m)
                    state = jax.eval_shape(lambda made=made: made.init(m, jnp.zeros(n)))
                else:
                    made = aggregators[name](m)
                    state = jax.eval_shape(lambda made=made: made.init(jnp.zeros(n)))
                # Counts, and next to a Jacobian a few numbers per task.
                room = 3 + (3 * m if declared >= n else 0)
                assert 0 <= size_of(state) - declared <= room, name


@pytest.mark.slow
def test_the_table_of_conflicts_is_what_is_computed():
    rows = rows_of(table_in((DOCS / "choosing.md").read_text(), "conflicts"))
    assert [code_of(row[0])[0] for row in rows] == list(conflict.METHODS)
    shown = {code_of(row[0])[0]: [float(cell.strip(" %")) for cell in row[1:]] for row in rows}
    # A last digit, and one draw of a thousand that rounding decides.
    tolerances = np.array([0.11, 0.006, 0.11, 0.006])
    for name in ("mean", "pcgrad", "stch", "upgrad"):
        assert np.all(abs(np.array(conflict.row_of(name)) - shown[name]) <= tolerances), name
