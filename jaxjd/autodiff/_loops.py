"""What runs inside of loops and conditionals, with convolutions that are fast there on CPUs.

XLA's fast code for convolutions on CPUs takes batches first and channels last. At the top level of
a program XLA brings all convolutions into that layout, inside of a loop or a conditional none; and
those of a backward pass are in other layouts. There they would run 10 to 30 times slower.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax import lax

from jaxjd.autodiff._taps import bind, context_of, evaluate


def looped(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Makes the body of a loop or the branch of a conditional of a function of arrays."""

    @functools.wraps(fn)
    def body(*args: Any) -> Any:
        leaves, treedef = jax.tree.flatten(args)
        closed, found = jax.make_jaxpr(
            lambda *leaves: fn(*treedef.unflatten(leaves)), return_shape=True
        )(*leaves)
        outputs = _evaluate(closed.jaxpr, closed.consts, leaves)
        return jax.tree.unflatten(jax.tree.structure(found), outputs)

    return body


def _evaluate(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    return evaluate(jaxpr, consts, args, {}, {}, _bind_fast)[0]


def _bind_fast(equation: Any, operands: Sequence[Any]) -> Sequence[Any]:
    if not _is_slow(equation):
        return bind(_rewritten(equation), operands)
    with context_of(equation):
        return [_convolve(equation, *operands)]


def _rewritten(equation: Any) -> Any:
    """The equation with other convolutions in the jaxprs that it calls, where there are any."""
    params = {name: _rewritten_value(value) for name, value in equation.params.items()}
    if all(params[name] is value for name, value in equation.params.items()):
        return equation
    return equation.replace(params=params)


def _rewritten_value(value: Any) -> Any:
    if isinstance(value, tuple):
        parts = tuple(map(_rewritten_value, value))
        return value if all(map(lambda a, b: a is b, parts, value)) else parts
    jaxpr = getattr(value, "jaxpr", value)
    if not isinstance(jaxpr, jex.Jaxpr) or not _has_slow(jaxpr):
        return value
    closed = value if isinstance(value, jex.ClosedJaxpr) else jex.ClosedJaxpr(value, ())
    # The constants are arguments here, so that the new jaxpr has none of its own.
    avals = [var.aval for var in (*jaxpr.constvars, *jaxpr.invars)]
    count = len(jaxpr.constvars)
    made = jax.make_jaxpr(lambda *args: _evaluate(jaxpr, args[:count], args[count:]))(*avals).jaxpr
    made = made.replace(constvars=made.invars[:count], invars=made.invars[count:])
    return jex.ClosedJaxpr(made, closed.consts) if value is closed else made


def _has_slow(jaxpr: Any) -> bool:
    def inner(value: Any) -> bool:
        if isinstance(value, tuple):
            return any(map(inner, value))
        jaxpr = getattr(value, "jaxpr", value)
        return isinstance(jaxpr, jex.Jaxpr) and _has_slow(jaxpr)

    return any(_is_slow(e) or any(map(inner, e.params.values())) for e in jaxpr.eqns)


def _is_slow(equation: Any) -> bool:
    """Whether it is a convolution that the fast code would take in another layout."""
    if equation.primitive.name != "conv_general_dilated":
        return False
    spatial = len(equation.params["dimension_numbers"].lhs_spec) - 2
    return (
        1 <= spatial <= 3
        and equation.params["batch_group_count"] == 1
        and jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.floating)
        and equation.params["dimension_numbers"] != _fast_numbers(spatial)
    )


def _fast_numbers(spatial: int) -> lax.ConvDimensionNumbers:
    images = (0, spatial + 1, *range(1, spatial + 1))
    return lax.ConvDimensionNumbers(images, (spatial + 1, spatial, *range(spatial)), images)


def _convolve(equation: Any, inputs: jax.Array, kernel: jax.Array) -> jax.Array:
    numbers = equation.params["dimension_numbers"]
    spatial = inputs.ndim - 2

    def channels_last(spec: tuple[int, ...]) -> tuple[int, ...]:
        first, second, *places = spec
        return (first, *places, second)

    def fast(inputs: jax.Array, kernel: jax.Array) -> jax.Array:
        inputs = inputs.transpose(channels_last(numbers.lhs_spec))
        outputs, channels, *places = numbers.rhs_spec
        kernel = kernel.transpose((*places, channels, outputs))
        params = {**equation.params, "dimension_numbers": _fast_numbers(spatial)}
        (found,) = bind(equation.replace(params=params), [inputs, kernel])
        order = channels_last(numbers.out_spec)
        return found.transpose([order.index(axis) for axis in range(found.ndim)])

    def given(inputs: jax.Array, kernel: jax.Array) -> jax.Array:
        return bind(equation, [inputs, kernel])[0]

    return lax.platform_dependent(inputs, kernel, cpu=fast, default=given)
