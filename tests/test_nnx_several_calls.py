"""Steps that call a function of modules several times: microbatches and two more batches."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxjd
from jaxjd.integrations import nnx as engines
from tests.matrices import gaussian

X, TARGETS = jnp.asarray(gaussian(0, 12, 8)), jnp.asarray(gaussian(1, 12, 2))
PARTS = 3


class Net(nnx.Module):
    """With statistics, a random stream, a count and a frozen layer."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.frozen = nnx.Linear(8, 8, rngs=rngs)
        self.trunk = nnx.Linear(8, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=nnx.Rngs(dropout=1))
        self.head = nnx.Linear(8, 2, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        self.calls[...] += 1
        return self.head(self.dropout(jnp.tanh(self.norm(self.trunk(self.frozen(x))))))


WRT = nnx.All(nnx.Param, nnx.Not(nnx.PathContains("frozen")))


def losses_of(model, x, targets, scale=1.0):
    errors = scale * (model(x) - targets) ** 2
    return {"a": jnp.mean(errors[:, 0]), "b": jnp.mean(errors[:, 1])}


def numbers(model):
    """All state, keys as numbers."""
    raw = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return jax.tree.map(raw, nnx.to_pure_dict(nnx.state(model)))


def leaves(tree):
    return jax.tree.leaves(tree)


close = functools.partial(chex.assert_trees_all_close, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("every", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_microbatches_are_calls_one_after_the_other(every):
    init, apply = engines.aggregated_value_and_grad(
        losses_of,
        jaxjd.weightings.upgrad(),
        num_tasks=2,
        microbatches=PARTS,
        wrt=WRT,
        every=every,
    )
    model, by_hand = Net(), Net()
    frozen = model.frozen.kernel.get_raw_value()

    @nnx.jit
    def one(model, x, targets):
        engine = engines.value_and_jacobian(losses_of, wrt=WRT)
        return engine(model, x, targets, scale=2.0)

    state = init(model)
    run = nnx.jit(lambda model, state: apply(state, model, X, TARGETS, scale=2.0))
    for call in range(every):
        (losses, gradient), state = run(model, state)
        parts = [one(by_hand, X[n::PARTS], TARGETS[n::PARTS]) for n in range(PARTS)]
        wanted, rows = jax.tree.map(lambda *parts: sum(parts) / PARTS, *parts)
        if call == 0:
            weights, _ = jaxjd.weightings.upgrad().update(jaxjd.gramian(rows), ())
        close(losses, wanted)
        close(leaves(gradient), leaves(jaxjd.combine(weights, rows)))
        close(numbers(model), numbers(by_hand))
        assert model.calls[...] == model.dropout.rngs.count[...] == PARTS * (call + 1)
    assert np.any(model.norm.mean[...] != 0)
    np.testing.assert_array_equal(model.frozen.kernel.get_raw_value(), frozen)


@pytest.mark.parametrize("parts", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_two_more_batches_are_calls_before(parts):
    """Masks of all three batches differ, as those of independent batches have to."""
    weighting = jaxjd.weightings.sdmgrad()
    init, apply = engines.aggregated_value_and_grad(
        losses_of, weighting, num_tasks=2, microbatches=parts
    )
    model, by_hand = Net(), Net()
    batches = [(X[n::3], TARGETS[n::3]) for n in range(3)]
    state = init(model)
    run = nnx.jit(
        lambda model, state: apply(state, model, *batches[2], cross_args=tuple(batches[:2]))
    )

    @nnx.jit
    def one(model, x, targets):
        return engines.value_and_jacobian(losses_of)(model, x, targets)

    def whole(x, targets):
        found = [one(by_hand, x[n::parts], targets[n::parts]) for n in range(parts)]
        return jax.tree.map(lambda *found: sum(found) / parts, *found)

    (losses, gradient), after = run(model, state)
    (_, first), (_, second), (wanted, rows) = (whole(*batch) for batch in batches)
    weights, _ = weighting.update(jaxjd.cross_gramian(first, second), state.aggregator.weighting)
    close(losses, wanted)
    close(after.aggregator.weights, weights)
    close(leaves(gradient), leaves(jaxjd.combine(weights, rows)))
    close(numbers(model), numbers(by_hand))
    assert model.calls[...] == 3 * parts


def test_auxiliary_output_of_parts_and_a_stream_of_its_own():
    """A random stream that is an argument moves on as well; a module's output is collected."""

    def losses(model, x, rngs, scale):
        y = model(x) * jax.random.uniform(rngs.noise()) * scale
        return jnp.mean(y, axis=0), {"y": y}

    model, rngs = nnx.Linear(8, 2, rngs=nnx.Rngs(0)), nnx.Rngs(noise=3)
    _, apply = engines.aggregated_value_and_grad(
        losses, jaxjd.weightings.sum(), has_aux=True, microbatches=4
    )
    ((found, aux), gradient), _ = apply(
        jaxjd.aggregated.AggregatedGradState((), jaxjd.sum().init(())), model, X, rngs, 2.0
    )
    assert rngs.noise.count[...] == 4
    assert aux["y"].shape == (4, 3, 2)
    other = nnx.Rngs(noise=3)
    wanted = [losses(model, X[n::4], other, 2.0)[1]["y"] for n in range(4)]
    close(aux["y"], jnp.stack(wanted))
    close(found, jnp.mean(jnp.stack(wanted), axis=(0, 1)))
    assert gradient["kernel"][...].shape == (8, 2)


def test_a_subset_of_the_tasks():
    model = nnx.Linear(8, 5, rngs=nnx.Rngs(0))
    losses = lambda model, tasks: jnp.mean(model(X)[:, tasks] ** 2, axis=0)
    subset = jaxjd.subset(jaxjd.weightings.mean(), num_tasks=5, num_present=2)
    init, apply = engines.aggregated_value_and_grad(losses, subset)
    tasks = jnp.array([3, 1])
    (_, gradient), state = apply(init(model), model, tasks, tasks=tasks)
    np.testing.assert_array_equal(state.aggregator.weights, [0, 0.5, 0, 0.5, 0])
    wanted = nnx.grad(lambda model: jnp.mean(losses(model, tasks)))(model)
    close(leaves(gradient), leaves(wanted))
