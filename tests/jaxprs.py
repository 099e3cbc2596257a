"""Reading the jaxpr of a function."""

from __future__ import annotations

import math
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


def multiplications(jaxpr: Any) -> int:
    """The multiplications in products and convolutions, as often as their loops run them."""
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            ((contract, _), _) = params["dimension_numbers"]
            size = math.prod(equation.invars[0].aval.shape[axis] for axis in contract)
            total += size * math.prod(equation.outvars[0].aval.shape)
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            size = math.prod(kernel) // kernel[params["dimension_numbers"].rhs_spec[0]]
            total += size * math.prod(equation.outvars[0].aval.shape)
        for value in params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += multiplications(inner) * params.get("length", 1)
    return total
