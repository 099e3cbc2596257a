"""Tasks of one shape, stacked on an axis: what a loop over the tasks gives, in one pass."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxjd
from tests import test_cost_of_shapes as costs

M, BATCH, WIDTH = 10, 4, 5


def problem():
    """A trunk with a table of heads, and a batch, targets and a one-hot vector for every task."""
    keys = jax.random.split(jax.random.key(0), 5)
    params = {
        "trunk": jax.random.normal(keys[0], (3 + M, WIDTH)),
        "bias": jax.random.normal(keys[1], (1, WIDTH)),
        "heads": jax.random.normal(keys[2], (M, WIDTH)),
    }
    x, y = jax.random.normal(keys[3], (M, BATCH, 3)), jax.random.normal(keys[4], (M, BATCH))
    return params, (jnp.arange(M), jnp.eye(M, dtype=x.dtype), x, y)


def loss(params, task, one_hot, x, y):
    x = jnp.concatenate([x, jnp.broadcast_to(one_hot, (x.shape[0], M))], axis=1)
    hidden = jnp.tanh(x @ params["trunk"] + params["bias"])
    return jnp.mean((hidden @ params["heads"][task] - y) ** 2)


def in_a_loop(params, data):
    def losses(params):
        return jnp.stack([loss(params, *(part[i] for part in data)) for i in range(M)])

    return losses(params), jax.jacrev(losses)(params)


def with_aux(params, task, one_hot, x, y):
    return loss(params, task, one_hot, x, y), {"largest": jnp.max(y), "task": task}


def close(found, wanted):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10), found, wanted
    )


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_the_numbers_of_a_loop_over_the_tasks(chunk_size):
    with jax.enable_x64(True):
        params, data = problem()
        losses, rows = jax.jit(in_a_loop)(params, data)
        matrix = jaxjd.gramian(rows)
        weights = jnp.linspace(0.1, 1.0, M)

        @jax.jit
        def run(params, data):
            engine = jaxjd.per_task_value_and_jacobian(
                with_aux, has_aux=True, chunk_size=chunk_size, form="auto"
            )
            (values, aux), jacobian = engine(params, *data)
            engine = jaxjd.per_task_value_and_gramian(loss, chunk_size=chunk_size)
            _, gramian, pullback = engine(params, *data)
            return values, jaxjd.materialize(jacobian), gramian, pullback(weights), aux

        values, jacobian, gramian, gradient, aux = run(params, data)
        close((values, jacobian, gramian), (losses, rows, matrix))
        close(gradient, jaxjd.combine(weights, rows))
        np.testing.assert_array_equal(aux["task"], np.arange(M))
        np.testing.assert_array_equal(aux["largest"], jnp.max(data[3], axis=1))


def test_the_front_door_with_tasks_mapped_inside_the_function():
    with jax.enable_x64(True):
        params, data = problem()
        _, rows = jax.jit(in_a_loop)(params, data)
        weighting = jaxjd.weightings.stch()
        init, apply = jaxjd.aggregated_value_and_grad(
            lambda params, *data: jax.vmap(loss, (None, 0, 0, 0, 0))(params, *data), weighting
        )
        (_, gradient), _ = jax.jit(apply)(init(params), params, *data)
        close(gradient, jaxjd.combine(weighting.update(jaxjd.gramian(rows), ())[0], rows))


@pytest.mark.parametrize(
    "engine", [jaxjd.per_task_value_and_jacobian, jaxjd.per_task_value_and_gramian]
)
def test_messages_are_about_tasks(engine):
    data = (jnp.ones((3, 2)),)
    with pytest.raises(ValueError, match=r"loss of a task must be a scalar, found float32\[2\]"):
        engine(lambda w, x: w * x)(1.0, *data)
    with pytest.raises(ValueError, match=r"loss of a task .* pass has_aux=True"):
        engine(lambda w, x: (w * x, x))(1.0, *data)
    with pytest.raises(ValueError, match="`fn` must be a function"):
        engine(None)


def step_by_task(_, params, x):
    engine = jaxjd.per_task_value_and_gramian(lambda params, x: costs.fit(costs.net(params, x)))
    values, gramian, pullback = engine(params, x)
    return values, pullback(costs.weights_of(gramian))


@pytest.mark.slow
def test_a_step_takes_the_products_of_a_plain_one_and_a_half():
    problem = costs.stacked_batches()
    (plain, plain_memory), (flops, memory) = (
        costs.cost(step, problem) for step in (costs.plain, step_by_task)
    )
    assert flops <= 1.5 * plain, flops / plain
    assert memory <= 2 * plain_memory, memory / plain_memory
