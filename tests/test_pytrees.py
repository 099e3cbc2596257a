"""Jacobians of every container, dtype and sharding."""

import dataclasses
from typing import Any, NamedTuple

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
from jax.sharding import AxisType, NamedSharding

import jaxjd
from jaxjd import labels, weightings
from tests.registry import slow_but

M = 3
_upgrad = weightings.upgrad()
# One compilation for all containers: the weighting sees an (m, m) matrix whatever they are.
UPGRAD = jaxjd.Weighting(_upgrad.init, jax.jit(_upgrad.update))


# Containers


class Pair(NamedTuple):
    weight: Any
    inner: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Registered:
    weight: Any
    inner: Any
    name: str = dataclasses.field(default="static", metadata={"static": True})


@flax.struct.dataclass
class FlaxStruct:
    weight: Any
    inner: Any
    name: str = flax.struct.field(pytree_node=False, default="static")


@chex.dataclass
class ChexDataclass:
    weight: Any
    inner: Any


class NnxModel(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.encoder = nnx.Linear(3, 2, rngs=rngs)
        self.heads = nnx.List([nnx.Linear(2, 1, rngs=rngs) for _ in range(2)])


def haiku_params():
    def forward(x):
        return hk.nets.MLP([2, 1], name="mlp")(x)

    return hk.transform(forward).init(jax.random.key(0), jnp.ones((1, 3)))


def equinox_params():
    model = eqx.nn.MLP(3, 2, 2, depth=1, key=jax.random.key(0))
    return eqx.partition(model, eqx.is_inexact_array)[0]


def frozen_equinox_params():
    """Only the first layer is trained: None holes also where arrays were."""
    model = eqx.nn.MLP(3, 2, 2, depth=1, key=jax.random.key(0))
    trained = jax.tree.map(lambda _: False, model)
    where = lambda model: (model.layers[0].weight, model.layers[0].bias)
    return eqx.filter(model, eqx.tree_at(where, trained, (True, True)))


TENSOR, VECTOR, SCALAR = jnp.ones((2, 3)), jnp.ones(4), jnp.ones(())
CONTAINERS = {
    "dict": lambda: {"weight": TENSOR, "inner": {"bias": VECTOR, "scale": SCALAR}},
    "tuple": lambda: (TENSOR, (VECTOR, SCALAR)),
    "list": lambda: [TENSOR, [VECTOR, SCALAR]],
    "NamedTuple": lambda: Pair(TENSOR, Pair(VECTOR, SCALAR)),
    "dataclass": lambda: Registered(TENSOR, Registered(VECTOR, SCALAR)),
    "flax.struct": lambda: FlaxStruct(TENSOR, FlaxStruct(VECTOR, SCALAR)),
    "chex.dataclass": lambda: ChexDataclass(weight=TENSOR, inner=VECTOR),
    "FrozenDict": lambda: flax.core.freeze({"weight": TENSOR, "inner": {"bias": VECTOR}}),
    "nnx.State": lambda: nnx.state(NnxModel(), nnx.Param),
    "pure nnx.State": lambda: nnx.as_pure(nnx.state(NnxModel(), nnx.Param)),
    "linen": lambda: nn.Dense(2).init(jax.random.key(0), jnp.ones((1, 3))),
    "equinox": equinox_params,
    "equinox with frozen layers": frozen_equinox_params,
    "haiku": haiku_params,
    "None holes": lambda: {"weight": TENSOR, "frozen": None, "inner": [None, VECTOR]},
    "array": lambda: TENSOR,
    "scalar": lambda: SCALAR,
    "zero-size leaf": lambda: {"weight": TENSOR, "empty": jnp.ones((0, 3))},
}
# What is added up leaf by leaf is the same program for most containers: by default the numbers are
# compared in those that differ in kind, and in all of them when slow.
QUICK = {"None holes", "array", "dataclass", "dict", "nnx.State", "scalar", "zero-size leaf"}
containers = pytest.mark.parametrize("container", CONTAINERS)
mostly_slow = pytest.mark.parametrize("container", slow_but(QUICK, list(CONTAINERS)))


def random_jacobian(params, seed=0, dtype=jnp.float32, m=M):
    """From NumPy: nothing is compiled for it."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=(m, *leaf.shape)), dtype), params)


def flat(jacobian):
    """The (m, n) matrix of a Jacobian, in float64."""
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(jacobian)]
    return np.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in leaves], axis=1)


def flat_update(update):
    return np.concatenate(
        [np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(update)]
    )


def check_like(update, params):
    assert jax.tree.structure(update) == jax.tree.structure(params)
    assert jax.tree.map(jnp.shape, update) == jax.tree.map(jnp.shape, params)


@mostly_slow
def test_algebra_equals_the_flat_matrix(container):
    params = CONTAINERS[container]()
    jacobian, other = random_jacobian(params), random_jacobian(params, seed=1)
    rows, other_rows = flat(jacobian), flat(other)
    gramian = jaxjd.gramian(jacobian)
    assert (gramian.shape, gramian.dtype) == ((M, M), jnp.float32)
    np.testing.assert_allclose(gramian, rows @ rows.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        jaxjd.cross_gramian(jacobian, other), rows @ other_rows.T, rtol=1e-5, atol=1e-5
    )
    weights = jnp.array([1.0, -2.0, 0.5])
    update = jaxjd.combine(weights, jacobian)
    check_like(update, params)
    np.testing.assert_allclose(flat_update(update), weights @ rows, rtol=1e-5, atol=1e-5)
    plain = jaxjd.materialize(jacobian)
    assert jax.tree.structure(plain) == jax.tree.structure(jacobian)
    np.testing.assert_array_equal(flat(plain), rows)


@mostly_slow
def test_an_aggregator_equals_its_weights_on_the_flat_matrix(container):
    params = CONTAINERS[container]()
    jacobian = random_jacobian(params)
    aggregator = jaxjd.weighted(UPGRAD, num_tasks=M)
    update, state = aggregator.update(jacobian, aggregator.init(params), params)
    check_like(update, params)
    rows = flat(jacobian)
    weights, _ = UPGRAD.update(jnp.asarray(rows @ rows.T, jnp.float32), ())
    np.testing.assert_allclose(state.weights, weights, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(flat_update(update), weights @ rows, rtol=1e-3, atol=1e-4)
    assert np.min(rows @ flat_update(update)) > -1e-4  # UPGrad conflicts with no row.


@containers
@pytest.mark.filterwarnings("ignore:by_network puts all")  # Some are one network with parts.
@pytest.mark.parametrize("strategy", ["together", "by_network", "by_layer", "by_tensor"])
def test_labels_have_the_structure_of_the_parameters(container, strategy):
    params = CONTAINERS[container]()
    tree = getattr(labels, strategy)(params)
    assert jax.tree.structure(tree) == jax.tree.structure(params)
    found = jax.tree.leaves(tree)
    assert all(isinstance(label, str) and label for label in found)
    if strategy == "together":
        assert set(found) == {"all"}
    if strategy == "by_tensor":
        assert len(set(found)) == len(found)


@mostly_slow
def test_grouped_equals_every_leaf_on_its_own(container):
    params = CONTAINERS[container]()
    jacobian = random_jacobian(params)
    aggregator = jaxjd.grouped(weightings.mean(), labels.by_tensor, num_tasks=M)
    update, state = aggregator.update(jacobian, aggregator.init(params), params)
    check_like(update, params)
    assert state.weights.shape == (len(jax.tree.leaves(params)), M)
    np.testing.assert_allclose(flat_update(update), np.mean(flat(jacobian), axis=0), atol=1e-6)


@mostly_slow
def test_partition_cuts_and_restores_the_structure(container):
    params = CONTAINERS[container]()
    jacobian = random_jacobian(params)
    groups = sorted(set(jax.tree.leaves(labels.by_tensor(params))))
    factors = {label: float(i + 1) for i, label in enumerate(groups)}
    aggregator = jaxjd.partition(
        {label: optax.chain(jaxjd.mean(), optax.scale(factors[label])) for label in groups},
        labels.by_tensor,
    )
    update, _ = aggregator.update(jacobian, aggregator.init(params), params)
    check_like(update, params)
    expected = jax.tree.map(
        lambda leaf, label: factors[label] * jnp.mean(leaf, axis=0),
        jacobian,
        labels.by_tensor(params),
    )
    chex.assert_trees_all_close(update, expected, rtol=1e-5, atol=1e-6)


@containers
def test_updates_have_the_structure_of_the_parameters(container):
    """Nothing is compiled: structures, shapes and dtypes are known when an update is traced."""
    params = CONTAINERS[container]()
    jacobian = random_jacobian(params)
    aggregators = [
        jaxjd.weighted(UPGRAD, num_tasks=M),
        jaxjd.grouped(weightings.mean(), labels.by_tensor, num_tasks=M),
        jaxjd.partition(
            dict.fromkeys(jax.tree.leaves(labels.by_tensor(params)), jaxjd.mean()),
            labels.by_tensor,
        ),
    ]
    for aggregator in aggregators:
        state = aggregator.init(params)
        check_like(
            jax.eval_shape(lambda J, s, u=aggregator.update: u(J, s)[0], jacobian, state), params
        )


def test_a_jacobian_of_zero_size_leaves_only():
    jacobian = {"empty": jnp.ones((M, 0))}
    np.testing.assert_array_equal(jaxjd.gramian(jacobian), np.zeros((M, M)))
    assert jaxjd.combine(jnp.ones(M), jacobian)["empty"].shape == (0,)


# Dtypes


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_products_are_float32_or_better_and_updates_keep_the_dtype(dtype):
    with jax.enable_x64(dtype == "float64"):
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), CONTAINERS["dict"]())
        jacobian, other = random_jacobian(params, 0, dtype), random_jacobian(params, 1, dtype)
        wide = jnp.float64 if dtype == "float64" else jnp.float32
        rows, other_rows = flat(jacobian), flat(other)
        # Float32 products of the given numbers: nothing is lost before the sum.
        exact = 1e-12 if dtype == "float64" else 1e-5
        for found, expected in (
            (jaxjd.gramian(jacobian), rows @ rows.T),
            (jaxjd.cross_gramian(jacobian, other), rows @ other_rows.T),
        ):
            assert found.dtype == wide
            np.testing.assert_allclose(found, expected, rtol=exact, atol=exact)
        aggregator = jaxjd.weighted(UPGRAD, num_tasks=M)
        state = aggregator.init(params)
        assert state.weights.dtype == wide
        update, state = aggregator.update(jacobian, state, params)
        assert state.weights.dtype == wide
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(update)} == {dtype}
        expected = np.asarray(state.weights, np.float64) @ rows
        rounding = 4 * float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(flat_update(update), expected, rtol=rounding, atol=rounding)


def test_leaves_of_different_dtypes():
    with jax.enable_x64(True):
        dtypes = {"a": "float64", "b": "bfloat16", "c": "float32"}
        params = {name: jnp.zeros(4, dtype) for name, dtype in dtypes.items()}
        jacobian = {
            name: jnp.asarray(np.random.default_rng(i).normal(size=(M, 4)), dtype)
            for i, (name, dtype) in enumerate(dtypes.items())
        }
        rows = flat(jacobian)
        gramian = jaxjd.gramian(jacobian)
        assert gramian.dtype == jnp.float64
        # Each leaf is summed in its own precision (float32 for bfloat16), then all in float64.
        np.testing.assert_allclose(gramian, rows @ rows.T, rtol=1e-6)
        assert jaxjd.gramian({name: jacobian[name] for name in "bc"}).dtype == jnp.float32
        aggregator = jaxjd.weighted(UPGRAD)
        update, _ = aggregator.update(jacobian, aggregator.init(params), params)
        assert {name: str(leaf.dtype) for name, leaf in update.items()} == dtypes
        mixed = {name: leaf.astype("float32") for name, leaf in jacobian.items()}
        assert jaxjd.cross_gramian(jacobian, mixed).dtype == jnp.float64


def test_small_inner_products_survive_in_bfloat16():
    """The terms cancel to one in 1,000 of their size; a bfloat16 sum would lose the sign."""
    plus, minus = jnp.full((1, 1000), 1.0), jnp.full((1, 999), -1.0)
    row_1 = jnp.ones((1, 1999))
    jacobian = jnp.concatenate([row_1, jnp.concatenate([plus, minus], axis=1)]).astype("bfloat16")
    assert jaxjd.gramian(jacobian)[0, 1] == 1.0


# Sharding

SHARDED_SHAPES = {"kernel": (16, 8), "bias": (8,)}
LAYOUTS = {
    "columns": {"kernel": jax.P(None, "x"), "bias": jax.P("x")},
    "rows": {"kernel": jax.P("x", None), "bias": jax.P(None)},
    "both": {"kernel": jax.P("x", "y"), "bias": jax.P("y")},
    "one axis over both": {"kernel": jax.P(("x", "y"), None), "bias": jax.P(None)},
}


def put(tree, mesh, specs, *leading):
    return {
        name: jax.device_put(leaf, NamedSharding(mesh, jax.P(*leading, *specs[name])))
        for name, leaf in tree.items()
    }


@jax.jit
def algebra(jacobian, other, weights):
    return (
        jaxjd.gramian(jacobian),
        jaxjd.cross_gramian(jacobian, other),
        jaxjd.combine(weights, jacobian),
    )


SHARDED_PARAMS = {name: jnp.ones(shape) for name, shape in SHARDED_SHAPES.items()}
SHARDED_JACOBIAN = random_jacobian(SHARDED_PARAMS, 0, m=4)
OTHER_JACOBIAN = random_jacobian(SHARDED_PARAMS, 1, m=4)
SHARDED_WEIGHTS = jnp.array([1.0, -2.0, 0.5, 0.25])
mesh_kinds = pytest.mark.parametrize(
    "kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"]
)
# The same programs to compile, but for the types that only the explicit ones check.
mostly_explicit = pytest.mark.parametrize(
    "kind",
    [pytest.param(AxisType.Auto, marks=pytest.mark.slow), AxisType.Explicit],
    ids=["auto", "explicit"],
)


def mesh_of(kind):
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))


SPLITS = [*((layout, None) for layout in LAYOUTS), ("columns", "y"), ("rows", "y")]


@mesh_kinds
@pytest.mark.parametrize(
    ("layout", "task_axis"),
    [
        split if split == ("both", None) else pytest.param(*split, marks=pytest.mark.slow)
        for split in SPLITS
    ],
)
def test_algebra_equals_the_unsharded_one(kind, layout, task_axis):
    mesh, specs = mesh_of(kind), LAYOUTS[layout]
    expected = algebra(SHARDED_JACOBIAN, OTHER_JACOBIAN, SHARDED_WEIGHTS)
    found = algebra(
        put(SHARDED_JACOBIAN, mesh, specs, task_axis),
        put(OTHER_JACOBIAN, mesh, specs, task_axis),
        SHARDED_WEIGHTS,
    )
    chex.assert_trees_all_close(
        jax.tree.map(np.asarray, found),
        jax.tree.map(np.asarray, expected),
        rtol=1e-5,
        atol=1e-4,
    )
    for name, leaf in found[2].items():
        wanted = NamedSharding(mesh, specs[name])
        assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim)


@mostly_explicit
@pytest.mark.parametrize("layout", slow_but({"both"}, ["columns", "both"]))
def test_an_update_keeps_the_sharding_of_its_parameter(kind, layout):
    mesh, specs = mesh_of(kind), LAYOUTS[layout]
    aggregator = jaxjd.upgrad(num_tasks=4)
    update = jax.jit(aggregator.update)
    expected, expected_state = update(
        SHARDED_JACOBIAN, aggregator.init(SHARDED_PARAMS), SHARDED_PARAMS
    )
    with jax.set_mesh(mesh):
        params = put(SHARDED_PARAMS, mesh, specs)
        jacobian = put(SHARDED_JACOBIAN, mesh, specs, None)
        updates, state = update(jacobian, aggregator.init(params), params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(state.weights, expected_state.weights, rtol=1e-4, atol=1e-5)
    for name, leaf in updates.items():
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, specs[name]), leaf.ndim)
        np.testing.assert_allclose(leaf, expected[name], rtol=1e-4, atol=1e-5)
        assert params[name].sharding.is_equivalent_to(leaf.sharding, leaf.ndim)


ENTRYWISE = {
    "db_mtl": jaxjd.db_mtl,
    "graddrop": jaxjd.graddrop,
    "moco": jaxjd.moco,
    "momentum_conflict_free": jaxjd.momentum_conflict_free,
    "momentum_conflict_free(task)": jaxjd.momentum_conflict_free,
    "trimmed_mean": lambda num_tasks: jaxjd.trimmed_mean(1, num_tasks=num_tasks),
}
"""What reads or keeps every entry of a Jacobian, not only the Gramian."""


@mostly_explicit
@pytest.mark.parametrize("name", slow_but({"graddrop", "moco"}, list(ENTRYWISE)))
def test_methods_on_entries_equal_the_unsharded_ones(name, kind):
    mesh, specs = mesh_of(kind), LAYOUTS["both"]
    aggregator = ENTRYWISE[name](num_tasks=4)

    @jax.jit
    def train(params, jacobian):
        state = aggregator.init(params)
        for i in range(4):
            extra, updates = {"losses": jnp.arange(1.0, 5.0)}, jacobian
            if "task" in name:
                extra["task"], updates = i, jax.tree.map(lambda leaf, i=i: leaf[i], jacobian)
            updates, state = aggregator.update(updates, state, params, **extra)
        return updates, state

    expected, _ = train(SHARDED_PARAMS, SHARDED_JACOBIAN)
    with jax.set_mesh(mesh):
        params = put(SHARDED_PARAMS, mesh, specs)
        updates, _ = train(params, put(SHARDED_JACOBIAN, mesh, specs, None))
    for key, leaf in updates.items():
        np.testing.assert_allclose(leaf, expected[key], rtol=1e-4, atol=1e-5)
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, specs[key]), leaf.ndim)


@pytest.mark.slow
@mostly_explicit
def test_a_training_step_from_the_losses_on(kind):
    mesh, specs = mesh_of(kind), LAYOUTS["columns"]
    aggregator = optax.chain(
        jaxjd.grouped(weightings.mgda(), labels.by_tensor, num_tasks=2), optax.adam(1e-2)
    )

    def losses(params):
        kernel, bias = params["kernel"], params["bias"]
        return jnp.stack([jnp.sum(kernel**2) + jnp.sum(bias), jnp.sum((kernel - 2.0) ** 2)])

    @jax.jit
    def step(params, state):
        values, jacobian = jaxjd.value_and_jacobian(losses)(params)
        updates, state = aggregator.update(jacobian, state, params)
        return optax.apply_updates(params, updates), state, values

    def train(params):
        state = aggregator.init(params)
        for _ in range(2):
            params, state, values = step(params, state)
        return params, values

    expected, expected_values = train(SHARDED_PARAMS)
    with jax.set_mesh(mesh):
        params, values = train(put(SHARDED_PARAMS, mesh, specs))
    np.testing.assert_allclose(values, expected_values, rtol=1e-5)
    for name, leaf in params.items():
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, specs[name]), leaf.ndim)
        np.testing.assert_allclose(leaf, expected[name], rtol=1e-4, atol=1e-5)
