"""What a step costs in units of the plain gradient of the sum, read from compiled programs.

Nothing runs, so that the shapes are those that people have. Loops count once in XLA's number of
operations; multiplications are counted in the jaxpr, with loops as often as they run.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest

import jaxjd
from jaxjd.diagnostics import ProgramCost
from tests.benchmarks.step_cases import CASES, Case, make_numbers
from tests.benchmarks.step_jax import make_model


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


GRAMIAN = "the Gramian of the factors comes on top"
ROWS = "more rows than a kernel is wide: its gradient is a product per loss, (2 m + 1) / 3"
FROZEN = "a frozen base has no kernels' gradients: a plain step is two products, (m + 1) / 2"


def shape(name, measured, above="", **smaller):
    """A shape, what was measured in plain steps, and why that is above (m + 2) / 3 if it is.

    What is not made smaller is slow.
    """
    marks = [] if smaller else [pytest.mark.slow]
    case = CASES[name]._replace(**smaller)
    label = f"{name}, small" if smaller else name
    return pytest.param(case, ProgramCost(*measured), above, id=label, marks=marks)


# Multiplications, operations, bytes and temporaries in plain steps, of jax 0.10.2; the same on
# SSE4.2 and AVX-512, with and without optimizations.
TEN_SHAPES = [
    shape("heads-6", (3.306, 3.345, 4.98, 9.06), GRAMIAN, depth=3, width=256),
    shape("pinn", (1.001, 1.001, 1.01, 1.00), batch=1000, depth=4),
    shape("own", (1.799, 1.790, 0.90, 0.64), batch=32, depth=2, width=256),
    shape("stacked", (1.799, 1.800, 2.11, 2.01), batch=32, depth=2, width=256),
    shape("cnn-4", (3.067, 2.511, 4.23, 3.98), ROWS, batch=12),
    shape("transformer", (4.146, 4.141, 4.94, 5.95), ROWS, batch=4, depth=1, width=128, length=32),
    shape("adapters", (3.143, 3.152, 3.14, 3.76), FROZEN, batch=32, depth=3, width=256),
    shape("mlp-32", (3.287, 3.298, 4.59, 9.28), depth=3, width=256),
    shape("mlp-2", (1.540, 1.543, 2.45, 3.01), GRAMIAN, batch=64, depth=3, width=256),
    shape("mlp-32-losses", (13.504, 13.553, 22.55, 58.6), GRAMIAN, batch=64, depth=3, width=256),
    shape("heads-6", (2.931, 2.944, 4.17, 7.87), GRAMIAN),
    shape("pinn", (1.000, 1.000, 1.01, 1.00)),
    shape("own", (1.409, 1.100, 1.16, 1.24)),
    shape("stacked", (1.409, 1.103, 2.29, 2.17)),
    shape("cnn-4", (3.067, 2.350, 4.05, 3.98), ROWS),
    shape("transformer", (4.355, 4.362, 4.57, 3.18), ROWS),
    shape("adapters", (3.357, 3.362, 2.96, 2.26), FROZEN),
    shape("mlp-32", (3.254, 3.256, 2.16, 4.51)),
    shape("mlp-2", (1.569, 1.571, 2.46, 1.89), GRAMIAN),
    shape("mlp-32-losses", (14.036, 14.055, 22.59, 41.5), GRAMIAN),
]


def cost_of(case: Case, sharding=None) -> ProgramCost:
    """What `aggregated_value_and_grad` with UPGrad costs, in plain steps."""
    numbers = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), make_numbers(case)
    )
    losses = make_model(case).losses
    init, apply = jaxjd.aggregated_value_and_grad(losses, jaxjd.weightings.upgrad())
    step = functools.partial(apply, init(numbers[0]))
    return jaxjd.diagnostics.explain_step(losses, *numbers, step=step, quiet=True).ratio


@pytest.mark.parametrize(("case", "measured", "above"), TEN_SHAPES)
def test_a_whole_step_of_ten_shapes(case, measured, above):
    ratio = cost_of(case)
    assert ratio.multiplications <= 1.01 * measured.multiplications
    for name in ("flops", "bytes", "temporaries"):
        assert getattr(ratio, name) <= 1.1 * getattr(measured, name), (name, ratio)
    assert above or ratio.multiplications <= (case.m + 2) / 3
