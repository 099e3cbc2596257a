"""Diagnostics against float64 oracles; their place in optimizer states; plots."""

from __future__ import annotations

import itertools
import re
import sys
from typing import Any, NamedTuple

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax import lax

import jaxjd
from jaxjd import diagnostics as D
from tests.matrices import J_BASE, badly_scaled, degenerate, families, gaussian

mpl.use("Agg")

RNG = np.random.default_rng(0)
# Of two sizes, since every size is a compilation.
MATRICES = [matrix for group in families().values() for matrix in group if len(matrix) in (4, 20)]
MATRICES += [*degenerate().values(), badly_scaled(RNG, 4, 12), RNG.standard_normal((4, 7))]


gramian = jax.jit(jaxjd.gramian)


def gram(J) -> jax.Array:
    return gramian(np.asarray(J, np.float32))


def exact(J) -> np.ndarray:
    J = np.asarray(np.asarray(J, np.float32), np.float64)
    return J @ J.T


@jax.jit
def everything(G: jax.Array, weights: jax.Array) -> dict[str, jax.Array]:
    """All functions of a Gramian in one program for each number of tasks."""
    return {
        "cosine_matrix": D.cosine_matrix(G),
        "conflict_count": D.conflict_count(G),
        "conflict_rate": D.conflict_rate(G),
        "conflict_count of weights": D.conflict_count(G, weights),
        "conflict_rate of weights": D.conflict_rate(G, weights),
        "predicted_change": D.predicted_change(G, weights, 0.25),
        "gap": D.stationarity_gap(G),
        "relative gap": D.stationarity_gap(G, relative=True),
        "effective_rank": D.effective_rank(G),
    }


def all_of(J, weights=None) -> dict[str, jax.Array]:
    m = len(J)
    return everything(
        gram(J), np.asarray(np.full(m, 1 / m) if weights is None else weights, np.float32)
    )


def cosines_of(G: np.ndarray) -> np.ndarray:
    lengths = np.sqrt(np.diag(G))
    lengths = np.where(lengths > 0, lengths, 1)
    return np.where(np.eye(len(G)) > 0, 1, G / np.outer(lengths, lengths))


# The functions of a Gramian


@pytest.mark.parametrize("J", MATRICES, ids=lambda J: f"{J.shape[0]}x{J.shape[1]}")
def test_cosines_conflicts_changes_and_ranks(J):
    m = J.shape[0]
    G64 = exact(J)
    C = cosines_of(G64)
    w = np.asarray(RNG.uniform(-0.2, 1, m), np.float32)
    found = all_of(J, w)
    np.testing.assert_allclose(found["cosine_matrix"], C, atol=2e-6)
    assert np.abs(found["cosine_matrix"]).max() <= 1

    pairs = C[np.triu_indices(m, 1)]
    count = float(found["conflict_count"])
    # What is a conflict beyond rounding is one; what is orthogonal up to rounding may be.
    assert np.sum(pairs < -1e-5) <= count <= np.sum(pairs < 1e-5)
    np.testing.assert_allclose(found["conflict_rate"], count / max(1, pairs.size), rtol=1e-6)

    products = G64 @ w
    lengths = np.sqrt(np.diag(G64))
    level = 1e-5 * lengths * np.sum(np.abs(w) * lengths)
    count = float(found["conflict_count of weights"])
    assert np.sum(products < -level) <= count <= np.sum(products < level)
    np.testing.assert_allclose(found["conflict_rate of weights"], count / m, rtol=1e-6)
    np.testing.assert_allclose(found["predicted_change"], -0.25 * products, atol=level.max())

    values = np.maximum(np.linalg.eigvalsh(G64), 0)
    shares = values[values > 0] / max(values.sum(), 1e-300)
    rank = np.exp(-np.sum(shares * np.log(shares))) if values.sum() > 0 else 0
    np.testing.assert_allclose(found["effective_rank"], rank, rtol=2e-4)


def grid_gap(G: np.ndarray) -> float:
    """The shortest convex combination of two rows, by trying them all."""
    t = np.linspace(0, 1, 20001)
    W = np.stack([t, 1 - t], axis=1)
    return float(np.sqrt(np.maximum(np.einsum("ki,ij,kj->k", W, G, W), 0).min()))


@pytest.mark.parametrize("seed", range(8))
def test_the_stationarity_gap_is_the_shortest_combination(seed):
    J = np.random.default_rng(seed).standard_normal((2, 4)) + 0.5 * np.eye(1, 4)
    G64, found = exact(J), all_of(J)
    # The grid is off by its width at most, and never below.
    gap = float(found["gap"])
    assert gap - 2e-6 <= grid_gap(G64) <= gap + 1e-3
    relative = float(found["relative gap"])
    assert relative - 2e-6 <= grid_gap(cosines_of(G64)) <= relative + 1e-3


def test_closed_forms():
    # Two gradients: the altitude of the triangle.
    altitude = np.sqrt((18 * 38 - 22**2) / (18 + 38 + 44))
    np.testing.assert_allclose(all_of(J_BASE)["gap"], altitude, rtol=1e-5)
    for m in (1, 4):
        found = all_of(3 * np.eye(m))
        np.testing.assert_allclose(found["gap"], 3 / np.sqrt(m), rtol=1e-5)
        np.testing.assert_allclose(found["relative gap"], m**-0.5, rtol=1e-5)
        np.testing.assert_allclose(found["effective_rank"], m, rtol=1e-5)
        assert float(found["conflict_rate"]) == 0
        np.testing.assert_allclose(all_of(np.ones((m, 3)))["effective_rank"], 1, rtol=1e-5)
    # The corners of a tetrahedron, seen from its centre.
    found = all_of(np.eye(4) - 1 / 4)
    assert (float(found["conflict_count"]), float(found["conflict_rate"])) == (6, 1)
    assert float(found["gap"]) < 1e-3
    np.testing.assert_allclose(found["effective_rank"], 3, rtol=1e-5)


@pytest.mark.parametrize("kind", ["strong", "weak", "free"])
def test_the_gap_tells_stationary_points(kind):
    for J in families()[kind]:
        gap = float(all_of(J)["relative gap"])
        assert gap < 2e-3 if kind != "free" else gap > 1e-2


# How the numbers scale with the gradients; the gap of a zero gradient is zero.
POWERS = {"predicted_change": 2, "gap": 1}


@pytest.mark.slow
def test_functions_are_batched_scale_free_and_let_nan_through():
    J = np.random.default_rng(3).standard_normal((4, 3, 6))
    J[1, 2] = 0
    weights = np.array([0.5, 0.3, 0.2])
    batched = jax.jit(jax.vmap(everything, in_axes=(0, None)))
    batch = lambda J: batched(np.stack([gram(rows) for rows in J]), np.asarray(weights, np.float32))
    found = batch(J)
    for number, rows in enumerate(J):
        single = jax.tree.map(lambda leaf, number=number: np.asarray(leaf)[number], found)
        chex.assert_trees_all_close(single, all_of(rows, weights), rtol=1e-5, atol=1e-6)
    assert not any(leaf.weak_type or leaf.dtype != jnp.float32 for leaf in found.values())
    chex.assert_tree_all_finite(found)
    assert np.asarray(found["gap"])[1] == np.asarray(found["relative gap"])[1] == 0
    for scale in (1e-8, 1e8):
        scaled = batch(J * scale)
        for name, value in found.items():
            back = np.asarray(scaled[name]) / scale ** POWERS.get(name, 0)
            np.testing.assert_allclose(back, value, rtol=1e-4, atol=1e-5)
    for bad in (np.nan, np.inf):
        broken = batch(np.where(np.arange(3)[:, None] == 1, bad, J))
        assert all(np.isnan(np.asarray(leaf)[0]).any() for leaf in broken.values())
    for name, value in batch(0 * J).items():
        expected = np.eye(3) if name == "cosine_matrix" else 0
        np.testing.assert_array_equal(value, np.broadcast_to(expected, value.shape))


def test_single_tasks():
    found = {name: float(np.ravel(value)[0]) for name, value in all_of([[0.0, 2.0]]).items()}
    ones = {"cosine_matrix": 1, "gap": 2, "relative gap": 1, "effective_rank": 1}
    assert found == dict.fromkeys(found, 0) | ones | {"predicted_change": -1}


def test_scaling_one_loss_changes_neither_cosines_nor_the_relative_gap():
    J = np.random.default_rng(5).standard_normal((4, 9)) + 0.3
    scaled, plain = all_of(J * [[1e-6], [1.0], [1e3], [1e5]]), all_of(J)
    for name in ("cosine_matrix", "conflict_count", "relative gap"):
        np.testing.assert_allclose(scaled[name], plain[name], rtol=1e-5, atol=1e-5)


def test_functions_in_float64():
    with jax.enable_x64(True):
        found = jax.eval_shape(everything, jnp.asarray(exact(J_BASE)), jnp.ones(2))
        assert {leaf.dtype for leaf in found.values()} == {jnp.dtype("float64")}


@pytest.mark.slow
def test_dual_cone_methods_conflict_with_no_task():
    @jax.jit
    @jax.vmap
    def counts(G):
        methods = (jaxjd.weightings.upgrad(), jaxjd.weightings.dualproj(), jaxjd.weightings.mean())
        return [D.conflict_count(G, weighting.update(G, ())[0]) for weighting in methods]

    J = [badly_scaled(np.random.default_rng(seed), 4, 6, 2.0) for seed in range(40)]
    upgrad, dualproj, mean = counts(jnp.stack([gram(rows) for rows in J]))
    np.testing.assert_array_equal(upgrad, 0)
    np.testing.assert_array_equal(dualproj, 0)
    assert np.sum(mean) > 20


# Changes by an update, and the cross-Gramian behind them


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.tanh(nn.Dense(16)(x)))


NET = Net()
X = jnp.asarray(gaussian(1, 8, 12))
TARGETS = jnp.asarray(gaussian(2, 8, 3))
PARAMS = jax.jit(NET.init)(jax.random.key(0), X)
M = 3


def net_losses(params, x=X, targets=TARGETS):
    return jnp.mean((NET.apply(params, x) - targets) ** 2, axis=0)


def rows_of(tree, leading=1) -> np.ndarray:
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]
    return np.concatenate(
        [leaf.reshape(*leaf.shape[:leading], -1) for leaf in leaves], axis=leading
    )


@pytest.mark.parametrize("form", ["dense", "factored"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_change_by_any_update(form, dtype):
    params = jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype), PARAMS)
    update = jax.tree.map(lambda leaf: np.sin(50 * leaf.astype("float32")).astype(dtype), params)
    update = jax.tree.map(lambda leaf: leaf + np.ones_like(leaf), update)

    @jax.jit
    def both(params):
        fn = jaxjd.value_and_jacobian(lambda p: net_losses(p, X.astype(dtype)), form=form)
        jacobian = fn(params)[1]
        rows = jax.tree.map(lambda leaf: jnp.stack([leaf, -2 * leaf]), update)
        return (
            D.predicted_change_by(update, jacobian),
            jaxjd.cross_gramian(jacobian, rows),
            jaxjd.cross_gramian(rows, jacobian),
            jaxjd.materialize(jacobian),
        )

    change, cross, transposed, jacobian = both(params)
    expected = rows_of(jacobian) @ rows_of(update, 0)
    # A factored leaf's products are not rounded to its dtype, but the dense leaf is.
    rounding = 2e-6 if dtype == "float32" or form == "dense" else 4e-3
    scale = np.linalg.norm(rows_of(jacobian), axis=1) * np.linalg.norm(rows_of(update, 0))
    np.testing.assert_allclose(change, expected, atol=rounding * scale.max(), rtol=0)
    wanted = np.stack([expected, -2 * expected], axis=1)
    np.testing.assert_allclose(cross, wanted, atol=2 * rounding * scale.max(), rtol=0)
    np.testing.assert_allclose(transposed, wanted.T, atol=2 * rounding * scale.max(), rtol=0)
    assert change.dtype == cross.dtype == jnp.float32


def test_a_few_rows_do_not_materialize_a_factored_leaf():
    """The dense leaf has 6 x 64 x 64 entries, more than anything else here."""
    w, x = jnp.ones((64, 64)), jnp.ones((4, 64))

    def fn(w):
        return jnp.mean(((x @ w)[None] - jnp.arange(6.0)[:, None, None]) ** 2, axis=(1, 2))

    def change_of(w):
        return D.predicted_change_by(w, jaxjd.value_and_jacobian(fn, form="factored")(w)[1])

    program = jax.jit(change_of).lower(w).compile()
    assert "6,64,64" not in program.as_text()
    expected = np.asarray(jax.jacrev(fn)(w), np.float64).reshape(6, -1) @ np.ones(64 * 64)
    np.testing.assert_allclose(program(w), expected, rtol=1e-5)


def test_rows_of_two_numbers_of_tasks():
    J1, J2 = RNG.standard_normal((4, 10)), RNG.standard_normal((3, 10))
    tree = lambda J: {"a": jnp.asarray(J[:, :4], "float32"), "b": jnp.asarray(J[:, 4:], "float32")}
    found = jaxjd.cross_gramian(tree(J1), tree(J2))
    np.testing.assert_allclose(found, J1 @ J2.T, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"'b': expected one shape after the task axis .*6.*5"):
        jaxjd.cross_gramian(tree(J1), tree(J2[:, :9]))


def test_the_prediction_is_the_change_to_first_order():
    """The rest of every loss shrinks with the square of the step."""
    with jax.enable_x64(True):
        params, x, targets = jax.tree.map(
            lambda leaf: jnp.asarray(leaf, "float64"), (PARAMS, X, TARGETS)
        )
        fn = lambda params: net_losses(params, x, targets)
        tx = optax.chain(jaxjd.upgrad(), optax.adamw(1.0, weight_decay=0.1))

        @jax.jit
        def at(step):
            losses, jacobian = jaxjd.value_and_jacobian(fn, form="auto")(params)
            updates, _ = tx.update(jacobian, tx.init(params), params)
            updates = jax.tree.map(lambda leaf: step * leaf, updates)
            moved = fn(optax.apply_updates(params, updates))
            gramian = jaxjd.gramian(jacobian)
            weights, _ = jaxjd.weightings.upgrad().update(gramian, ())
            descent = jax.tree.map(lambda leaf: -step * leaf, jaxjd.combine(weights, jacobian))
            descended = fn(optax.apply_updates(params, descent))
            return (
                (moved - losses, D.predicted_change_by(updates, jacobian)),
                (descended - losses, D.predicted_change(gramian, weights, step)),
            )

        rests = []
        for step in (1e-3, 1e-4):
            results = at(jnp.float64(step))
            rests.append([np.abs(actual - predicted).max() for actual, predicted in results])
            for actual, predicted in results:
                np.testing.assert_allclose(actual, predicted, rtol=step * 100)
        ratios = np.divide(*map(np.array, rests))
        assert (ratios > 80).all()
        assert (ratios < 120).all()


# Weights and other fields of any optimizer state


class SkipIfNotFiniteState(NamedTuple):
    """As the chain link's, for what holds without it."""

    inner_state: Any
    skipped: jax.Array


SMALL = {"trunk": {"w": np.ones((2, 3))}, "head": {"w": np.ones(3), "b": np.zeros(())}}
SMALL = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), SMALL)
SMALL_JACOBIAN = jax.tree.map(
    lambda leaf: jnp.asarray(
        np.sin(1 + np.arange(2 * leaf.size, dtype=np.float32)).reshape(2, *leaf.shape)
    ),
    SMALL,
)
MEAN = lambda: jaxjd.mean(num_tasks=2)
PER_NETWORK = {"trunk": MEAN(), "head": jaxjd.sum(num_tasks=2)}

NESTINGS = {
    "itself": (MEAN, ["weights"]),
    "chain": (lambda: optax.chain(MEAN(), optax.adam(1e-3)), ["weights"]),
    "chain of chains": (
        lambda: optax.chain(optax.chain(optax.chain(MEAN()), optax.clip(1.0)), optax.adam(1e-3)),
        ["weights"],
    ),
    "named_chain": (
        lambda: optax.named_chain(("aggregate", MEAN()), ("adam", optax.adam(1e-3))),
        ["weights"],
    ),
    "partition": (
        lambda: optax.chain(jaxjd.partition(PER_NETWORK, jaxjd.labels.by_network), optax.sgd(1.0)),
        ["head/weights", "trunk/weights"],
    ),
    "optax.partition": (
        lambda: optax.partition(PER_NETWORK, {"trunk": "trunk", "head": "head"}),
        ["head/weights", "trunk/weights"],
    ),
    "grouped": (
        lambda: optax.chain(
            jaxjd.grouped(jaxjd.weightings.mean(), jaxjd.labels.by_tensor, num_tasks=2)
        ),
        ["weights"],
    ),
    "inject_hyperparams": (
        lambda: optax.inject_hyperparams(jaxjd.stch, static_args=("num_tasks", "warmup_steps"))(
            mu=0.5, num_tasks=2
        ),
        ["weights"],
    ),
    "inject_hyperparams of a chain": (
        lambda: optax.inject_hyperparams(lambda lr: optax.chain(MEAN(), optax.sgd(lr)))(lr=0.1),
        ["weights"],
    ),
    "MultiSteps": (
        lambda: optax.chain(
            MEAN(), optax.MultiSteps(optax.adam(1e-3), 2).gradient_transformation()
        ),
        ["weights"],
    ),
    "apply_if_finite": (
        lambda: optax.chain(MEAN(), optax.apply_if_finite(optax.adam(1e-3), 3)),
        ["weights"],
    ),
    "masked": (
        lambda: optax.chain(
            optax.masked(MEAN(), {"trunk": True, "head": False}),
            optax.masked(jaxjd.sum(num_tasks=2), {"trunk": False, "head": True}),
        ),
        ["0/weights", "1/weights"],
    ),
    "schedule_free": (
        lambda: optax.chain(MEAN(), optax.contrib.schedule_free(optax.sgd(1.0), 1.0)),
        ["weights"],
    ),
    "cr_mogm": (
        lambda: jaxjd.weighted(jaxjd.weightings.cr_mogm(jaxjd.weightings.mean()), num_tasks=2),
        ["weights"],  # Those of the wrapper's own state are the same.
    ),
    "momentum_conflict_free": (lambda: jaxjd.momentum_conflict_free(num_tasks=2), ["weights"]),
    "monitored": (
        lambda: optax.chain(D.monitored(MEAN(), num_tasks=2), optax.adam(1e-3)),
        ["weights"],
    ),
    "per task, then skipped": (
        lambda: jaxjd.skip_if_not_finite(
            optax.chain(jaxjd.per_task(optax.clip(1.0), 2), MEAN(), optax.adam(1e-3))
        ),
        ["weights"],
    ),
    "multi_steps": (
        lambda: jaxjd.multi_steps(optax.chain(MEAN(), optax.adam(1e-3)), 2, 2),
        ["weights"],
    ),
}


@pytest.mark.parametrize("name", NESTINGS)
def test_weights_are_found_in_any_nesting(name):
    make, paths = NESTINGS[name]
    tx = make()
    state = tx.init(SMALL)
    found = D.weights(state)
    assert sorted(found) == sorted(paths)
    for path, weights in found.items():
        assert weights.shape[-1] == 2
        assert path in D.summary(state)
        np.testing.assert_array_equal(weights, 0)
    _, state = jax.jit(tx.update)(SMALL_JACOBIAN, state, SMALL)
    assert list(D.weights(state)) == list(found)
    if name not in ("multi_steps", "momentum_conflict_free"):
        assert all(np.asarray(weights).any() for weights in D.weights(state).values())
    # The same path leads to it, in abstract states too.
    assert list(D.weights(jax.eval_shape(tx.init, SMALL))) == list(found)
    population = jax.vmap(lambda scale: tx.init(optax.tree.scale(scale, SMALL)))
    stacked = jax.eval_shape(population, np.ones(5, np.float32))
    assert all(leaf.shape[0] == 5 for leaf in D.weights(stacked).values())


def test_weights_are_found_in_what_frameworks_keep():
    tx = optax.chain(MEAN(), optax.adam(1e-3))
    state = TrainState.create(apply_fn=None, params=SMALL, tx=tx)
    assert list(D.weights(state)) == ["weights"]
    optimizer = nnx.Optimizer(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), tx, wrt=nnx.Param)
    ((path, weights),) = D.weights(optimizer.opt_state).items()
    assert path == "weights"
    np.testing.assert_array_equal(weights, [0, 0])


def test_parameters_are_not_taken_for_a_state():
    class Layer(NamedTuple):
        weights: jax.Array
        bias: jax.Array

    class Module(eqx.Module):
        weights: jax.Array

    for params in (Layer(jnp.ones(3), jnp.ones(())), Module(jnp.ones(3))):
        tx = optax.chain(MEAN(), optax.adam(1e-3))
        assert list(D.weights(tx.init(params))) == ["weights"]


def test_states_without_anything_to_find():
    state = optax.chain(jaxjd.upgrad(), optax.adam(1e-3)).init(SMALL)
    with pytest.raises(ValueError, match="num_tasks="):
        D.weights(state)
    with pytest.raises(ValueError, match="skip_if_not_finite"):
        D.skipped_steps(state)
    assert D.summary(state) == {}
    assert D.summary({}) == {}


def test_skipped_steps_are_found():
    inner = optax.adam(1e-3).init(SMALL)
    outer = (SkipIfNotFiniteState(inner, jnp.int32(3)), {"x": SkipIfNotFiniteState((), 4)})
    assert D.skipped_steps(outer) == {"0/skipped": 3, "1/skipped": 4}
    tx = jaxjd.skip_if_not_finite(optax.chain(MEAN(), optax.adam(1e-3)))
    state = tx.init(SMALL)
    bad = jax.tree.map(lambda leaf: np.asarray(leaf) * np.float32(np.nan), SMALL_JACOBIAN)
    step = jax.jit(tx.update)
    for jacobian in (SMALL_JACOBIAN, bad, bad):
        _, state = step(jacobian, state, SMALL)
    assert {path: int(count) for path, count in D.skipped_steps(state).items()} == {"skipped": 2}
    assert sorted(D.summary(state)) == ["skipped", "weights"]


WRAPPINGS = {
    "itself": lambda make: make(),
    "chain": lambda make: optax.chain(optax.chain(make(), optax.clip(1.0)), optax.adam(1e-3)),
    "MultiSteps": lambda make: optax.MultiSteps(make(), 2),
    "skip_if_not_finite": lambda make: jaxjd.skip_if_not_finite(optax.chain(make())),
    "inject_hyperparams": lambda make: optax.inject_hyperparams(
        lambda lr: optax.chain(make(), optax.sgd(lr))
    )(lr=0.1),
    "monitored": lambda make: optax.chain(D.monitored(make(), num_tasks=2), optax.sgd(0.1)),
    "multi_steps": lambda make: jaxjd.multi_steps(optax.chain(make(), optax.sgd(0.1)), 2, 2),
}


@pytest.mark.parametrize("name", WRAPPINGS)
def test_keys_do_not_change_with_the_wrapping(name):
    two = lambda: jaxjd.partition(PER_NETWORK, jaxjd.labels.by_network)
    for make, keys in ((MEAN, ["weights"]), (two, ["head/weights", "trunk/weights"])):
        state = WRAPPINGS[name](make).init(SMALL)
        assert sorted(D.weights(state)) == keys
        assert [key for key in sorted(D.summary(state)) if key.endswith("weights")] == keys
    aggregator = lambda: D.monitored(MEAN(), num_tasks=2)
    if name != "monitored":
        keys = set(D.summary(WRAPPINGS[name](aggregator).init(SMALL))) - {"skipped"}
        assert keys == set(D.summary(aggregator().init(SMALL)))


def test_keys_are_unique():
    states = [MEAN().init(SMALL) for _ in range(4)]
    tree = {"a": {"x": states[0], "y": states[1]}, "b": {"x": states[2]}}
    assert sorted(D.weights(tree)) == ["a/weights", "a/y/weights", "b/weights"]
    assert sorted(D.weights(tuple(states))) == [f"{place}/weights" for place in range(4)]


# Diagnostics in the state


def check_fields(state, jacobian, direction, learning_rate=1.0, rtol=1e-5):
    G = gramian(jacobian)
    found = everything(G, np.ones(len(G), np.float32))
    np.testing.assert_allclose(state.cosines, found["cosine_matrix"], rtol=rtol, atol=1e-6)
    np.testing.assert_allclose(state.conflict_rate, found["conflict_rate"], rtol=rtol)
    change = -learning_rate * rows_of(jaxjd.materialize(jacobian)) @ rows_of(direction, 0)
    scale = np.abs(change).max()
    np.testing.assert_allclose(state.predicted_change, change, rtol=0, atol=2e-5 * scale)
    np.testing.assert_allclose(state.stationarity_gap, found["gap"], rtol=1e-4, atol=1e-5)
    relative = found["relative gap"]
    np.testing.assert_allclose(state.relative_stationarity_gap, relative, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(state.effective_rank, found["effective_rank"], rtol=1e-4)


def test_monitored_keeps_the_diagnostics_and_changes_nothing():
    plain = jaxjd.mean(num_tasks=M)
    tx = D.monitored(plain, M, learning_rate=0.5)
    assert isinstance(tx, jaxjd.Aggregator)
    jacobian = jax.jit(jax.jacrev(net_losses))(PARAMS)
    state = tx.init(PARAMS)
    types = jax.tree.map(jax.typeof, state)
    step, plain_step = jax.jit(tx.update), jax.jit(plain.update)
    for _ in range(2):
        inner = state.inner_state
        direction, state = step(jacobian, state, PARAMS)
        expected, inner = plain_step(jacobian, inner, PARAMS)
        chex.assert_trees_all_close(direction, expected, rtol=1e-5, atol=1e-6)
        assert jax.tree.map(jax.typeof, state) == types
        check_fields(state, jacobian, direction, 0.5)


@pytest.mark.slow
def test_monitored_without_weights_and_with_conflicts():
    jacobian = jnp.asarray([[4.0, 0.0, 0.0], [-1.0, 0.1, 0.0]])
    for make in (jaxjd.mean, jaxjd.graddrop):
        tx = D.monitored(make(num_tasks=2), 2)
        direction, state = tx.update(jacobian, tx.init(jnp.zeros(3)))
        check_fields(state, jacobian, direction)
        assert float(state.update_conflict_rate) == 0.5
        assert float(state.predicted_change[1]) > 0


def test_monitored_chain_predicts_the_step_itself():
    tx = D.monitored(optax.chain(jaxjd.mean(), optax.adam(1e-2)), M, learning_rate=None)

    @jax.jit
    def step(params, state):
        losses, jacobian = jaxjd.value_and_jacobian(net_losses)(params)
        updates, state = tx.update(jacobian, state, params)
        actual = net_losses(optax.apply_updates(params, updates)) - losses
        return jacobian, updates, state, actual

    jacobian, updates, state, actual = step(PARAMS, tx.init(PARAMS))
    check_fields(state, jacobian, updates, -1.0)
    np.testing.assert_allclose(state.predicted_change, actual, rtol=0.2, atol=1e-3)


@pytest.mark.slow
def test_monitored_in_a_scan_with_factored_leaves_and_injected_hyperparameters():
    def factory(alpha, learning_rate):
        smoothed = jaxjd.weightings.cr_mogm(jaxjd.weightings.upgrad(), alpha)
        aggregator = D.monitored(jaxjd.weighted(smoothed, num_tasks=M), M, learning_rate)
        return optax.chain(aggregator, optax.sgd(learning_rate))

    tx = optax.inject_hyperparams(factory)(
        alpha=optax.linear_schedule(0.0, 0.9, 10), learning_rate=0.05
    )

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            losses, jacobian = jaxjd.value_and_jacobian(net_losses, form="factored")(params)
            updates, state = tx.update(jacobian, state, params)
            return (optax.apply_updates(params, updates), state), (losses, D.summary(state))

        return lax.scan(step, (params, tx.init(params)), length=30)

    (params, _), (losses, history) = train(PARAMS)
    assert history["cosines"].shape == (30, M, M)
    assert history["weights"].shape == (30, M)
    # Every step is as long as predicted.
    change = np.diff(np.concatenate([losses, net_losses(params)[None]]), axis=0)
    predicted = np.asarray(history["predicted_change"])
    assert np.abs(change - predicted).max() < 0.15 * np.abs(change).max()
    figure = D.plot_diagnostics(history, names=["a", "b", "c"])
    assert len(figure.axes) == 9


def test_monitored_in_partition_and_around_it():
    groups = {
        "trunk": D.monitored(jaxjd.sum(), 2),
        "head": optax.chain(D.monitored(jaxjd.mean(num_tasks=2), 2)),
    }
    tx = jaxjd.partition(groups, jaxjd.labels.by_network)
    direction, state = tx.update(SMALL_JACOBIAN, tx.init(SMALL), SMALL)
    for name in groups:
        inner = state.inner_states[name]
        inner = inner[0] if name == "head" else inner
        check_fields(inner, SMALL_JACOBIAN[name], direction[name])
    around = D.monitored(jaxjd.partition(PER_NETWORK, jaxjd.labels.by_network), 2)
    direction, state = around.update(SMALL_JACOBIAN, around.init(SMALL), SMALL)
    check_fields(state, SMALL_JACOBIAN, direction)


@pytest.mark.slow
def test_monitored_over_a_population():
    tx = D.monitored(jaxjd.mean(num_tasks=2), 2)
    batch = jnp.stack([jnp.asarray(J_BASE, "float32"), jnp.eye(2, 3), jnp.zeros((2, 3))])
    state = tx.init(jnp.zeros(3))
    _, states = jax.jit(jax.vmap(tx.update, in_axes=(0, None)))(batch, state)
    for number, jacobian in enumerate(batch):
        direction, single = tx.update(jacobian, state)
        member = jax.tree.map(lambda leaf, number=number: leaf[number], states)
        chex.assert_trees_all_close(member, single, rtol=1e-5, atol=1e-6)
        check_fields(single, jacobian, direction)


def test_monitored_passes_extra_args_and_leafless_trees():
    tx = D.monitored(jaxjd.modo(num_tasks=2), 2)
    jacobian = jnp.asarray(J_BASE, "float32")
    state = tx.init(jnp.zeros(3))
    _, after = tx.update(jacobian, state, cross_jacobians=(jacobian, jacobian), other=1)
    assert not np.array_equal(after.inner_state.weights, state.inner_state.weights)
    assert tx.update({}, tx.init({}), {}, cross_jacobians=({}, {}))[0] == {}
    chain = optax.chain(tx, optax.adam(1e-3))
    mapped = optax.tree.map_params(chain, lambda leaf: leaf, chain.init(SMALL))
    assert jax.tree.structure(mapped) == jax.tree.structure(chain.init(SMALL))


def test_monitored_in_low_precision():
    """The diagnostics are float32, and rounding to bfloat16 is no conflict."""
    params = jnp.zeros(300, jnp.bfloat16)
    tx = D.monitored(jaxjd.upgrad(num_tasks=2), 2)
    rng = np.random.default_rng(0)
    state = tx.init(params)
    for _ in range(10):
        jacobian = (rng.standard_normal((2, 300)) - 0.4) * [[1], [-1]]
        direction, after = tx.update(jnp.asarray(jacobian, jnp.bfloat16), state)
        assert direction.dtype == jnp.bfloat16
        assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(after))
        assert float(after.conflict_rate) > 0
        assert float(after.update_conflict_rate) == 0


def test_monitored_passes_nan_on():
    tx = D.monitored(jaxjd.mean(num_tasks=2), 2)
    jacobian = jnp.array([[1.0, jnp.nan, 0.0], [1.0, 2.0, 3.0]])
    _, state = tx.update(jacobian, tx.init(jnp.zeros(3)))
    found = state._asdict()
    assert found.pop("solver_residual") == -1  # The mean solves no problem.
    del found["inner_state"]
    assert all(np.isnan(np.asarray(leaf)).any() for leaf in found.values())


@pytest.mark.parametrize("form", ["dense", pytest.param("factored", marks=pytest.mark.slow)])
def test_the_compiler_shares_the_gramian(form):
    m, params = 8, {"k": jnp.ones((40, 500)), "b": jnp.ones(500)}

    def losses_fn(params, x):
        hidden = jnp.tanh(x @ params["k"] + params["b"][None])
        return jnp.stack([jnp.mean((hidden - task / 4) ** 2) for task in range(m)])

    def program(tx):
        def step(params, state, x):
            jacobian = jaxjd.value_and_jacobian(losses_fn, form=form)(params, x)[1]
            return tx.update(jacobian, state, params)

        return jax.jit(step).lower(params, tx.init(params), jnp.ones((8, 40))).compile()

    # Whatever reads the Gramian, and is quick to compile.
    weighting = jaxjd.Weighting(lambda *_: (), lambda stat, state, **_: (stat.mean(0), state))
    plain = jaxjd.weighted(weighting, num_tasks=m)
    programs = [program(plain), program(D.monitored(plain, m))]
    # Kernel and bias if dense; else the cotangents, by what the inputs' rows have in common.
    product = {"dense": r"f32\[8,8\]\S* dot\(", "factored": r"f32\[8,8,500\]\S* dot\("}[form]
    wide = []
    for compiled in programs:
        text = compiled.as_text()
        shapes = dict(re.findall(r"%(\S+) = \w+\[([\d,]*)\]", text))
        lines = [line for line in text.splitlines() if re.search(product, line)]
        operands = [re.search(r"dot\(%[^,]+, %([^,)]+)", line).group(1) for line in lines]
        wide.append(sum("500" in shapes[operand].split(",") for operand in operands))
    assert wide[0] == wide[1] > 0
    if form == "dense":
        first, second = (compiled.cost_analysis()["flops"] for compiled in programs)
        gramian = 2 * m * m * 20_500
        assert first > gramian
        assert second - first < 0.4 * gramian


MONITOR_ERRORS = {
    "a factory": (lambda: D.monitored(jaxjd.upgrad, 2), "`aggregator` must be .*function"),
    "a weighting": (lambda: D.monitored(jaxjd.weightings.upgrad(), 2), "`aggregator` .*Weighting"),
    "no tasks": (lambda: D.monitored(jaxjd.upgrad(), 0), "`num_tasks` must be >= 1, got 0"),
    "a rate": (lambda: D.monitored(jaxjd.upgrad(), 2, [1.0]), "`learning_rate` must be a number"),
    "rows": (
        lambda: D.monitored(jaxjd.upgrad(), 3).update(
            jnp.eye(2), D.monitored(jaxjd.upgrad(), 3).init(jnp.zeros(2))
        ),
        "num_tasks=3, but the Jacobian has 2 rows",
    ),
    "no task axis": (
        lambda: D.monitored(jaxjd.upgrad(), 2).update(
            {"w": jnp.zeros(2)},
            D.monitored(jaxjd.upgrad(), 2).init({"w": jnp.zeros(2)}),
            {"w": jnp.zeros(2)},
        ),
        "leaf 'w': expected shape",
    ),
    "no matrix": (lambda: D.cosine_matrix(jnp.ones((2, 3))), "`gramian` must be a matrix"),
    "integers": (lambda: D.effective_rank(jnp.eye(2, dtype=int)), "`gramian` must be floating"),
    "a scalar": (lambda: D.stationarity_gap(jnp.float32(1)), "`gramian` must be a matrix"),
    "weights": (lambda: D.conflict_rate(jnp.eye(2), jnp.ones(3)), "`weights` has 3 entries"),
    "weights of rank 2": (
        lambda: D.predicted_change(jnp.eye(2), jnp.eye(2)),
        r"`weights` must have shape \(m,\)",
    ),
    "a rate per task": (
        lambda: D.predicted_change(jnp.eye(2), jnp.ones(2), jnp.ones(2)),
        "`learning_rate` must be a scalar",
    ),
    "updates of another shape": (
        lambda: D.predicted_change_by({"w": jnp.ones(3)}, {"w": jnp.ones((2, 4))}),
        r"leaf 'w': expected shape \(m, \*\(3,\)\)",
    ),
    "points": (lambda: D.hypervolume(jnp.ones((2, 3)), jnp.ones(2)), r"shape \(k, 2\)"),
    "a reference": (lambda: D.hypervolume(jnp.ones((2, 2)), 1.0), r"`reference` must have shape"),
    "names": (lambda: D.plot_conflict(jnp.eye(2), ["a"]), "`names` has 1 entries, .* 2 tasks"),
    "a heat map": (lambda: D.plot_conflict(jnp.ones(2)), r"`cosines` must have shape \(m, m\)"),
    "a history": (lambda: D.plot_weights(jnp.ones(2)), r"`history` must have shape \(steps, m\)"),
    "nothing": (lambda: D.plot_diagnostics({"a": jnp.ones(())}), "nothing to draw"),
    "a front": (lambda: D.plot_front(jnp.ones((2, 2)), jnp.ones((2, 3))), "`reference` must"),
}


@pytest.mark.parametrize("name", MONITOR_ERRORS)
def test_errors(name):
    call, message = MONITOR_ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call()


# The hypervolume


def area(points: np.ndarray, reference: np.ndarray) -> float:
    """The union of boxes by all cells of the grid that their corners span."""
    points = points[(points < reference).all(axis=1)]
    x = np.unique(np.append(points[:, 0], reference[0]))
    y = np.unique(np.append(points[:, 1], reference[1]))
    total = 0.0
    for x0, x1 in itertools.pairwise(x):
        for y0, y1 in itertools.pairwise(y):
            if ((points[:, 0] <= x0) & (points[:, 1] <= y0)).any():
                total += (x1 - x0) * (y1 - y0)
    return total


@pytest.mark.slow
def test_hypervolume():
    rng = np.random.default_rng(0)
    reference = np.array([1.0, 1.5])
    points = rng.uniform(-0.5, 2.0, (40, 12, 2))
    points[:, 3] = points[:, 4]  # Twice the same point, and ties in one loss.
    points[:, 5, 0] = points[:, 6, 0]
    fn = jax.jit(jax.vmap(lambda points: D.hypervolume(points, reference)))
    found = fn(jnp.asarray(points, jnp.float32))
    expected = [area(np.float32(each).astype(float), reference) for each in points]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert min(expected) < max(expected)
    assert float(D.hypervolume(jnp.array([[2.0, 0.0], [0.0, 2.0]]), jnp.ones(2))) == 0
    assert float(D.hypervolume(jnp.zeros((0, 2)), jnp.ones(2))) == 0
    assert np.isnan(D.hypervolume(jnp.array([[0.5, jnp.nan], [0.1, 0.1]]), jnp.ones(2)))


# Plots


def test_plots():
    figures = plt.get_fignums()
    own = mpl.figure.Figure().subplots()
    assert D.plot_conflict(jnp.eye(3), ["a", "b", "c"], own) is own
    assert [label.get_text() for label in own.get_yticklabels()] == ["a", "b", "c"]
    own = mpl.figure.Figure().subplots()
    assert D.plot_weights(np.ones((5, 9)), None, own) is own
    assert len({(line.get_color(), line.get_linestyle()) for line in own.lines}) == 9
    own = mpl.figure.Figure().subplots()
    points = jnp.array([[0.0, 1.0], [1.0, 0.0]])
    assert D.plot_front(points, points, own) is own
    # With axes of one's own pyplot gets no figure; without, there is one to show.
    assert plt.get_fignums() == figures
    ax = D.plot_conflict(jnp.eye(15))
    assert len(ax.texts) == 0
    assert ax.figure.number in plt.get_fignums()
    history = {
        "0/cosines": jnp.ones((4, 3, 3)),
        "0/conflict_rate": jnp.ones(4),
        "0/weights": jnp.ones((4, 3)),
        "grouped/weights": jnp.ones((4, 2, 3)),  # No panel.
    }
    figure = D.plot_diagnostics(history)
    assert [len(ax.lines) for ax in figure.axes] == [3, 1, 3]
    labels = [line.get_label() for line in figure.axes[0].lines]
    assert labels == ["0, 1", "0, 2", "1, 2"]
    figure.canvas.draw()
    plt.close("all")


def test_plots_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"jaxjd\[plot\]"):
        D.plot_weights(jnp.ones((3, 2)))
