"""What a step costs in units of the plain gradient of the sum, read from compiled programs.

Nothing runs, so that the shapes are those that people have. Loops count once in XLA's number of
operations: the products of what is taken by stretches are counted in `test_parts.py`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest

import jaxjd


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def net(kernels, x):
    for kernel in kernels[:-1]:
        x = jnp.tanh(x @ kernel)
    return x @ kernels[-1]


def fit(y):
    return jnp.mean((y - 1) ** 2)


def points_of_their_own():
    """A network for an equation, with points inside, on the border and at the start."""

    def value(params, x):
        for kernel, bias in zip(params["kernels"], params["biases"], strict=True):
            x = jnp.tanh(x @ kernel + bias)
        return x @ params["out"]

    def residual(params, x):
        slope = jax.grad(value, 1)
        curve = jax.jvp(lambda x: slope(params, x), (x,), (jnp.array([1.0, 0.0]),))[1][0]
        first = slope(params, x)
        return first[1] + value(params, x) * first[0] - 0.01 * curve

    def losses(params, points):
        inside, border, start = points
        of = lambda fn, x: jax.vmap(functools.partial(fn, params))(x)
        return [fit(of(residual, inside)), fit(of(value, border)), fit(of(value, start))]

    sizes = [(2, 128), *[(128, 128)] * 3]
    params = {
        "kernels": [array(*size) for size in sizes],
        "biases": [array(128) for _ in sizes],
        "out": array(128),
    }
    return losses, params, [array(n, 2) for n in (1000, 250, 250)]


def batches_of_their_own(width=512, batch=32):
    kernels = [*[array(width, width)] * 4, array(width, 1)]
    losses = lambda params, xs: [fit(net(params, x)) for x in xs]
    return losses, kernels, [array(batch, width)] * 8


def stacked_batches():
    _, kernels, data = batches_of_their_own()
    losses = lambda params, xs: jax.vmap(lambda x: fit(net(params, x)))(xs)
    return losses, kernels, array(8, *data[0].shape)


def trunk_and_heads():
    params = {"trunk": [array(512, 512)] * 5, "heads": [array(512, 10)] * 6}

    def losses(params, x):
        features = trunk(params["trunk"], x)
        return [head(kernel, features, x) for kernel in params["heads"]]

    return losses, params, array(96, 512)


def trunk(params, x):
    return jnp.tanh(net(params, x))


def head(kernel, features, _):
    return fit(features @ kernel)


def plain(losses, params, x):
    def total(params):
        values = losses(params, x)
        return sum(map(jnp.sum, jax.tree.leaves(values))), values

    return jax.value_and_grad(total, has_aux=True)(params)


def weights_of(gramian):
    return 1 + gramian.sum(axis=0) / gramian.sum()


def aggregated(losses, params, x):
    values, gramian, pullback = jaxjd.value_and_gramian(losses)(params, x)
    return values, pullback(weights_of(gramian))


def by_mtl(heads_fn, _, params, x):
    engine = jaxjd.mtl_value_and_jacobian(trunk, heads_fn, form="auto")
    values, (jacobian, gradients) = engine(params["trunk"], params["heads"], x)
    update = jaxjd.combine(weights_of(jaxjd.gramian(jacobian)), jacobian)
    return values, {"trunk": update, "heads": gradients}


def each_head(kernels, features, x):
    return [head(kernel, features, x) for kernel in kernels]


def cost(step, problem):
    """Operations, and the memory that a step takes besides its arguments."""
    losses, params, x = problem
    compiled = jax.jit(functools.partial(step, losses)).lower(params, x).compile()
    memory = compiled.memory_analysis()
    held = memory.temp_size_in_bytes + memory.output_size_in_bytes
    return compiled.cost_analysis()["flops"], held


@pytest.mark.parametrize(
    ("make", "step", "most_flops", "most_memory"),
    [
        pytest.param(points_of_their_own, aggregated, 1.1, 1.2, id="points"),
        pytest.param(batches_of_their_own, aggregated, 1.5, 1.5, id="batches"),
        pytest.param(
            *(lambda: batches_of_their_own(384, 64), aggregated, 1.5, 2.0),
            id="long batches",
            marks=pytest.mark.slow,
        ),
        pytest.param(stacked_batches, aggregated, 1.5, 2.0, id="stacked", marks=pytest.mark.slow),
        # The cotangents of six losses on a trunk that is no larger than they are.
        pytest.param(trunk_and_heads, aggregated, 3.0, 2.4, id="heads", marks=pytest.mark.slow),
        pytest.param(
            *(trunk_and_heads, functools.partial(by_mtl, [head] * 6), 3.0, 2.4), id="heads by mtl"
        ),
        pytest.param(
            *(trunk_and_heads, functools.partial(by_mtl, each_head), 3.0, 2.4),
            id="heads in one function by mtl",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_step_in_units_of_the_plain_gradient(make, step, most_flops, most_memory):
    problem = make()
    (plain_flops, plain_memory), (flops, memory) = cost(plain, problem), cost(step, problem)
    assert flops <= most_flops * plain_flops, flops / plain_flops
    assert memory <= most_memory * plain_memory, memory / plain_memory
