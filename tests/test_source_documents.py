"""The worked examples of the documentation pages that jaxjd answers to, each as a test.

They are the pages of TorchJD on CR-MOGM, SDMGrad, ExcessMTL, its aggregation module and grouping:
every example has its counterpart here, with the numbers that the page gives.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxjd
from jaxjd import labels, weightings

ROWS = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
GRAMIAN = ROWS @ ROWS.T
HALF_A_DIGIT = 5e-5  # The pages print four decimals.
UPGRAD_WEIGHTS = np.array([10 / 9, 15 / 19])
# Two more Gramians of two tasks: without a conflict, UPGrad's weights are the preferences.
ORTHOGONAL = jnp.eye(2)
ALIGNED = jnp.array([[4.0, 1.0], [1.0, 1.0]])
WANTED = [UPGRAD_WEIGHTS, np.full(2, 0.5), np.full(2, 0.5)]


def compiled_once(weighting):
    """The same weighting with a jitted update: the tests have one compilation in common."""
    return type(weighting)(weighting.init, jax.jit(weighting.update))


UPGRAD = compiled_once(weightings.upgrad())
GRADVAC = compiled_once(weightings.gradvac())


def run(weighting, stats, state=None):
    state = weighting.init(2) if state is None else state
    outputs = []
    for stat in stats:
        weights, state = weighting.update(stat, state)
        outputs.append(np.asarray(weights))
    return np.stack(outputs), state


def smoothed_by_hand(wanted, alphas, initial=None):
    """The moving average of CR-MOGM, spelled out."""
    outputs, previous = [], initial
    for new, alpha in zip(wanted, alphas, strict=True):
        previous = new if previous is None else alpha * previous + (1 - alpha) * new
        outputs.append(previous)
    return np.stack(outputs)


# CR-MOGM


def test_cr_mogm_smooths_upgrad():
    outputs, state = run(weightings.cr_mogm(UPGRAD), [GRAMIAN, ORTHOGONAL, ALIGNED])
    np.testing.assert_allclose(outputs[0], UPGRAD_WEIGHTS, rtol=1e-6)
    np.testing.assert_allclose(outputs, smoothed_by_hand(WANTED, [0.9] * 3), rtol=1e-6)
    assert state.count == 3
    np.testing.assert_array_equal(state.weights, outputs[-1])


def test_cr_mogm_makes_an_aggregator():
    aggregator = jaxjd.weighted(weightings.cr_mogm(UPGRAD), num_tasks=2)
    state = aggregator.init(jnp.zeros(3))
    update, state = aggregator.update(ROWS, state)
    np.testing.assert_allclose(update, UPGRAD_WEIGHTS @ ROWS, rtol=1e-5)
    jacobian = jnp.eye(2, 3)
    update, state = aggregator.update(jacobian, state)
    expected = 0.9 * UPGRAD_WEIGHTS + 0.1 * 0.5
    np.testing.assert_allclose(state.weights, expected, rtol=1e-6)
    np.testing.assert_allclose(update, expected @ jacobian, rtol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9, 1.0])
def test_cr_mogm_changes_nothing_around_weights_that_ignore_the_gradients(alpha):
    weighting = weightings.cr_mogm(weightings.mean(), alpha)
    outputs, _ = run(weighting, [GRAMIAN, ORTHOGONAL, ALIGNED])
    np.testing.assert_allclose(outputs, 0.5, rtol=1e-6)
    aggregator = jaxjd.weighted(weighting, num_tasks=2)
    update, _ = aggregator.update(ROWS, aggregator.init(jnp.zeros(3)))
    np.testing.assert_allclose(update, [1.0, 1.0, 1.0], rtol=1e-6)


@pytest.mark.parametrize("initial_weights", [None, [0.2, 0.8]])
def test_cr_mogm_with_alpha_zero_returns_the_wrapped_weights_verbatim(initial_weights):
    stats = [GRAMIAN, ORTHOGONAL, ALIGNED]
    outputs, _ = run(weightings.cr_mogm(UPGRAD, 0.0, initial_weights), stats)
    expected, _ = run(UPGRAD, stats, state=())
    np.testing.assert_array_equal(outputs, expected)


@pytest.mark.parametrize("initial_weights", [None, [0.2, 0.8]])
def test_cr_mogm_with_alpha_one_is_frozen_at_the_first_weights(initial_weights):
    outputs, _ = run(
        weightings.cr_mogm(UPGRAD, 1.0, initial_weights), [GRAMIAN, ORTHOGONAL, ALIGNED]
    )
    first = UPGRAD_WEIGHTS if initial_weights is None else initial_weights
    np.testing.assert_allclose(outputs, np.stack([first] * 3), rtol=1e-6)


def test_cr_mogm_starts_from_the_initial_weights():
    initial = np.array([0.2, 0.8])
    outputs, _ = run(weightings.cr_mogm(UPGRAD, 0.9, initial), [GRAMIAN, ORTHOGONAL, ALIGNED])
    np.testing.assert_allclose(outputs[0], 0.9 * initial + 0.1 * UPGRAD_WEIGHTS, rtol=1e-6)
    np.testing.assert_allclose(outputs, smoothed_by_hand(WANTED, [0.9] * 3, initial), rtol=1e-6)


def test_cr_mogm_alpha_follows_the_learning_rate():
    # A learning rate that has fallen from 0.1 to 0.05 gives 1 - 0.05 / 0.1.
    learning_rate = optax.piecewise_constant_schedule(0.1, {1: 0.5})
    alpha = lambda count: 1 - learning_rate(count) / learning_rate(0)
    weighting = weightings.cr_mogm(UPGRAD, alpha)
    outputs, _ = run(weighting, [GRAMIAN, ORTHOGONAL])
    np.testing.assert_allclose(outputs[1], (UPGRAD_WEIGHTS + 0.5) / 2, rtol=1e-6)


def test_cr_mogm_alpha_can_be_set_between_calls():
    """The counterpart of setting the attribute: a hyper-parameter that optax keeps in the state."""

    def smoothed_upgrad(alpha):
        return jaxjd.weighted(weightings.cr_mogm(UPGRAD, alpha), num_tasks=2)

    aggregator = optax.inject_hyperparams(smoothed_upgrad)(alpha=0.9)
    params = jnp.zeros(3)
    state = aggregator.init(params)
    _, state = aggregator.update(ROWS, state, params)
    initial_lr, current_lr = 0.1, 0.05
    state.hyperparams["alpha"] = jnp.asarray(1 - current_lr / initial_lr)
    _, state = aggregator.update(jnp.eye(2, 3), state, params)
    weights = optax.tree.get(state, "inner_state").weights
    np.testing.assert_allclose(weights, (UPGRAD_WEIGHTS + 0.5) / 2, rtol=1e-6)


def test_cr_mogm_schedule_and_optimizer_share_the_learning_rate_in_a_training_loop():
    learning_rate = optax.exponential_decay(0.1, transition_steps=1, decay_rate=0.8)
    alpha = lambda count: 1 - learning_rate(count) / learning_rate(0)
    weighting = weightings.cr_mogm(weightings.upgrad(), alpha)
    tx = optax.chain(jaxjd.weighted(weighting, num_tasks=2), optax.sgd(learning_rate))
    centers = jnp.array([[1.0, 0.0, 0.5], [-1.0, 0.2, 0.5]])
    scales = jnp.array([1.0, 3.0])

    def losses(params):
        return scales * jnp.sum((params[None, :] - centers) ** 2, axis=1)

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            jacobian = jax.jacrev(losses)(params)
            updates, state = tx.update(jacobian, state, params)
            return (optax.apply_updates(params, updates), state), (params, state[0].weights)

        return jax.lax.scan(step, (params, tx.init(params)), length=6)

    start = jnp.array([0.3, -0.4, 0.1])
    (params, state), (visited, weights) = train(start)
    assert state[0].weighting.count == 6

    expected, previous = start, None
    for k in range(6):
        np.testing.assert_allclose(visited[k], expected, rtol=1e-5)
        jacobian = 2 * scales[:, None] * (expected[None, :] - centers)
        new, _ = UPGRAD.update(jaxjd.gramian(jacobian), ())
        alpha_k = 1 - 0.8**k  # 0 in the first step: the wrapped weights as they are.
        previous = new if previous is None else alpha_k * previous + (1 - alpha_k) * new
        np.testing.assert_allclose(weights[k], previous, rtol=1e-5)
        expected = expected - 0.1 * 0.8**k * (previous @ jacobian)
    np.testing.assert_allclose(params, expected, rtol=1e-5)


def test_cr_mogm_restarts_with_init_and_so_does_what_it_wraps():
    weighting = weightings.cr_mogm(GRADVAC)
    first, state = run(weighting, [GRAMIAN, ALIGNED])
    assert np.any(state.inner.target != 0)
    fresh = weighting.init(2)
    assert fresh.count == 0
    assert np.all(fresh.inner.target == 0)
    again, _ = run(weighting, [GRAMIAN, ALIGNED], fresh)
    np.testing.assert_array_equal(again, first)


# SDMGrad and MoDo

INPUTS = jax.random.normal(jax.random.key(1), (9, 16, 5))
TARGETS = jax.random.normal(jax.random.key(2), (9, 16))


def linear(key, num_inputs, num_outputs):
    key_w, key_b = jax.random.split(key)
    bound = num_inputs**-0.5
    return {
        "w": jax.random.uniform(key_w, (num_inputs, num_outputs), minval=-bound, maxval=bound),
        "b": jax.random.uniform(key_b, (num_outputs,), minval=-bound, maxval=bound),
    }


def apply_linear(layer, x):
    return x @ layer["w"] + layer["b"][None, :]


MLP = {"first": linear(jax.random.key(3), 5, 4), "second": linear(jax.random.key(4), 4, 1)}


def example_losses(params, inputs, targets):
    """The squared error of every example of a batch: 16 examples are 16 tasks."""
    hidden = jax.nn.relu(apply_linear(params["first"], inputs))
    return (apply_linear(params["second"], hidden)[:, 0] - targets) ** 2


def rows_by_hand(jacobian):
    leaves = jax.tree.leaves(jacobian)
    return np.concatenate([np.asarray(leaf, np.float64).reshape(16, -1) for leaf in leaves], 1)


def onto_simplex_by_hand(x):
    for size in range(len(x), 0, -1):
        threshold = (np.sort(x)[::-1][:size].sum() - 1) / size
        if np.sort(x)[::-1][size - 1] > threshold:
            return np.maximum(x - threshold, 0)
    raise AssertionError


def sdmgrad_by_hand(A, w, lr=10.0, momentum=0.5, n_iter=20, lambda_=0.3):
    preferred = np.full(len(w), 1 / len(w))
    A = A / np.mean(np.sqrt(np.maximum(np.diag(A), 0))) ** 2
    velocity = 0
    for _ in range(n_iter):
        velocity = momentum * velocity + A @ (w + lambda_ * preferred)
        w = onto_simplex_by_hand(w - lr * velocity)
    return (w + lambda_ * preferred) / (1 + lambda_), w


example_jacobian = jax.jit(jaxjd.value_and_jacobian(example_losses))
weighted_gradient = jax.jit(jax.grad(lambda p, weights, x, y: weights @ example_losses(p, x, y)))


def test_sdmgrad_uses_three_independent_batches_a_step():
    weighting = weightings.sdmgrad(lambda_=0.3)
    aggregator = jaxjd.sdmgrad(lambda_=0.3, num_tasks=16)
    tx = optax.chain(aggregator, optax.sgd(1e-3))
    update_weights = jax.jit(weighting.update)
    update_chain = jax.jit(tx.update)

    params, state, chain_state = MLP, weighting.init(16, MLP), tx.init(MLP)
    for i in range(3):
        first, second, third = (
            example_jacobian(params, INPUTS[3 * i + k], TARGETS[3 * i + k])[1] for k in range(3)
        )
        A = jaxjd.cross_gramian(first, second)
        assert A.shape == (16, 16)
        np.testing.assert_allclose(A, rows_by_hand(first) @ rows_by_hand(second).T, atol=1e-4)

        previous = np.asarray(state.weights, np.float64)
        weights, state = update_weights(A, state)
        expected, inner = sdmgrad_by_hand(np.asarray(A, np.float64), previous)
        np.testing.assert_allclose(weights, expected, atol=1e-4)
        np.testing.assert_allclose(state.weights, inner, atol=1e-4)
        np.testing.assert_allclose(np.sum(weights), 1, rtol=1e-5)
        assert np.all(weights >= 0)

        # The third batch alone gives the step: the gradient of its weighted losses.
        gradient = weighted_gradient(params, weights, INPUTS[3 * i + 2], TARGETS[3 * i + 2])
        updates, chain_state = update_chain(
            third, chain_state, params, cross_jacobians=(first, second)
        )
        np.testing.assert_array_equal(chain_state[0].weights, weights)
        for update, leaf in zip(jax.tree.leaves(updates), jax.tree.leaves(gradient), strict=True):
            np.testing.assert_allclose(update, -1e-3 * leaf, rtol=1e-4, atol=1e-8)
        params = optax.apply_updates(params, updates)


def test_sdmgrad_starts_from_the_weights_of_the_call_before():
    """With short inner steps, whose result is not a corner of the simplex."""
    weighting = weightings.sdmgrad(lr=0.003, n_iter=5)
    first, second = (example_jacobian(MLP, INPUTS[k], TARGETS[k])[1] for k in range(2))
    A = jaxjd.cross_gramian(first, second)
    state, w = weighting.init(16, MLP), np.full(16, 1 / 16)
    for _ in range(2):
        weights, state = jax.jit(weighting.update)(A, state)
        expected, w = sdmgrad_by_hand(np.asarray(A, np.float64), w, lr=0.003, n_iter=5)
        assert np.sum(w > 0) > 2
        np.testing.assert_allclose(weights, expected, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(state.weights, w, rtol=1e-4, atol=1e-6)


def test_sdmgrad_restarts_from_uniform_weights():
    weighting = weightings.sdmgrad()
    state = weighting.init(16, MLP)
    np.testing.assert_allclose(state.weights, 1 / 16)
    _, state = jax.jit(weighting.update)(jax.random.normal(jax.random.key(0), (16, 16)), state)
    assert np.any(state.weights != 1 / 16)
    np.testing.assert_allclose(weighting.init(16, MLP).weights, 1 / 16)


@pytest.mark.parametrize("gamma", [0.1, 10.0])
def test_modo_uses_two_independent_batches_a_step(gamma):
    weighting = weightings.modo(gamma=gamma, rho=0.1)
    aggregator = jaxjd.modo(gamma=gamma, rho=0.1, num_tasks=16)
    update_chain = jax.jit(aggregator.update)
    state, aggregator_state = weighting.init(16, MLP), aggregator.init(MLP)
    for i in range(2):
        pair = tuple(
            example_jacobian(MLP, INPUTS[2 * i + k], TARGETS[2 * i + k])[1] for k in range(2)
        )
        A = jaxjd.cross_gramian(*pair)
        previous = np.asarray(state.weights, np.float64)
        weights, state = weighting.update(A, state)
        expected = onto_simplex_by_hand(
            previous - gamma * (np.asarray(A, np.float64) @ previous + 0.1 * previous)
        )
        np.testing.assert_allclose(weights, expected, atol=1e-4)
        both = jax.tree.map(lambda one, two: (one + two) / 2, *pair)
        updates, aggregator_state = update_chain(both, aggregator_state, cross_jacobians=pair)
        np.testing.assert_allclose(aggregator_state.weights, weights, atol=1e-6)
        by_hand = jaxjd.combine(weights, both)
        for update, leaf in zip(jax.tree.leaves(updates), jax.tree.leaves(by_hand), strict=True):
            np.testing.assert_allclose(update, leaf, rtol=1e-4, atol=1e-6)


# ExcessMTL

EXCESS_PARAMS = {"w": jnp.zeros((2, 3)), "b": jnp.zeros(3)}
EXCESS_JACOBIANS = [
    {
        "w": jax.random.normal(jax.random.key(10 + k), (3, 2, 3)) / (k + 1),
        "b": jax.random.normal(jax.random.key(20 + k), (3, 3)) / (k + 1),
    }
    for k in range(6)
]


def excess_mtl_by_hand(jacobians, step_size, n_warmup_steps):
    """Weights and risks of every call, on one flat matrix."""
    squares, log_weights, risks, outputs = 0, np.zeros(3), [], []
    collecting = max(1, n_warmup_steps)
    for k, jacobian in enumerate(jacobians):
        rows = np.concatenate(
            [np.asarray(leaf, np.float64).reshape(3, -1) for leaf in jax.tree.leaves(jacobian)], 1
        )
        squares = squares + rows**2
        risks.append(np.sum(rows**2 / np.sqrt(squares), axis=1))
        if k >= collecting:
            log_weights = log_weights + step_size * risks[-1] / np.mean(risks[:collecting], axis=0)
        outputs.append(np.exp(log_weights) / np.sum(np.exp(log_weights)))
    return np.stack(outputs), np.stack(risks)


excess_mtl_update = jax.jit(
    lambda warmup, jacobian, state: weightings.excess_mtl(0.7, warmup).update(jacobian, state),
    static_argnums=0,
)


@pytest.mark.parametrize("n_warmup_steps", [0, 1, 3])
def test_excess_mtl_as_a_weighting(n_warmup_steps):
    weighting = weightings.excess_mtl(0.7, n_warmup_steps)
    state = weighting.init(3, EXCESS_PARAMS)
    expected, risks = excess_mtl_by_hand(EXCESS_JACOBIANS, 0.7, n_warmup_steps)
    collecting = max(1, n_warmup_steps)
    for k, jacobian in enumerate(EXCESS_JACOBIANS):
        weights, state = excess_mtl_update(n_warmup_steps, jacobian, state)
        np.testing.assert_allclose(weights, expected[k], rtol=1e-5)
        if k < collecting:
            np.testing.assert_allclose(weights, 1 / 3, rtol=1e-6)
        else:
            baseline = np.mean(risks[:collecting], axis=0)
            np.testing.assert_allclose(state.baseline, baseline, rtol=1e-5)
    assert np.max(weights) - np.min(weights) > 0.01
    np.testing.assert_allclose(np.sum(weights), 1, rtol=1e-6)


@pytest.mark.parametrize("n_warmup_steps", [0, 3])
def test_excess_mtl_as_an_aggregator(n_warmup_steps):
    aggregator = jaxjd.excess_mtl(0.7, n_warmup_steps, num_tasks=3)
    update = jax.jit(aggregator.update)
    state = aggregator.init(EXCESS_PARAMS)
    expected, _ = excess_mtl_by_hand(EXCESS_JACOBIANS, 0.7, n_warmup_steps)
    for k, jacobian in enumerate(EXCESS_JACOBIANS):
        updates, state = update(jacobian, state, EXCESS_PARAMS)
        np.testing.assert_allclose(state.weights, expected[k], rtol=1e-5)
        for name, leaf in updates.items():
            by_hand = np.tensordot(expected[k], jacobian[name], 1)
            np.testing.assert_allclose(leaf, by_hand, rtol=1e-4, atol=1e-6)


def test_excess_mtl_keeps_no_more_than_one_jacobian():
    state = weightings.excess_mtl().init(3, EXCESS_PARAMS)
    jacobian = EXCESS_JACOBIANS[0]
    assert jax.tree.structure(state.squares) == jax.tree.structure(jacobian)
    shapes = jax.tree.map(jnp.shape, (state.squares, jacobian))
    assert shapes[0] == shapes[1]
    num_params = sum(leaf.size for leaf in jax.tree.leaves(EXCESS_PARAMS))
    assert sum(leaf.size for leaf in jax.tree.leaves(state.squares)) == 3 * num_params
    _, state = excess_mtl_update(0, jacobian, state)
    for name, square in state.squares.items():
        np.testing.assert_allclose(square, jacobian[name] ** 2, rtol=1e-6)


def test_excess_mtl_restarts_with_uniform_weights_and_a_new_warm_up():
    weighting = weightings.excess_mtl(0.7, 3)
    state = weighting.init(3, EXCESS_PARAMS)
    for jacobian in EXCESS_JACOBIANS:
        weights, state = excess_mtl_update(3, jacobian, state)
    assert np.any(np.abs(weights - 1 / 3) > 0.01)
    state = weighting.init(3, EXCESS_PARAMS)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves((state.squares, state.baseline)))
    for jacobian in EXCESS_JACOBIANS[:3]:
        weights, state = excess_mtl_update(3, jacobian, state)
        np.testing.assert_allclose(weights, 1 / 3, rtol=1e-6)


# The aggregation module


def test_upgrad_is_exact():
    aggregator = jaxjd.weighted(UPGRAD, num_tasks=2)
    update, state = aggregator.update(ROWS, aggregator.init(jnp.zeros(3)))
    np.testing.assert_allclose(state.weights, [10 / 9, 15 / 19], rtol=1e-6)
    np.testing.assert_allclose(update, [50 / 171, 325 / 171, 325 / 171], rtol=1e-5)
    weights, _ = UPGRAD.update(GRAMIAN, UPGRAD.init(2))
    np.testing.assert_allclose(weights, [10 / 9, 15 / 19], rtol=1e-6)


def test_upgrad_with_the_regularized_projector_gives_the_page_its_digits():
    projector = jaxjd.linalg.regularized_projector()
    aggregator = jax.jit(jaxjd.upgrad(projector=projector, num_tasks=2).update)
    state = jaxjd.AggregatorState(weights=jnp.zeros(2), weighting=())
    update, state = aggregator(ROWS, state)
    np.testing.assert_allclose(update, [0.2929, 1.9004, 1.9004], rtol=0, atol=HALF_A_DIGIT)
    np.testing.assert_allclose(state.weights, [1.1109, 0.7894], rtol=0, atol=HALF_A_DIGIT)


def test_flattening_of_a_generalized_gramian_of_ones():
    weighting = weightings.flattening(UPGRAD)
    weights, _ = weighting.update(jnp.ones((2, 3, 3, 2)), weighting.init((2, 3)))
    assert weights.shape == (2, 3)
    np.testing.assert_allclose(weights, [[0.1667] * 3] * 2, rtol=0, atol=HALF_A_DIGIT)
    np.testing.assert_allclose(weights, 1 / 6, rtol=1e-6)


def test_flattening_equals_the_weighting_of_the_flat_gramian():
    jacobian = jax.random.normal(jax.random.key(5), (2, 3, 7))
    generalized = jnp.einsum("abp,cdp->abdc", jacobian, jacobian)
    weights, _ = weightings.flattening(UPGRAD).update(generalized, ())
    flat, _ = UPGRAD.update(jaxjd.gramian(jacobian.reshape(6, 7)), ())
    np.testing.assert_allclose(weights.reshape(-1), flat, rtol=1e-4, atol=1e-5)


# Grouping

LEARNING_RATE = 0.1
GROUP_INPUTS = jax.random.normal(jax.random.key(6), (8, 16, 10))
GROUP_TARGETS = {
    "task1": jax.random.normal(jax.random.key(7), (8, 16, 1)),
    "task2": jax.random.normal(jax.random.key(8), (8, 16, 1)),
}


def encoder_with_heads():
    """An encoder 10-5-3 with two linear heads 3-1."""
    keys = iter(jax.random.split(jax.random.key(9), 4))
    return {
        "encoder": [linear(next(keys), 10, 5), linear(next(keys), 5, 3)],
        "heads": {"task1": linear(next(keys), 3, 1), "task2": linear(next(keys), 3, 1)},
    }


def encoder_and_decoder_with_heads():
    """The same model as two networks: the shared features are the decoder's output."""
    params = encoder_with_heads()
    first, second = params["encoder"]
    return {"encoder": [first], "decoder": [second], "heads": params["heads"]}


def trunk_fn(params, x, targets):
    for layer in params["encoder"] + params.get("decoder", []):
        x = jax.nn.relu(apply_linear(layer, x))
    return x


def head_fn(task):
    def loss(params, features, x, targets):
        return jnp.mean((apply_linear(params, features) - targets[task]) ** 2)

    return loss


HEADS = {"task1": head_fn("task1"), "task2": head_fn("task2")}
mtl = jaxjd.mtl_value_and_jacobian(trunk_fn, HEADS)


@jax.jit
def multi_task_gradients(params, x, targets):
    trunk = {name: params[name] for name in params if name != "heads"}
    losses, (jacobian, gradients) = mtl(trunk, params["heads"], x, targets)
    return losses, {**jacobian, "heads": gradients}


def batches():
    for i in range(8):
        yield GROUP_INPUTS[i], {task: t[i] for task, t in GROUP_TARGETS.items()}


def with_heads(label_trunk):
    def label(params):
        trunk = {name: params[name] for name in params if name != "heads"}
        return {**label_trunk(trunk), "heads": "heads"}

    return label


# For each strategy: its model, how it labels the trunk, and the groups as indices of trunk leaves
# in tree order (for each layer "b", then "w"; the decoder comes before the encoder).
STRATEGIES = {
    "together": (encoder_with_heads, labels.together, {"all": [0, 1, 2, 3]}),
    "per network": (
        encoder_and_decoder_with_heads,
        labels.by_network,
        {"decoder": [0, 1], "encoder": [2, 3]},
    ),
    "per layer": (
        encoder_with_heads,
        labels.by_layer,
        {"encoder/0": [0, 1], "encoder/1": [2, 3]},
    ),
    "per tensor": (
        encoder_with_heads,
        labels.by_tensor,
        {"encoder/0/b": [0], "encoder/0/w": [1], "encoder/1/b": [2], "encoder/1/w": [3]},
    ),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradvac_per_group(strategy):
    model, label_trunk, groups = STRATEGIES[strategy]
    params = model()
    aggregators = {group: jaxjd.weighted(GRADVAC, num_tasks=2) for group in groups}
    tx = optax.chain(
        jaxjd.partition(aggregators | {"heads": optax.identity()}, with_heads(label_trunk)),
        optax.sgd(LEARNING_RATE),
    )
    # Under jit where that is one small program.
    update = jax.jit(tx.update) if strategy == "together" else tx.update
    state = tx.init(params)

    expected = params
    targets = {group: GRADVAC.init(2) for group in groups}
    history = []
    for x, y in batches():
        losses, gradients = multi_task_gradients(params, x, y)
        history.append(np.asarray([losses["task1"], losses["task2"]]))
        updates, state = update(gradients, state, params)

        # By hand, at the same parameters: one Gramian, one set of weights and one state per group;
        # the heads take a step along their own gradients.
        trunk = {name: gradients[name] for name in gradients if name != "heads"}
        leaves, treedef = jax.tree.flatten(trunk)
        combined = [None] * len(leaves)
        for group, places in groups.items():
            rows = [leaves[place] for place in places]
            weights, targets[group] = GRADVAC.update(jaxjd.gramian(rows), targets[group])
            for place, row in zip(places, rows, strict=True):
                combined[place] = jaxjd.combine(weights, row)
        by_hand = {**jax.tree.unflatten(treedef, combined), "heads": gradients["heads"]}
        expected = jax.tree.map(lambda p, g: p - LEARNING_RATE * g, params, by_hand)
        params = optax.apply_updates(params, updates)
        for leaf, other in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(leaf, other, rtol=1e-4, atol=1e-6)

    assert np.sum(history[-1]) < np.sum(history[0])
    inner_states = state[0].inner_states
    found = {group: inner_states[group].weighting.target for group in groups}
    for group, target in found.items():
        np.testing.assert_allclose(target, targets[group].target, rtol=1e-4, atol=1e-6)
    for one, other in itertools.combinations(found.values(), 2):
        assert np.any(np.abs(one - other) > 1e-3)  # Each group has its own targets.


def test_the_heads_get_their_own_plain_gradients():
    params = encoder_with_heads()
    x, y = next(batches())
    losses, gradients = multi_task_gradients(params, x, y)
    features = trunk_fn(params, x, y)
    for task, head in HEADS.items():
        value, gradient = jax.value_and_grad(head)(params["heads"][task], features, x, y)
        np.testing.assert_allclose(losses[task], value, rtol=1e-6)
        for name, leaf in gradients["heads"][task].items():
            np.testing.assert_allclose(leaf, gradient[name], rtol=1e-5, atol=1e-6)
    for leaf, param in zip(
        jax.tree.leaves(gradients["encoder"]), jax.tree.leaves(params["encoder"]), strict=True
    ):
        assert leaf.shape == (2, *param.shape)


@pytest.mark.parametrize(
    ("method", "strategy"),
    [
        pytest.param(UPGRAD, "per tensor", id="upgrad"),
        pytest.param(GRADVAC, "per layer", id="gradvac"),
    ],
)
def test_grouped_equals_one_aggregator_per_label(method, strategy):
    """With two tasks GradVac's order does not matter, so that it can be compared too."""
    model, label_trunk, groups = STRATEGIES[strategy]
    params = model()
    separate = {group: jaxjd.weighted(method, num_tasks=2) for group in groups}
    heads = {"heads": optax.identity()}
    partitioned = jaxjd.partition(separate | heads, with_heads(label_trunk))
    # `grouped` labels what it is given: here the trunk, cut out by an outer partition.
    together = {"trunk": jaxjd.grouped(method, label_trunk, num_tasks=2)}
    batched = jaxjd.partition(
        together | heads, lambda params: {k: "heads" if k == "heads" else "trunk" for k in params}
    )
    state_partitioned, state_batched = partitioned.init(params), batched.init(params)
    for x, y in itertools.islice(batches(), 3):
        _, gradients = multi_task_gradients(params, x, y)
        expected, state_partitioned = partitioned.update(gradients, state_partitioned, params)
        found, state_batched = batched.update(gradients, state_batched, params)
        for leaf, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(leaf, other, rtol=1e-5, atol=1e-7)
    grouped_state = state_batched.inner_states["trunk"]
    for number, group in enumerate(sorted(groups)):
        separate_state = state_partitioned.inner_states[group]
        np.testing.assert_allclose(
            grouped_state.weights[number], separate_state.weights, rtol=1e-5, atol=1e-7
        )
