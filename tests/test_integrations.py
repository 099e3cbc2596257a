"""jaxjd inside the training loops of flax, equinox and haiku."""

from typing import Any

import chex
import equinox as eqx
import flax
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import jaxjd
from jaxjd import labels, weightings
from jaxjd.integrations.flax import JDTrainState
from tests.matrices import gaussian
from tests.registry import slow_but

X = jnp.asarray(gaussian(0, 8, 3))
TARGETS = jnp.asarray(gaussian(1, 8, 2))


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


@pytest.mark.parametrize("name", slow_but({"gradvac"}, ["upgrad", "gradvac"]))
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
    [
        ("gradvac", True),
        pytest.param("upgrad", True, marks=pytest.mark.slow),
        pytest.param("grouped", True, marks=pytest.mark.slow),
        pytest.param("gradvac", False, marks=pytest.mark.slow),
    ],
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


class Trained(JDTrainState):
    """With the collection that BatchNorm changes and the key that dropout draws from."""

    batch_stats: Any
    key: jax.Array


class Regularized(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
        return nn.Dense(2)(nn.Dropout(0.5, deterministic=not train)(nn.tanh(x)))


def test_jd_train_state_carries_extra_args_batch_statistics_and_a_key():
    model = Regularized()
    variables = model.init(jax.random.key(2), X, train=False)
    state = Trained.create(
        apply_fn=model.apply,
        params=variables["params"],
        tx=optax.chain(jaxjd.mgda("loss", num_tasks=2), optax.adam(1e-2)),
        batch_stats=variables["batch_stats"],
        key=jax.random.key(7),
    )

    traces = []

    @jax.jit
    def step(state):
        traces.append(None)
        key = jax.random.fold_in(state.key, state.step)

        def losses_fn(params):
            predictions, changed = state.apply_fn(
                {"params": params, "batch_stats": state.batch_stats},
                X,
                train=True,
                rngs={"dropout": key},
                mutable=["batch_stats"],
            )
            return errors(predictions), changed["batch_stats"]

        engine = jaxjd.value_and_jacobian(losses_fn, has_aux=True, form="auto")
        (losses, batch_stats), jacobian = engine(state.params)
        state = state.apply_jacobian(
            jacobian, extra_args={"losses": losses}, batch_stats=batch_stats
        )
        return state, losses, jaxjd.materialize(jacobian)

    params, opt_state = state.params, state.tx.init(state.params)
    update = jax.jit(state.tx.update)
    evaluate = jax.jit(
        lambda state: errors(
            model.apply({"params": state.params, "batch_stats": state.batch_stats}, X, train=False)
        )
    )
    before, statistics = evaluate(state), state.batch_stats
    for _ in range(20):
        state, losses, jacobian = step(state)
        updates, opt_state = update(jacobian, opt_state, params, losses=losses)
        params = optax.apply_updates(params, updates)
    assert int(state.step) == 20
    assert len(traces) == 1
    chex.assert_trees_all_close(state.params, params, rtol=1e-4, atol=1e-5)
    assert float(jnp.sum(evaluate(state))) < float(jnp.sum(before))
    moved = state.batch_stats["BatchNorm_0"]["mean"] - statistics["BatchNorm_0"]["mean"]
    assert np.all(moved != 0)


def test_jd_train_state_takes_any_parameters_and_checkpoints_as_its_parent_does():
    tx = optax.chain(jaxjd.sum(), optax.sgd(0.5))
    state = JDTrainState.create(apply_fn=None, params=jnp.ones(2), tx=tx)
    state = state.apply_jacobian(jnp.array([[1.0, 0.0], [0.0, 2.0]]))
    np.testing.assert_array_equal(state.params, [0.5, 0.0])
    assert state.step == 1
    restored = flax.serialization.from_state_dict(state, flax.serialization.to_state_dict(state))
    chex.assert_trees_all_equal(restored.params, state.params)


def test_jd_train_state_refuses_what_would_broadcast_the_parameters():
    state = JDTrainState.create(apply_fn=None, params={"w": jnp.ones(2)}, tx=optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"leaf 'w'.*task axis"):
        state.apply_jacobian({"w": jnp.ones((3, 2))})
    overwritten = {"params": {"w": jnp.ones(2)}, "_overwrite_with_gradient": {"scale": jnp.ones(1)}}
    state = JDTrainState.create(apply_fn=None, params=overwritten, tx=optax.sgd(0.1))
    with pytest.raises(ValueError, match="_overwrite_with_gradient"):
        state.apply_jacobian(jax.tree.map(lambda p: jnp.ones((2, *p.shape)), overwritten))


class Recurrent(nnx.Module):
    """A network of nnx with running statistics and a dropout stream of its own."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.trunk = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(dropout=1))
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(jnp.tanh(self.norm(self.trunk(x)))))


def test_dropout_of_nnx_moves_on_through_has_aux():
    model = Recurrent()
    optimizer = nnx.Optimizer(model, optax.chain(jaxjd.upgrad(), optax.adam(1e-2)), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)

        def losses_fn(params):
            copied = nnx.merge(graphdef, params, rest, copy=True)
            losses = errors(copied(X))
            return losses, nnx.split(copied, nnx.Param, ...)[2]

        engine = jaxjd.value_and_jacobian(losses_fn, has_aux=True, form="auto")
        (losses, rest), jacobian = engine(params)
        nnx.update(model, rest)
        optimizer.update(model, jacobian)
        return losses

    counts = [int(model.dropout.rngs.count.get_value())]
    for _ in range(2):
        step(model, optimizer)
        counts.append(int(model.dropout.rngs.count.get_value()))
    assert counts == [0, 1, 2]
    assert np.any(model.norm.mean.get_value() != 0)


# equinox and haiku


@pytest.mark.parametrize("name", slow_but({"gradvac"}, ["upgrad", "gradvac"]))
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
