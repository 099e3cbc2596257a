"""Label trees on the parameters of every library, and aggregation group by group."""

import dataclasses

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

import jaxjd
from jaxjd import labels, weightings


def compiled_once(weighting):
    """The same weighting with a jitted update: the tests have one compilation in common."""
    return type(weighting)(weighting.init, jax.jit(weighting.update))


UPGRAD = compiled_once(weightings.upgrad())
GRADVAC = compiled_once(weightings.gradvac())
MODO = compiled_once(weightings.modo())
EXCESS_MTL = compiled_once(weightings.excess_mtl())


# Labels on the parameters of every library: path of the parameter -> its three labels.


class LinenModel(nn.Module):
    def setup(self):
        self.encoder = nn.Sequential([nn.Dense(2), nn.Dense(2)])
        self.decoder = nn.Dense(1)

    def __call__(self, x):
        return self.decoder(self.encoder(x))


class NnxModel(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.encoder = nnx.List([nnx.Linear(3, 2, rngs=rngs), nnx.Linear(2, 2, rngs=rngs)])
        self.decoder = nnx.Linear(2, 1, rngs=rngs)


class EquinoxModel(eqx.Module):
    encoder: list
    decoder: eqx.nn.Linear

    def __init__(self):
        keys = jax.random.split(jax.random.key(0), 3)
        self.encoder = [eqx.nn.Linear(3, 2, key=keys[0]), eqx.nn.Linear(2, 2, key=keys[1])]
        self.decoder = eqx.nn.Linear(2, 1, key=keys[2])

    def __call__(self, x):
        for layer in self.encoder:
            x = layer(x)
        return self.decoder(x)


def linen_params():
    return LinenModel().init(jax.random.key(0), jnp.ones((1, 3)))


def haiku_params():
    class Encoder(hk.Module):
        def __call__(self, x):
            return hk.Linear(2)(hk.Linear(2)(x))

    def forward(x):
        return hk.Linear(1, name="decoder")(Encoder(name="encoder")(x))

    return hk.transform(forward).init(jax.random.key(0), jnp.ones((1, 3)))


def boxed_linen_params():
    init = nn.with_partitioning(nn.initializers.ones_init(), (None, None))
    return nn.Dense(2, kernel_init=init).init(jax.random.key(0), jnp.ones((1, 3)))


def sets_of_leaves(tree):
    """Which leaves, by their places in tree order, share a label."""
    groups = {}
    for place, label in enumerate(jax.tree.leaves(tree)):
        groups.setdefault(label, []).append(place)
    return groups


LIBRARIES = {
    # The collection that holds everything is left out.
    "linen": (
        linen_params,
        {"decoder": [0, 1], "encoder": [2, 3, 4, 5]},
        {"decoder": [0, 1], "encoder/layers_0": [2, 3], "encoder/layers_1": [4, 5]},
    ),
    "nnx": (
        lambda: nnx.state(NnxModel(), nnx.Param),
        {"decoder": [0, 1], "encoder": [2, 3, 4, 5]},
        {"decoder": [0, 1], "encoder/0": [2, 3], "encoder/1": [4, 5]},
    ),
    "equinox": (
        lambda: eqx.filter(EquinoxModel(), eqx.is_inexact_array),
        {"encoder": [0, 1, 2, 3], "decoder": [4, 5]},
        {"encoder/0": [0, 1], "encoder/1": [2, 3], "decoder": [4, 5]},
    ),
    # The names of haiku's modules are paths already; they are quoted, since they hold slashes.
    "haiku": (
        haiku_params,
        {"decoder": [0, 1], "encoder": [2, 3, 4, 5]},
        {"decoder": [0, 1], "'encoder/linear'": [2, 3], "'encoder/linear_1'": [4, 5]},
    ),
}
libraries = pytest.mark.parametrize("library", LIBRARIES)


@libraries
def test_the_four_strategies(library):
    make, networks, layers = LIBRARIES[library]
    params = make()
    assert sets_of_leaves(labels.together(params)) == {"all": [0, 1, 2, 3, 4, 5]}
    assert sets_of_leaves(labels.by_network(params)) == networks
    assert sets_of_leaves(labels.by_layer(params)) == layers
    tensors = sets_of_leaves(labels.by_tensor(params))
    assert list(tensors.values()) == [[place] for place in range(6)]
    for layer, places in layers.items():
        assert all(list(tensors)[place].startswith(f"{layer}/") for place in places)


@libraries
def test_groups_are_the_same_at_init_and_update(library):
    """One weight per layer, so that every leaf tells which group it was in."""
    params = LIBRARIES[library][0]()
    names = sorted(LIBRARIES[library][2])
    parts = {name: jaxjd.constant([1.0 + n, 0.0], num_tasks=2) for n, name in enumerate(names)}
    tx = optax.chain(jaxjd.partition(parts, labels.by_layer), optax.scale(-1.0))
    J = jax.tree.map(lambda leaf: jnp.ones((2, *leaf.shape)), params)
    state = tx.init(params)
    assert sorted(state[0].inner_states) == names
    for like in (params, None):
        updates, after = tx.update(J, state, like)
        assert jax.tree.structure(after) == jax.tree.structure(state)
        leaves = jax.tree.leaves(updates)
        for n, name in enumerate(names):
            for place in LIBRARIES[library][2][name]:
                np.testing.assert_array_equal(leaves[place], np.full(leaves[place].shape, -1.0 - n))


@libraries
def test_by_rules(library):
    params = LIBRARIES[library][0]()
    tree = labels.by_rules([("^decoder", "head")], default="trunk")(params)
    expected = {"head": LIBRARIES[library][1]["decoder"], "trunk": LIBRARIES[library][1]["encoder"]}
    assert sets_of_leaves(tree) == expected
    # The first rule that matches counts; the empty one takes what is left.
    rules = [(r"decoder.*/b(ias)?$", "bias"), ("^decoder", "head"), ("", "trunk")]
    assert set(jax.tree.leaves(labels.by_rules(rules)(params))) == {"bias", "head", "trunk"}


def test_labels_of_parameters_in_boxes():
    params = boxed_linen_params()
    assert jax.tree.leaves(labels.by_tensor(params)) == ["bias", "kernel"]
    assert jax.tree.leaves(labels.by_tensor(nn.unbox(params))) == ["bias", "kernel"]


@pytest.mark.parametrize("collection", [True, False])
def test_a_collection_is_left_out_only_if_it_holds_everything(collection):
    params = {"params": {"dense": {"kernel": 0.0}}}
    if not collection:
        params["other"] = {"scale": 0.0}
    found = jax.tree.leaves(labels.by_network(params))
    assert found == (["dense"] if collection else ["other", "params"])


def test_names_with_slashes_never_share_a_label():
    params = {"a/b": {"c": {"w": 0.0}}, "a": {"b/c": {"w": 0.0}, "b": {"c": {"w": 0.0}}}}
    for strategy in (labels.by_layer, labels.by_tensor):
        assert len(set(jax.tree.leaves(strategy(params)))) == 3


def test_a_field_called_value_is_a_field_like_others():
    """The name that nnx gives to the content of its variables may also be somebody's own."""

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Affine:
        scale: jax.Array
        value: jax.Array

    params = {"one": Affine(0.0, 0.0), "two": Affine(0.0, 0.0)}
    assert sets_of_leaves(labels.by_layer(params)) == {"one": [0, 1], "two": [2, 3]}


def test_labels_of_a_bare_array():
    for strategy in (labels.by_network, labels.by_layer, labels.by_tensor):
        assert strategy(jnp.zeros(3)) == "root"
    assert labels.by_rules([("", "everything")])(jnp.zeros(3)) == "everything"


# Jacobians of random numbers, from NumPy: nothing is compiled for them.

M = 3
PARAMS = {
    "encoder": [{"w": jnp.zeros((2, 2)), "b": jnp.zeros(2)}, {"w": jnp.zeros((2, 3))}],
    "decoder": {"w": jnp.zeros(4)},
}


def random_jacobian(params, seed=0, m=M):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=(m, *leaf.shape)), jnp.float32), params
    )


JACOBIANS = [random_jacobian(PARAMS, seed) for seed in range(3)]
# Leaves in tree order: decoder/w, encoder/0/b, encoder/0/w, encoder/1/w.
BY_LAYER = {"decoder": [0], "encoder/0": [1, 2], "encoder/1": [3]}


def rows_of(jacobian, places):
    leaves = jax.tree.leaves(jacobian)
    return [leaves[place] for place in places]


def by_hand(jacobian, groups, weigh):
    """Combines every group with its own weights, ``weigh(group, rows)``."""
    leaves, treedef = jax.tree.flatten(jacobian)
    updates = [None] * len(leaves)
    for group, places in groups.items():
        weights = weigh(group, [leaves[place] for place in places])
        for place in places:
            updates[place] = jaxjd.combine(weights, leaves[place])
    return jax.tree.unflatten(treedef, updates)


def weigh_with(weighting, states):
    """Weighs a group's Gramian with the group's own state, which it moves on."""

    def weigh(group, rows):
        weights, states[group] = weighting.update(jaxjd.gramian(rows), states[group])
        return weights

    return weigh


# Ways to give labels

LABEL_TREES = {
    "function": labels.by_layer,
    "tree": {
        "encoder": [{"w": "encoder/0", "b": "encoder/0"}, {"w": "encoder/1"}],
        "decoder": {"w": "decoder"},
    },
    "prefix": {"encoder": ["encoder/0", "encoder/1"], "decoder": "decoder"},
    "partly a prefix": {
        "encoder": [{"w": "encoder/0", "b": "encoder/0"}, "encoder/1"],
        "decoder": "decoder",
    },
    "function that returns a prefix": lambda params: {
        name: [f"{name}/{i}" for i in range(len(part))] if isinstance(part, list) else name
        for name, part in params.items()
    },
    "tuple for a list": {"encoder": ("encoder/0", "encoder/1"), "decoder": "decoder"},
}


@pytest.mark.parametrize("kind", LABEL_TREES)
@pytest.mark.parametrize("with_params", [True, False])
def test_ways_to_give_labels(kind, with_params):
    trees = LABEL_TREES[kind]
    aggregators = {
        "encoder/0": jaxjd.sum(),
        "encoder/1": jaxjd.mean(),
        "decoder": jaxjd.constant([1.0, 2.0, 3.0]),
    }
    weights = {"encoder/0": jnp.ones(M), "encoder/1": jnp.full(M, 1 / 3)}
    weights["decoder"] = jnp.array([1.0, 2.0, 3.0])
    aggregator = jaxjd.partition(aggregators, trees)
    params = PARAMS if with_params else None
    update, _ = aggregator.update(JACOBIANS[0], aggregator.init(PARAMS), params)
    expected = by_hand(JACOBIANS[0], BY_LAYER, lambda group, rows: weights[group])
    chex.assert_trees_all_close(update, expected, rtol=1e-6)

    grouped = jaxjd.grouped(weightings.mean(), trees, num_tasks=M)
    update, state = grouped.update(JACOBIANS[0], grouped.init(PARAMS), params)
    assert state.weights.shape == (3, M)
    chex.assert_trees_all_close(
        update, jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), JACOBIANS[0]), atol=1e-6
    )


def test_a_single_label_is_for_all():
    aggregator = jaxjd.partition({"all": jaxjd.sum()}, "all")
    update, state = aggregator.update(JACOBIANS[0], aggregator.init(PARAMS), PARAMS)
    assert list(state.inner_states) == ["all"]
    expected = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), JACOBIANS[0])
    chex.assert_trees_all_close(update, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["FrozenDict", "nnx.State", "pure nnx.State"])
def test_plain_dicts_label_other_mappings(kind):
    names = {"encoder": "trunk", "decoder": {"kernel": "head", "bias": "head"}}
    if kind == "FrozenDict":
        params = flax.core.freeze(
            {
                "encoder": {"w": jnp.zeros(2)},
                "decoder": {"kernel": jnp.zeros(3), "bias": jnp.zeros(1)},
            }
        )
    else:
        params = nnx.state(NnxModel(), nnx.Param)
        params = nnx.as_pure(params) if kind == "pure nnx.State" else params
    aggregator = jaxjd.partition({"trunk": jaxjd.mean(), "head": jaxjd.sum()}, names)
    jacobian = random_jacobian(params)
    update, _ = aggregator.update(jacobian, aggregator.init(params), params)
    assert jax.tree.structure(update) == jax.tree.structure(params)
    encoder, decoder = jacobian["encoder"], jacobian["decoder"]
    chex.assert_trees_all_close(
        update["decoder"], jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), decoder), atol=1e-5
    )
    chex.assert_trees_all_close(
        update["encoder"], jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), encoder), atol=1e-5
    )


def test_a_module_that_can_be_called_is_a_label_tree():
    params = eqx.filter(EquinoxModel(), eqx.is_inexact_array)
    tree = labels.by_network(params)
    assert callable(tree)
    aggregator = jaxjd.partition({"encoder": jaxjd.mean(), "decoder": jaxjd.sum()}, tree)
    jacobian = random_jacobian(params)
    update, _ = aggregator.update(jacobian, aggregator.init(params), params)
    assert isinstance(update, EquinoxModel)
    np.testing.assert_allclose(
        update.decoder.bias, jnp.sum(jacobian.decoder.bias, axis=0), rtol=1e-5, atol=1e-6
    )


def test_labels_are_of_the_parameters_not_of_the_jacobian():
    """A function of the shapes sees the same parameters in `init` and in `update`."""
    seen = []

    def by_rank(params):
        seen.append(jax.tree.map(jnp.ndim, params))
        return jax.tree.map(lambda p: "matrices" if p.ndim == 2 else "vectors", params)

    aggregator = jaxjd.partition({"matrices": jaxjd.mean(), "vectors": jaxjd.sum()}, by_rank)
    state = aggregator.init(PARAMS)
    aggregator.update(JACOBIANS[0], state, PARAMS)
    aggregator.update(JACOBIANS[0], state)
    assert seen == [jax.tree.map(jnp.ndim, PARAMS)] * 3


# partition


def test_partition_with_one_aggregator_per_group():
    """Stateless, stateful, a Jacobian weighting and a chain, each with its own state."""
    smoothed = weightings.cr_mogm(UPGRAD, 0.5)
    aggregators = {
        "encoder/0": jaxjd.weighted(smoothed, num_tasks=M),
        "encoder/1": optax.chain(jaxjd.weighted(GRADVAC, num_tasks=M), optax.scale(2.0)),
        "decoder": jaxjd.weighted(EXCESS_MTL, num_tasks=M),
    }
    tx = optax.chain(jaxjd.partition(aggregators, labels.by_layer), optax.sgd(0.1))
    state = tx.init(PARAMS)
    smoothed_states = {"encoder/0": smoothed.init(M)}
    gradvac_states = {"encoder/1": GRADVAC.init(M)}
    excess_state = EXCESS_MTL.init(M, [PARAMS["decoder"]["w"]])
    for jacobian in JACOBIANS:
        updates, state = tx.update(jacobian, state, PARAMS)
        excess, excess_state = EXCESS_MTL.update(rows_of(jacobian, [0]), excess_state)
        weights = {
            "encoder/0": lambda rows: weigh_with(smoothed, smoothed_states)("encoder/0", rows),
            "encoder/1": lambda rows: 2 * weigh_with(GRADVAC, gradvac_states)("encoder/1", rows),
            "decoder": lambda rows, excess=excess: excess,
        }
        expected = by_hand(jacobian, BY_LAYER, lambda group, rows, w=weights: w[group](rows))
        expected = jax.tree.map(lambda leaf: -0.1 * leaf, expected)
        chex.assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-6)

    inner = state[0].inner_states
    assert set(inner) == set(BY_LAYER)
    assert inner["encoder/0"].weighting.count == 3
    # A group's state has its own parameters only.
    (squares,) = jax.tree.leaves(inner["decoder"].weighting.squares)
    assert squares.shape == (M, 4)
    np.testing.assert_allclose(squares, sum(j["decoder"]["w"] ** 2 for j in JACOBIANS), rtol=1e-5)
    chex.assert_trees_all_close(inner["decoder"].weighting.log_weights, excess_state.log_weights)
    targets = inner["encoder/1"][0].weighting.target
    np.testing.assert_allclose(targets, gradvac_states["encoder/1"].target, rtol=1e-5)


def test_partition_under_jit_and_scan():
    aggregator = jaxjd.partition(
        {
            "trunk": jaxjd.weighted(weightings.cr_mogm(GRADVAC), num_tasks=M),
            "head": jaxjd.random(key=3),
        },
        {"encoder": "trunk", "decoder": "head"},
    )
    tx = optax.chain(aggregator, optax.adam(1e-2))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *JACOBIANS)

    def step(carry, jacobian):
        params, state = carry
        updates, state = tx.update(jacobian, state, params)
        return (optax.apply_updates(params, updates), state), updates

    carry = (PARAMS, tx.init(PARAMS))
    (params, state), updates = jax.jit(lambda c: jax.lax.scan(step, c, stacked))(carry)
    jitted = jax.jit(step)
    for i, jacobian in enumerate(JACOBIANS):
        carry, expected = jitted(carry, jacobian)
        found = jax.tree.map(lambda leaf, i=i: leaf[i], updates)
        chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(params, carry[0], rtol=1e-5, atol=1e-6)
    assert jax.tree.structure(state) == jax.tree.structure(carry[1])


def test_partition_cuts_the_cross_jacobians_per_group():
    first, second, third = JACOBIANS
    aggregator = jaxjd.partition(
        {"trunk": jaxjd.weighted(MODO, num_tasks=M), "head": jaxjd.sum()},
        {"encoder": "trunk", "decoder": "head"},
    )
    state = aggregator.init(PARAMS)
    updates, state = aggregator.update(third, state, PARAMS, cross_jacobians=(first, second))
    trunk = [1, 2, 3]
    A = jaxjd.cross_gramian(rows_of(first, trunk), rows_of(second, trunk))
    weights, _ = MODO.update(A, MODO.init(M))
    given = {"trunk": weights, "head": jnp.ones(M)}
    groups = {"head": [0], "trunk": trunk}
    expected = by_hand(third, groups, lambda group, rows: given[group])
    chex.assert_trees_all_close(updates, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(state.inner_states["trunk"].weights, weights, rtol=1e-5)


def test_partition_passes_other_extra_arguments_on():
    seen = {}

    def spy(name):
        def update(updates, state, params=None, **extra_args):
            seen[name] = extra_args
            return jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), updates), state

        return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)

    aggregator = jaxjd.partition(
        {"trunk": spy("trunk"), "head": spy("head")},
        {"encoder": "trunk", "decoder": "head"},
        cut_args=("noise",),
    )
    losses, noise = jnp.ones(M), random_jacobian(PARAMS, 7)
    aggregator.update(
        JACOBIANS[0], aggregator.init(PARAMS), PARAMS, losses=losses, noise=noise, value=1.0
    )
    for name, places in (("trunk", [1, 2, 3]), ("head", [0])):
        assert seen[name]["losses"] is losses
        assert seen[name]["value"] == 1.0
        chex.assert_trees_all_equal(jax.tree.leaves(seen[name]["noise"]), rows_of(noise, places))


def test_partition_lets_heads_with_plain_gradients_through():
    gradients = {"encoder": JACOBIANS[0]["encoder"], "decoder": {"w": jnp.arange(4.0)}}
    aggregator = jaxjd.partition(
        {"trunk": jaxjd.mean(), "head": optax.identity()}, {"encoder": "trunk", "decoder": "head"}
    )
    updates, _ = aggregator.update(gradients, aggregator.init(PARAMS), PARAMS)
    np.testing.assert_array_equal(updates["decoder"]["w"], np.arange(4.0))
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, PARAMS)


def test_partitions_nest():
    inner = jaxjd.partition(
        {"first": jaxjd.sum(), "second": jaxjd.constant([3.0, 0.0, 0.0])},
        labels.by_rules([("^encoder/0", "first"), ("^encoder/1", "second")]),
    )
    outer = jaxjd.partition(
        {"trunk": inner, "head": jaxjd.mean()}, {"encoder": "trunk", "decoder": "head"}
    )
    updates, _ = outer.update(JACOBIANS[0], outer.init(PARAMS), PARAMS)
    given = {"decoder": jnp.full(M, 1 / 3), "encoder/0": jnp.ones(M)}
    given["encoder/1"] = jnp.array([3.0, 0.0, 0.0])
    expected = by_hand(JACOBIANS[0], BY_LAYER, lambda group, rows: given[group])
    chex.assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-6)


# grouped


@pytest.mark.parametrize("num_tasks", [M, None])
def test_grouped_equals_every_group_by_hand(num_tasks):
    aggregator = jaxjd.grouped(UPGRAD, labels.by_layer, num_tasks=num_tasks)
    updates, state = aggregator.update(JACOBIANS[0], aggregator.init(PARAMS), PARAMS)
    found = {}

    def weigh(group, rows):
        found[group], _ = UPGRAD.update(jaxjd.gramian(rows), ())
        return found[group]

    expected = by_hand(JACOBIANS[0], BY_LAYER, weigh)
    chex.assert_trees_all_close(updates, expected, rtol=1e-4, atol=1e-5)
    if num_tasks is None:
        assert state == jaxjd.GroupedState((), ())
    else:
        # Groups are in the sorted order of their labels.
        weights = jnp.stack([found[group] for group in sorted(BY_LAYER)])
        np.testing.assert_allclose(state.weights, weights, rtol=1e-4, atol=1e-5)


def test_grouped_keeps_a_state_per_group():
    smoothed = weightings.cr_mogm(UPGRAD, 0.5)
    aggregator = jaxjd.grouped(smoothed, labels.by_layer, num_tasks=M)
    state = aggregator.init(PARAMS)
    assert state.weights.shape == (3, M)
    assert state.weighting.count.shape == (3,)
    assert state.weighting.weights.shape == (3, M)
    states = {group: smoothed.init(M) for group in BY_LAYER}
    for jacobian in JACOBIANS:
        updates, state = aggregator.update(jacobian, state, PARAMS)
        expected = by_hand(jacobian, BY_LAYER, weigh_with(smoothed, states))
        chex.assert_trees_all_close(updates, expected, rtol=1e-4, atol=1e-5)
    for number, group in enumerate(sorted(BY_LAYER)):
        np.testing.assert_allclose(
            state.weighting.weights[number], states[group].weights, rtol=1e-4, atol=1e-5
        )


def test_grouped_with_cross_gramians():
    aggregator = jaxjd.grouped(MODO, labels.by_layer, num_tasks=M)
    first, second, third = JACOBIANS
    state = aggregator.init(PARAMS)
    assert state.weighting.weights.shape == (3, M)
    updates, state = aggregator.update(third, state, PARAMS, cross_jacobians=(first, second))

    def weigh(group, rows):
        pair = (rows_of(jacobian, BY_LAYER[group]) for jacobian in (first, second))
        return MODO.update(jaxjd.cross_gramian(*pair), MODO.init(M))[0]

    chex.assert_trees_all_close(updates, by_hand(third, BY_LAYER, weigh), rtol=1e-4, atol=1e-5)


def test_grouped_draws_independently_for_every_group():
    aggregator = jaxjd.grouped(weightings.random(key=0), labels.by_layer, num_tasks=M)
    state = aggregator.init(PARAMS)
    assert state.weighting.key.shape == (3,)
    update = jax.jit(aggregator.update)
    _, once = update(JACOBIANS[0], state, PARAMS)
    _, twice = update(JACOBIANS[0], once, PARAMS)
    draws = np.concatenate([once.weights, twice.weights])
    assert len(np.unique(np.round(draws, 5), axis=0)) == 6
    _, again = update(JACOBIANS[0], aggregator.init(PARAMS), PARAMS)
    np.testing.assert_array_equal(again.weights, once.weights)


def test_grouped_with_one_group_is_the_plain_aggregator():
    one = jaxjd.grouped(UPGRAD, labels.together, num_tasks=M)
    plain = jaxjd.weighted(UPGRAD, num_tasks=M)
    found, state = one.update(JACOBIANS[0], one.init(PARAMS), PARAMS)
    expected, plain_state = plain.update(JACOBIANS[0], plain.init(PARAMS), PARAMS)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.weights[0], plain_state.weights, rtol=1e-5)


# The same groups when optax initializes and when it updates


@pytest.mark.parametrize("strategy", ["by_network", "by_layer", "by_tensor"])
@pytest.mark.parametrize("grouping", ["partition", "grouped"])
def test_nnx_optimizer_sees_the_same_groups_at_init_and_update(grouping, strategy):
    """nnx.Optimizer initializes with paths that end in `value` and updates without."""
    model = NnxModel()
    params = nnx.state(model, nnx.Param)
    seen = []

    def spy(params):
        tree = getattr(labels, strategy)(params)
        seen.append(jax.tree.leaves(tree))
        return tree

    groups = sorted(set(jax.tree.leaves(spy(params))))
    if grouping == "grouped":
        aggregator = jaxjd.grouped(weightings.mean(), spy, num_tasks=M)
    else:
        aggregator = jaxjd.partition({group: jaxjd.mean(num_tasks=M) for group in groups}, spy)
    optimizer = nnx.Optimizer(model, optax.chain(aggregator, optax.sgd(1.0)), wrt=nnx.Param)
    jacobian = random_jacobian(params)
    expected = jax.tree.map(lambda p, j: p - jnp.mean(j, axis=0), params, jacobian)
    optimizer.update(model, jacobian)
    assert len(seen) == 3
    assert seen[0] == seen[1] == seen[2]
    chex.assert_trees_all_close(
        jax.tree.leaves(nnx.state(model, nnx.Param)), jax.tree.leaves(expected), atol=1e-6
    )
