"""Every method with a memory, for 10,000 steps: finite, one type, one program, and resumable."""

from __future__ import annotations

import pickle
import zlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import jaxjd
from tests.registry import AGGREGATORS, M, Method, by_name, example_params

STEPS = 10_000
SCALES = jnp.array([1.0, 0.1, 3.0])
CENTERS = 2 * jax.random.normal(jax.random.key(5), (M, 13))


def losses_of(params, key):
    """Three noisy quadratics around different centers: there is no step that helps all for long."""
    leaves = jax.tree.leaves(params)
    flat = jnp.concatenate([leaf.ravel() for leaf in leaves])
    noise = jax.random.normal(key, CENTERS.shape)
    return SCALES * jnp.mean(jnp.square(flat[None] - CENTERS - 0.1 * noise), axis=1)


def remembers(method: Method) -> bool:
    """Whether a method's state holds anything but its last weights."""
    state = jax.eval_shape(method.aggregator(M).init, example_params())
    if isinstance(state, (jaxjd.AggregatorState, jaxjd.GroupedState)):
        state = state.weighting
    return bool(jax.tree.leaves(state))


STATEFUL = [method for method in AGGREGATORS if remembers(method)]


def test_the_methods_with_a_memory_are_these():
    names = {method.name for method in STATEFUL}
    assert {method.name for method in AGGREGATORS if method.random} <= names
    assert {"excess_mtl", "gradvac", "momentum_conflict_free", "grouped(modo)"} <= names
    assert "upgrad" not in names
    assert len(names) > 20


def make_step(method: Method):
    tx = optax.chain(method.aggregator(M), optax.sgd(0.02))

    def step(carry, number):
        params, state = carry
        key, other = jax.random.split(jax.random.key(number))
        losses = losses_of(params, key)
        jacobian = jax.jacrev(losses_of)(params, key)
        extra = {"losses": losses} if method.losses else {}
        if method.stat == "cross":
            extra["cross_jacobians"] = (jacobian, jax.jacrev(losses_of)(params, other))
        updates, state = tx.update(jacobian, state, params, **extra)
        return (optax.apply_updates(params, updates), state), losses

    return tx, step


def types_of(tree):
    return jax.tree.map(lambda x: (x.shape, str(x.dtype), getattr(x, "weak_type", False)), tree)


def to_bytes(tree) -> bytes:
    """What a checkpoint keeps: NumPy arrays, and the data of typed keys."""
    return pickle.dumps([np.asarray(leaf) for leaf in jax.tree.leaves(raw(tree))])


def raw(tree):
    return jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, tree)


def is_key(x):
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def from_bytes(data: bytes, template):
    leaves, treedef = jax.tree.flatten(template)
    restored = [
        jax.random.wrap_key_data(jnp.asarray(value)) if is_key(like) else jnp.asarray(value)
        for like, value in zip(leaves, pickle.loads(data), strict=True)
    ]
    return jax.tree.unflatten(treedef, restored)


@pytest.mark.slow
@pytest.mark.parametrize("method", STATEFUL, ids=by_name)
def test_ten_thousand_steps_and_a_restart(method):
    tx, step = make_step(method)
    traces = []

    @jax.jit
    def run(carry, first, last):
        """The steps from `first` up to `last`; the others of the scan leave everything as it is."""
        traces.append(None)

        def visit(carry, number):
            due = (first <= number) & (number < last)
            return lax.cond(
                due, step, lambda carry, _: (carry, jnp.full(M, jnp.nan)), carry, number
            )

        return lax.scan(visit, carry, jnp.arange(STEPS))

    def start():
        params = example_params()
        return params, tx.init(params)

    whole, losses = run(start(), 0, STEPS)
    assert types_of(whole) == types_of(start())
    chex.assert_tree_all_finite(raw((whole, losses)))
    assert losses[-100:].sum() < losses[:100].sum()

    kill = int(np.random.default_rng(zlib.crc32(method.name.encode())).integers(1, STEPS))
    until, _ = run(start(), 0, kill)
    restored = from_bytes(to_bytes(until), jax.eval_shape(start))
    del until
    resumed, rest = run(restored, kill, STEPS)
    chex.assert_trees_all_equal(raw(resumed), raw(whole))
    np.testing.assert_array_equal(rest[kill:], losses[kill:])
    # The training and its restart are one program.
    assert len(traces) == run._cache_size() == 1
