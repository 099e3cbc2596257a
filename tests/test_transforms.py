"""The chain links: each closes a trap of optax's chains around a Jacobian."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import jaxjd
from tests import registry
from tests.matrices import gaussian
from tests.registry import AGGREGATORS, M, by_name, slow_but

PARAMS = {"w": jnp.array([[0.3, -0.2], [0.1, 0.4]]), "b": jnp.array([0.5, -0.5])}


def jacobians(count, num_tasks=2, like=PARAMS, seed=0):
    """`count` random Jacobians, stacked."""
    leaves, treedef = jax.tree.flatten(like)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    rows = [
        jax.random.normal(key, (count, num_tasks, *leaf.shape), leaf.dtype)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, rows)


def raw(tree):
    return jax.tree.map(
        lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x,
        tree,
    )


def row(tree, *index):
    return jax.tree.map(lambda leaf: leaf[index], tree)


# per_task

TRANSFORMS = {
    "clip_by_global_norm": lambda: optax.clip_by_global_norm(1.0),
    "ema": lambda: optax.ema(0.9),
    "trace": lambda: optax.trace(0.9),
    "scale_by_adam": lambda: optax.scale_by_adam(),
    "normalize": lambda: optax.normalize_by_update_norm(),
    "decay": lambda: optax.add_decayed_weights(0.1),
    "chain": lambda: optax.chain(optax.clip(0.5), optax.scale_by_rms()),
    "inject": lambda: optax.inject_hyperparams(optax.ema)(decay=lambda n: 0.5 + 0.1 * n),
}


@pytest.mark.parametrize("name", slow_but({"ema", "scale_by_adam", "chain", "inject"}, TRANSFORMS))
def test_per_task_is_the_transformation_of_every_row(name):
    plain, num_tasks, steps = TRANSFORMS[name](), 2, 3
    tx = jaxjd.per_task(TRANSFORMS[name](), num_tasks)
    J = jacobians(steps, num_tasks)
    # A scan refuses a state that changes its type.
    step = lambda state, jacobian: tx.update(jacobian, state, PARAMS)[::-1]
    _, found = jax.jit(lambda J: lax.scan(step, tx.init(PARAMS), J))(J)
    for task in range(num_tasks):
        state = plain.init(PARAMS)
        for t in range(steps):
            expected, state = plain.update(row(J, t, task), state, PARAMS)
            chex.assert_trees_all_close(row(found, t, task), expected, rtol=1e-5, atol=1e-6)


def test_per_task_differs_from_the_joint_transformation():
    """The trap that it closes: clipping a Jacobian clips the norm of all tasks together."""
    J = {"w": jnp.array([[3.0, 0.0], [0.0, 0.5]])}
    joint, _ = optax.clip_by_global_norm(1.0).update(J, optax.EmptyState())
    tx = jaxjd.per_task(optax.clip_by_global_norm(1.0), 2)
    found, _ = tx.update(J, tx.init({"w": jnp.zeros(2)}))
    np.testing.assert_allclose(found["w"], [[1.0, 0.0], [0.0, 0.5]], rtol=1e-6)
    assert float(joint["w"][1, 1]) < 0.2


def test_per_task_draws_other_noise_for_every_task():
    tx = jaxjd.per_task(optax.add_noise(1.0, 0.0, key=0), 3)
    noise, state = tx.update({"w": jnp.zeros((3, 4))}, tx.init({"w": jnp.zeros(4)}))
    assert not np.any(np.isclose(noise["w"][0], noise["w"][1]))
    assert len(np.unique(raw(state).inner_states.rng_key, axis=0)) == 3


def test_per_task_takes_factored_leaves_and_extra_args_and_keeps_dtypes():
    x, params = jnp.ones((3, 4), jnp.bfloat16), {"w": jnp.ones((4, 2), jnp.bfloat16)}
    _, J = jaxjd.value_and_jacobian(lambda p: jnp.mean((x @ p["w"]) ** 2, 0), form="factored")(
        params
    )
    seen = []

    def record(updates, state, params=None, *, scale, **_):
        seen.append(scale)
        return jax.tree.map(lambda leaf: leaf * scale, updates), state

    tx = jaxjd.per_task(
        optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), record), 2
    )
    found, _ = tx.update(J, tx.init(params), params, scale=2)
    assert seen == [2]
    assert found["w"].dtype == jnp.bfloat16
    chex.assert_trees_all_equal(found["w"], 2 * jaxjd.materialize(J)["w"])


def test_per_task_states_are_known_to_optax():
    tx = optax.chain(jaxjd.per_task(optax.scale_by_adam(), 2), jaxjd.sum(), optax.sgd(0.1))
    state = tx.init(PARAMS)
    shapes = jax.eval_shape(lambda: PARAMS)
    chex.assert_trees_all_equal(tx.init(shapes), state)
    mapped = optax.tree.map_params(tx, lambda leaf: leaf + 1, state)
    assert optax.tree.get(mapped, "mu")["w"].shape == (2, 2, 2)
    assert np.all(optax.tree.get(mapped, "mu")["w"] == 1)


# freeze


def test_frozen_parameters_stay_bit_for_bit():
    labels = {"w": "trained", "b": "frozen"}
    parts = {"trained": jaxjd.upgrad(), "frozen": jaxjd.freeze()}
    J = row(jacobians(1), 0)
    makers = (
        lambda: jaxjd.partition(parts, labels),
        lambda: optax.partition(parts, labels),
    )
    for make in makers:
        tx = optax.chain(make(), optax.adam(0.1), jaxjd.ensure_aggregated())
        updates, _ = tx.update(J, tx.init(PARAMS), PARAMS)
        new = optax.apply_updates(PARAMS, updates)
        np.testing.assert_array_equal(new["b"], PARAMS["b"])
        assert np.all(new["w"] != PARAMS["w"])


def test_freeze_takes_jacobians_gradients_and_factored_leaves():
    link = jaxjd.freeze()
    J = row(jacobians(1), 0)
    for updates, params in [(J, PARAMS), (J, None), (PARAMS, PARAMS)]:
        found, _ = link.update(updates, link.init(PARAMS), params)
        chex.assert_trees_all_equal(found, jax.tree.map(jnp.zeros_like, PARAMS))
    x = jnp.ones((3, 4))
    _, factored = jaxjd.value_and_jacobian(lambda w: jnp.mean(x @ w, 0), form="factored")(
        jnp.ones((4, 2))
    )
    np.testing.assert_array_equal(link.update(factored, link.init(None))[0], jnp.zeros((4, 2)))


def test_set_to_zero_is_the_trap_that_freeze_closes():
    J = row(jacobians(1), 0)
    parts = {"trained": jaxjd.upgrad(), "frozen": optax.set_to_zero()}
    labels = {"w": "trained", "b": "frozen"}
    tx = optax.partition(parts, labels)
    updates, _ = tx.update(J, tx.init(PARAMS), PARAMS)
    with jax.numpy_rank_promotion("allow"):
        assert optax.apply_updates(PARAMS, updates)["b"].shape == (2, 2)  # Silently wrong.
    safe = optax.chain(tx, jaxjd.ensure_aggregated())
    with pytest.raises(ValueError, match=r"leaf 'b'.*\(2,\).*found \(2, 2\)"):
        safe.update(J, safe.init(PARAMS), PARAMS)
    ours = jaxjd.partition(parts, labels)
    with pytest.raises(ValueError, match=r"'b' in group 'frozen'"):
        ours.update(J, ours.init(PARAMS), PARAMS)


# ensure_aggregated

FORGOTTEN = {
    "no aggregator": lambda: optax.adam(0.1),
    "masked": lambda: optax.masked(jaxjd.upgrad(), {"w": True, "b": False}),
    "per_task only": lambda: jaxjd.per_task(optax.clip(1.0), 2),
}


@pytest.mark.parametrize("name", FORGOTTEN)
def test_a_jacobian_that_is_left_is_found(name):
    J = row(jacobians(1), 0)
    for tx in (
        optax.chain(FORGOTTEN[name](), jaxjd.ensure_aggregated()),
        jaxjd.ensure_aggregated(FORGOTTEN[name]()),
    ):
        with jax.numpy_rank_promotion("allow"), pytest.raises(ValueError, match="leaf '"):
            jax.eval_shape(lambda state, tx=tx: tx.update(J, state, PARAMS), tx.init(PARAMS))


def test_an_optimizer_before_the_aggregator_is_found():
    J = row(jacobians(1), 0)
    for first in (optax.adam(0.1), optax.ema(0.9), optax.trace(0.9)):
        tx = optax.chain(first, jaxjd.upgrad())
        with jax.numpy_rank_promotion("allow"):
            tx.update(J, tx.init(PARAMS), PARAMS)  # Silently wrong.
            checked = jaxjd.ensure_aggregated(tx)
            with pytest.raises(ValueError, match=r"State leaf .*jaxjd\.per_task"):
                checked.update(J, checked.init(PARAMS), PARAMS)


def test_what_is_aggregated_passes_unchanged():
    chain = optax.chain(jaxjd.mgda("l2", num_tasks=2), optax.adam(0.1))
    J, extra = row(jacobians(1), 0), {"losses": jnp.ones(2)}
    expected, state = chain.update(J, chain.init(PARAMS), PARAMS, **extra)
    around = jaxjd.ensure_aggregated(chain)
    found, checked = around.update(J, around.init(PARAMS), PARAMS, **extra)
    chex.assert_trees_all_equal((found, checked.inner_state), (expected, state))
    last = optax.chain(chain, jaxjd.ensure_aggregated())
    found, _ = last.update(J, last.init(PARAMS), PARAMS, **extra)
    chex.assert_trees_all_equal(found, expected)


# multi_steps

X = jnp.asarray(gaussian(3, 4, 6, 3))
Y = jnp.asarray(gaussian(4, 4, 6, 2))


def losses_fn(params, x, y):
    return jnp.mean((jnp.tanh(x @ params["w"] + params["b"][None]) - y) ** 2, axis=0)


REGRESSION = {"w": jnp.asarray(gaussian(5, 3, 2)), "b": jnp.zeros(2)}
ACCUMULATED = {
    "upgrad": lambda: jaxjd.upgrad(num_tasks=2),
    "excess_mtl": lambda: jaxjd.excess_mtl(num_tasks=2),
    "mgda(loss)": lambda: jaxjd.mgda("loss", num_tasks=2),
    "modo": lambda: jaxjd.modo(num_tasks=2),
}


@pytest.mark.parametrize("name", slow_but({"excess_mtl", "modo"}, list(ACCUMULATED)))
@pytest.mark.parametrize("form", ["dense", pytest.param("factored", marks=pytest.mark.slow)])
def test_microbatches_equal_one_large_batch(name, form):
    """Two updates of two microbatches each, in a scan, against two updates of large batches."""
    chain = optax.chain(ACCUMULATED[name](), optax.sgd(0.1, momentum=0.9))
    crossed = name == "modo"
    tx = jaxjd.multi_steps(chain, 2, 2, cross_jacobians=crossed)
    engine = jaxjd.value_and_jacobian(losses_fn, form=form)

    def step(tx, carry, batch):
        params, state = carry
        losses, J = engine(params, *batch)
        extra = {"losses": losses}
        if crossed:
            extra["cross_jacobians"] = (J, engine(params, batch[0] + 1, batch[1])[1])
        updates, state = tx.update(J, state, params, **extra)
        return (optax.apply_updates(params, updates), state), updates

    run = lambda tx, X, Y: jax.jit(
        lambda: lax.scan(lambda c, b: step(tx, c, b), (REGRESSION, tx.init(REGRESSION)), (X, Y))
    )()
    (params, state), updates = run(tx, X, Y)
    (expected, outer), _ = run(chain, X.reshape(2, 12, 3), Y.reshape(2, 12, 2))
    chex.assert_trees_all_close(params, expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(state.inner_state, outer, rtol=1e-5, atol=1e-6)
    assert int(state.step) == 2
    assert int(state.mini_step) == 0
    assert np.all(updates["w"][0::2] == 0)
    assert np.all(updates["w"][1::2] != 0)


def test_the_number_of_microbatches_may_be_scheduled():
    tx = jaxjd.multi_steps(jaxjd.sum(), lambda step: 1 + step, 2)
    J = row(jacobians(1), 0)
    update, state = jax.jit(tx.update), tx.init(PARAMS)
    emitted = []
    for _ in range(6):
        updates, state = update(J, state, PARAMS)
        emitted.append(bool(np.any(updates["w"])))
    assert emitted == [True, False, True, False, False, True]
    chex.assert_trees_all_close(updates, jax.tree.map(lambda x: jnp.sum(x, 0), J), rtol=1e-6)


def test_sums_of_bfloat16_are_kept_in_float32():
    params = {"w": jnp.zeros(1, jnp.bfloat16)}
    tx = jaxjd.multi_steps(jaxjd.mean(), 64, 2)
    step = lambda state, J: tx.update({"w": J}, state, params)[::-1]
    # In bfloat16 a sum of ones stays at 256.
    J = jnp.ones((64, 2, 1), jnp.bfloat16) * 8
    state, updates = jax.jit(lambda: lax.scan(step, tx.init(params), J))()
    assert updates["w"].dtype == jnp.bfloat16
    assert float(updates["w"][-1, 0]) == 8.0
    assert state.jacobian["w"].dtype == jnp.float32


def test_multi_steps_of_optax_is_the_trap():
    tx = optax.MultiSteps(optax.chain(jaxjd.upgrad(), optax.sgd(0.1)), 2)
    J = row(jacobians(1), 0)
    with jax.numpy_rank_promotion("allow"), pytest.raises((TypeError, ValueError)):
        tx.update(J, tx.init(PARAMS), PARAMS)
    # Behind the aggregator it averages aggregated updates instead of Jacobians.
    behind = optax.chain(jaxjd.upgrad(), optax.MultiSteps(optax.sgd(1.0), 2))
    ours = jaxjd.multi_steps(optax.chain(jaxjd.upgrad(), optax.sgd(1.0)), 2, 2)
    J = jacobians(2)
    found = []
    for link in (behind, ours):
        state = link.init(PARAMS)
        for t in range(2):
            updates, state = link.update(row(J, t), state, PARAMS)
        found.append(updates["w"])
    assert not np.allclose(found[0], found[1], rtol=1e-2)


# skip_if_not_finite

STATEFUL = [method for method in AGGREGATORS if method.stateful or method.random]


# A state of a weighting and of groups.
QUICK = {"excess_mtl", "grouped(modo)"}


@pytest.mark.parametrize("method", slow_but(QUICK, STATEFUL), ids=by_name)
def test_a_skipped_step_leaves_no_trace(method):
    params = registry.example_params()
    chain = optax.chain(method.aggregator(M), optax.adam(0.1))
    tx = jaxjd.skip_if_not_finite(chain)
    update = jax.jit(lambda J, state: tx.update(J, state, params, **method.extra_args(J)))
    J = jacobians(3, M, params)
    first, second, bad = (row(J, t) for t in range(3))
    bad["first"]["kernel"] = bad["first"]["kernel"].at[1, 0, 0].set(jnp.nan)
    _, state = update(first, tx.init(params))
    expected, after = update(second, state)
    skipped, state = update(bad, state)
    chex.assert_trees_all_equal(skipped, jax.tree.map(jnp.zeros_like, params))
    assert (int(state.skipped), int(state.consecutive)) == (1, 1)
    updates, state = update(second, state)
    assert (int(state.skipped), int(state.consecutive)) == (1, 0)
    chex.assert_trees_all_equal(updates, expected)
    chex.assert_trees_all_equal(raw(state.inner_state), raw(after.inner_state))


BAD = {
    "nan": ({"w": jnp.nan}, {}),
    "inf": ({"w": jnp.inf}, {}),
    "the Gramian overflows": ({"w": 1e30}, {}),
    "a loss is not finite": ({}, {"losses": jnp.array([1.0, jnp.nan])}),
}


@pytest.mark.parametrize("name", BAD)
def test_what_counts_as_not_finite(name):
    changes, extra = BAD[name]
    tx = jaxjd.skip_if_not_finite(optax.chain(jaxjd.mgda("loss", num_tasks=2), optax.adam(0.1)))
    J = row(jacobians(1), 0)
    for key, value in changes.items():
        J[key] = J[key].at[0].set(value)
    update, state = jax.jit(tx.update), tx.init(PARAMS)
    updates, after = update(J, state, PARAMS, **{"losses": jnp.ones(2), **extra})
    assert int(after.skipped) == 1
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, PARAMS))
    chex.assert_trees_all_equal(after.inner_state, state.inner_state)


def test_a_second_moment_that_would_overflow_is_skipped():
    tx = jaxjd.skip_if_not_finite(optax.chain(jaxjd.sum(), optax.scale_by_adam()))
    J = {"w": jnp.full((2, 1), 1e25)}
    params = {"w": jnp.zeros(1)}
    updates, state = tx.update(J, tx.init(params), params)
    assert int(state.skipped) == 1
    assert np.all(updates["w"] == 0)
    assert np.all(np.isfinite(optax.tree.get(state, "nu")["w"]))


def test_factored_leaves_are_looked_at():
    w = jnp.ones((4, 2))
    tx = jaxjd.skip_if_not_finite(optax.chain(jaxjd.upgrad(), optax.sgd(0.1)))

    @jax.jit
    def step(x):
        _, J = jaxjd.value_and_jacobian(lambda w: jnp.mean((x @ w) ** 2, 0), form="factored")(w)
        return tx.update(J, tx.init(w), w)

    x = jnp.arange(12.0).reshape(3, 4)
    assert int(step(x)[1].skipped) == 0
    updates, state = step(x.at[0, 0].set(jnp.nan))
    assert int(state.skipped) == 1
    assert np.all(updates == 0)


def test_a_state_that_begins_at_infinity_is_no_reason_to_skip():
    tx = jaxjd.skip_if_not_finite(
        optax.chain(jaxjd.sum(), optax.sgd(0.1), optax.contrib.reduce_on_plateau())
    )
    J = row(jacobians(1), 0)
    state = tx.init(PARAMS)
    assert np.isinf(optax.tree.get(state, "best_value"))
    updates, state = tx.update(J, state, PARAMS, value=jnp.array(3.0))
    assert int(state.skipped) == 0
    assert np.any(updates["w"])
    assert float(optax.tree.get(state, "best_value")) == 3.0


def test_a_bad_microbatch_is_left_out():
    """Around `multi_steps`, a skipped microbatch is neither added nor counted."""
    chain = optax.chain(jaxjd.excess_mtl(num_tasks=2), optax.sgd(0.1))
    tx = jaxjd.skip_if_not_finite(jaxjd.multi_steps(chain, 2, 2))
    J = jacobians(3)
    J["b"] = J["b"].at[1, 0].set(jnp.nan)
    step = lambda state, J: tx.update(J, state, PARAMS)[::-1]
    state, updates = jax.jit(lambda J: lax.scan(step, tx.init(PARAMS), J))(J)
    assert int(state.skipped) == 1
    assert int(state.inner_state.step) == 1
    plain = jaxjd.multi_steps(chain, 2, 2)
    good = jax.tree.map(lambda leaf: leaf[jnp.array([0, 2])], J)
    step = lambda state, J: plain.update(J, state, PARAMS)[::-1]
    expected, wanted = jax.jit(lambda J: lax.scan(step, plain.init(PARAMS), J))(good)
    chex.assert_trees_all_close(row(updates, 2), row(wanted, 1), rtol=1e-6)
    chex.assert_trees_all_close(state.inner_state, expected, rtol=1e-6)


@pytest.mark.parametrize("check_vma", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_links_on_shards(check_vma):
    """One device's shard is bad: all skip. And marks of shards survive an accumulation."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = {"w": jax.P("x"), "b": jax.P()}
    params = {"w": jnp.arange(4.0).reshape(2, 2), "b": jnp.ones(2)}
    tx = jaxjd.skip_if_not_finite(
        jaxjd.multi_steps(
            optax.chain(jaxjd.imtl_g(num_tasks=2), optax.sgd(0.1, momentum=0.9)), 2, 2
        )
    )
    J = jacobians(5, like=params)
    J["w"] = J["w"].at[1, 0, 1, 0].set(jnp.nan)  # Row 1 of w: the second device.

    def run(params, J, mark=lambda J: jaxjd.sharding.sharded(J, spec)):
        step = lambda state, J: tx.update(mark(J), state, params)[::-1]
        state, updates = lax.scan(step, tx.init(params), J)
        return updates, state.skipped, state.inner_state.step

    expected = jax.jit(lambda params, J: run(params, J, lambda J: J))(params, J)

    rows = {"w": jax.P(None, "x"), "b": jax.P()}
    found = jax.jit(
        jax.shard_map(
            run,
            mesh=mesh,
            in_specs=(spec, {"w": jax.P(None, None, "x"), "b": jax.P()}),
            out_specs=(rows, jax.P(), jax.P()),
            check_vma=check_vma,
        )
    )(params, J)
    assert int(found[1]) == 1
    assert int(found[2]) == 2
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


def test_links_of_optax_come_too_late_or_do_not_fit():
    """Why `skip_if_not_finite` exists."""
    J = row(jacobians(1), 0)
    around = optax.apply_if_finite(optax.chain(jaxjd.upgrad(), optax.sgd(0.1)), 3)
    with pytest.raises(TypeError):
        around.update(J, around.init(PARAMS), PARAMS)
    behind = optax.chain(jaxjd.excess_mtl(num_tasks=2), optax.apply_if_finite(optax.sgd(0.1), 3))
    J["w"] = J["w"].at[0].set(jnp.nan)
    updates, state = behind.update(J, behind.init(PARAMS), PARAMS)
    assert np.all(updates["w"] == 0)
    leaves = jax.tree.leaves(state[0].weighting)
    assert any(np.any(np.isnan(leaf)) for leaf in leaves if leaf.dtype == jnp.float32)
