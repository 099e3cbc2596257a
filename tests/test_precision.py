"""Low precision: the Gramian and the weights are in float32 or better, whatever the gradients are.

On CPU every product is exact, so the jaxpr has to tell.
"""

from __future__ import annotations

import pathlib
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxjd
from tests import jaxprs
from tests.registry import (
    AGGREGATORS,
    NAMED,
    UNWEIGHTED,
    WEIGHTINGS,
    M,
    by_name,
    example_params,
    slow_but,
)

all_aggregators = pytest.mark.parametrize("method", AGGREGATORS, ids=by_name)
PAGE = pathlib.Path(__file__).parents[1] / "docs" / "precision.md"
SCALE = 2.0**15


def random_jacobian(dtype="float32", seed=0):
    """A Jacobian of `example_params` with entries that 2^15 scales without overflow in float16."""
    rng = np.random.default_rng(seed)

    def rows(leaf):
        shape = (M, *leaf.shape)
        sizes = rng.uniform(2.0**-9, 2.0**-2, shape) * rng.choice([-1, 1], shape)
        return jnp.asarray(sizes, dtype)

    return jax.tree.map(rows, example_params())


# Dtypes


@all_aggregators
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_and_states_are_float32_and_updates_keep_the_dtype(method, dtype):
    params = example_params(dtype)
    aggregator = method.aggregator(M)

    def update(jacobian, params):
        state = aggregator.init(params)
        extra = method.extra_args(jacobian)
        return state, aggregator.update(jacobian, state, params, **extra)

    start, (updates, state) = jax.eval_shape(update, random_jacobian(dtype), params)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(updates)} == {dtype}
    for leaf in jax.tree.leaves((start, state)):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            assert leaf.dtype == jnp.float32
    if isinstance(state, (jaxjd.AggregatorState, jaxjd.GroupedState)):
        assert state.weights.dtype == jnp.float32
        assert state.weights.shape[-1] == M


def model(params, x):
    """Two layers, an embedding of the inputs' signs, and as many losses as the registry has."""
    signs = params["table"][(x[:, 0] > 0).astype(int)]
    hidden = jnp.tanh(x @ params["kernel"] + signs)
    return jnp.mean(jnp.square(hidden @ params["heads"]), axis=0)


def example_loss(params, x):
    return jnp.sum(model(params, x[None]))


def model_params(dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"kernel": (6, 8), "table": (2, 8), "heads": (8, M)}
    return {
        name: jax.random.normal(key, shape, dtype)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


INPUTS = jax.random.normal(jax.random.key(4), (5, 6))
FORMS = ("dense", "auto", "factored")
GRAMIAN_ENGINES = {
    **{f"value_and_gramian({m})": (jaxjd.value_and_gramian, model, {"form": m}) for m in FORMS},
    "value_and_gramian(products)": (
        jaxjd.value_and_gramian,
        model,
        {"form": "products"},
    ),
    "value_and_gramian(labels)": (
        jaxjd.value_and_gramian,
        model,
        {"labels": jaxjd.labels.by_tensor},
    ),
    **{
        f"per_example_value_and_gramian({form})": (
            jaxjd.per_example_value_and_gramian,
            example_loss,
            {"form": form},
        )
        for form in FORMS
    },
    "per_example_value_and_gramian(chunks)": (
        jaxjd.per_example_value_and_gramian,
        example_loss,
        {"chunk_size": 2},
    ),
}
JACOBIAN_ENGINES = {
    f"{engine.__name__}({form})": (engine, fn, form)
    for engine, fn in (
        (jaxjd.value_and_jacobian, model),
        (jaxjd.per_example_value_and_jacobian, example_loss),
    )
    for form in FORMS
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", GRAMIAN_ENGINES)
def test_gramians_of_every_engine_are_float32(name, dtype):
    engine, fn, options = GRAMIAN_ENGINES[name]

    def step(params, x):
        losses, gramian, pullback = engine(fn, **options)(params, x)
        return losses, gramian, pullback(jnp.ones(losses.size))

    params = model_params(dtype)
    losses, gramian, gradient = jax.eval_shape(step, params, INPUTS.astype(dtype))
    assert losses.dtype == dtype
    for leaf in jax.tree.leaves(gramian):
        assert leaf.dtype == jnp.float32
    chex.assert_trees_all_equal_shapes_and_dtypes(gradient, jax.eval_shape(lambda: params))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", JACOBIAN_ENGINES)
def test_jacobians_of_every_engine_have_the_dtype_of_the_parameters(name, dtype):
    engine, fn, form = JACOBIAN_ENGINES[name]

    def step(params, x):
        _, jacobian = engine(fn, form=form)(params, x)
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(jacobian)} == {dtype}
        gramian = jaxjd.gramian(jacobian)
        return gramian, jaxjd.combine(gramian[0], jacobian)

    params = model_params(dtype)
    gramian, update = jax.eval_shape(step, params, INPUTS.astype(dtype))
    assert gramian.dtype == jnp.float32
    chex.assert_trees_all_equal_shapes_and_dtypes(update, jax.eval_shape(lambda: params))


# Loss scaling


def scaled(tree):
    return jax.tree.map(lambda leaf: leaf * jnp.asarray(SCALE, leaf.dtype), tree)


READS_MORE = [
    method
    for method in AGGREGATORS
    if method.homogeneous
    and (method.stat != "gramian" or method.losses or method in UNWEIGHTED or method.name == "mgda")
]
"""Homogeneous methods that read more than the Gramian, and MGDA. The tests of properties scale the
Gramian of the others by powers of two."""


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_scaled_gramian_is_exact(dtype):
    # Weightings of the Gramian see nothing else, so float16 is tested once for all of them.
    jacobian, other = random_jacobian(dtype), random_jacobian(dtype, 1)
    found = jaxjd.gramian(scaled(jacobian)), jaxjd.cross_gramian(scaled(jacobian), scaled(other))
    expected = jaxjd.gramian(jacobian), jaxjd.cross_gramian(jacobian, other)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, SCALE**2 * b)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", READS_MORE, ids=by_name)
def test_losses_times_a_power_of_two_change_no_weight(method, dtype):
    aggregator = method.aggregator(M)
    params = example_params(dtype)

    @jax.jit
    def two_calls(first, second, losses):
        state = aggregator.init(params)
        for jacobian in (first, second):
            extra = {"losses": losses} if method.losses else {}
            if method.stat == "cross":
                extra["cross_jacobians"] = (jacobian, first)
            updates, state = aggregator.update(jacobian, state, params, **extra)
        return updates, getattr(state, "weights", ())

    jacobians = random_jacobian(dtype), random_jacobian(dtype, 1)
    losses = jnp.array([0.5, 1.0, 0.7])
    updates, weights = two_calls(*jacobians, losses)
    scaled_updates, scaled_weights = two_calls(*scaled(jacobians), losses)
    chex.assert_trees_all_equal(scaled_weights, weights)
    assert jax.tree.leaves(weights) or method.weighting is None
    if dtype == "bfloat16":  # In float16 a small update is rounded more, unless it is scaled.
        chex.assert_trees_all_equal(scaled_updates, scaled(updates))
    # Nor if the losses that the method reads are scaled, too.
    chex.assert_trees_all_equal(two_calls(*scaled(jacobians), SCALE * losses)[1], weights)


@pytest.mark.parametrize("form", slow_but({"dense", "factored"}, FORMS))
def test_scaled_losses_change_no_weight_through_an_engine(form):
    params, x = model_params("bfloat16"), INPUTS.astype("bfloat16")
    # One step of the exact projection is enough: weightings are tested above.
    weighting = jaxjd.weightings.dualproj()

    @jax.jit
    def weights_of(params, scale):
        fn = lambda params, x: model(params, x) * scale
        _, gramian, _ = jaxjd.value_and_gramian(fn, form=form)(params, x)
        return weighting.update(gramian, ())[0]

    one, scale = jnp.ones((), "bfloat16"), jnp.asarray(SCALE, "bfloat16")
    np.testing.assert_array_equal(weights_of(params, scale), weights_of(params, one))


def test_the_page_names_the_methods_that_loss_scaling_changes():
    text = PAGE.read_text()
    listed = re.search(r"These are not:\s+(.*?)\n\n", text, re.DOTALL)
    assert listed is not None
    expected = {method.name for method in NAMED + UNWEIGHTED if not method.homogeneous}
    assert set(re.findall(r"`(\w+)`", listed.group(1))) == expected


# Products


def products(fn, *args):
    """All products of a function's jaxpr, the inner ones too."""
    names = ("dot_general", "conv_general_dilated")
    return [e for e in jaxprs.equations(fn, *args) if e.primitive.name in names]


def is_full(equation) -> bool:
    highest = (lax.Precision.HIGHEST, lax.Precision.HIGHEST)
    (out,) = equation.outvars
    wide = jnp.finfo(out.aval.dtype).bits >= 32
    preferred = equation.params["preferred_element_type"]
    named = preferred is not None and jnp.finfo(preferred).bits >= 32
    # Without a named result a product of float32 is accumulated in float32.
    inputs = all(jnp.finfo(v.aval.dtype).bits >= 32 for v in equation.invars)
    return equation.params["precision"] == highest and wide and (named or inputs)


def check_precision(equations):
    for equation in equations:
        assert is_full(equation), equation


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_product_of_a_jacobian_is_in_full_precision(dtype):
    jacobian = random_jacobian(dtype)
    for function, args in (
        (jaxjd.gramian, (jacobian,)),
        (jaxjd.cross_gramian, (jacobian, jacobian)),
        (jaxjd.combine, (jnp.ones(M), jacobian)),
        (jaxjd.combine, (jnp.ones(M, dtype), jacobian)),
        (jaxjd.combine, (jnp.ones(M, int), jacobian)),
    ):
        equations = products(function, *args)
        assert len(equations) == len(jax.tree.leaves(jacobian))
        check_precision(equations)
        for equation in equations:
            assert equation.params["preferred_element_type"] == jnp.float32


@pytest.mark.parametrize("method", WEIGHTINGS, ids=by_name)
def test_every_product_of_a_weighting_is_in_full_precision(method):
    jacobian = random_jacobian()
    weighting = method.weighting()
    state = weighting.init(M, example_params())
    extra = method.extra_args(jacobian)
    update = lambda stat, state: weighting.update(stat, state, **extra)
    check_precision(products(update, method.stat_of(jacobian), state))


@pytest.mark.parametrize(
    "solver",
    [
        lambda gramian: jaxjd.linalg.project_onto_dual_cone(jnp.eye(len(gramian)), gramian),
        lambda gramian: jaxjd.linalg.regularized_projector()(jnp.eye(len(gramian)), gramian),
        jaxjd.linalg.min_norm_weights,
        jax.jacrev(jaxjd.linalg.min_norm_weights),
    ],
    ids=["dual cone", "regularized", "min norm", "derivative"],
)
def test_every_product_of_a_solver_is_in_full_precision(solver):
    equations = products(solver, jnp.eye(12))  # Few rows take a form without products.
    assert equations
    check_precision(equations)


@all_aggregators
def test_every_product_of_an_aggregator_is_in_full_precision(method):
    params = example_params("bfloat16")
    jacobian = random_jacobian("bfloat16")
    aggregator = method.aggregator(M)
    update = lambda jacobian, state: aggregator.update(
        jacobian, state, params, **method.extra_args(jacobian)
    )
    equations = products(update, jacobian, aggregator.init(params))
    if method not in UNWEIGHTED:
        assert len(equations) >= 4  # The combination of every leaf is one.
    check_precision(equations)


def layer(params, x):
    """Losses of one matrix product, the only one that is the model's own; all share its columns."""
    y = jnp.cumsum(jnp.tanh(x @ params), axis=1)
    return jnp.mean(jnp.square(y - 1), axis=0)


def convolution(params, x):
    y = lax.conv_general_dilated(x[:, None, :], params, (1,), "SAME")
    return jnp.mean(jnp.square(jnp.tanh(y) - 1), axis=(0, 2))


KERNELS = {"matrix": (layer, (6, M)), "convolution": (convolution, (M, 1, 3))}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("engine", ["gramian", "gramian per example", "jacobian", "cross-Gramian"])
def test_every_product_of_factors_is_in_full_precision(engine, kernel, dtype):
    fn, shape = KERNELS[kernel]
    params = jax.random.normal(jax.random.key(0), shape, dtype)
    x = INPUTS.astype(dtype)
    one = lambda params, x: jnp.sum(fn(params, x[None]))

    def step(params, x):
        if engine == "gramian":
            _, gramian, pullback = jaxjd.value_and_gramian(fn, form="factored")(params, x)
        elif engine == "gramian per example":
            per_example = jaxjd.per_example_value_and_gramian(one, form="factored")
            _, gramian, pullback = per_example(params, x)
        else:
            _, jacobian = jaxjd.value_and_jacobian(fn, form="factored")(params, x)
            gramian = jaxjd.gramian(jacobian)
            if engine == "cross-Gramian":
                gramian = jaxjd.cross_gramian(jacobian, jaxjd.materialize(jacobian))
            pullback = lambda weights: jaxjd.combine(weights, jacobian)
        return gramian, pullback(gramian[0])

    equations = products(step, params, x)
    own = [equation for equation in equations if not is_full(equation)]
    assert len(own) == 1, own  # The model's forward pass, at the model's precision.
    assert len(equations) >= 3  # The Gramian and the combination.


# What it is for: see the page


def shortest(gramian):
    """The weight of the first of two gradients in their shortest convex combination."""
    (a, b), (_, c) = np.asarray(gramian, np.float64)
    return (c - b) / (a + c - 2 * b)


def rounded(pair, bits):
    """The Gramian of gradients that are rounded to `bits` bits, without any other error."""
    pair = np.asarray(lax.reduce_precision(pair, 8, bits), np.float64)
    return pair @ pair.T


def test_the_table_of_weight_errors():
    rng = np.random.default_rng(0)
    found = {}
    for cosine in (0.999, 0.9999):
        errors = []
        for _ in range(64):
            q, _ = np.linalg.qr(rng.standard_normal((4096, 2)))
            pair = np.array([q[:, 0], cosine * q[:, 0] + (1 - cosine**2) ** 0.5 * q[:, 1]])
            pair = jnp.asarray(pair, "float32")
            gramians = [jaxjd.gramian(pair), rounded(pair, 10), rounded(pair, 7)]
            exact = shortest(rounded(pair, 23))
            errors.append([abs(shortest(gramian) - exact) for gramian in gramians])
        found[cosine] = np.max(errors, axis=0)
        print(cosine, found[cosine])
    rows = re.findall(r"^\| 0\.(\d+) \|(.*)\|$", PAGE.read_text(), re.MULTILINE)
    table = {float(f"0.{d}"): [float(x) for x in row.split("|")] for d, row in rows}
    assert set(table) == set(found)
    for cosine, measured in found.items():
        # The float32 product may be more exact than the page says; rounding is the same everywhere.
        assert measured[0] <= 2 * table[cosine][0]
        np.testing.assert_allclose(np.log2(measured[1:]), np.log2(table[cosine][1:]), atol=1)
