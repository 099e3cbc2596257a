"""jaxjd among optax's own tools."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.experimental
import pytest

import jaxjd
from jaxjd import weightings
from tests.matrices import gaussian
from tests.registry import NAMED, M, by_name

X = jnp.asarray(gaussian(0, 8, 3))
TARGETS = jnp.asarray(gaussian(1, 8, 2))

PARAMS = {"w": jnp.array([[0.3, -0.2], [0.1, 0.4]]), "b": jnp.zeros(2)}
JACOBIAN = {
    "w": jnp.array([[[-4.0, 1.0], [1.0, 0.0]], [[6.0, 1.0], [1.0, 0.0]]]),
    "b": jnp.array([[1.0, 0.0], [0.0, 1.0]]),
}
CONSTANT = weightings.constant([0.25, 0.5])
COMBINED = jax.tree.map(lambda leaf: 0.25 * leaf[0] + 0.5 * leaf[1], JACOBIAN)


# An attribute, not a module: `import optax.experimental.aggregating` does not find it.
aggregating = getattr(optax.experimental, "aggregating", None)
needs_aggregating = pytest.mark.skipif(
    aggregating is None, reason="this optax has no protocol for aggregators"
)


@needs_aggregating
def test_aggregators_are_what_optax_calls_aggregators():
    made = [
        jaxjd.weighted(CONSTANT),
        jaxjd.partition({"all": jaxjd.sum()}, "all"),
        jaxjd.grouped(CONSTANT, jaxjd.labels.together),
        *(method.aggregator(M) for method in NAMED),
    ]
    for aggregator in made:
        assert isinstance(aggregator, jaxjd.Aggregator)
        assert isinstance(aggregator, aggregating.Aggregator)
        assert isinstance(aggregator, optax.GradientTransformationExtraArgs)
        init, update = aggregator
        assert init is aggregator.init
        assert update is aggregator.update


@needs_aggregating
def test_process_takes_an_aggregator():
    tx = aggregating.process(
        optax.identity(), jaxjd.weighted(CONSTANT, num_tasks=2), optax.sgd(0.1)
    )
    updates, _ = jax.jit(tx.update)(JACOBIAN, tx.init(PARAMS), PARAMS)
    expected = jax.tree.map(lambda leaf: -0.1 * leaf, COMBINED)
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)


def test_the_weights_are_found_in_a_state():
    tx = optax.chain(jaxjd.weighted(CONSTANT, num_tasks=2), optax.adam(1e-3))
    state = tx.init(PARAMS)
    np.testing.assert_array_equal(optax.tree.get(state, "weights"), [0.0, 0.0])
    _, state = tx.update(JACOBIAN, state, PARAMS)
    np.testing.assert_array_equal(optax.tree.get(state, "weights"), [0.25, 0.5])
    aggregator_state = optax.tree.get(state, "AggregatorState")
    assert isinstance(aggregator_state, jaxjd.AggregatorState)
    # Without `num_tasks` there is nothing to hold them.
    plain = jaxjd.weighted(CONSTANT)
    assert plain.init(PARAMS).weights == ()
    assert plain.update(JACOBIAN, plain.init(PARAMS))[1].weights == ()


def test_the_weights_of_every_group_are_found_in_a_state():
    constants = {"w": [0.25, 0.5], "b": [1.0, 2.0]}
    parts = {name: jaxjd.constant(values, num_tasks=2) for name, values in constants.items()}
    tx = optax.chain(jaxjd.partition(parts, {"w": "w", "b": "b"}), optax.sgd(0.1))
    _, state = tx.update(JACOBIAN, tx.init(PARAMS), PARAMS)
    with pytest.raises(KeyError):
        optax.tree.get(state, "weights")
    found = optax.tree.get_all_with_path(state, "weights")
    assert sorted(weights.tolist() for _, weights in found) == sorted(constants.values())
    for path, weights in found:
        (group,) = (key.key for key in path if hasattr(key, "key") and key.key in constants)
        assert weights.tolist() == constants[group]


@pytest.mark.slow
def test_inject_hyperparams_makes_the_radius_of_cagrad_a_schedule():
    schedule = optax.linear_schedule(0.0, 0.8, 4)
    injected = optax.inject_hyperparams(jaxjd.cagrad, static_args=("num_tasks",))
    tx = injected(c=schedule, num_tasks=2)
    state = tx.init(PARAMS)
    update = jax.jit(tx.update)
    plain = jax.jit(lambda c: jaxjd.cagrad(c).update(JACOBIAN, jaxjd.AggregatorState((), ()))[0])
    for count in range(3):
        updates, state = update(JACOBIAN, state, PARAMS)
        np.testing.assert_allclose(state.hyperparams["c"], 0.2 * count, rtol=1e-6)
        chex.assert_trees_all_close(updates, plain(0.2 * count), rtol=1e-4, atol=1e-5)
    assert state.inner_state.weights.shape == (2,)
    # With a radius of zero it is the mean.
    start, _ = update(JACOBIAN, tx.init(PARAMS), PARAMS)
    mean = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), JACOBIAN)
    chex.assert_trees_all_close(start, mean, rtol=1e-5, atol=1e-6)


def test_inject_hyperparams_lets_a_constant_be_set():
    injected = optax.inject_hyperparams(jaxjd.modo, static_args=("num_tasks",))
    tx = injected(gamma=0.1, rho=0.0, num_tasks=2)
    state = tx.init(PARAMS)
    pair = (JACOBIAN, JACOBIAN)
    _, state = tx.update(JACOBIAN, state, PARAMS, cross_jacobians=pair)
    assert set(state.hyperparams) == {"gamma", "rho"}
    np.testing.assert_array_equal(state.inner_state.weights, [1.0, 0.0])
    state = tx.init(PARAMS)
    state.hyperparams["gamma"] = jnp.asarray(0.01)
    _, state = tx.update(JACOBIAN, state, PARAMS, cross_jacobians=pair)
    A = np.asarray(jaxjd.gramian(JACOBIAN))
    step = 0.5 - 0.01 * (A @ [0.5, 0.5])
    np.testing.assert_allclose(state.inner_state.weights, step + (1 - np.sum(step)) / 2, rtol=1e-5)


@pytest.mark.parametrize("kind", ["NumPy scalar", "array"])
@pytest.mark.parametrize(
    "method", [method for method in NAMED if method.hyperparameters], ids=by_name
)
def test_hyperparameters_of_a_wider_dtype(method, kind):
    """Sweeps come from ``np.linspace`` and the like; the Jacobian's dtype is what counts."""
    make = np.float64 if kind == "NumPy scalar" else lambda value: jnp.asarray(value, "float64")
    with jax.enable_x64(True):
        values = {name: make(value) for name, value in method.hyperparameters.items()}
        factory = getattr(jaxjd, method.name)
        aggregator = factory(**{**method.required, **values, "num_tasks": 3})
        params = {"w": jnp.zeros((2, 2), "float32")}
        jacobian = {"w": jnp.ones((3, 2, 2), "float32")}
        state = jax.eval_shape(aggregator.init, params)
        updates, after = jax.eval_shape(
            lambda jacobian, state: aggregator.update(
                jacobian, state, params, **method.extra_args(jacobian)
            ),
            jacobian,
            state,
        )
    assert updates["w"].dtype == jnp.float32
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


FOLLOWERS = {
    "clip_by_global_norm": lambda: optax.clip_by_global_norm(1.0),
    "add_decayed_weights": lambda: optax.add_decayed_weights(1e-2),
    "ema": lambda: optax.ema(0.9),
    "MultiSteps": lambda: optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(1e-2), 3),
    "keep_params_nonnegative": lambda: optax.keep_params_nonnegative(),
    "masked": lambda: optax.masked(optax.adam(1e-2), {"w": True, "b": False}),
    "adamw": lambda: optax.adamw(1e-2),
}


@pytest.mark.parametrize("follower", FOLLOWERS)
def test_what_may_follow_an_aggregator(follower):
    tx = optax.chain(jaxjd.weighted(CONSTANT, num_tasks=2), FOLLOWERS[follower]())
    state = jax.eval_shape(tx.init, PARAMS)
    updates, after = jax.eval_shape(tx.update, JACOBIAN, state, PARAMS)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


def test_a_big_batch_in_microbatches():
    def losses_fn(w, x, targets):
        return jnp.mean((jnp.tanh(x @ w) - targets) ** 2, axis=0)

    w = jax.random.normal(jax.random.key(5), (3, 2))
    engine = jaxjd.value_and_jacobian(losses_fn)
    split = optax.microbatching.microbatch(
        engine,
        argnums=(1, 2),
        microbatch_size=2,
        accumulator=optax.microbatching.AccumulationType.MEAN,
    )
    found = jax.jit(split)(w, X, TARGETS)
    chex.assert_trees_all_close(found, jax.jit(engine)(w, X, TARGETS), rtol=1e-5, atol=1e-6)


WRAPPERS = {
    "lookahead": lambda tx: optax.lookahead(tx, sync_period=2, slow_step_size=0.5),
    "schedule_free": lambda tx: optax.contrib.schedule_free(tx, learning_rate=0.1, b1=0.9),
    "masked": lambda tx: optax.masked(tx, {"w": True, "b": True}),
    "named_chain": lambda tx: optax.named_chain(("all", tx)),
    "partition": lambda tx: optax.partition({"all": tx}, lambda _: "all"),
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(
        lambda lr: optax.chain(tx, optax.scale(lr))
    )(lr=lambda count: 1.0 / (1.0 + count)),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_of_optax_around_a_chain(name):
    """Around aggregator and optimizer they do what they do around the optimizer alone."""
    wrap, optimizer = WRAPPERS[name], lambda: optax.sgd(0.1, momentum=0.9)
    ours = wrap(optax.chain(jaxjd.weighted(CONSTANT, num_tasks=2), optimizer()))
    plain = wrap(optimizer())
    start = PARAMS
    if name == "lookahead":
        start = optax.LookaheadParams.init_synced(PARAMS)

    def run(tx, gradient):
        update, params, state = jax.jit(tx.update), start, tx.init(start)
        types = jax.tree.map(jnp.shape, state)
        for _ in range(3):
            updates, state = update(gradient, state, params)
            params = optax.apply_updates(params, updates)
        assert jax.tree.map(jnp.shape, state) == types
        return params

    chex.assert_trees_all_close(run(ours, JACOBIAN), run(plain, COMBINED), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_partition_of_optax_equals_ours():
    parts = {"w": jaxjd.upgrad(num_tasks=2), "b": jaxjd.constant([0.25, 0.5], num_tasks=2)}
    labels = {"w": "w", "b": "b"}
    found = []
    for partition in (jaxjd.partition, optax.partition):
        tx = optax.chain(partition(parts, labels), optax.sgd(0.1), jaxjd.ensure_aggregated())
        found.append(tx.update(JACOBIAN, tx.init(PARAMS), PARAMS)[0])
    chex.assert_trees_all_equal(*found)


def test_apply_if_finite_may_follow_but_does_not_fit_around():
    """Around an aggregator, `jaxjd.skip_if_not_finite` does its work (tests/test_transforms.py)."""
    around = optax.apply_if_finite(jaxjd.weighted(CONSTANT), 3)
    with pytest.raises(TypeError):
        jax.eval_shape(around.update, JACOBIAN, around.init(PARAMS), PARAMS)
    behind = optax.chain(jaxjd.weighted(CONSTANT), optax.apply_if_finite(optax.sgd(0.1), 3))
    bad = {**JACOBIAN, "b": JACOBIAN["b"].at[0, 0].set(jnp.nan)}
    updates, state = behind.update(bad, behind.init(PARAMS), PARAMS)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, PARAMS))
    assert int(optax.tree.get(state, "total_notfinite")) == 1
