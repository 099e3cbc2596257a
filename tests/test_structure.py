"""The package's shape: imports run downwards, the import is lean, every name is documented."""

from __future__ import annotations

import ast
import inspect
import pathlib
import re
import subprocess
import sys
import types

import pytest

import jaxjd
import jaxjd.integrations.flax
import jaxjd.integrations.nnx

PACKAGE = pathlib.Path(jaxjd.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# What each part may import of jaxjd, besides itself.
BELOW = {
    "checks": set(),
    "base": {"checks"},
    "solvers": {"base", "checks"},
    "linalg": {"solvers", "base", "checks"},
    "weightings": {"linalg", "solvers", "base", "checks"},
    "scalarizers": {"linalg", "base", "checks"},
    "aggregators": {"weightings", "linalg", "solvers", "base", "checks"},
    "labels": {"base", "checks"},
    "grouping": {"aggregators", "weightings", "labels", "linalg", "base", "checks"},
    "transforms": {"grouping", "aggregators", "weightings", "linalg", "base", "checks"},
    "integrations": {"aggregated", "autodiff", "transforms", "base", "checks"},
    "aggregated": {"grouping", "aggregators", "autodiff", "base", "checks"},
    "autodiff": {"labels", "linalg", "base", "checks"},
    "diagnostics": {"autodiff", "linalg", "solvers", "base", "checks"},
    "sharding": {"linalg", "base", "checks"},
    "demo": {"<public>"},
}
FLAX = PACKAGE / "integrations"
CORE_IMPORTS = {"jax", "optax", "jaxjd"} | set(sys.stdlib_module_names)


def part_of(path: pathlib.Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imports_of(path: pathlib.Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "jaxjd":
                found += [f"jaxjd.{alias.name}" for alias in node.names]
            else:
                found.append(node.module or "")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downwards(path):
    part = part_of(path)
    if part == "__init__":
        return
    assert part in BELOW, f"{part} has no place in the order of the package: add it to BELOW."
    for name in imports_of(path):
        root = name.split(".")[0]
        assert "._src" not in name
        assert not name.startswith("jax.experimental")
        if part != "demo":
            allowed = CORE_IMPORTS | ({"flax"} if path.parent == FLAX else set())
            assert root in allowed, f"{path}: the core imports {name}"
        if root == "jaxjd" and part != "demo":
            other = [*name.split("."), "__init__"][1]
            assert other == part or other in BELOW[part], f"{path}: {part} imports {name}"


def test_the_order_has_no_cycle():
    for part, below in BELOW.items():
        for other in below - {"<public>"}:
            assert part not in BELOW[other]


def test_no_deprecated_or_host_escapes():
    for path in MODULES:
        text = path.read_text()
        for forbidden in ("pure_callback", "io_callback", "jax.core", "jax.interpreters"):
            assert forbidden not in text, f"{path}: {forbidden}"


def test_import_is_lean():
    code = (
        "import sys, jaxjd; "
        "optional = {'flax', 'matplotlib', 'rich', 'mlxtend', 'river', 'sklearn', 'pandas', "
        "'scipy.optimize', 'chex', 'equinox', 'haiku', 'jaxjd.demo'}; "
        "print(sorted(optional & set(sys.modules)))"
    )
    baseline = code.replace("import sys, jaxjd", "import sys, optax")
    run = [
        subprocess.run(
            [sys.executable, "-c", source], capture_output=True, text=True, check=True
        ).stdout
        for source in (code, baseline)
    ]
    assert run[0] == run[1] == "[]\n"


def public_objects() -> list[tuple[str, object]]:
    found = []
    for module in (
        jaxjd,
        jaxjd.linalg,
        jaxjd.weightings,
        jaxjd.scalarizers,
        jaxjd.labels,
        jaxjd.diagnostics,
        jaxjd.sharding,
        jaxjd.integrations.flax,
        jaxjd.integrations.nnx,
    ):
        for name in module.__all__:
            value = getattr(module, name)
            if not isinstance(value, types.ModuleType):
                found.append((f"{module.__name__}.{name}", value))
    return found


@pytest.mark.parametrize(
    ("name", "value"), public_objects(), ids=lambda x: x if isinstance(x, str) else ""
)
def test_public_names_are_documented(name, value):
    doc = inspect.getdoc(value) or ""
    assert doc, f"{name} has no docstring"
    assert ">>>" in doc, f"{name} has no example"
    if inspect.isfunction(value):
        signature = inspect.signature(value)
        assert signature.return_annotation is not inspect.Signature.empty, name
        for argument in signature.parameters:
            assert f"{argument}:" in doc or not doc.count("Args:"), f"{name}: {argument}"
        if signature.parameters:
            assert "Args:" in doc, f"{name} does not document its arguments"
        assert "Returns:" in doc, f"{name} does not say what it returns"
    elif hasattr(value, "_fields") and value.__name__.endswith("State"):
        for field in value._fields:
            assert f"{field}:" in doc, f"{name}: field {field} is not documented"


def test_version_is_the_installed_one():
    import importlib.metadata

    assert jaxjd.__version__ == importlib.metadata.version("jaxjd")


def test_the_table_of_integrations_names_tests_that_exist():
    root = PACKAGE.parent
    table = (root / "docs" / "integrations.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) > 25
    for row in rows:
        named = re.findall(r"`(tests/\w+\.py)::(\w+)`", row)
        assert named, f"no test holds this row: {row}"
        for path, name in named:
            tree = ast.parse((root / path).read_text())
            functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert name in functions, f"{path} has no {name}"
