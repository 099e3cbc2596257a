"""From losses to a gradient in one call."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import jaxjd
from jaxjd import weightings as W
from tests import registry
from tests.jaxprs import equations_of
from tests.matrices import gaussian

PARAMS = {"first": {"kernel": gaussian(0, 4, 6)}, "second": {"kernel": gaussian(1, 6, 3)}}
BATCHES = [gaussian(2 + number, 5, 4) for number in range(3)]


def losses_fn(params, x):
    hidden = jnp.tanh(x @ params["first"]["kernel"])
    return jnp.mean((hidden @ params["second"]["kernel"] - 1.0) ** 2, axis=0)


def key_data(leaf):
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf


def by_hand(aggregator, state, params, x, **extra_args):
    losses, jacobian = jaxjd.value_and_jacobian(losses_fn, form="auto")(params, x)
    gradient, state = aggregator.update(jacobian, state, params, losses=losses, **extra_args)
    return (losses, gradient), state


QUICK = ("upgrad", "gradnorm", "moco", "graddrop", "modo", "partition(upgrad, excess_mtl)")


@pytest.mark.parametrize(
    "method", registry.slow_but(QUICK, registry.AGGREGATORS), ids=registry.by_name
)
def test_it_is_the_jacobian_and_the_aggregator(method):
    if method.weighting is None:
        weighting = aggregator = method.aggregator(3)
    else:
        weighting = method.weighting()
        aggregator = jaxjd.weighted(weighting, num_tasks=3)
    init, apply = jaxjd.aggregated_value_and_grad(losses_fn, weighting, num_tasks=3)
    pair = {"cross_args": tuple((x,) for x in BATCHES[1:])} if method.stat == "cross" else {}

    @jax.jit
    def both(state, expected):
        found = apply(state, PARAMS, BATCHES[0], **pair)
        extra = {}
        if pair:
            jacobian = jaxjd.value_and_jacobian(losses_fn, form="auto")
            extra["cross_jacobians"] = tuple(jacobian(PARAMS, x)[1] for x in BATCHES[1:])
        return found, by_hand(aggregator, expected, PARAMS, BATCHES[0], **extra)

    state, expected = init(PARAMS), aggregator.init(PARAMS)
    for _ in range(2):
        (found, state), (wanted, expected) = both(state, expected)
        close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-5)
        close(found, wanted)
        close(*(jax.tree.map(key_data, tree) for tree in (state.aggregator, expected)))
    assert state.count == ()
    chex.assert_trees_all_equal_shapes_and_dtypes(found[1], PARAMS)


def column(number):
    return lambda params, x: losses_fn(params, x)[number]


@pytest.mark.parametrize(
    "fn",
    [
        lambda params, x: {"a": losses_fn(params, x)[0], "b": losses_fn(params, x)[1:]},
        {"a": column(0), "b": column(1), "c": column(2)},
        [column(0), (column(1), column(2))],
        (column(0), lambda params, x: losses_fn(params, x)[1:]),
    ],
    ids=["dict", "functions", "nested", "vectors"],
)
def test_losses_come_in_any_structure(fn):
    init, apply = jaxjd.aggregated_value_and_grad(fn, W.sum())
    (values, gradient), _ = jax.jit(apply)(init(PARAMS), PARAMS, BATCHES[0])
    losses, expected = jax.value_and_grad(lambda params: losses_fn(params, BATCHES[0]).sum())(
        PARAMS
    )
    assert sum(float(jnp.sum(leaf)) for leaf in jax.tree.leaves(values)) == pytest.approx(losses)
    assert type(values) is (dict if callable(fn) else type(fn))
    chex.assert_trees_all_close(gradient, expected, rtol=1e-5, atol=1e-6)


def test_auxiliary_output_of_each_function_and_several_arguments():
    def with_name(number, name):
        return lambda first, second, x: (
            column(number)({"first": first, "second": second}, x),
            name,
        )

    fns = {"a": with_name(0, "left"), "b": with_name(1, "right")}
    init, apply = jaxjd.aggregated_value_and_grad(fns, W.mean(), argnums=(0, 1), has_aux=True)
    arguments = (PARAMS["first"], PARAMS["second"])
    ((losses, aux), gradient), _ = apply(init(arguments), *arguments, x=BATCHES[0])
    assert aux == {"a": "left", "b": "right"}
    assert sorted(losses) == ["a", "b"]
    expected = jax.grad(lambda params: losses_fn(params, BATCHES[0])[:2].mean())(PARAMS)
    chex.assert_trees_all_close(gradient, tuple(expected.values()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("labels", [None, jaxjd.labels.by_layer], ids=["one", "groups"])
def test_weights_are_kept_between(labels):
    kinds = {"num_tasks": 3, "labels": labels}
    init, apply = jaxjd.aggregated_value_and_grad(losses_fn, W.upgrad(), every=3, **kinds)
    _, always = jaxjd.aggregated_value_and_grad(losses_fn, W.upgrad(), **kinds)

    @jax.jit
    def step(state, params, x):
        found, after = apply(state, params, x)
        fresh, other = always(state._replace(count=()), params, x)
        rows = jax.jacrev(losses_fn)(params, x)
        return found, after, fresh, other, rows

    state, params = init(PARAMS), PARAMS
    for number in range(7):
        before, x = state.aggregator.weights, BATCHES[number % 3]
        assert int(state.count) == number % 3
        (losses, gradient), state, (expected, fresh), other, rows = step(state, params, x)
        np.testing.assert_allclose(losses, expected, rtol=1e-6)
        if number % 3 == 0:
            chex.assert_trees_all_close(gradient, fresh, rtol=1e-6, atol=1e-7)
            chex.assert_trees_all_close(state.aggregator, other.aggregator, rtol=1e-6)
            assert not np.allclose(state.aggregator.weights, before)
        else:
            np.testing.assert_array_equal(state.aggregator.weights, before)
            weights = np.broadcast_to(before, (2, 3))
            for row, label in zip(weights, ("first", "second"), strict=True):
                combined = np.tensordot(row, rows[label]["kernel"], 1)
                np.testing.assert_allclose(
                    gradient[label]["kernel"], combined, rtol=1e-4, atol=1e-6
                )
        params = jax.tree.map(lambda param, part: param - 0.1 * part, params, gradient)


def test_a_call_between_has_one_backward_pass():
    init, apply = jaxjd.aggregated_value_and_grad(losses_fn, W.upgrad(), num_tasks=3, every=2)
    jaxpr = jax.make_jaxpr(apply)(init(PARAMS), PARAMS, BATCHES[0])
    (cond,) = [e for e in jaxpr.eqns if e.primitive.name == "cond"]
    plain = jax.make_jaxpr(jax.grad(lambda params, x: losses_fn(params, x).sum()))

    def products(jaxpr):
        return sum(e.primitive.name == "dot_general" for e in equations_of(jaxpr))

    between, whole = (products(branch.jaxpr) for branch in cond.params["branches"])
    assert between == products(plain(PARAMS, BATCHES[0]).jaxpr)
    assert whole > between


def test_the_gradient_is_one_for_optax_and_flax():
    init, apply = jaxjd.aggregated_value_and_grad(losses_fn, W.upgrad())
    tx = optax.MultiSteps(optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(1.0)), 2)
    state = TrainState.create(apply_fn=None, params=jax.tree.map(jnp.asarray, PARAMS), tx=tx)

    @jax.jit
    def step(state, aggregated, x):
        (losses, gradient), aggregated = apply(aggregated, state.params, x)
        return state.apply_gradients(grads=gradient), aggregated, losses

    aggregated = init(PARAMS)
    for _ in range(2):
        state, aggregated, _ = step(state, aggregated, BATCHES[0])
    moved = jax.tree.map(lambda new, old: new - old, state.params, PARAMS)
    assert float(optax.tree.norm(moved)) == pytest.approx(0.1, rel=1e-5)


def loss_of_two_batches(params, pair, factor):
    """A loss for each of two batches of different sizes."""
    return [factor * losses_fn(params, x).mean() for x in pair]


@pytest.mark.parametrize("every", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_microbatches_are_one_large_batch(every):
    pair = (gaussian(9, 24, 4), gaussian(10, 8, 4))

    @jax.jit
    def run(pair):
        found = []
        for parts in (1, 4):
            init, apply = jaxjd.aggregated_value_and_grad(
                loss_of_two_batches, W.upgrad(), num_tasks=2, every=every, microbatches=parts
            )
            state = init(PARAMS)
            for _ in range(every):  # Of the last call.
                values, state = apply(state, PARAMS, pair, 2.0)
            found.append((values, state))
        return found

    whole, parts = run(pair)
    chex.assert_trees_all_close(parts, whole, rtol=1e-5, atol=1e-6)


def test_microbatches_are_summed_wide_and_cut_evenly():
    """Sums of many parts in bfloat16 would stay at 256; auxiliary output is that of each part."""
    fn = lambda w, x: (jnp.stack([(w[0] * x).sum(), w[0] * x.mean()]), x)
    init, apply = jaxjd.aggregated_value_and_grad(
        fn, W.sum(), has_aux=True, microbatches=512, form="dense"
    )
    w, x = jnp.ones(1, jnp.bfloat16), jnp.ones((1024, 1), jnp.bfloat16)
    ((losses, aux), gradient), _ = apply(init(w), w, x)
    np.testing.assert_array_equal(losses, jnp.array([2, 1], jnp.bfloat16))
    np.testing.assert_array_equal(gradient, jnp.array([3], jnp.bfloat16))
    assert aux.shape == (512, 2, 1)
    init, apply = jaxjd.aggregated_value_and_grad(fn, W.sum(), has_aux=True, microbatches=2)
    ((_, aux), _), _ = apply(init(w), w, jnp.arange(4.0)[:, None])
    np.testing.assert_array_equal(aux[..., 0], [[0, 2], [1, 3]])


def test_microbatches_bound_the_activations():
    params, x = [jnp.ones((32, 32))] * 4, jnp.ones((4096, 32))

    def losses(params, x):
        for kernel in params:
            x = jnp.tanh(x @ kernel)
        return [x[:, 0].mean(), (x**2).mean()]

    def temporaries(parts):
        init, apply = jaxjd.aggregated_value_and_grad(losses, W.mean(), microbatches=parts)
        step = lambda params, x: apply(init(params), params, x)
        return jax.jit(step).lower(params, x).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(16) < 0.5 * temporaries(1)
