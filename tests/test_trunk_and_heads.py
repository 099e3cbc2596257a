"""Chain links around a Jacobian for a trunk beside plain gradients for its heads."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import jaxjd
from jaxjd.diagnostics import monitored
from tests.matrices import gaussian

M, K, BATCH = 2, 3, 4
ENGINE = jaxjd.mtl_value_and_jacobian(
    lambda trunk, x: jnp.tanh(x @ trunk["w"]),
    [lambda head, z, x, y=y: jnp.mean((z @ head["v"] - y) ** 2) for y in (0.3, -0.7)],
)


def parameters(dtype="float32"):
    draw = lambda seed, *shape: jnp.asarray(gaussian(seed, *shape), dtype)
    return {"heads": [{"v": draw(1, 4)}, {"v": draw(2, 4)}], "trunk": {"w": draw(0, 3, 4)}}


X = jnp.asarray(gaussian(3, K, BATCH, 3))
PARAMS = parameters()


@jax.jit
def engine(params, x):
    losses, (trunk, heads) = ENGINE(params["trunk"], params["heads"], x)
    return losses, {"heads": heads, "trunk": trunk}


LOSSES, MIXED = engine(PARAMS, X[0])


def split(trunk=None, heads=None):
    parts = {"trunk": trunk or jaxjd.upgrad(num_tasks=M), "heads": heads or optax.identity()}
    return jaxjd.partition(parts, jaxjd.labels.by_network)


@functools.cache
def expected_updates():
    return split().update(MIXED, split().init(PARAMS), PARAMS)[0]


def take(tree, place):
    return jax.tree.map(lambda leaf: leaf[place], tree)


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_microbatches_equal_one_large_batch(dtype):
    params = parameters(dtype)
    tx = jaxjd.multi_steps(split(), K, M)
    J = [engine(params, X[t].astype(dtype))[1] for t in range(K)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *J)
    step = lambda state, J: tx.update(J, state, params)[::-1]
    state, updates = jax.jit(lambda J: lax.scan(step, tx.init(params), J))(stacked)
    large = engine(params, X.reshape(K * BATCH, 3).astype(dtype))[1]
    expected, _ = split().update(large, split().init(params), params)
    chex.assert_trees_all_equal(take(updates, 0), jax.tree.map(jnp.zeros_like, params))
    # Every microbatch is rounded to the dtype, their sum to float32, and the weights carry both.
    eps = float(jnp.finfo(dtype).eps)
    chex.assert_trees_all_close(take(updates, K - 1), expected, rtol=32 * eps, atol=32 * eps)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(lambda p: (K, *p.shape), params)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.jacobian))


def test_sums_of_plain_bfloat16_gradients_do_not_stand_still():
    # In bfloat16 a sum of eights stays at 2,048.
    params = {"head": jnp.zeros(1, jnp.bfloat16), "trunk": jnp.zeros(1, jnp.bfloat16)}
    parts = {"trunk": jaxjd.mean(), "head": optax.identity()}
    tx = jaxjd.multi_steps(jaxjd.partition(parts, jaxjd.labels.by_network), 1024, M)
    J = {"head": jnp.full((1,), 8.0, "bfloat16"), "trunk": jnp.full((M, 1), 8.0, "bfloat16")}
    step = lambda state, _: tx.update(J, state, params)[::-1]
    _, updates = jax.jit(lambda: lax.scan(step, tx.init(params), length=1024))()
    assert [float(updates[name][-1, 0]) for name in ("head", "trunk")] == [8.0, 8.0]


def test_the_layout_needs_no_parameters_to_be_accumulated():
    first = lambda J: {**J, "trunk": take(J["trunk"], 0)}
    tx = jaxjd.multi_steps(optax.stateless(lambda updates, _: first(updates)), 1, M)
    updates, _ = tx.update(MIXED, tx.init(PARAMS))
    chex.assert_trees_all_close(updates, first(MIXED), rtol=1e-6)


def test_cross_jacobians_are_accumulated_in_the_same_layout():
    modo = lambda: split(jaxjd.modo(num_tasks=M))
    pair = (engine(PARAMS, X[1])[1], engine(PARAMS, X[2])[1])
    tx = jaxjd.multi_steps(modo(), 2, M, cross_jacobians=True)
    state = tx.init(PARAMS)
    for _ in range(2):
        updates, state = tx.update(MIXED, state, PARAMS, cross_jacobians=pair)
    expected, after = modo().update(MIXED, modo().init(PARAMS), PARAMS, cross_jacobians=pair)
    chex.assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(state.inner_state, after, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "inner", [optax.clip_by_global_norm(0.1), optax.trace(0.9)], ids=["clip", "trace"]
)
def test_per_task_leaves_plain_gradients_as_they_are(inner):
    tx = jaxjd.per_task(inner, M)
    updates, _ = tx.update(MIXED, tx.init(PARAMS), PARAMS)
    chex.assert_trees_all_equal(updates["heads"], MIXED["heads"])
    alone = jaxjd.per_task(inner, M)
    rows, _ = alone.update(MIXED["trunk"], alone.init(PARAMS["trunk"]), PARAMS["trunk"])
    chex.assert_trees_all_close(updates["trunk"], rows, rtol=1e-6)
    chain = optax.chain(tx, split())
    updates, _ = chain.update(MIXED, chain.init(PARAMS), PARAMS)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, PARAMS)


@pytest.mark.slow
def test_monitored_diagnoses_the_rows_of_the_trunk():
    around = monitored(split(), M, learning_rate=0.1)
    updates, found = around.update(MIXED, around.init(PARAMS), PARAMS)
    chex.assert_trees_all_equal(updates, expected_updates())
    inside = split(monitored(jaxjd.upgrad(num_tasks=M), M, learning_rate=0.1))
    _, state = inside.update(MIXED, inside.init(PARAMS), PARAMS)
    alone = state.inner_states["trunk"]
    for field in set(found._fields) - {"inner_state"}:
        chex.assert_trees_all_close(getattr(found, field), getattr(alone, field), rtol=1e-5)
    assert np.any(found.predicted_change)


def test_the_other_links_take_the_layout():
    links = [
        jaxjd.skip_if_not_finite(optax.chain(split(), optax.sgd(-1.0))),
        jaxjd.ensure_aggregated(optax.chain(split(), optax.sgd(-1.0))),
        optax.chain(split(), jaxjd.ensure_aggregated()),
    ]
    for tx in links:
        updates, _ = tx.update(MIXED, tx.init(PARAMS), PARAMS)
        chex.assert_trees_all_close(updates, expected_updates(), rtol=1e-6)
    frozen = split(heads=jaxjd.freeze())
    updates, _ = frozen.update(MIXED, frozen.init(PARAMS), PARAMS)
    chex.assert_trees_all_equal(updates["heads"], jax.tree.map(jnp.zeros_like, PARAMS["heads"]))
    frozen = split(trunk=jaxjd.freeze())
    updates, _ = frozen.update(MIXED, frozen.init(PARAMS), PARAMS)
    chex.assert_trees_all_equal(updates["trunk"], jax.tree.map(jnp.zeros_like, PARAMS["trunk"]))
    chex.assert_trees_all_equal(updates["heads"], MIXED["heads"])
    bad = {**MIXED, "heads": jax.tree.map(lambda leaf: leaf * jnp.nan, MIXED["heads"])}
    updates, state = links[0].update(bad, links[0].init(PARAMS), PARAMS)
    assert int(state.skipped) == 1


@pytest.mark.slow
def test_all_links_at_once():
    inner = optax.chain(
        jaxjd.per_task(optax.clip_by_global_norm(1e3), M), monitored(split(), M), optax.sgd(-1.0)
    )
    tx = jaxjd.skip_if_not_finite(jaxjd.ensure_aggregated(jaxjd.multi_steps(inner, 2, num_tasks=M)))
    state = tx.init(PARAMS)
    for _ in range(2):
        updates, state = tx.update(MIXED, state, PARAMS, losses=LOSSES)
    chex.assert_trees_all_close(updates, expected_updates(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "link",
    [
        lambda tx: jaxjd.multi_steps(tx, 1, M),
        lambda tx: optax.chain(jaxjd.per_task(optax.clip(1e3), M), tx),
        lambda tx: monitored(tx, M),
        jaxjd.skip_if_not_finite,
    ],
)
def test_a_gradient_that_no_group_declares_is_still_refused(link):
    tx = link(jaxjd.upgrad())
    with pytest.raises(ValueError, match="heads/0/v"):
        tx.update(MIXED, tx.init(PARAMS), PARAMS)
    gradient = jax.tree.map(jnp.zeros_like, PARAMS)
    with pytest.raises(ValueError, match="without a task axis"):
        tx.update(gradient, tx.init(PARAMS), PARAMS)


NAMED = {"a": jnp.ones(2), "b": jnp.ones(3)}
NAMED_ROWS = {"a": jnp.eye(2), "b": jnp.ones((2, 3))}
MGDA = lambda: jaxjd.mgda("loss", num_tasks=M)


@pytest.mark.parametrize(
    "make",
    [
        lambda: jaxjd.partition({"a": MGDA(), "b": MGDA()}, {"a": "a", "b": "b"}),
        lambda: optax.partition({"a": MGDA(), "b": MGDA()}, {"a": "a", "b": "b"}),
        lambda: jaxjd.grouped(jaxjd.weightings.mgda("loss"), jaxjd.labels.by_tensor, num_tasks=M),
        lambda: jaxjd.multi_steps(MGDA(), 1, M),
        lambda: monitored(MGDA(), M),
        lambda: optax.chain(jaxjd.per_task(optax.clip(1e3), M), MGDA()),
        lambda: jaxjd.skip_if_not_finite(MGDA()),
        lambda: jaxjd.ensure_aggregated(MGDA()),
    ],
)
def test_losses_may_be_named_as_the_parameters_are(make):
    tx = make()
    update = lambda losses: tx.update(NAMED_ROWS, tx.init(NAMED), NAMED, losses=losses)[0]
    named = update({"a": jnp.float32(1.0), "b": jnp.float32(5.0)})
    chex.assert_trees_all_equal(named, update(jnp.array([1.0, 5.0])))


@pytest.mark.parametrize("wrong", [NAMED_ROWS["a"], {"a": NAMED_ROWS["a"]}])
def test_what_is_cut_by_name_must_have_the_leaves_of_the_jacobian(wrong):
    parts = {"a": jaxjd.modo(num_tasks=M), "b": jaxjd.mean()}
    tx = jaxjd.partition(parts, {"a": "a", "b": "b"}, cut_args=["mask"])
    update = lambda **extra: tx.update(NAMED_ROWS, tx.init(NAMED), NAMED, **extra)
    with pytest.raises(ValueError, match="`cross_jacobians` must have the structure"):
        update(cross_jacobians=(NAMED_ROWS, wrong))
    with pytest.raises(ValueError, match="`mask` must have the structure"):
        update(cross_jacobians=(NAMED_ROWS, NAMED_ROWS), mask=wrong)
