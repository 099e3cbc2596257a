"""`partition` into many groups: aggregators that are made alike share one program."""

import collections

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxjd
from jaxjd import labels, weightings
from jaxjd.grouping._together import makings
from tests.jaxprs import equations
from tests.matrices import gaussian
from tests.registry import NAMED, VARIANTS, WEIGHTINGS, WRAPPED, M, by_name, slow_but

STACKED = [method for method in WEIGHTINGS if method.stat != "jacobian"]
NAMES = ["a", "b", "c", "d"]
# Groups of different shapes; their Gramians are all that is stacked.
PARAMS = {
    name: {"w": jnp.zeros((2, size)), "b": jnp.zeros(size)} for size, name in enumerate(NAMES, 3)
}


def jacobian_of(seed, params=PARAMS):
    leaves, treedef = jax.tree.flatten(params)
    rows = [jnp.asarray(gaussian(seed + n, M, *leaf.shape)) for n, leaf in enumerate(leaves)]
    return treedef.unflatten(rows)


def partition_of(make, names=NAMES):
    return jaxjd.partition({name: make() for name in names}, labels.by_network)


def extra_args(method, jacobian):
    extra = method.extra_args(jacobian)
    if method.stat == "cross":
        extra["cross_jacobians"] = (jacobian_of(100), jacobian_of(200))
    return extra


def one_by_one(aggregator, jacobian, states, extra):
    """Every group with an aggregator of its own, as `partition` is defined."""
    updates, new = {}, {}
    for name in NAMES:
        own = dict(extra)
        if "cross_jacobians" in extra:
            own["cross_jacobians"] = tuple({name: J[name]} for J in extra["cross_jacobians"])
        part, new[name] = aggregator.update(
            {name: jacobian[name]}, states[name], {name: PARAMS[name]}, **own
        )
        updates |= part
    return updates, new


def without_keys(tree):
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf, tree)


def counts(fn, *args):
    return collections.Counter(equation.primitive.name for equation in equations(fn, *args))


@pytest.mark.parametrize("method", STACKED, ids=by_name)
def test_states_are_those_of_the_groups_alone(method):
    jacobian = jacobian_of(0)
    extra = extra_args(method, jacobian)
    alone, tx = method.aggregator(M), partition_of(lambda: method.aggregator(M))
    state = tx.init(PARAMS)
    states = {name: alone.init({name: PARAMS[name]}) for name in NAMES}
    chex.assert_trees_all_equal(state.inner_states, states)
    updates, after = jax.eval_shape(lambda J, s: tx.update(J, s, PARAMS, **extra), jacobian, state)
    wanted = jax.eval_shape(lambda J, s: one_by_one(alone, J, s, extra), jacobian, states)
    assert (updates, after.inner_states) == wanted


@pytest.mark.parametrize("method", STACKED, ids=by_name)
def test_the_program_of_all_groups_has_the_loops_of_one(method):
    """Four separate calls of one factory, and still one program."""
    jacobian = jacobian_of(0)
    extra = extra_args(method, jacobian)
    alone, tx = method.aggregator(M), partition_of(lambda: method.aggregator(M))

    def one(J):
        part = dict(extra)
        if "cross_jacobians" in extra:
            part["cross_jacobians"] = tuple({"a": J["a"]} for J in extra["cross_jacobians"])
        return alone.update({"a": J["a"]}, alone.init({"a": PARAMS["a"]}), **part)

    whole = counts(lambda J: tx.update(J, tx.init(PARAMS), PARAMS, **extra), jacobian)
    single = counts(one, jacobian)
    for loop in ("while", "scan", "eigh", "cholesky", "triangular_solve", "sort"):
        assert whole[loop] == single[loop], loop


QUICK = ["upgrad", "gradvac", "pcgrad", "random", "modo", "mgda(loss+)", "cr_mogm(mean, schedule)"]


@pytest.mark.parametrize("method", slow_but(QUICK, STACKED))
def test_numbers_are_those_of_the_groups_alone(method):
    """Random methods draw the same numbers, too."""
    alone, tx = method.aggregator(M), partition_of(lambda: method.aggregator(M))
    extra = extra_args(method, jacobian_of(0))
    together = jax.jit(lambda J, s: tx.update(J, s, PARAMS, **extra))
    separate = jax.jit(lambda J, s: one_by_one(alone, J, s, extra))
    state = tx.init(PARAMS)
    states = state.inner_states
    for step in range(2):
        updates, state = together(jacobian_of(10 * step), state)
        wanted, states = separate(jacobian_of(10 * step), states)
        chex.assert_trees_all_close(updates, wanted, rtol=1e-4, atol=1e-4)
        plain = map(without_keys, (state.inner_states, states))
        chex.assert_trees_all_close(*plain, rtol=1e-4, atol=1e-4)


def test_sixty_groups_cost_a_few_operations_each():
    def operations(size):
        params = {f"{n:02}": {"w": jnp.zeros(2)} for n in range(size)}
        tx = partition_of(jaxjd.upgrad, params)
        found = counts(lambda J: tx.update(J, tx.init(params), params), jacobian_of(0, params))
        return found.total()

    few, more, most = map(operations, (10, 35, 60))
    assert most - more == more - few  # Linear.
    assert (most - few) / 50 < 12


def test_other_hyperparameters_are_another_kind():
    radii = {"a": 0.2, "b": 0.9, "c": 0.2, "d": 0.9}
    tx = jaxjd.partition({name: jaxjd.cagrad(c) for name, c in radii.items()}, labels.by_network)
    jacobian = jacobian_of(0)
    found, _ = jax.jit(lambda J: tx.update(J, tx.init(PARAMS), PARAMS))(jacobian)
    solve = jax.jit(lambda G, c: weightings.cagrad(c).update(G, ())[0])
    for name, c in radii.items():
        weights = solve(jaxjd.gramian(jacobian[name]), c)
        wanted = jaxjd.combine(weights, jacobian[name])
        chex.assert_trees_all_close(found[name], wanted, rtol=1e-3, atol=1e-3)


def test_what_is_made_alike():
    schedule = optax.linear_schedule(0.0, 0.9, 5)
    makers = [method.weighting for method in NAMED + VARIANTS + WRAPPED]
    makers = [make for make in makers if not isinstance(make(), jaxjd.JacobianWeighting)]
    makers += [
        lambda: weightings.cagrad(0.7),
        lambda: weightings.upgrad([1.0, 0.0, 2.0]),
        lambda: weightings.upgrad([1.0, -0.0, 2.0]),
        lambda: weightings.upgrad(projector=jaxjd.linalg.regularized_projector()),
        lambda: weightings.upgrad(projector=jaxjd.linalg.regularized_projector(1e-3)),
        lambda: weightings.cr_mogm(weightings.mean(), schedule),
        lambda: weightings.cr_mogm(weightings.mean(), lambda count: 0.5),
        lambda: weightings.cr_mogm(weightings.sum(), schedule),
    ]
    keys = [[makings(jaxjd.weighted(make(), num_tasks=M).update) for make in makers] for _ in "ab"]
    assert keys[0] == keys[1]
    assert len(set(keys[0])) == len(keys[0])
    sizes = {makings(jaxjd.mean(num_tasks=size).update) for size in (None, 2, 3)}
    assert len(sizes) == 3
    pair = jaxjd.weighted(weightings.modo(), num_tasks=M, combine_pair=True)
    assert makings(pair.update) != makings(jaxjd.modo(num_tasks=M).update)


def host_mean(gramian, state, **extra_args):
    shape = jax.ShapeDtypeStruct((M,), gramian.dtype)
    return jax.pure_callback(lambda G: np.full(M, 1 / M, G.dtype), shape, gramian), state


def mean_if_any(gramian, state, **extra_args):
    return jnp.full(M, (1 if gramian[0, 0] > 0 else 0) / M), state


@pytest.mark.parametrize("update", [host_mean, mean_if_any])
def test_what_cannot_be_mapped_is_done_one_by_one(update):
    weighting = jaxjd.Weighting(weightings.mean().init, update)
    tx = partition_of(lambda: jaxjd.weighted(weighting))
    jacobian = jacobian_of(0)
    found, _ = tx.update(jacobian, tx.init(PARAMS), PARAMS)
    chex.assert_trees_all_close(found, jax.tree.map(lambda leaf: leaf.mean(0), jacobian), atol=1e-6)


def test_errors_are_those_of_one_group():
    def update(gramian, state, **extra_args):
        raise ValueError(f"found {gramian.shape}")

    tx = partition_of(lambda: jaxjd.weighted(jaxjd.Weighting(weightings.mean().init, update)))
    with pytest.raises(ValueError, match=r"^found \(3, 3\)$"):
        tx.update(jacobian_of(0), tx.init(PARAMS), PARAMS)


def test_groups_keep_their_keys():
    """Of the generator whose draws depend on the batch as well, which is not batched."""
    for impl in ("threefry2x32", "rbg"):
        keys = {name: jax.random.key(n // 2, impl=impl) for n, name in enumerate(NAMES)}
        tx = jaxjd.partition(
            {name: jaxjd.random(key, num_tasks=M) for name, key in keys.items()}, labels.by_network
        )
        _, after = tx.update(jacobian_of(0), tx.init(PARAMS), PARAMS)
        for name, key in keys.items():
            weighting = weightings.random(key)
            weights, _ = weighting.update(jnp.eye(M), weighting.init(M))
            np.testing.assert_allclose(after.inner_states[name].weights, weights, rtol=1e-5)


def test_arguments_that_are_cut_reach_every_group_cut():
    def update(gramian, state, *, own=None, **extra_args):
        return jax.tree.leaves(own)[0], state

    weighting = jaxjd.Weighting(weightings.mean().init, update)
    tx = jaxjd.partition(
        {name: jaxjd.weighted(weighting) for name in NAMES}, labels.by_network, cut_args=["own"]
    )
    own = jax.tree.map(lambda leaf: jnp.full(M, float(leaf.size)), PARAMS)
    jacobian = jacobian_of(0)
    found, _ = tx.update(jacobian, tx.init(PARAMS), PARAMS, own=own)
    for name in NAMES:
        wanted = jaxjd.combine(own[name]["b"], jacobian[name])
        chex.assert_trees_all_close(found[name], wanted, rtol=1e-5, atol=1e-5)


def test_groups_with_other_numbers_of_tasks_and_plain_gradients():
    """Two groups of three tasks, two of two, and a head with a gradient."""
    names = [*NAMES, "head"]
    params = PARAMS | {"head": {"w": jnp.zeros(4)}}
    jacobian = jacobian_of(0) | {"head": {"w": jnp.arange(4.0)}}
    for name in "cd":
        jacobian[name] = jax.tree.map(lambda leaf: leaf[:2], jacobian[name])
    aggregators = {name: jaxjd.dualproj() for name in NAMES} | {"head": optax.identity()}
    tx = jaxjd.partition(aggregators, labels.by_network)
    found, _ = jax.jit(lambda J: tx.update(J, tx.init(params), params))(jacobian)
    assert list(found) == sorted(names)
    np.testing.assert_array_equal(found["head"]["w"], np.arange(4.0))
    for name in NAMES:
        weights, _ = weightings.dualproj().update(jaxjd.gramian(jacobian[name]), ())
        wanted = jaxjd.combine(weights, jacobian[name])
        chex.assert_trees_all_close(found[name], wanted, rtol=1e-4, atol=1e-4)
