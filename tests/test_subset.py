"""A step that sees some of the tasks is the step of a method that has no others."""

from __future__ import annotations

import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxjd
from jaxjd import scalarizers as S
from jaxjd import weightings as W
from tests.matrices import gaussian
from tests.registry import AGGREGATORS, LINKS, by_name, slow_but
from tests.test_missing_tasks import SCALARIZERS

TASKS, K = 5, 3
TABLE = jnp.array([0.1, 0.4, 0.2, 0.5, 0.3])
STEPS = [[4, 0, 2], [1, 2, 0], [3, 4, 1]]

# Sizes of parameters are those of the tasks on purpose.
PARAMS = {
    "first": {"kernel": jnp.ones((TASKS, K)), "bias": jnp.ones((TASKS,))},
    "second": {"kernel": jnp.ones((K,)), "scale": jnp.ones(())},
}

WITH_NUMBERS_PER_TASK = {
    "constant": lambda tasks: W.constant(TABLE[tasks]),
    "cr_mogm(mean, schedule)": lambda tasks: W.cr_mogm(
        W.mean(), optax.linear_schedule(0.0, 0.9, 5), TABLE[tasks]
    ),
}
METHODS = AGGREGATORS + LINKS
WAITING = ("multi_steps(excess_mtl)", "multi_steps(modo)")
QUICK = [
    "constant",
    "cr_mogm(mean, schedule)",
    "db_mtl",
    "excess_mtl",
    "graddrop",
    "gradnorm",
    "grouped(gradvac)",
    "momentum_conflict_free",
    "per_task(ema)",
    "trimmed_mean",
]


def rows_of(seed):
    leaves, treedef = jax.tree.flatten(PARAMS)
    drawn = [jnp.asarray(gaussian(seed + i, K, *x.shape), x.dtype) for i, x in enumerate(leaves)]
    return treedef.unflatten(drawn)


def array(leaf):
    key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if key else leaf)


def part_of(state, like, tasks):
    """The part of a state that belongs to some tasks: what another size of a method shows."""

    def part(leaf, wanted):
        for axis, (size, other) in enumerate(zip(leaf.shape, wanted.shape, strict=True)):
            leaf = leaf if size == other else jnp.take(leaf, jnp.array(tasks), axis=axis)
        return leaf

    return jax.tree.map(part, state, like)


def absent_of(state, like, tasks):
    """The rest of it."""
    return part_of(state, like, [task for task in range(TASKS) if task not in tasks])


def same(found, wanted):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(array(a), array(b))


def close(found, wanted):
    """Equal to what another program may round otherwise."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        scale = np.abs(array(b)).max(initial=0)
        np.testing.assert_allclose(array(a), array(b), rtol=1e-4, atol=1e-4 * scale)


def without_logs(state):
    """A state without the last weights of aggregators, which no later step reads."""
    logs = (jaxjd.AggregatorState, jaxjd.GroupedState, jaxjd.MomentumConflictFreeState)
    clear = lambda node: node._replace(weights=()) if isinstance(node, logs) else node
    return jax.tree.map(clear, state, is_leaf=lambda node: isinstance(node, logs))


@pytest.mark.parametrize("method", slow_but(QUICK, METHODS), ids=by_name)
def test_a_step_with_some_tasks_is_that_of_a_method_without_others(method):
    make = WITH_NUMBERS_PER_TASK.get(method.name)
    if make is None:
        make = alone = lambda tasks: method.aggregator(tasks.size)
    else:
        alone = lambda tasks: jaxjd.weighted(make(tasks), num_tasks=K)
    subset = jaxjd.subset(make, num_tasks=TASKS, num_present=K)

    @jax.jit
    def step(jacobian, state, tasks):
        return subset.update(jacobian, state, PARAMS, tasks=tasks, **method.extra_args(jacobian))

    @jax.jit
    def step_alone(jacobian, state, tasks):
        return alone(tasks).update(jacobian, state, PARAMS, **method.extra_args(jacobian))

    state, like = subset.init(PARAMS), jax.eval_shape(alone(jnp.arange(K)).init, PARAMS)
    same(part_of(state, like, STEPS[0]), alone(jnp.array(STEPS[0])).init(PARAMS))
    for seed, tasks in enumerate(STEPS):
        jacobian, before = rows_of(10 * seed), state
        update, state = step(jacobian, before, jnp.array(tasks))
        wanted = step_alone(jacobian, part_of(before, like, tasks), jnp.array(tasks))
        close((update, part_of(state, like, tasks)), wanted)
        bare = without_logs(like)
        old, new = (absent_of(without_logs(x), bare, tasks) for x in (before, state))
        for a, b, one in zip(*map(jax.tree.leaves, (old, new, bare)), strict=True):
            if a.shape != one.shape:  # What belongs to no task is in both parts.
                same(a, b)
        if method.name not in ("graddrop", "trimmed_mean"):  # They have no weights.
            for weights in jaxjd.diagnostics.weights(state).values():
                assert not np.delete(weights, tasks, axis=-1).any()
                assert weights.shape[-1] == TASKS
                assert np.take(weights, tasks, axis=-1).any() or method.name in WAITING


def test_all_tasks_in_another_order_are_the_method_itself():
    jacobian = jax.tree.map(lambda x: gaussian(3, TASKS, *x.shape), PARAMS)
    order = jnp.array([3, 1, 4, 0, 2])
    aggregator = jaxjd.imtl_g(num_tasks=TASKS)
    subset = jaxjd.subset(W.imtl_g(), num_tasks=TASKS, num_present=TASKS)
    wanted = jax.jit(aggregator.update)(jacobian, aggregator.init(PARAMS))
    rows = jax.tree.map(lambda leaf: leaf[order], jacobian)
    # Without the parameters, whose shapes the rows tell.
    close(jax.jit(subset.update)(rows, subset.init(PARAMS), tasks=order), wanted)


def test_what_is_no_choice_of_tasks():
    subset = jaxjd.subset(W.mean(), num_tasks=TASKS, num_present=K)
    state, jacobian = subset.init(PARAMS), rows_of(0)
    update = jax.jit(lambda tasks: subset.update(jacobian, state, tasks=tasks)[0])
    for tasks in ([0, 0, 1], [0, 1, TASKS], [-1, 0, 1]):
        assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(update(jnp.array(tasks))))
        with pytest.raises(ValueError, match="different integers from 0 to 4"):
            subset.update(jacobian, state, tasks=tasks)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(update(jnp.array([2, 4, 0]))))


def test_indices_of_a_narrow_dtype():
    subset = jaxjd.subset(W.sum(), num_tasks=300, num_present=2)
    rows = jnp.eye(2)
    tasks = jnp.array([200, 7], jnp.uint8)
    update, state = jax.jit(subset.update)(rows, subset.init(rows[0]), tasks=tasks)
    np.testing.assert_array_equal(update, [1.0, 1.0])
    np.testing.assert_array_equal(np.nonzero(np.asarray(state.weights))[0], [7, 200])


@pytest.mark.slow
def test_a_state_keeps_its_sharding_on_an_explicit_mesh():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    spread = lambda array, *spec: jax.device_put(array, jax.NamedSharding(mesh, jax.P(*spec)))
    subset = jaxjd.subset(W.excess_mtl(), num_tasks=TASKS, num_present=K)
    with jax.set_mesh(mesh):
        params, rows = jnp.ones((4, 3)), gaussian(0, K, 4, 3)
        state = subset.init(spread(params, "x"))
        wanted, _ = subset.update(rows, subset.init(params), params, tasks=STEPS[0])
        update, after = subset.update(
            spread(rows, None, "x"), state, spread(params, "x"), tasks=STEPS[0]
        )
    types = lambda tree: [str(jax.typeof(leaf)) for leaf in jax.tree.leaves(tree)]
    assert types(after) == types(state)
    assert str(jax.typeof(update)) == "float32[4@x,3]"
    close(update, wanted)


class Odd(NamedTuple):
    """A state with keys of tasks, typed and raw, a task axis at an end, and a shared matrix."""

    keys: jax.Array
    data: jax.Array
    last: jax.Array
    shared: jax.Array


def test_keys_and_axes_anywhere_in_a_state():
    def init(num_tasks, params=None):
        keys = jax.random.split(jax.random.key(0), num_tasks)
        return Odd(
            keys,
            jax.random.key_data(keys),
            jnp.zeros((num_tasks, 2, num_tasks)),
            jnp.zeros((TASKS, K)),
        )

    def update(stat, state, **extra_args):
        m = stat.shape[0]
        keys = jax.vmap(lambda key: jax.random.split(key)[0])(state.keys)
        return jnp.ones(m), Odd(keys, state.data, state.last + 1, state.shared + 1)

    subset = jaxjd.subset(jaxjd.Weighting(init, update), num_tasks=TASKS, num_present=K)
    start = subset.init(PARAMS)
    same(start.weighting[:2], init(TASKS)[:2])
    _, state = jax.jit(subset.update)(rows_of(0), start, tasks=jnp.array(STEPS[0]))
    odd = state.weighting
    present = np.isin(np.arange(TASKS), STEPS[0])
    changed = array(odd.keys) != array(start.weighting.keys)
    np.testing.assert_array_equal(changed.any(axis=1), present)
    expected = np.broadcast_to(np.outer(present, present)[:, None], (TASKS, 2, TASKS))
    np.testing.assert_array_equal(odd.last, expected)
    np.testing.assert_array_equal(odd.shared, np.ones((TASKS, K)))


def test_a_scan_of_steps_with_some_tasks_from_losses_to_gradients():
    """Heads of absent tasks and what the method keeps of them wait."""

    def loss(params, task, x):
        return jnp.mean((jnp.tanh(x @ params["trunk"]) @ params["heads"][task] - 1.0) ** 2)

    def losses_fn(params, tasks, x):
        return jax.vmap(loss, (None, 0, 0))(params, tasks, x)

    subset = jaxjd.subset(W.gradnorm(lr=0.1), num_tasks=TASKS, num_present=K)
    init, apply = jaxjd.aggregated_value_and_grad(losses_fn, subset)
    params = {"trunk": gaussian(0, 4, 6), "heads": jnp.asarray(gaussian(1, TASKS, 6))}
    steps = (jnp.array(STEPS), jnp.asarray(gaussian(2, len(STEPS), K, 5, 4)))

    def step(state, inputs):
        tasks, x = inputs
        (losses, gradient), state = apply(state, params, tasks, x, tasks=tasks)
        return state, (losses, gradient, state.aggregator.weights)

    state, found = jax.jit(lambda steps: jax.lax.scan(step, init(params), steps))(steps)

    @jax.jit
    def step_alone(logits, initial, number, tasks, x):
        values, rows = losses_fn(params, tasks, x), jax.jacrev(losses_fn)(params, tasks, x)
        own = W.GradNormState(number, logits[tasks], initial[tasks])
        weights, own = W.gradnorm(lr=0.1).update(jaxjd.gramian(rows), own, losses=values)
        return (values, jaxjd.combine(weights, rows), jnp.zeros(TASKS).at[tasks].set(weights)), own

    logits, initial = np.zeros((2, TASKS), np.float32)
    for number, (tasks, x) in enumerate(zip(*steps, strict=True)):
        wanted, own = step_alone(logits.copy(), initial.copy(), number, tasks, x)
        logits[tasks], initial[tasks] = own.logits, own.initial_losses
        close(tuple(jax.tree.map(operator.itemgetter(number), part) for part in found), wanted)
        assert not np.delete(found[1]["heads"][number], tasks, axis=0).any()
    close(state.aggregator.weighting[1:], (logits, initial))


def test_tasks_are_an_argument_of_the_function_where_a_weighting_has_no_use_for_them():
    init, apply = jaxjd.aggregated_value_and_grad(lambda w, tasks: w[tasks], W.sum())
    (losses, _), _ = apply(init(jnp.arange(5.0)), jnp.arange(5.0), tasks=jnp.array([3, 1]))
    np.testing.assert_array_equal(losses, [3.0, 1.0])


SCALARIZERS_OF = {
    "constant": lambda tasks: S.constant(TABLE[tasks]),
    "cosmos": lambda tasks: S.cosmos(1.0, TABLE[tasks]),
    "pbi": lambda tasks: S.pbi(1.0, TABLE[tasks]),
}


@pytest.mark.parametrize("name", SCALARIZERS)
def test_every_scalarizer_with_some_tasks(name):
    make = SCALARIZERS_OF.get(name, lambda tasks: SCALARIZERS[name]())
    subset = jaxjd.subset(make, num_tasks=TASKS, num_present=K)

    @jax.jit
    def step(losses, state, tasks):
        value, gradient = jax.value_and_grad(subset.apply)(losses, state, tasks=tasks)
        return (value, gradient), subset.update(losses, state, tasks=tasks)

    @jax.jit
    def step_alone(losses, state, tasks):
        value, gradient = jax.value_and_grad(make(tasks).apply)(losses, state)
        return (value, gradient), make(tasks).update(losses, state)

    state, like = subset.init(), jax.eval_shape(lambda: make(jnp.arange(K)).init(K))
    same(part_of(state, like, STEPS[0]), make(jnp.array(STEPS[0])).init(K))
    for number, tasks in enumerate([*STEPS, *STEPS]):
        losses, before = 0.5 + jnp.abs(gaussian(number, K)), state
        found, state = step(losses, before, jnp.array(tasks))
        wanted = step_alone(losses, part_of(before, like, tasks), jnp.array(tasks))
        close((found, part_of(state, like, tasks)), wanted)
        for a, b, part in zip(*map(jax.tree.leaves, (before, state, like)), strict=True):
            if a.shape != part.shape:
                same(np.delete(a, tasks), np.delete(b, tasks))
    assert np.isnan(subset.apply(losses, state, tasks=jnp.array([0, 0, 1])))
