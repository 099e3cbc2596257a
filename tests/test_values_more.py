"""The numbers of the methods that select, track or draw, against independent NumPy code."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import jaxjd
from jaxjd import weightings as W
from jaxjd.aggregators._graddrop import drop_signs
from tests.matrices import G_BASE, J_BASE, badly_scaled

J_KRUM = np.array([[1, 1, 1], [1, 0, 1], [75, -666, 23], [1, 2, 3], [2, 0, 1.0]])
J_TRIMMED = np.array([[1e11, 3], [1, -1e11], [-1e10, 1e10], [2, 2]])
PARAMS = {"a": np.zeros(4), "b": (np.zeros((1, 2)), np.zeros(()))}


def split(J: np.ndarray) -> dict:
    """A matrix of seven columns as a Jacobian of `PARAMS`; the split must not matter."""
    return jax.tree.map(jnp.asarray, {"a": J[:, :4], "b": (J[:, None, 4:6], J[:, 6])})


def joined(tree) -> np.ndarray:
    """What `split` undoes, for an update or one row."""
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def joined_rows(tree) -> np.ndarray:
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    return np.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in leaves], axis=1)


def sequence(seed: int, calls: int = 8, m: int = 3) -> tuple[list[np.ndarray], np.ndarray]:
    """Jacobians of related rows with very different lengths, and positive losses."""
    rng = np.random.default_rng(seed)
    drift = rng.standard_normal((m, 7))
    lengths = 10 ** rng.uniform(-1, 1, (m, 1))
    jacobians = [(drift + rng.standard_normal((m, 7))) * lengths for _ in range(calls)]
    return jacobians, rng.uniform(0.1, 3, (calls, m))


# --- ConFIG ------------------------------------------------------------------------------------

conflict_free = jax.jit(lambda G: W.conflict_free().update(G, ())[0])
conflict_free_to = jax.jit(lambda G, p: W.conflict_free(p).update(G, ())[0])


def conflict_free_reference(J: np.ndarray, p: np.ndarray) -> np.ndarray:
    """With the pseudo-inverse of the matrix of unit rows."""
    lengths = np.linalg.norm(J, axis=1, keepdims=True)
    units = np.divide(J, lengths, where=lengths > 0, out=np.zeros_like(J))
    direction = np.linalg.pinv(units) @ p
    direction /= np.linalg.norm(direction)
    return np.sum(J @ direction) * direction


@pytest.mark.parametrize(("dtype", "atol"), [("float64", 5e-9), ("float32", 2e-6)])
def test_conflict_free_on_base(dtype, atol):
    with jax.enable_x64(dtype == "float64"):
        update = conflict_free(jnp.asarray(G_BASE, dtype)) @ J_BASE
        np.testing.assert_allclose(update, [0.15880898, 2.07060676, 2.07060676], atol=atol)


def test_conflict_free_equals_the_pseudo_inverse_of_the_jacobian():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        for J in [
            *(rng.standard_normal((4, 9)) for _ in range(5)),
            *(badly_scaled(rng, 4, 9) for _ in range(5)),
            rng.standard_normal((4, 9)) * [[1], [0], [1], [1]],
            rng.standard_normal((4, 2)),  # More tasks than directions.
        ]:
            for p in (np.ones(4), rng.uniform(0.1, 1, 4)):
                expected = conflict_free_reference(J, p)
                weights = np.asarray(conflict_free_to(jnp.asarray(J @ J.T), jnp.asarray(p)))
                scale = np.abs(weights) @ np.linalg.norm(J, axis=1)
                np.testing.assert_allclose(weights @ J, expected, rtol=0, atol=1e-12 * scale)


def test_conflict_free_has_the_wanted_cosines_and_the_length_of_all_projections():
    rng = np.random.default_rng(1)
    p = np.array([0.2, 1.0, 0.5, 0.3])
    with jax.enable_x64(True):
        for _ in range(5):
            J = badly_scaled(rng, 4, 9)
            update = np.asarray(conflict_free_to(jnp.asarray(J @ J.T), jnp.asarray(p))) @ J
            direction = update / np.linalg.norm(update)
            cosines = (J / np.linalg.norm(J, axis=1, keepdims=True)) @ direction
            np.testing.assert_allclose(cosines / p, cosines[0] / p[0], rtol=1e-10)
            np.testing.assert_allclose(np.linalg.norm(update), np.sum(J @ direction), rtol=1e-12)


@pytest.mark.parametrize(
    "J", [np.zeros((2, 2)), np.array([[1.0, 2], [-3, -6]]), np.array([[0.1, 0.7], [-0.1, -0.7]])]
)
def test_conflict_free_without_a_direction_is_zero(J):
    J = J.astype(np.float32)
    np.testing.assert_array_equal(conflict_free(jnp.asarray(J @ J.T)), [0, 0])


# --- Krum --------------------------------------------------------------------------------------


@functools.cache
def krum(n_byzantine: int, n_selected: int, squared: bool = False):
    return jax.jit(lambda G: W.krum(n_byzantine, n_selected, squared).update(G, ())[0])


def krum_reference(J: np.ndarray, f: int, k: int, power: int) -> np.ndarray:
    m = J.shape[0]
    scores = []
    for i in range(m):
        distances = [np.linalg.norm(J[i] - J[j]) ** power for j in range(m) if j != i]
        scores.append(sum(sorted(distances)[: m - f - 2]))
    weights = np.zeros(m)
    weights[np.argsort(scores)[:k]] = 1 / k
    return weights


@pytest.mark.parametrize("squared", [False, True])
def test_krum_on_five_rows(squared):
    G = jnp.asarray(J_KRUM @ J_KRUM.T, jnp.float32)
    weights = krum(1, 4, squared)(G)
    np.testing.assert_array_equal(weights, [0.25, 0.25, 0, 0.25, 0.25])
    np.testing.assert_allclose(np.asarray(weights) @ J_KRUM, [1.25, 0.75, 1.5])
    np.testing.assert_array_equal(krum(1, 1, squared)(G), [0, 1, 0, 0, 0])


def test_krum_equals_distances_of_the_rows():
    rng = np.random.default_rng(2)
    different = 0
    with jax.enable_x64(True):
        for _ in range(100):
            J = rng.standard_normal((6, 4)) * rng.uniform(0.5, 2, (6, 1))
            found = [np.asarray(krum(1, 2, squared)(jnp.asarray(J @ J.T))) for squared in (0, 1)]
            np.testing.assert_array_equal(found[0], krum_reference(J, 1, 2, 1))
            np.testing.assert_array_equal(found[1], krum_reference(J, 1, 2, 2))
            different += (found[0] != found[1]).any()
    assert 0 < different < 50


@pytest.mark.parametrize(
    ("n_byzantine", "n_selected", "m", "enough"),
    [
        (1, 1, 3, False),
        (1, 1, 4, True),
        (1, 4, 4, True),
        (12, 4, 14, False),
        (12, 4, 15, True),
        (12, 15, 15, True),
        (12, 16, 15, False),
    ],
)
def test_krum_needs_enough_rows(n_byzantine, n_selected, m, enough):
    update = lambda G: W.krum(n_byzantine, n_selected).update(G, ())[0]
    if enough:
        assert jax.eval_shape(update, jnp.eye(m)).shape == (m,)
    else:
        with pytest.raises(ValueError, match=f"at least {max(n_byzantine + 3, n_selected)} tasks"):
            jax.eval_shape(update, jnp.eye(m))


def test_krum_leaves_out_rows_that_are_far_away():
    rng = np.random.default_rng(3)
    J = 1 + 0.1 * rng.standard_normal((8, 5))
    J[[2, 5]] = 1e3 * rng.standard_normal((2, 5))
    weights = np.asarray(krum(2, 6)(jnp.asarray(J @ J.T, jnp.float32)))
    np.testing.assert_array_equal(weights > 0, [1, 1, 0, 1, 1, 0, 1, 1])


# --- Trimmed mean ------------------------------------------------------------------------------


@functools.cache
def trimmed_mean(trim_number: int):
    return jax.jit(lambda J: jaxjd.trimmed_mean(trim_number).update(J, ())[0])


def test_trimmed_mean_of_four_rows():
    np.testing.assert_array_equal(
        trimmed_mean(1)(jnp.asarray(J_TRIMMED, jnp.float32)), np.float32([1.5, 2.5])
    )


@pytest.mark.parametrize("trim_number", [0, 1, 3])
def test_trimmed_mean_of_every_entry(trim_number):
    J = np.random.default_rng(4).standard_normal((7, 7))
    ordered = np.sort(J, axis=0)
    with jax.enable_x64(True):
        update = trimmed_mean(trim_number)(split(J))
    assert jax.tree.map(jnp.shape, update) == jax.tree.map(jnp.shape, PARAMS)
    expected = ordered[trim_number : 7 - trim_number].mean(axis=0)
    np.testing.assert_allclose(joined(update), expected, rtol=1e-13)
    if trim_number == 3:
        np.testing.assert_array_equal(joined(update), np.median(J, axis=0))


def test_trimmed_mean_drops_what_is_not_finite():
    J = np.arange(20, dtype=np.float32).reshape(5, 4)
    J[0, 1], J[2, 1] = np.inf, -np.inf
    J[3, 2] = np.nan  # Counts as the largest.
    J[[1, 2], 3] = np.nan  # One more than is dropped at that end.
    update = np.asarray(trimmed_mean(1)(jnp.asarray(J)))
    np.testing.assert_allclose(update[:3], [8, (5 + 13 + 17) / 3, (6 + 10 + 18) / 3], rtol=1e-6)
    assert np.isnan(update[3])


def test_trimmed_mean_of_bfloat16_is_taken_in_float32():
    J = jnp.asarray([256.0] + 255 * [1.0] + [-1e4, 1e4], jnp.bfloat16)[:, None]
    update = trimmed_mean(1)(J)
    assert update.dtype == jnp.bfloat16
    np.testing.assert_allclose(update, [511 / 256], rtol=0.004)  # A bfloat16 sum stays at 256.


# --- GradDrop ----------------------------------------------------------------------------------


def graddrop_reference(J, uniforms, leak, f):
    update = np.zeros(J.shape[1])
    for k in range(J.shape[1]):
        total = np.abs(J[:, k]).sum()
        purity = f(0.5 * (1 + J[:, k].sum() / total)) if total else f(0.5)
        for i in range(J.shape[0]):
            masked = (purity > uniforms[k] and J[i, k] > 0) or (
                purity < uniforms[k] and J[i, k] < 0
            )
            update[k] += (leak[i] + (1 - leak[i]) * masked) * J[i, k]
    return update


@pytest.mark.parametrize("leak", [None, [0.0, 0.3, 1.0, 0.5]])
@pytest.mark.parametrize("f", [None, lambda p: p**2])
def test_graddrop_for_given_draws(leak, f):
    rng = np.random.default_rng(5)
    J = rng.standard_normal((4, 50))
    J[:, 7] = 0
    J[:, 8] = np.abs(J[:, 8])
    uniforms = rng.uniform(size=50)
    with jax.enable_x64(True):
        update = drop_signs(
            jnp.asarray(J).reshape(4, 5, 10),
            jnp.asarray(uniforms).reshape(5, 10),
            None if leak is None else jnp.asarray(leak),
            f,
        )
    assert update.shape == (5, 10)
    expected = graddrop_reference(J, uniforms, leak or np.zeros(4), f or (lambda p: p))
    np.testing.assert_allclose(np.ravel(update), expected, rtol=1e-12, atol=1e-14)


def test_graddrop_keeps_one_sign_with_the_probability_of_its_purity():
    n = 20_000
    J = np.array([[-4.0, 1, 0], [6, 1, 0]])
    # Many copies of the three entries: each has a draw of its own.
    aggregator = jaxjd.graddrop(key=3)
    many = jnp.asarray(np.repeat(J[:, None], n, axis=1), jnp.float32)
    step = jax.jit(aggregator.update)
    first, state = step(many, aggregator.init(many[0]))
    second, _ = step(many, state)
    for update in (np.asarray(first), np.asarray(second)):
        assert set(np.unique(update[:, 0])) == {-4, 6}
        np.testing.assert_allclose(np.mean(update[:, 0] == 6), 0.6, atol=0.015)
        np.testing.assert_array_equal(update[:, 1:], np.tile([2, 0], (n, 1)))
    # New draws at every call, the same ones for the same key.
    assert 0.3 < np.mean(first[:, 0] == second[:, 0]) < 0.7
    again, _ = step(many, jaxjd.graddrop(key=jax.random.key(3)).init(many[0]))
    np.testing.assert_array_equal(first, again)
    other, _ = step(many, jaxjd.graddrop(key=4).init(many[0]))
    assert 0.3 < np.mean(first[:, 0] == other[:, 0]) < 0.7


def test_graddrop_draws_for_a_leaf_do_not_depend_on_the_others():
    aggregator = jaxjd.graddrop()
    step = jax.jit(aggregator.update)
    rng = np.random.default_rng(6)
    row = lambda *shape: jnp.asarray(rng.standard_normal((3, *shape)), jnp.float32)
    leaf = row(40)
    updates = []
    for other, last in ((row(2), row(5)), (row(0, 3), row())):
        jacobian = {"a": other, "b": leaf, "c": last}
        updates.append(step(jacobian, aggregator.init(None))[0]["b"])
    np.testing.assert_array_equal(*updates)
    # Leaves of one shape have different draws.
    same, _ = step({"a": leaf, "b": leaf}, aggregator.init(None))
    assert (same["a"] != same["b"]).any()


# --- STCH --------------------------------------------------------------------------------------

stch = jax.jit(lambda G, mu: W.stch(mu).update(G, ())[0])


@pytest.mark.parametrize(("dtype", "rtol"), [("float64", 1e-14), ("float32", 2e-6)])
def test_stch_weights_are_powers_of_the_norms(dtype, rtol):
    norms = np.array([1.0, 10.0, 3.0, 0.0])
    with jax.enable_x64(dtype == "float64"):
        weights = stch(jnp.asarray(G_BASE, dtype), jnp.asarray(1.0, dtype))
        exact = np.sqrt([18, 38]) / np.sqrt([18, 38]).sum()
        np.testing.assert_allclose(exact, [0.40766968, 0.59233032], atol=5e-9)
        np.testing.assert_allclose(weights, exact, rtol=rtol)
        np.testing.assert_allclose(weights @ J_BASE, [1.9233032, 1, 1], rtol=1e-6)
        for mu in (0.1, 0.5, 1, 2, 10):
            weights = stch(jnp.asarray(np.diag(norms**2), dtype), jnp.asarray(mu, dtype))
            expected = (norms / 10) ** (1 / mu)
            np.testing.assert_allclose(weights, expected / expected.sum(), rtol=10 * rtol)


def test_stch_limits():
    weigh = lambda norms, mu: stch(jnp.diag(jnp.square(jnp.array(norms))), mu)
    np.testing.assert_allclose(weigh([1.0, 10.0], 0.01), [0, 1], atol=1e-6)
    np.testing.assert_allclose(weigh([1.0, 10.0], 1e4), [0.5, 0.5], atol=1e-3)
    np.testing.assert_array_equal(weigh([0.0, 0.0], 1.0), [0.5, 0.5])
    np.testing.assert_array_equal(weigh([0.0, 1e-15], 1.0), [0, 1])


def test_stch_is_uniform_in_its_warm_up_and_then_relative_to_it():
    weighting = W.stch(mu=0.5, warmup_steps=2)
    update = jax.jit(weighting.update)
    state = weighting.init(2)
    calls = [([1, 2], [0.5, 0.5]), ([3, 4], [0.5, 0.5])]
    for norms in ([2, 3], [4, 3], [1, 6], [0, 3], [0, 0]):
        relative = (np.array(norms) / [2, 3]) ** 2
        calls.append((norms, relative / relative.sum() if relative.any() else [0.5, 0.5]))
    for count, (norms, expected) in enumerate(calls):
        weights, state = update(jnp.diag(jnp.square(jnp.array(norms, jnp.float32))), state)
        np.testing.assert_allclose(weights, expected, rtol=1e-5)
        assert state.count == count + 1
    np.testing.assert_array_equal(state.nadir, [2, 3])


def test_stch_of_a_task_without_a_gradient_in_the_warm_up():
    weighting = W.stch(warmup_steps=1)
    _, state = weighting.update(jnp.diag(jnp.array([0.0, 4.0])), weighting.init(2))
    weights, _ = weighting.update(jnp.diag(jnp.array([9.0, 4.0])), state)
    np.testing.assert_array_equal(weights, [0.5, 0.5])


# --- MoCo and DB-MTL ---------------------------------------------------------------------------


@functools.cache
def steps(name: str, *static):
    """Updates of a weighting and of its aggregator, compiled once for all hyper-parameters."""

    @jax.jit
    def weigh(arguments, stat, state, losses):
        return getattr(W, name)(*arguments, *static).update(stat, state, losses=losses)

    @jax.jit
    def step(arguments, jacobian, state, losses):
        aggregator = getattr(jaxjd, name)(*arguments, *static, num_tasks=3)
        return aggregator.update(jacobian, state, losses=losses)

    return weigh, step


def simplex_reference(x: np.ndarray) -> np.ndarray:
    """The projection onto the simplex by bisection on the threshold."""
    low, high = x.min() - 1, x.max()
    for _ in range(200):
        threshold = (low + high) / 2
        low, high = (
            (threshold, high) if np.maximum(x - threshold, 0).sum() > 1 else (low, threshold)
        )
    return np.maximum(x - (low + high) / 2, 0)


def softmax_reference(x: np.ndarray) -> np.ndarray:
    return np.exp(x) / np.exp(x).sum()


def moco_reference(jacobians, losses, beta, beta_sigma, gamma, gamma_sigma, rho, project):
    """The update, the weights of what is tracked, and those of the rows, of every call."""
    m = len(jacobians[0])
    tracked, weights = np.zeros_like(jacobians[0]), np.full(m, 1 / m)
    for t, J in enumerate(jacobians, start=1):
        factors = np.ones(m) if losses is None else losses[t - 1] / np.linalg.norm(J, axis=1)
        tracked = tracked - beta / t**beta_sigma * (tracked - factors[:, None] * J)
        step = (tracked @ tracked.T + rho * np.eye(m)) @ weights
        weights = project(weights - gamma / t**gamma_sigma * step)
        yield weights @ tracked, weights, weights * factors


@pytest.mark.parametrize(
    ("projection", "with_losses"),
    [
        ("softmax", True),
        ("simplex", False),
        pytest.param("softmax", False, marks=pytest.mark.slow),
        pytest.param("simplex", True, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    "arguments", [(0.5, 0.5, 0.1, 0.5, 0.0), (0.9, 0.0, 0.02, 0.2, 0.3)], ids=["defaults", "other"]
)
def test_moco_over_several_calls(arguments, projection, with_losses):
    jacobians, losses = sequence(7)
    project = {"softmax": softmax_reference, "simplex": simplex_reference}[projection]
    expected = moco_reference(jacobians, losses if with_losses else None, *arguments, project)
    with jax.enable_x64(True):
        weighting = W.moco(*arguments, projection)
        aggregator = jaxjd.moco(*arguments, projection, num_tasks=3)
        weigh, step = (functools.partial(f, arguments) for f in steps("moco", projection))
        inner, state = weighting.init(3, PARAMS), aggregator.init(PARAMS)
        seen = []
        for J, values, (update, weights, row_weights) in zip(
            jacobians, losses, expected, strict=True
        ):
            # As a vector, and as a dict in the order of the tasks.
            as_dict = {"x": jnp.asarray(values[0]), "y": jnp.asarray(values[1:])}
            found, inner = weigh(split(J), inner, values if with_losses else None)
            np.testing.assert_allclose(found, row_weights, rtol=1e-10, atol=1e-13)
            found, state = step(split(J), state, as_dict if with_losses else None)
            scale = np.linalg.norm(update)
            np.testing.assert_allclose(joined(found), update, rtol=0, atol=1e-11 * scale)
            np.testing.assert_allclose(state.weights, weights, rtol=0, atol=1e-12)
            chex.assert_trees_all_close(state.weighting, inner, rtol=1e-12)
            seen.append(weights)
        assert np.ptp(seen, axis=0).max() > 0.005
        assert state.weighting.count == len(jacobians)


def test_moco_without_losses_does_not_look_at_their_scale():
    """The tracked gradients of a task whose gradient is zero decay, with and without losses."""
    for losses in (None, jnp.ones(2)):
        aggregator = jaxjd.moco(beta_sigma=0.0, projection="simplex", num_tasks=2)
        state = aggregator.init(jnp.zeros(2))
        for J in (jnp.eye(2), jnp.diag(jnp.array([1.0, 0.0]))):
            update, state = aggregator.update(J, state, losses=losses)
        np.testing.assert_allclose(state.weighting.tracked, np.diag([0.75, 0.25]))
        np.testing.assert_allclose(update, state.weights @ np.diag([0.75, 0.25]), rtol=1e-6)


def test_moco_projects_long_rows_onto_a_ball():
    """So that with losses far above the gradients no step is longer than the ball's radius."""
    aggregator = jaxjd.moco(beta_sigma=0.0, max_norm=2.0, num_tasks=2)
    state = aggregator.init(jnp.zeros(2))
    J = jnp.array([[0.0, 3.0], [1.0, 0.0]])
    for _ in range(2):
        update, state = aggregator.update(J, state, losses=jnp.array([1000.0, 2.0]))
    np.testing.assert_allclose(state.weighting.tracked, [[0, 2], [1.5, 0]], rtol=1e-6)
    np.testing.assert_allclose(update, state.weights @ state.weighting.tracked, rtol=1e-6)


def db_mtl_reference(jacobians, losses, beta, beta_sigma):
    tracked = np.zeros_like(jacobians[0])
    for t, (J, values) in enumerate(zip(jacobians, losses, strict=True), start=1):
        logarithmic = J / values[:, None]
        tracked = logarithmic + beta / t**beta_sigma * (tracked - logarithmic)
        norms = np.linalg.norm(tracked, axis=1)
        weights = norms.max() / norms
        yield weights @ tracked, weights, weights / values


@pytest.mark.parametrize("arguments", [(0.9, 0.0), (0.3, 0.5), (0.0, 1.0)])
def test_db_mtl_over_several_calls(arguments):
    jacobians, losses = sequence(8)
    with jax.enable_x64(True):
        weighting, aggregator = W.db_mtl(*arguments), jaxjd.db_mtl(*arguments, num_tasks=3)
        weigh, step = (functools.partial(f, arguments) for f in steps("db_mtl"))
        inner, state = weighting.init(3, PARAMS), aggregator.init(PARAMS)
        expected = db_mtl_reference(jacobians, losses, *arguments)
        for J, values, (update, weights, row_weights) in zip(
            jacobians, losses, expected, strict=True
        ):
            found, inner = weigh(split(J), inner, values)
            np.testing.assert_allclose(found, row_weights, rtol=1e-11)
            found, state = step(split(J), state, tuple(map(jnp.asarray, values)))
            scale = np.linalg.norm(update)
            np.testing.assert_allclose(joined(found), update, rtol=0, atol=1e-12 * scale)
            np.testing.assert_allclose(state.weights, weights, rtol=1e-12)


def test_db_mtl_is_the_sum_of_the_gradients_of_the_logarithms_made_equally_long():
    target = jnp.array([[1.0, 2.0, -1.0], [0.0, 1.0, 1.0], [3.0, -1.0, 0.0]])
    losses = lambda p: jnp.sum((p[None] - target) ** 2, axis=1) * jnp.array([1.0, 1e4, 1e-4])
    params = jnp.array([0.3, -0.2, 0.5])
    values, J = losses(params), jax.jacrev(losses)(params)
    aggregator = jaxjd.db_mtl(beta=0.0, num_tasks=3)
    update, _ = aggregator.update(J, aggregator.init(params), losses=values)
    logarithmic = np.asarray(jax.jacrev(lambda p: jnp.log(losses(p)))(params))
    norms = np.linalg.norm(logarithmic, axis=1, keepdims=True)
    np.testing.assert_allclose(update, np.sum(norms.max() / norms * logarithmic, 0), rtol=1e-4)


def test_db_mtl_of_losses_that_have_no_logarithm():
    weighting = W.db_mtl()
    update = jax.jit(weighting.update)
    state = weighting.init(2, jnp.zeros(2))
    weights, _ = update(jnp.eye(2), state, losses=jnp.array([0.0, 2.0]))
    np.testing.assert_array_equal(weights, [0, 0.5])
    weights, _ = update(jnp.eye(2) * jnp.array([[0.0], [1.0]]), state, losses=jnp.array([1.0, 2]))
    np.testing.assert_array_equal(weights, [0, 0.5])
    weights, _ = update(jnp.eye(2), state, losses=jnp.array([-1.0, 2.0]))
    assert np.isnan(weights).all()


# --- GradNorm ----------------------------------------------------------------------------------


def gradnorm_reference(jacobians, losses, alpha, lr):
    """The slope is that of the objective, by central differences in the logits."""
    m = len(jacobians[0])
    logits = np.zeros(m)
    for J, values in zip(jacobians, losses, strict=True):
        ratios = values / losses[0]
        rates = ratios / ratios.mean()
        lengths = np.linalg.norm(J, axis=1)
        weigh = lambda s: m * np.exp(s) / np.exp(s).sum()
        mean = np.mean(weigh(logits) * lengths)
        objective = lambda s, mean=mean, rates=rates, lengths=lengths, weigh=weigh: (
            np.abs(weigh(s) * lengths - mean * rates**alpha).sum() / mean
        )
        yield weigh(logits)
        h = 1e-6
        slope = [(objective(logits + d) - objective(logits - d)) / (2 * h) for d in h * np.eye(m)]
        logits = logits - lr * np.array(slope)


@pytest.mark.parametrize("arguments", [(1.5, 0.025), (0.12, 0.2), (0.0, 0.1)])
def test_gradnorm_over_several_calls(arguments):
    jacobians, losses = sequence(9)
    with jax.enable_x64(True):
        weighting = W.gradnorm(*arguments)
        aggregator = jaxjd.gradnorm(*arguments, num_tasks=3)
        weigh, step = (functools.partial(f, arguments) for f in steps("gradnorm"))
        inner, state = weighting.init(3), aggregator.init(PARAMS)
        expected = gradnorm_reference(jacobians, losses, *arguments)
        for J, values, weights in zip(jacobians, losses, expected, strict=True):
            found, inner = weigh(jnp.asarray(J @ J.T), inner, values)
            np.testing.assert_allclose(found, weights, rtol=1e-7)
            np.testing.assert_allclose(found.sum(), 3, rtol=1e-12)
            update, state = step(split(J), state, {"a": values[:1], "b": values[1:]})
            np.testing.assert_allclose(joined(update), weights @ J, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(inner.initial_losses, losses[0])
        assert np.ptp(found) > 0.01


def test_gradnorm_makes_the_gradients_as_long_as_the_rates_ask_for():
    # Constant norms and rates: the weighted norms go to multiples of r, in a scan.
    norms, losses = np.array([1.0, 10.0, 0.1]), np.array([1.0, 0.5, 2.0])
    weighting = W.gradnorm(alpha=1.0, lr=0.01)
    G = jnp.diag(jnp.asarray(norms**2, jnp.float32))

    @jax.jit
    def train(state):
        call = lambda state, values: weighting.update(G, state, losses=values)[::-1]
        first = jnp.ones((1, 3))
        later = jnp.broadcast_to(jnp.asarray(losses, jnp.float32), (3000, 3))
        return lax.scan(call, state, jnp.concatenate([first, later]))

    _, weights = train(weighting.init(3))
    wanted = losses / norms
    # The slope of an absolute value does not vanish: the last steps go back and forth.
    np.testing.assert_allclose(weights[-1] / 3, wanted / wanted.sum(), rtol=0.05)
    np.testing.assert_allclose(weights.sum(axis=1), 3, rtol=1e-5)


def test_gradnorm_of_losses_that_are_not_positive():
    weighting = W.gradnorm(lr=0.1)
    update = jax.jit(weighting.update)
    state = weighting.init(3)
    for losses in ([1.0, 0.0, -1.0], [0.5, 3.0, 2.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 0.0]):
        weights, state = update(jnp.eye(3), state, losses=jnp.array(losses))
        assert np.isfinite(weights).all()
        assert np.isfinite(state.logits).all()
    weights, _ = update(jnp.zeros((3, 3)), weighting.init(3), losses=jnp.ones(3))
    np.testing.assert_array_equal(weights, [1, 1, 1])


# --- M-ConFIG ----------------------------------------------------------------------------------


def momentum_reference(calls, m, n, b1, b2, eps):
    """Adam's raw moments and their corrections; `calls` hold pairs of task (or None) and rows."""
    first, counts = np.zeros((m, n)), np.zeros(m, int)
    pseudo_first, second, t = np.zeros(n), np.zeros(n), 0
    for task, rows in calls:
        for i in range(m) if task is None else [task]:
            counts[i] += 1
            first[i] = b1 * first[i] + (1 - b1) * (rows[i] if task is None else rows)
        if not counts.all():
            yield np.zeros(n)
            continue
        t += 1
        corrected = first / (1 - b1 ** counts[:, None])
        direction = conflict_free_reference(corrected, np.ones(m))
        raw = direction * (1 - b1**t)
        gradient = (raw - b1 * pseudo_first) / (1 - b1)
        pseudo_first = raw
        second = b2 * second + (1 - b2) * gradient**2
        root = np.sqrt(second / (1 - b2**t))
        yield direction / (root + eps * np.sqrt(np.mean(root**2)))


@jax.jit
def momentum_step(arguments, updates, state, task=None):
    aggregator = jaxjd.momentum_conflict_free(*arguments, num_tasks=3)
    return aggregator.update(updates, state, task=task)


MODES = {
    "all": [None] * 9,
    "one": [0, 1, 2] * 4,
    "uneven": [0, 0, 1, 0, 2, 2, 1, 0, 1],
    "mixed": [1, None, 0, None, 2, 2, None],
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("arguments", [(0.9, 0.999, 1e-8), (0.5, 0.9, 1e-2), (0.0, 0.0, 0.0)])
def test_momentum_conflict_free_over_several_calls(arguments, mode):
    tasks = MODES[mode]
    jacobians, _ = sequence(10, len(tasks))
    rows = [J if task is None else J[task] for task, J in zip(tasks, jacobians, strict=True)]
    expected = momentum_reference(zip(tasks, rows, strict=True), 3, 7, *arguments)
    with jax.enable_x64(True):
        aggregator = jaxjd.momentum_conflict_free(*arguments, num_tasks=3)
        state, ready = aggregator.init(PARAMS), 0
        for task, J, update in zip(tasks, jacobians, expected, strict=True):
            if task is None:
                found, state = momentum_step(arguments, split(J), state)
            else:
                gradient = jax.tree.map(lambda leaf, i=task: leaf[i], split(J))
                found, state = momentum_step(arguments, gradient, state, task)
            np.testing.assert_allclose(joined(found), update, rtol=1e-8, atol=1e-10)
            ready += bool(update.any())
        assert state.count == ready > 3
        counted = [sum(task in (None, i) for task in tasks) for i in range(3)]
        np.testing.assert_array_equal(state.task_counts, counted)
        # The last direction is the combination of the moments with the weights in the state.
        combined = np.asarray(state.weights) @ joined_rows(state.first_moments)
        np.testing.assert_allclose(joined(state.direction), combined, rtol=1e-9)


def test_momentum_conflict_free_in_float32_equals_float64():
    jacobians, _ = sequence(11, 300)
    aggregator = jaxjd.momentum_conflict_free(num_tasks=3)

    @jax.jit
    def run(jacobians):
        call = lambda state, J: aggregator.update(J, state)[::-1]
        return lax.scan(call, aggregator.init(jacobians[0, 0]), jacobians)[1]

    runs = {}
    for dtype in ("float32", "float64"):
        with jax.enable_x64(dtype == "float64"):
            runs[dtype] = run(jnp.asarray(np.stack(jacobians), dtype))
    # Including the corrections of the moments, where 1 - b^t cancels.
    np.testing.assert_allclose(runs["float32"], runs["float64"], rtol=0, atol=2e-5)


def test_momentum_conflict_free_does_not_depend_on_the_scale():
    jacobians, _ = sequence(12, 4)
    aggregator = jaxjd.momentum_conflict_free(num_tasks=3)
    step = jax.jit(aggregator.update)
    runs = []
    for scale in (1.0, 2.0**-33, 2.0**33):
        state, run = aggregator.init(jnp.zeros(7)), []
        for J in jacobians:
            update, state = step(jnp.asarray(scale * J, jnp.float32), state)
            run.append(update)
        runs.append(jnp.stack(run))
    np.testing.assert_array_equal(runs[0], runs[1])
    np.testing.assert_array_equal(runs[0], runs[2])


def test_momentum_conflict_free_of_parameters_without_a_gradient():
    jacobian = jnp.array([[1.0, 0.0, 2.0], [0.5, 0.0, 2.0]])
    for eps in (0.0, 1e-8):
        aggregator = jaxjd.momentum_conflict_free(eps=eps, num_tasks=2)
        state = aggregator.init(jacobian[0])
        for _ in range(2):
            update, state = aggregator.update(jacobian, state)
            np.testing.assert_allclose(update, [1, 0, 1], rtol=1e-5)
        zero, _ = aggregator.update(jnp.zeros((2, 3)), aggregator.init(jacobian[0]))
        np.testing.assert_array_equal(zero, [0, 0, 0])


def test_momentum_conflict_free_keeps_float32_moments_of_bfloat16_parameters():
    params = jnp.zeros(3, jnp.bfloat16)
    aggregator = jaxjd.momentum_conflict_free(num_tasks=2)
    state = aggregator.init(params)
    gradient = jnp.ones(3, jnp.bfloat16)
    for task in range(2):
        update, state = aggregator.update(gradient, state, params, task=task)
    assert update.dtype == jnp.bfloat16
    for tree in (state.first_moments, state.direction, state.second_moment):
        assert tree.dtype == jnp.float32


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.slow
def test_momentum_conflict_free_goes_to_the_pareto_front(single):
    # Two ellipses: at the front their gradients are opposite.
    scales = jnp.array([[1.0, 5.0], [30.0, 3.0]])
    centers = jnp.array([[1.0, 1.0], [-1.0, 0.0]])
    losses = lambda p: jnp.sum(scales * (p[None] - centers) ** 2, axis=1)
    tx = optax.chain(jaxjd.momentum_conflict_free(num_tasks=2), optax.scale_by_learning_rate(0.02))

    def step(carry, task):
        params, state = carry
        if single:
            gradient = jax.grad(lambda p: losses(p)[task])(params)
            updates, state = tx.update(gradient, state, params, task=task)
        else:
            updates, state = tx.update(jax.jacrev(losses)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    def train(start):
        tasks = jnp.arange(1500) % 2
        (params, _), _ = lax.scan(step, (start, tx.init(start)), tasks)
        return params

    starts = jnp.array([[3.0, -2.0], [-2.0, 2.0], [0.5, 3.0]])
    jacobian = jax.vmap(jax.jacrev(losses))
    cosine = lambda p: (
        np.sum(np.prod(jacobian(p), axis=1), axis=1)
        / np.prod(np.linalg.norm(jacobian(p), axis=2), axis=1)
    )
    ends = jax.jit(jax.vmap(train))(starts)
    assert (cosine(starts) > -0.9).all()
    np.testing.assert_allclose(cosine(ends), -1, atol=1e-2)


def test_momentum_conflict_free_costs_one_gradient_per_step():
    """With `task`, no Jacobian is made, whatever the number of tasks."""
    aggregator = jaxjd.momentum_conflict_free(num_tasks=4)
    gradient = jnp.ones(5)
    update = lambda g, state, task: aggregator.update(g, state, task=task)
    updates, state = jax.eval_shape(update, gradient, aggregator.init(gradient), jnp.int32(0))
    assert updates.shape == (5,)
    assert state.first_moments.shape == (4, 5)
