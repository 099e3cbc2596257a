"""jaxjd inside the training loops of flax, equinox and haiku, and among optax's own tools."""

import chex
import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.experimental
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import jaxjd
from jaxjd import labels, weightings
from tests.registry import NAMED, M, by_name

X = jax.random.normal(jax.random.key(0), (8, 3))
TARGETS = jax.random.normal(jax.random.key(1), (8, 2))


def errors(predictions):
    """Two losses, one per output of a model."""
    return jnp.mean((predictions - TARGETS) ** 2, axis=0)


# flax


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.tanh(nn.Dense(4)(x)))


class Nnx(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.trunk = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(jnp.tanh(self.norm(self.trunk(x))))


AGGREGATORS = {
    "upgrad": lambda: jaxjd.upgrad(),
    "gradvac": lambda: jaxjd.gradvac(num_tasks=2),
    "grouped": lambda: jaxjd.grouped(weightings.mgda(), labels.by_layer, num_tasks=2),
}


@pytest.mark.parametrize("name", ["upgrad", "gradvac"])
def test_train_state_applies_a_jacobian_as_gradients(name):
    model = Linen()
    params = model.init(jax.random.key(2), X)
    tx = optax.chain(AGGREGATORS[name](), optax.adam(1e-2))
    train_state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    @jax.jit
    def step(train_state):
        losses_fn = lambda params: errors(train_state.apply_fn(params, X))
        losses, jacobian = jaxjd.value_and_jacobian(losses_fn)(train_state.params)
        return train_state.apply_gradients(grads=jacobian), losses, jacobian

    opt_state, update = tx.init(params), jax.jit(tx.update)
    history = []
    for _ in range(3):
        train_state, losses, jacobian = step(train_state)
        updates, opt_state = update(jacobian, opt_state, params)
        params = optax.apply_updates(params, updates)
        history.append(float(jnp.sum(losses)))
    assert train_state.step == 3
    assert history[-1] < history[0]
    chex.assert_trees_all_close(train_state.params, params, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "jitted"),
    [("upgrad", True), ("gradvac", True), ("grouped", True), ("gradvac", False)],
)
def test_nnx_optimizer_takes_a_jacobian(name, jitted):
    model = Nnx()
    optimizer = nnx.Optimizer(
        model, optax.chain(AGGREGATORS[name](), optax.adam(1e-2)), wrt=nnx.Param
    )

    def step(model, optimizer):
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)

        def losses_fn(params):
            # A copy, since the model changes its running statistics.
            copied = nnx.merge(graphdef, params, rest, copy=True)
            losses = errors(copied(X))
            return losses, nnx.split(copied, nnx.Param, ...)[2]

        (losses, rest), jacobian = jaxjd.value_and_jacobian(losses_fn, has_aux=True)(params)
        nnx.update(model, rest)
        optimizer.update(model, jacobian)
        return losses

    run = nnx.jit(step) if jitted else step
    before = jnp.array(model.trunk.kernel.get_value())
    history = [float(jnp.sum(run(model, optimizer))) for _ in range(3)]
    assert history[-1] < history[0]
    assert model.trunk.kernel.get_value().shape == before.shape
    assert np.any(model.trunk.kernel.get_value() != before)
    assert np.any(model.norm.mean.get_value() != 0)


def test_nnx_optimizer_passes_the_cross_jacobians_on():
    model = Nnx()
    aggregator = jaxjd.modo(gamma=0.3, num_tasks=2)
    optimizer = nnx.Optimizer(model, optax.chain(aggregator, optax.sgd(0.1)), wrt=nnx.Param)
    params = nnx.state(model, nnx.Param)
    leaves, treedef = jax.tree.flatten(params)
    jacobians = [
        jax.tree.unflatten(
            treedef,
            [
                jax.random.normal(jax.random.key(10 * n + i), (2, *p.shape))
                for i, p in enumerate(leaves)
            ],
        )
        for n in range(3)
    ]
    expected, _ = aggregator.update(
        jacobians[2], aggregator.init(params), cross_jacobians=(jacobians[0], jacobians[1])
    )
    wanted = [p - 0.1 * u for p, u in zip(leaves, jax.tree.leaves(expected), strict=True)]
    optimizer.update(model, jacobians[2], cross_jacobians=(jacobians[0], jacobians[1]))
    found = jax.tree.leaves(nnx.state(model, nnx.Param))
    chex.assert_trees_all_close(found, wanted, rtol=1e-5, atol=1e-6)


# equinox and haiku


@pytest.mark.parametrize("name", ["upgrad", "gradvac"])
def test_equinox_training_loop(name):
    model = eqx.nn.MLP(3, 2, 4, depth=1, key=jax.random.key(0))
    tx = optax.chain(AGGREGATORS[name](), optax.adam(1e-2))
    opt_state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, opt_state):
        params, static = eqx.partition(model, eqx.is_inexact_array)
        losses_fn = lambda params: errors(jax.vmap(eqx.combine(params, static))(X))
        losses, jacobian = jaxjd.value_and_jacobian(losses_fn)(params)
        updates, opt_state = tx.update(jacobian, opt_state, params)
        return eqx.apply_updates(model, updates), opt_state, losses

    history = []
    for _ in range(3):
        model, opt_state, losses = step(model, opt_state)
        history.append(float(jnp.sum(losses)))
    assert history[-1] < history[0]


def test_haiku_training_loop():
    network = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([4, 2])(x)))
    params = network.init(jax.random.key(0), X)
    aggregator = jaxjd.grouped(weightings.mgda(), labels.by_layer, num_tasks=2)
    tx = optax.chain(aggregator, optax.adam(1e-2))
    opt_state = tx.init(params)
    assert opt_state[0].weights.shape == (2, 2)

    @jax.jit
    def step(params, opt_state):
        losses, jacobian = jaxjd.value_and_jacobian(lambda p: errors(network.apply(p, X)))(params)
        updates, opt_state = tx.update(jacobian, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, losses

    history = []
    for _ in range(3):
        params, opt_state, losses = step(params, opt_state)
        history.append(float(jnp.sum(losses)))
    assert history[-1] < history[0]


# optax

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
        jaxjd.grouped(CONSTANT, labels.together),
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
