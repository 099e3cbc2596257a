"""Label functions give a subtree the same groups alone and inside of a partition."""

import warnings

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import jaxjd
from jaxjd import labels

TRUNK = {"first": {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}, "second": {"w": jnp.ones((3, 2))}}
HEADS = [{"w": jnp.ones(2)}, {"w": jnp.ones(2)}]
STRATEGIES = [labels.by_network, labels.by_layer, labels.by_tensor]


def hide(tree):
    return jax.tree.map(lambda _: optax.MaskedNode(), tree)


def groups(tree):
    """Which leaves are together."""
    names = jax.tree.leaves(tree)
    return [names.index(name) for name in names]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda tree: {"trunk": tree, "heads": hide(HEADS)},
        lambda tree: {"params": {"trunk": tree, "heads": hide(HEADS)}},
        lambda tree: {"model": {"parts": {"trunk": tree, "neck": hide(TRUNK)}}, "x": hide(HEADS)},
        lambda tree: {"params": tree, "batch_stats": hide(HEADS)},
        lambda tree: [hide(HEADS), tree],
        lambda tree: nnx.State({"trunk": tree, "heads": hide({"w": jnp.ones(2)})}),
    ],
    ids=["dict", "collection", "whole collection", "deeper", "list", "nnx"],
)
def test_a_subtree_has_the_groups_that_it_has_alone(strategy, wrap):
    assert groups(strategy(wrap(TRUNK))) == groups(strategy(TRUNK))


def test_groups_inside_of_partitions():
    networks = jaxjd.grouped(jaxjd.weightings.upgrad(), labels.by_network, num_tasks=2)
    params = {"model": {"trunk": TRUNK, "heads": HEADS}, "scale": jnp.ones(1)}
    inner = jaxjd.partition(
        {"trunk": networks, "heads": jaxjd.mean()},
        lambda params: {"model": {"trunk": "trunk", "heads": "heads"}, "scale": optax.MaskedNode()},
    )
    tx = jaxjd.partition(
        {"model": inner, "scale": jaxjd.sum()}, {"model": "model", "scale": "scale"}
    )
    state = tx.init(params)
    weights = state.inner_states["model"].inner_states["trunk"].weights
    assert weights.shape == (2, 2)  # Two networks, two tasks.
    key = jax.random.key(0)
    jacobian = jax.tree.map(lambda leaf: jax.random.normal(key, (2, *leaf.shape)), params)
    _, state = tx.update(jacobian, state, params)
    alone = networks.update(jacobian["model"]["trunk"], networks.init(TRUNK), TRUNK)[1].weights
    found = state.inner_states["model"].inner_states["trunk"].weights
    assert jnp.array_equal(found, alone)


def test_one_network_with_parts_is_said_to_be_one():
    with pytest.warns(UserWarning, match="one group, 'model'.*model/first.*together"):
        labels.by_network({"model": TRUNK})
    with pytest.warns(UserWarning, match="one group, 'model'"):
        labels.by_network({"params": {"model": TRUNK}})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        labels.by_network({"layer": {"w": jnp.ones(2), "b": jnp.ones(2)}})
        labels.by_network(TRUNK)
