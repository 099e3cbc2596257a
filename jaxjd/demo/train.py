"""One training run for each method, from the same parameters and on the same batches."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxjd
from jaxjd.demo.models import Model, Params, trunk

Batch = tuple[jax.Array, jax.Array]
Step = Callable[..., Any]
LossesFn = Callable[[Params, jax.Array, jax.Array], jax.Array]

BASELINE = "plain mean"
"""The name of the ordinary gradient step, in the results."""

AGGREGATORS: dict[str, Callable[[int, int], optax.GradientTransformation]] = {
    "upgrad": lambda num_tasks, seed: jaxjd.upgrad(),
    "dualproj": lambda num_tasks, seed: jaxjd.dualproj(),
    "mgda": lambda num_tasks, seed: jaxjd.mgda(),
    "pcgrad": lambda num_tasks, seed: jaxjd.pcgrad(key=seed),
    "gradvac": lambda num_tasks, seed: jaxjd.gradvac(num_tasks=num_tasks, key=seed),
    "imtl_g": lambda num_tasks, seed: jaxjd.imtl_g(),
    "aligned_mtl": lambda num_tasks, seed: jaxjd.aligned_mtl(),
    "cagrad": lambda num_tasks, seed: jaxjd.cagrad(c=0.5),
    "excess_mtl": lambda num_tasks, seed: jaxjd.excess_mtl(num_tasks=num_tasks),
    "mean": lambda num_tasks, seed: jaxjd.mean(),
    "sum": lambda num_tasks, seed: jaxjd.sum(),
    "random": lambda num_tasks, seed: jaxjd.random(key=seed),
}
"""The aggregators that `--aggregators` offers: `name -> make(num_tasks, seed)`."""

ROUNDING = 1e-6
"""How negative `g_i . d` must be, relative to `|g_i| |d|`, to count as raising a loss."""

_TIMING_ROUNDS = 15
_STEPS_A_ROUND = 6


class Measures(NamedTuple):
    """What is recorded of a training step, or with a leading step axis, as NumPy arrays, of a run.

    Attributes:
        losses: Shape `(m,)`, the losses of the step's batch before the step.
        mean_cosine: Mean cosine over all pairs of tasks, of their gradients of the shared trunk.
            A head's gradient is zero for all other tasks, so over all parameters the cosines have
            the same signs and smaller values.
        min_cosine: The smallest of these cosines.
        conflicting_pairs: Share of the pairs with a negative cosine.
        direction_raises: Whether the direction `d` that goes into adam raises a loss to first
            order: `g_i . d < -1e-6 |g_i| |d|` for some task, where the parameters move along `-d`.
        update_raises: The same for the update that comes out of adam.
    """

    losses: Any
    mean_cosine: Any
    min_cosine: Any
    conflicting_pairs: Any
    direction_raises: Any
    update_raises: Any


class Method(NamedTuple):
    """One way to train, compiled.

    Attributes:
        name: The aggregator's name, or `BASELINE`.
        state: Initial state of `step`'s optimizer.
        step: `step(params, state, batch) -> (params, state, losses)`. This is what is timed.
        measured_state: Initial state of `measured_step`'s optimizer.
        measured_step: The same step with measuring: `-> (params, state, Measures)`.
        compile_seconds: Time to trace and compile `step`.
    """

    name: str
    state: Any
    step: Step
    measured_state: Any
    measured_step: Step
    compile_seconds: float


class Run(NamedTuple):
    """What a training run left.

    Attributes:
        measures: The measures of all steps, each with a leading step axis.
        test_losses: Shape `(m,)`.
        test_correct: Shape `(n, m)`, whether each task of each test example was answered right.
    """

    measures: Measures
    test_losses: np.ndarray
    test_correct: np.ndarray

    @property
    def test_accuracies(self) -> np.ndarray:
        """Test accuracy of each task, shape `(m,)`."""
        return self.test_correct.mean(axis=0)


def make_method(
    name: str,
    losses_fn: LossesFn,
    num_tasks: int,
    learning_rate: float,
    seed: int,
    params: Params,
    batch: Batch,
) -> Method:
    """Builds and compiles the steps of one method.

    Args:
        name: A key of `AGGREGATORS`, or `BASELINE`.
        losses_fn: `losses_fn(params, inputs, targets) -> (m,)`.
        num_tasks: The number of tasks `m`.
        learning_rate: Of adam.
        seed: Of the aggregators that draw random numbers.
        params: The initial parameters.
        batch: An example of a batch.

    Returns:
        The method, whose steps take arguments of exactly these shapes.
    """
    adam = optax.adam(learning_rate)
    links: list[optax.GradientTransformation] = []
    gradient_fn = jacobian_fn = jaxjd.value_and_jacobian(losses_fn, form="auto")
    if name == BASELINE:
        gradient_fn = _mean_gradient(losses_fn)
    else:
        links = [AGGREGATORS[name](num_tasks, seed)]

    tx = optax.chain(*links, adam)
    measured_tx = optax.chain(*links, _record_direction(), adam)
    state, measured_state = tx.init(params), measured_tx.init(params)

    start = time.perf_counter()
    step = _compile(_make_step(gradient_fn, tx), params, state, batch)
    compile_seconds = time.perf_counter() - start
    measured_step = _compile(
        _make_measured_step(gradient_fn, measured_tx, jacobian_fn), params, measured_state, batch
    )
    return Method(name, state, step, measured_state, measured_step, compile_seconds)


def train(
    method: Method,
    params: Params,
    batches: Callable[[int], Batch],
    num_steps: int,
    on_step: Callable[[], None] = lambda: None,
) -> tuple[Params, Measures]:
    """Trains with one method.

    Args:
        method: What to train with.
        params: The initial parameters.
        batches: `batches(i)` is the batch of step `i`.
        num_steps: The number of steps.
        on_step: Called after each step.

    Returns:
        The trained parameters and the measures of all steps.
    """
    state, history = method.measured_state, []
    for i in range(num_steps):
        params, state, measures = method.measured_step(params, state, batches(i))
        history.append(jax.block_until_ready(measures))
        on_step()
    return params, Measures(*(np.stack(column) for column in zip(*history, strict=True)))


def evaluate(
    model: Model, params: Params, inputs: np.ndarray, targets: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The losses of a whole data set, shape `(m,)`, and which answers are right, `(n, m)`."""
    return jax.device_get(_evaluate(model, params, inputs, targets))


def time_steps(
    methods: Sequence[Method],
    params: Params,
    batches: Callable[[int], Batch],
    num_steps: int,
    on_round: Callable[[], None] = lambda: None,
) -> list[np.ndarray]:
    """Milliseconds of single steps of each method, compilation excluded.

    The methods take turns in short blocks, the order rotating, so that a machine whose speed
    drifts favours none. The first step after a change of method only warms the caches. Each method
    trains on as it would, so that an aggregator whose cost depends on the gradients is timed on
    gradients of a training.

    Args:
        methods: What to time.
        params: The parameters to start from.
        batches: `batches(i)` is the batch of step `i`.
        num_steps: An upper bound for the number of batches to use.
        on_round: Called after each round of blocks.

    Returns:
        For each method the times of its steps.
    """
    states = [(params, method.state) for method in methods]
    times: list[list[float]] = [[] for _ in methods]
    for first in range(num_timing_rounds(num_steps)):
        for turn in range(len(methods)):
            k = (first + turn) % len(methods)
            for repeat in range(_STEPS_A_ROUND):
                batch = batches((first * _STEPS_A_ROUND + repeat) % num_steps)
                start = time.perf_counter()
                trained, state, _ = jax.block_until_ready(methods[k].step(*states[k], batch))
                seconds = time.perf_counter() - start
                states[k] = (trained, state)
                if repeat > 0:
                    times[k].append(1e3 * seconds)
        on_round()
    return [np.array(column) for column in times]


def num_timing_rounds(num_steps: int) -> int:
    """How often `time_steps` calls `on_round`."""
    return min(_TIMING_ROUNDS, num_steps)


def _mean_gradient(losses_fn: LossesFn) -> Step:
    """`(params, *batch) -> (losses, gradient of the mean loss)`: no Jacobian is made."""

    def mean_loss(params: Params, *batch: jax.Array) -> tuple[jax.Array, jax.Array]:
        losses = losses_fn(params, *batch)
        return jnp.mean(losses), losses

    def losses_and_gradient(params: Params, *batch: jax.Array) -> tuple[jax.Array, Params]:
        (_, losses), gradient = jax.value_and_grad(mean_loss, has_aux=True)(params, *batch)
        return losses, gradient

    return losses_and_gradient


def _make_step(gradient_fn: Step, tx: optax.GradientTransformation) -> Step:
    def step(params: Params, state: Any, batch: Batch) -> tuple[Params, Any, jax.Array]:
        losses, gradient = gradient_fn(params, *batch)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, losses

    return step


def _make_measured_step(
    gradient_fn: Step, tx: optax.GradientTransformation, jacobian_fn: Step
) -> Step:
    """The step with measuring. Where `gradient_fn` is `jacobian_fn`, the Jacobian is made once."""

    def step(params: Params, state: Any, batch: Batch) -> tuple[Params, Any, Measures]:
        losses, gradient = gradient_fn(params, *batch)
        if jacobian_fn is gradient_fn:
            jacobian = gradient
        else:
            _, jacobian = jacobian_fn(params, *batch)
        updates, state = tx.update(gradient, state, params)
        (direction,) = (s.direction for s in state if isinstance(s, _RecordState))
        measures = _measure(losses, jacobian, direction, jax.tree.map(jnp.negative, updates))
        return optax.apply_updates(params, updates), state, measures

    return step


class _RecordState(NamedTuple):
    """The last updates that passed through `_record_direction`."""

    direction: Params


def _record_direction() -> optax.GradientTransformation:
    """A chain link that changes nothing and keeps the updates it sees in its state."""

    def init(params: Params) -> _RecordState:
        return _RecordState(jax.tree.map(jnp.zeros_like, params))

    def update(updates: Params, state: Any, params: Any = None) -> tuple[Params, _RecordState]:
        del state, params
        return updates, _RecordState(updates)

    return optax.GradientTransformation(init, update)


def _measure(losses: jax.Array, jacobian: Any, direction: Params, update: Params) -> Measures:
    cosines = _cosines(jaxjd.gramian(trunk(jacobian)))
    norms = jnp.sqrt(jnp.diagonal(jaxjd.gramian(jacobian)))

    def raises_a_loss(descent: Params) -> jax.Array:
        """Whether a step along `-descent` raises a loss: to first order it adds `-g_i . d`."""
        rows = jax.tree.map(lambda d: jnp.broadcast_to(d, (len(losses), *d.shape)), descent)
        products = jaxjd.cross_gramian(jacobian, rows)[:, 0]
        return jnp.any(products < -ROUNDING * norms * optax.tree.norm(descent))

    return Measures(
        losses=losses,
        mean_cosine=jnp.mean(cosines),
        min_cosine=jnp.min(cosines),
        conflicting_pairs=jnp.mean(cosines < 0),
        direction_raises=raises_a_loss(direction),
        update_raises=raises_a_loss(update),
    )


def _cosines(gramian: jax.Array) -> jax.Array:
    """The cosine of each pair, and 0 where a gradient is 0: it conflicts with nothing."""
    norms = jnp.sqrt(jnp.diagonal(gramian))
    scale = jnp.outer(norms, norms)
    cosines = jnp.where(scale > 0, gramian / jnp.where(scale > 0, scale, 1), 0)
    return cosines[jnp.triu_indices(len(norms), k=1)]


def _compile(step: Step, params: Params, state: Any, batch: Batch) -> Step:
    return jax.jit(step).lower(params, state, batch).compile()


@jax.jit(static_argnums=0)
def _evaluate(
    model: Model, params: Params, inputs: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return model.losses(params, inputs, targets), model.correct(params, inputs, targets)
