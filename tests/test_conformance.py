"""Every registered method behaves as an optax transformation and as a pure function should."""

from __future__ import annotations

import functools
import inspect
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType

import jaxjd
from tests import registry
from tests.registry import (
    AGGREGATORS,
    GROUPINGS,
    LINKS,
    NAMED,
    UNWEIGHTED,
    WEIGHTINGS,
    M,
    Method,
    by_name,
    slow_but,
)

ALL = AGGREGATORS + LINKS
all_aggregators = pytest.mark.parametrize("method", ALL, ids=by_name)
# One of each solver and of each kind of state; all methods are traced.
STEPPED = {
    "conflict_free",
    "constant",
    "cr_mogm(mean, schedule)",
    "cr_mogm(sdmgrad)",
    "db_mtl",
    "excess_mtl",
    "graddrop",
    "gradnorm",
    "grouped(modo)",
    "krum",
    "mean",
    "mgda",
    "moco",
    "modo",
    "momentum_conflict_free",
    "multi_steps(excess_mtl)",
    "nash_mtl",
    "pcgrad",
    "per_task(ema)",
    "random",
    "sdmgrad",
    "skip_if_not_finite(gradvac)",
    "stch",
    "trimmed_mean",
    "upgrad",
}
stepped = pytest.mark.parametrize("method", slow_but(STEPPED, ALL), ids=by_name)
# Quick to compile: state, cross-Jacobians, and a state that is no weighting's.
QUICK = {"mean", "modo", "multi_steps(excess_mtl)"}
mostly_slow = pytest.mark.parametrize("method", slow_but(QUICK, ALL), ids=by_name)


def make_chain(method: Method) -> optax.GradientTransformationExtraArgs:
    return optax.chain(method.aggregator(M), optax.sgd(0.05, momentum=0.9))


def make_step(method: Method, tx: optax.GradientTransformationExtraArgs):
    def step(params, state):
        jacobian = jax.jacrev(registry.example_losses)(params)
        updates, state = tx.update(jacobian, state, params, **method.extra_args(jacobian))
        return optax.apply_updates(params, updates), state

    return step


@functools.cache
def compiled_step(name: str):
    """The one compiled step of a method for each dtype, which donates; and a list of its traces."""
    (method,) = (method for method in ALL if method.name == name)
    step, traces = make_step(method, make_chain(method)), []

    def counted(params, state):
        traces.append(None)
        return step(params, state)

    return jax.jit(counted, donate_argnums=(0, 1)), traces


def start(method: Method, dtype="float32"):
    params = registry.example_params(dtype)
    return params, make_chain(method).init(params)


def types_of(tree):
    return jax.tree.map(lambda x: (x.shape, str(x.dtype), getattr(x, "weak_type", False)), tree)


def raw(tree):
    """Arrays instead of typed keys, so that values can be compared and written."""
    return jax.tree.map(
        lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x,
        tree,
    )


def random_jacobians(count: int) -> dict:
    key_w, key_b = jax.random.split(jax.random.key(3))
    return {
        "w": jax.random.normal(key_w, (count, M, 4)),
        "b": jax.random.normal(key_b, (count, M)),
    }


def test_catalogue_is_registered():
    named = {method.name for method in NAMED}
    returns_aggregator = {
        name
        for name in jaxjd.__all__
        if inspect.isfunction(getattr(jaxjd, name))
        and inspect.signature(getattr(jaxjd, name)).return_annotation == "Aggregator"
    }
    unweighted = {method.name for method in UNWEIGHTED}
    assert returns_aggregator - {"freeze", "grouped", "partition", "weighted"} == named | unweighted
    wrappers = {"cr_mogm", "flattening"}
    functions = {
        name
        for name in jaxjd.weightings.__all__
        if inspect.isfunction(getattr(jaxjd.weightings, name))
    }
    assert functions - wrappers == named
    for wrapper in wrappers:
        assert any(method.name.startswith(wrapper) for method in WEIGHTINGS)


@pytest.mark.parametrize("method", NAMED, ids=by_name)
def test_alias_has_the_arguments_of_its_weighting(method):
    weighting = inspect.signature(getattr(jaxjd.weightings, method.name)).parameters
    alias = dict(inspect.signature(getattr(jaxjd, method.name)).parameters)
    assert alias.pop("num_tasks").kind is inspect.Parameter.KEYWORD_ONLY
    if method.stat == "cross":  # What is combined is no matter of the weights.
        assert alias.pop("combine_pair").default is False
    assert {n: p.default for n, p in alias.items()} == {n: p.default for n, p in weighting.items()}


def check_training(method, dtype):
    with jax.enable_x64(dtype == "float64"):
        jitted, traces = compiled_step(method.name)
        before = len(traces)
        params, state = start(method, dtype)
        types = types_of((params, state))
        for _ in range(3):
            params, state = jitted(params, state)
            assert types_of((params, state)) == types
        assert len(traces) - before <= 1  # None if another test has compiled it.
        assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(params))
        chex.assert_tree_all_finite(raw((params, state)))
        # Donated state must not take the factory's own buffers with it.
        chex.assert_tree_all_finite(raw(start(method, dtype)))


@stepped
def test_training_keeps_types_compiles_once_and_may_donate(method):
    check_training(method, "float32")


@mostly_slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_training_in_other_dtypes(method, dtype):
    check_training(method, dtype)


@all_aggregators
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float64", marks=pytest.mark.slow)])
def test_a_step_keeps_other_dtypes(method, dtype):
    """Nothing is compiled: types are known when a step is traced."""
    with jax.enable_x64(dtype == "float64"):
        tx = make_chain(method)
        params = jax.eval_shape(lambda: registry.example_params(dtype))
        carry = (params, jax.eval_shape(tx.init, params))
        assert types_of(jax.eval_shape(make_step(method, tx), *carry)) == types_of(carry)
        assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(params))


def restore(method, saved):
    return jax.tree.map(
        lambda like, value: (
            jax.random.wrap_key_data(jnp.array(value))
            if jnp.issubdtype(like.dtype, jax.dtypes.prng_key)
            else jnp.array(value)
        ),
        start(method),
        pickle.loads(saved),
    )


def run_from_a_saved_state(method):
    """Five steps, and what was saved after two: to bytes and back, as a checkpoint does."""
    step, _ = compiled_step(method.name)
    carry = start(method)
    for _ in range(2):
        carry = step(*carry)
    saved = pickle.dumps(jax.tree.map(np.array, raw(carry)))
    for _ in range(3):
        carry = step(*carry)
    return saved, carry


@stepped
def test_a_run_from_a_saved_state_is_the_same_bit_for_bit(method):
    saved, expected = run_from_a_saved_state(method)
    step, _ = compiled_step(method.name)
    resumed = restore(method, saved)
    for _ in range(3):
        resumed = step(*resumed)
    chex.assert_trees_all_equal(raw(resumed), raw(expected))


@mostly_slow
def test_scan_equals_loop(method):
    saved, expected = run_from_a_saved_state(method)
    step = make_step(method, make_chain(method))
    scan = jax.jit(lambda carry: lax.scan(lambda c, _: (step(*c), None), carry, length=3)[0])
    scanned = scan(restore(method, saved))
    chex.assert_trees_all_close(raw(scanned), raw(expected), rtol=1e-5, atol=1e-6)


@mostly_slow
def test_jit_equals_eager(method):
    eager = make_step(method, make_chain(method))(*start(method))
    jitted, _ = compiled_step(method.name)
    chex.assert_trees_all_close(raw(jitted(*start(method))), raw(eager), rtol=1e-4, atol=1e-5)


@all_aggregators
def test_state_is_a_pytree_of_arrays_that_init_makes_from_shapes(method):
    params = registry.example_params()
    shapes = jax.eval_shape(lambda: params)
    aggregator = method.aggregator(M)
    state = aggregator.init(params)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    chex.assert_trees_all_equal(raw(aggregator.init(shapes)), raw(state))
    abstract = jax.eval_shape(aggregator.init, params)
    assert types_of(abstract) == types_of(state)


@all_aggregators
def test_tree_map_params(method):
    params = registry.example_params()
    tx = make_chain(method)
    state = tx.init(params)
    mapped = optax.tree.map_params(tx, lambda leaf: leaf + 1, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    momentum = optax.tree.get(mapped, "trace")
    chex.assert_trees_all_equal(momentum, jax.tree.map(jnp.ones_like, params))


@all_aggregators
def test_unexpected_extra_args_and_leafless_trees(method):
    """They change nothing in the program."""
    params = registry.example_params()
    aggregator = method.aggregator(M)
    jacobian = jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf, 2 * leaf]), params)
    extra = method.extra_args(jacobian)
    args = (jacobian, aggregator.init(params), params)
    unexpected = {"losses": jnp.ones(M), "value": 1.0, **extra}

    def result(update, extra):
        update = functools.partial(update, **extra)
        if method.name.startswith("multi_steps"):  # It sums extra arguments, needed or not.
            return update(*args)[0]
        return str(jax.make_jaxpr(update)(*args))

    without_params = lambda jacobian, state, _, **extra: aggregator.update(jacobian, state, **extra)
    expected = result(aggregator.update, extra)
    chex.assert_trees_all_equal(result(aggregator.update, unexpected), expected)
    chex.assert_trees_all_equal(result(without_params, extra), expected)
    if method not in GROUPINGS:
        empty, _ = aggregator.update({}, aggregator.init({}), {}, **method.extra_args({}))
        assert empty == {}


INJECTED = NAMED + UNWEIGHTED


@pytest.mark.parametrize(
    "method", slow_but({"db_mtl", "gradvac", "mean", "modo", "stch"}, INJECTED), ids=by_name
)
def test_inject_hyperparams(method):
    factory = getattr(jaxjd, method.name)
    names = list(inspect.signature(factory).parameters)
    static = [name for name in names if name not in method.hyperparameters]
    injected = optax.inject_hyperparams(factory, static_args=static, hyperparam_dtype=jnp.float32)
    tx = injected(**{**method.required, **method.hyperparameters, "num_tasks": M})
    plain = factory(**{**method.required, **method.hyperparameters, "num_tasks": M})
    params = registry.example_params()
    jacobian = jax.jacrev(registry.example_losses)(params)
    extra = method.extra_args(jacobian)

    @jax.jit
    def update(state):
        return tx.update(jacobian, state, params, **extra)

    found, state = update(tx.init(params))
    assert set(state.hyperparams) == set(method.hyperparameters)
    expected, _ = plain.update(jacobian, plain.init(params), params, **extra)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)


@all_aggregators
def test_state_keeps_its_sharding_type_under_an_explicit_mesh(method):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        params = jax.tree.map(lambda leaf: jax.device_put(leaf, jax.P()), registry.example_params())
        sharded = jax.device_put(jnp.zeros((2, 3)), jax.P("x", None))
        params["first"]["kernel"] = sharded
        aggregator = method.aggregator(M)
        jacobian = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (M, *leaf.shape)) + 1.0, params)
        extra = method.extra_args(jacobian)

        def train(params, jacobian):
            # A scan refuses a carry whose type changes, sharding included.
            def step(state, _):
                updates, state = aggregator.update(jacobian, state, params, **extra)
                return state, updates

            return lax.scan(step, aggregator.init(params), length=2)

        _, updates = jax.eval_shape(train, params, jacobian)
        assert updates["first"]["kernel"].sharding.spec == jax.P(None, "x", None)


def test_same_key_gives_the_same_run_and_keys_may_be_typed():
    for method in NAMED:
        if not method.random:
            continue
        stat = method.stat_of(jax.tree.map(lambda x: x[0], random_jacobians(1)))
        factory = getattr(jaxjd.weightings, method.name)
        runs = []
        for key in (7, jax.random.key(7), jax.random.PRNGKey(7), 8):
            weighting = factory(key=key)
            state = weighting.init(M)
            run = []
            for _ in range(4):
                weights, state = weighting.update(stat, state)
                run.append(weights)
            runs.append(jnp.stack(run))
        chex.assert_trees_all_equal(runs[0], runs[1])
        chex.assert_trees_all_equal(runs[0], runs[2])
        if method.name == "random":
            assert not np.allclose(runs[0], runs[3])
            assert not np.allclose(runs[0][0], runs[0][1])
