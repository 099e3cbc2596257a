"""Writes tests/torchjd_names.json: every public name of TorchJD with its parameters and methods.

Run it where torch and torchjd 0.18.0 are installed: ``python -m tests.goldens.make_names``. The
page docs/from-torchjd.md is held to it by tests/test_docs.py, which needs neither.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import json
import pathlib
import pkgutil
import types
import warnings

OUTPUT = pathlib.Path(__file__).parents[1] / "torchjd_names.json"
# Not in torchjd.__all__, but importable from it, with a DeprecationWarning.
DEPRECATED = ("backward", "mtl_backward")


def parameters_of(value: object) -> list[str]:
    """The names of what a function or a constructor takes."""
    try:
        found = inspect.signature(value).parameters
    except (TypeError, ValueError):  # The matrix types are annotations.
        return []
    return list(found)


def methods_of(value: object) -> list[str]:
    """The public methods of a class, without `forward`, which every module of PyTorch has."""
    if not inspect.isclass(value):
        return []
    members = inspect.getmembers(value, inspect.isfunction)
    own = value.__module__.split(".")[0]
    return [
        name
        for name, member in members
        if not name.startswith("_") and name != "forward" and member.__module__.startswith(own)
    ]


def public(module: types.ModuleType) -> list[str]:
    names = list(module.__all__)
    return names + list(DEPRECATED) if module.__name__ == "torchjd" else names


def main() -> None:
    warnings.simplefilter("ignore", DeprecationWarning)
    root = importlib.import_module("torchjd")
    found = [info.name for info in pkgutil.iter_modules(root.__path__, "torchjd.")]
    modules = ["torchjd", *(name for name in found if not name.split(".")[-1].startswith("_"))]
    names = {
        module.__name__: {
            name: {
                "parameters": parameters_of(getattr(module, name)),
                "methods": methods_of(getattr(module, name)),
            }
            for name in public(module)
        }
        for module in map(importlib.import_module, modules)
    }
    version = json.dumps(importlib.metadata.version("torchjd"))
    blocks = [f'"version": {version}']
    for module, found in names.items():
        rows = ",\n".join(f" {json.dumps(name)}: {json.dumps(row)}" for name, row in found.items())
        blocks.append(f"{json.dumps(module)}: {{\n{rows}\n}}")
    OUTPUT.write_text("{\n" + ",\n".join(blocks) + "\n}\n")
    print(f"{sum(map(len, names.values()))} names in {len(names)} modules")


if __name__ == "__main__":
    main()
