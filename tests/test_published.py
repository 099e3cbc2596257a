"""The published problems: their definitions, and the page that shows their results."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests.benchmarks import iwrm, landscape, pareto_fronts, published, trajectories


@pytest.mark.parametrize("page", published.PAGES, ids=lambda page: page.name)
def test_pages_show_the_committed_results(page):
    text = page.read_text()
    assert published.filled(page) == text, "run `python -m tests.benchmarks.published`"


def test_every_method_has_been_measured():
    rows = published.read("landscape")["rows"]
    assert [row["method"] for row in rows] == list(landscape.METHODS)
    for row in rows:
        assert len(row["reached"]) == len(landscape.STARTS)
        assert 0 <= row["share"] <= 1
    rows = published.read("trajectories")["rows"]
    assert [row["method"] for row in rows] == list(trajectories.METHODS)
    assert set(published.read("pareto_fronts")) == set(
        pareto_fronts.PROBLEMS | pareto_fronts.THREE_LOSSES
    )
    for row in published.read("iwrm")["rows"]:
        assert len(row["seeds"]) == iwrm.SEEDS


def test_landscape_is_the_published_one():
    """Losses at the starts, as the papers' figures have them."""
    expected = [[0.655, 7.90], [0, 0], [0.794, 6.69], [0.039, -4.75], [-0.883, 2.81]]
    found = jax.vmap(landscape.losses_fn)(jnp.asarray(landscape.STARTS))
    np.testing.assert_allclose(found, expected, atol=6e-3)


def test_distance_to_the_landscapes_front():
    far = jax.vmap(landscape.distance)(jnp.asarray(landscape.FRONT[::50] + 1e-4, jnp.float32))
    assert float(jnp.abs(far).max()) < 1e-3
    span = landscape.FRONT.max(0) - landscape.FRONT.min(0)
    point = landscape.FRONT[300] + 0.5 * span
    assert float(landscape.distance(jnp.asarray(point, jnp.float32))) == pytest.approx(0.5, abs=0.2)
    starts = jax.vmap(landscape.losses_fn)(jnp.asarray(landscape.STARTS))
    assert (np.asarray(jax.vmap(landscape.distance)(starts)) > 0.1).all()


def test_the_mean_stays_away_from_the_front_at_one_start():
    row = published.read("landscape")["rows"][list(landscape.METHODS).index("mean")]
    keys = jax.random.split(jax.random.key(0), len(landscape.STARTS))
    program = landscape.METHODS["mean"]()
    run = jax.jit(lambda starts: landscape.simulate(program, starts, keys)[2])
    found = np.asarray(run(jnp.asarray(landscape.STARTS)))[:, -1]
    assert [bool(far < landscape.REACHED) for far in found] == row["reached"]
    assert row["reached"] == [True, True, False, True, True]


@pytest.mark.parametrize(
    ("method", "stops"), [("mgda", 4), pytest.param("upgrad", 0, marks=pytest.mark.slow)]
)
def test_some_stop_at_stationary_points_that_are_not_optimal(method, stops):
    problem = trajectories.PROBLEMS["element-wise quadratic"]
    paths = trajectories.descend(method, problem)
    arrived = trajectories.gap(paths, problem)[:, -1] < trajectories.ARRIVED
    assert int((~arrived).sum()) == stops
    # Who stops does so where one of the two gradients is zero.
    assert (np.abs(paths[~arrived, -1]).min(axis=1) < 0.2).all()


@pytest.mark.slow
def test_quadratic_forms_and_their_pareto_set():
    problem = trajectories.PROBLEMS["convex quadratic forms"]
    jacobians = jax.vmap(jax.jacrev(problem.losses_fn))(
        jnp.asarray(problem.pareto_set[1:-1:100], jnp.float32)
    )
    first, second = jacobians[:, 0], jacobians[:, 1]
    cosines = jnp.sum(first * second, axis=1) / (
        jnp.linalg.norm(first, axis=1) * jnp.linalg.norm(second, axis=1)
    )
    np.testing.assert_allclose(cosines, -1, atol=1e-3)
    gaps = trajectories.gap(problem.pareto_set[None, ::100], problem)
    assert gaps.max() < 1e-3


def test_volume_of_three_losses():
    corner = np.array([[0.1, 0.1, 0.1]])
    assert pareto_fronts.volume(corner) == pytest.approx(1.0)
    two = np.array([[0.1, 0.6, 0.1], [0.6, 0.1, 0.6], [0.9, 0.9, 0.9]])
    # One box of 1 x 0.5 x 1 and one of 0.5 x 1 x 0.5 that share 0.5 x 0.5 x 0.5.
    assert pareto_fronts.volume(two) == pytest.approx(0.5 + 0.25 - 0.125)
    assert pareto_fronts.volume(np.array([[2.0, 0.0, 0.0]])) == 0
    rays = np.asarray(pareto_fronts.simplex_lattice(), float)
    assert rays.shape == (136, 3)
    problems = pareto_fronts.THREE_LOSSES
    plane, sphere = 0.5 * rays, rays / np.linalg.norm(rays, axis=1, keepdims=True)
    assert pareto_fronts.share(problems["DTLZ1"], plane) == pytest.approx(1, abs=2e-3)
    assert pareto_fronts.share(problems["DTLZ2"], sphere) == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize(("name", "total"), [("DTLZ1", 0.5), ("DTLZ2", 1.0)])
@pytest.mark.slow
def test_fronts_of_three_losses(name, total):
    """A plane and a sphere, where the last variables are at their best."""
    problem = pareto_fronts.THREE_LOSSES[name]
    x = jnp.full(problem.size, 0.5).at[:2].set(jnp.array([0.3, 0.8]))
    best = problem.losses(jnp.arcsin(jnp.sqrt(x)))
    found = best.sum() if name == "DTLZ1" else jnp.linalg.norm(best)
    assert float(found) == pytest.approx(total, rel=1e-4)
    worse = problem.losses(problem.start(1)[0])
    assert (worse.sum() if name == "DTLZ1" else jnp.linalg.norm(worse)) > 1.1 * total


@pytest.mark.slow
def test_shifted_sums_are_depthwise_convolutions():
    key_x, key_kernel = jax.random.split(jax.random.key(0))
    x = jax.random.normal(key_x, (2, 6, 5, 3))
    kernel = jax.random.normal(key_kernel, (3, 3, 6))

    def convolve(x, kernel):
        return lax.conv_general_dilated(
            x,
            kernel[:, :, None],
            (1, 1),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=3,
        )

    expected, pullback = jax.vjp(convolve, x, kernel)
    found, our_pullback = jax.vjp(iwrm._depthwise, x, kernel)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for ours, theirs in zip(our_pullback(expected), pullback(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4)


@pytest.fixture
def search_with(monkeypatch):
    """Searches with ``run(seed, data, batches, rate) -> (seed, losses)`` in place of training."""

    def search(run):
        monkeypatch.setattr(iwrm, "make_run", lambda method: run)
        monkeypatch.setattr(iwrm, "init", lambda key: int(jax.random.key_data(key)[-1]))
        batches = np.zeros((256, iwrm.BATCH), int)
        monkeypatch.setattr(iwrm, "split", lambda data, seed: (data, data, batches))
        monkeypatch.setattr(iwrm, "evaluate", lambda params, data: (0.1, 0.9))
        return iwrm.search("upgrad", (np.zeros(0), np.zeros(0)), lambda line: None)

    return search


def test_the_search_finds_the_best_rate_that_diverges_with_no_seed(search_with):
    """Losses are best at the coarse rate 0.1; one seed diverges just above, and another below."""
    calls = []

    def run(seed, data, batches, rate):
        calls.append(seed)
        off = float(jnp.log10(rate)) + 1
        diverges = (seed == 1 and off > 0.03) or (seed == 2 and off < -0.02)
        loss = np.nan if diverges or off > 1 else 0.5 + abs(off - 0.01 * seed)
        return seed, np.full(len(batches), loss)

    found = search_with(run)
    assert found["coarse"]["best"] == pytest.approx(0.1)
    assert np.log10(found["learning_rate"]) == pytest.approx(-1 + 0.01, abs=0.014)
    compared = np.log10([row["rate"] for row in found["closer"]]) + 1
    assert 1 < len(compared) < iwrm.FINALISTS
    assert compared.min() > -0.02 - 1e-6
    assert compared.max() < 0.03 + 1e-6
    assert [len(row["curve"]) for row in found["seeds"]] == [256] * iwrm.SEEDS
    # Without giving up, all runs take their eight epochs.
    everything = len(iwrm.COARSE) + len(iwrm.CLOSER) + (iwrm.SEEDS - 1) * iwrm.FINALISTS
    assert len(calls) < 0.9 * iwrm.EPOCHS * everything


def test_the_search_goes_on_where_the_best_rates_diverge_with_another_seed(search_with):
    def run(seed, data, batches, rate):
        off = float(jnp.log10(rate)) + 1
        diverges = seed and abs(off) < 0.08  # More than ten of the fifty.
        return seed, np.full(len(batches), np.nan if diverges else 0.5 + abs(off))

    found = search_with(run)
    assert 0.08 <= abs(np.log10(found["learning_rate"]) + 1) < 0.1


def test_seeds_choose_images_and_batches():
    data = (np.arange(5000.0)[:, None], np.arange(5000))
    train, test, batches = iwrm.split(data, 0)
    assert len(train[1]) == iwrm.IMAGES
    assert not set(train[1]) & set(test[1])
    assert batches.shape == (256, 32)
    for epoch in batches.reshape(iwrm.EPOCHS, -1):
        assert sorted(epoch) == list(range(iwrm.IMAGES))
    again = iwrm.split(data, 0)
    np.testing.assert_array_equal(again[0][1], train[1])
    assert (iwrm.split(data, 1)[0][1] != train[1]).any()


def test_steps_of_both_kinds_have_the_network_of_the_paper():
    params = jax.eval_shape(iwrm.init, jax.random.key(0))
    batch = (jax.ShapeDtypeStruct((4, 28, 28, 1), jnp.float32), jnp.zeros(4, jnp.int32))
    assert jax.eval_shape(iwrm.logits_fn, params, batch[0]).shape == (4, 10)
    rate = jnp.float32(0.1)
    for method in ("sgd", "upgrad"):
        after, loss = jax.eval_shape(iwrm.make_step(method), params, batch, rate)
        assert jax.tree.map(lambda p: p.shape, after) == jax.tree.map(lambda p: p.shape, params)
        assert loss.shape == ()
