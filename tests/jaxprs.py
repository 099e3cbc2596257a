"""Reading the jaxpr of a function."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax


def equations(fn: Any, *args: Any) -> Iterator[Any]:
    """Yields all equations of a function's jaxpr, those of inner jaxprs too."""

    def visit(jaxpr: Any) -> Iterator[Any]:
        for equation in jaxpr.eqns:
            yield equation
            for inner in jax.tree.leaves(
                list(equation.params.values()), is_leaf=lambda p: hasattr(p, "jaxpr")
            ):
                if hasattr(inner, "jaxpr"):
                    yield from visit(inner.jaxpr)
                elif hasattr(inner, "eqns"):
                    yield from visit(inner)

    yield from visit(jax.make_jaxpr(fn)(*args).jaxpr)
