"""Names of scopes and lines of the function survive in every form."""

from __future__ import annotations

import re
import traceback

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import jaxjd

PARAMS = {"w": jnp.ones((3, 4)), "v": jnp.ones((4, 2)), "scan": jnp.ones((2, 2)), "b": jnp.ones(2)}
X = jnp.ones((5, 3))


def body(carry, _, w):
    with jax.named_scope("inside"):
        return jnp.tanh(carry @ w), None  # line: inside


@jax.jit
def first_layer(params, x):
    with jax.named_scope("first"):
        return jnp.sin(x @ params["w"])  # line: first


@jax.checkpoint
def second_layer(params, y):
    with jax.named_scope("second"):
        return jnp.cos(y @ params["v"])  # line: second


def losses_of(params, x):
    y = second_layer(params, first_layer(params, x))
    y, _ = lax.scan(lambda carry, _: body(carry, _, params["scan"]), y, length=3)
    with jax.named_scope("last"):
        return jnp.sum(y * y, axis=0) * params["b"]  # line: last


SCOPES = ("first", "second", "inside", "last")


def line_of(name):
    with open(__file__) as file:
        return next(n for n, line in enumerate(file, 1) if line.endswith(f"# line: {name}\n"))


def engines(form):
    one = lambda params, x: jnp.sum(losses_of(params, x[None]))
    yield lambda p: jaxjd.value_and_jacobian(losses_of, form=form)(p, X)
    yield lambda p: jaxjd.per_example_value_and_jacobian(one, form=form)(p, X)


@pytest.mark.parametrize("form", ["dense", "auto", "factored"])
def test_scopes_and_lines_in_the_compiled_program(form):
    for engine in engines(form):
        step = jax.jit(lambda p, e=engine: jaxjd.gramian(e(p)[1]))
        lowered = step.lower(PARAMS)
        text = lowered.as_text(debug_info=True)
        names = re.findall(r'loc\("([^"]*)"', text)
        compiled = re.findall(r'op_name="([^"]*)', lowered.compile().as_text())
        for scope in SCOPES:
            # As a name of its own, not as a part of the name of a function.
            of_scope = re.compile(rf"(^|[/(]){scope}[/)]")
            assert any(map(of_scope.search, names)), scope
            backward = [name for name in compiled if "transpose(" in name]
            assert any(map(of_scope.search, backward)), scope
            assert f'{__file__}":{line_of(scope)}:' in text, scope


@jax.custom_vjp
def fails(y):
    return y


def _backward(_, cotangent):
    raise RuntimeError("no backward pass")


fails.defvjp(lambda y: (y, None), _backward)


@pytest.mark.parametrize("form", ["dense", "auto", "factored"])
def test_tracebacks_name_the_line_of_the_function(form):
    def fn(params, x):
        return jnp.sum(fails(x @ params["w"]), axis=0)  # line: fails

    with pytest.raises(RuntimeError, match="no backward pass") as error:
        jaxjd.value_and_jacobian(fn, form=form)(PARAMS, X)
    text = "".join(traceback.format_exception(error.value))
    assert "in _backward" in text
    assert f'{__file__}", line {line_of("fails")}' in text
