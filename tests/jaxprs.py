"""Reading the jaxpr of a function."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax


def equations(fn: Any, *args: Any) -> Iterator[Any]:
    """Yields all equations of a function's jaxpr, those of inner jaxprs too."""
    yield from equations_of(jax.make_jaxpr(fn)(*args).jaxpr)


def equations_of(jaxpr: Any) -> Iterator[Any]:
    """Yields all equations of a jaxpr, those of inner jaxprs too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda p: hasattr(p, "jaxpr")
        ):
            if hasattr(inner, "jaxpr"):
                yield from equations_of(inner.jaxpr)
            elif hasattr(inner, "eqns"):
                yield from equations_of(inner)
