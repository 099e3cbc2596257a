"""Scalarizers: values, gradients, states, and parity with TorchJD's numbers."""

from __future__ import annotations

import collections
import dataclasses
import functools
import inspect
import json
import pathlib
import pickle
import re
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType

import jaxjd
from jaxjd import scalarizers as S
from tests.registry import slow_but

M = 6
LOSSES = np.array([0.7, 2.0, 0.3, 1.1, 1.9, 0.5])
WEIGHTS = np.array([0.5, 1.0, 0.2, 2.0, 0.8, 1.5])
REFERENCE = np.array([-0.1, -0.5, 0.1, -0.2, 0.3, -0.4])
STEPS = np.array([LOSSES * factor for factor in ([0.9], [0.8], 1 / (1 + LOSSES))])
"""Losses of three steps."""

rng = np.random.default_rng(0)
LEARNED = rng.normal(size=M)


# --- The registry ------------------------------------------------------------------------------


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def pbi_value(L: np.ndarray, state: Any) -> float:
    u = WEIGHTS / np.linalg.norm(WEIGHTS)
    f = L - REFERENCE
    return f @ u + 1.5 * np.linalg.norm(f - (f @ u) * u)


def stch_value(L: np.ndarray, state: Any) -> float:
    return 0.3 * np.log(np.sum(np.exp(WEIGHTS * (L - REFERENCE) / 0.3)))


def warm_stch_value(L: np.ndarray, state: Any) -> float:
    if state.count < 2:
        return np.sum(np.log(L))
    return M * 0.7 * np.log(np.sum(np.exp(np.log(L / state.nadir) / 0.7)))


def random_value(L: np.ndarray, state: Any) -> float:
    key = jax.random.split(state.key)[1]
    return softmax(np.asarray(jax.random.normal(key, (M,), jnp.float64))) @ L


def dwa_value(L: np.ndarray, state: Any) -> float:
    if state.epoch < 2:
        return L.sum()
    return M * softmax(np.asarray(state.previous / state.older) / 1.3) @ L


def famo_weights(L: np.ndarray, state: Any) -> np.ndarray:
    z = softmax(np.asarray(state.logits))
    gaps = L - REFERENCE
    return z / gaps / np.sum(z / gaps)


def famo_value(L: np.ndarray, state: Any) -> float:
    gaps = L - REFERENCE
    z = softmax(np.asarray(state.logits))
    return z @ np.log(gaps) / np.sum(z / gaps)


@dataclasses.dataclass(frozen=True)
class Row:
    """One scalarizer.

    Attributes:
      name: The test id; it starts with the public name.
      value: Its formula, in NumPy, of a vector of losses and the state.
      scalars: Scalar hyper-parameters.
      per_task: Hyper-parameters with one number per task, as vectors.
      static: Other arguments.
      gradient: The gradient by the losses where it is not that of the value.
      learned: Whether the state is learned by the user's optimizer.
      stateful: Whether a rule updates the state.
    """

    name: str
    value: Callable[[np.ndarray, Any], float]
    scalars: dict[str, float] = dataclasses.field(default_factory=dict)
    per_task: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    static: dict[str, Any] = dataclasses.field(default_factory=dict)
    gradient: Callable[[np.ndarray, Any], np.ndarray] | None = None
    learned: bool = False
    stateful: bool = False

    @property
    def factory(self) -> Callable[..., jaxjd.Scalarizer]:
        return getattr(S, self.name.split("(")[0])

    def make(self, **changes: Any) -> jaxjd.Scalarizer:
        return self.factory(**{**self.scalars, **self.per_task, **self.static, **changes})

    @property
    def scalarizer(self) -> jaxjd.Scalarizer:
        """The same object for all tests, so that what it compiled is found again."""
        return made(self.name)

    def state(self) -> Any:
        """A state after some steps."""
        scalarizer = self.scalarizer
        state = scalarizer.init(M)
        if self.learned:
            return jnp.asarray(LEARNED, state.dtype)
        for losses in STEPS:
            state = compiled(scalarizer.update)(jnp.asarray(losses, float), state)
        return state


ROWS = (
    Row("mean", lambda L, _: L.mean()),
    Row("sum", lambda L, _: L.sum()),
    Row("constant", lambda L, _: WEIGHTS @ L, per_task={"weights": WEIGHTS}),
    Row("random", random_value, static={"key": 3}, stateful=True),
    Row(
        "cosmos",
        lambda L, _: WEIGHTS @ L * (1 - 2.5 / np.linalg.norm(WEIGHTS) / np.linalg.norm(L)),
        {"lambda_": 2.5},
        {"weights": WEIGHTS},
    ),
    Row("dwa", dwa_value, {"temperature": 1.3}, stateful=True),
    Row(
        "famo",
        famo_value,
        {"lr": 0.3, "weight_decay": 0.01},
        {"min_losses": REFERENCE},
        gradient=famo_weights,
        stateful=True,
    ),
    Row("geometric_mean", lambda L, _: np.prod(L) ** (1 / M)),
    Row("imtl_l", lambda L, s: np.sum(np.exp(s) * L - s), learned=True),
    Row("pbi", pbi_value, {"theta": 1.5}, {"weights": WEIGHTS, "reference": REFERENCE}),
    Row("stch", stch_value, {"mu": 0.3}, {"weights": WEIGHTS, "reference": REFERENCE}),
    Row("stch(warm-up)", warm_stch_value, {"mu": 0.7}, static={"warmup_steps": 2}, stateful=True),
    Row("uw", lambda L, s: np.sum(np.exp(-s) * L + s) / 2, learned=True),
)
all_rows = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


@functools.cache
def made(name: str) -> jaxjd.Scalarizer:
    return next(row for row in ROWS if row.name == name).make()


def arrange(vector: Any) -> dict[str, Any]:
    """The same six numbers in several layouts, in tree order."""
    return {
        "vector": vector,
        "matrix": vector.reshape(2, 3),
        "scalars": {name: vector[i] for i, name in enumerate("abcdef")},
        "mixed": {"a": vector[:4].reshape(2, 2), "b": [vector[4], (vector[5:],)]},
    }


def types_of(tree: Any) -> Any:
    return jax.tree.map(lambda x: (x.shape, str(x.dtype), getattr(x, "weak_type", False)), tree)


def raw(tree: Any) -> Any:
    """Arrays instead of typed keys."""
    return jax.tree.map(
        lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x,
        tree,
    )


@functools.cache
def compiled(function: Callable, **options: Any) -> Callable:
    """One compilation for all tests that call it with the same types."""
    return jax.jit(function, **options)


@functools.cache
def derivative(apply: Callable) -> Callable:
    return jax.jit(jax.value_and_grad(apply))


def test_every_scalarizer_has_a_row():
    functions = {name for name in S.__all__ if inspect.isfunction(getattr(S, name))}
    assert {row.factory.__name__ for row in ROWS} == functions
    for row in ROWS:
        assert isinstance(row.make(), jaxjd.Scalarizer)
        if not (row.stateful or row.learned):
            assert row.make().init(None) == row.make().init(M) == ()


@all_rows
def test_value_and_gradient_on_any_structure(row):
    with jax.enable_x64(True):
        state = row.state()

        @jax.jit
        def run(vector, per_task):
            results = {}
            for name, losses in arrange(vector).items():
                # Per-task arguments once as vectors and once laid out as the losses.
                laid_out = {key: arrange(value)[name] for key, value in per_task.items()}
                ways = {"vectors": per_task, "laid out": laid_out} if per_task else {"": {}}
                for label, arguments in ways.items():
                    scalarizer = row.make(**arguments)
                    result = jax.value_and_grad(scalarizer.apply)(losses, state)
                    results[name, label] = (*result, losses)
            return list(results.values())

        value = lambda vector: row.value(vector, state)
        expected = value(LOSSES)
        if row.gradient is not None:
            gradient = row.gradient(LOSSES, state)
        else:
            steps = 1e-6 * np.eye(M)
            gradient = [(value(LOSSES + h) - value(LOSSES - h)) / 2e-6 for h in steps]
        for found, by_losses, losses in run(jnp.asarray(LOSSES), row.per_task):
            assert found.shape == ()
            assert found.dtype == jnp.float64
            np.testing.assert_allclose(found, expected, rtol=1e-12)
            chex.assert_trees_all_equal_shapes_and_dtypes(by_losses, losses)
            flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(by_losses)])
            np.testing.assert_allclose(flat, gradient, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("row", [row for row in ROWS if row.learned], ids=lambda row: row.name)
def test_gradient_by_learned_parameters(row):
    with jax.enable_x64(True):
        found = jax.grad(row.scalarizer.apply, argnums=1)(jnp.asarray(LOSSES), row.state())
        for i, step in enumerate(1e-6 * np.eye(M)):
            difference = row.value(LOSSES, LEARNED + step) - row.value(LOSSES, LEARNED - step)
            np.testing.assert_allclose(found[i], difference / 2e-6, rtol=1e-8, atol=1e-9)


@all_rows
def test_permuted_tasks(row):
    """Losses, weights and state permuted: the same value, and the next state permuted."""
    if row.name == "random":  # Its weights are drawn by position.
        return
    order = rng.permutation(M)
    permute = lambda tree: jax.tree.map(lambda x: x[order] if jnp.ndim(x) == 1 else x, tree)
    with jax.enable_x64(True):
        scalarizer = row.scalarizer
        permuted = row.make(**permute(row.per_task)) if row.per_task else scalarizer
        state, losses = row.state(), jnp.asarray(LOSSES)
        chex.assert_trees_all_close(
            compiled(permuted.apply)(losses[order], permute(state)),
            compiled(scalarizer.apply)(losses, state),
            rtol=1e-13,
            atol=1e-15,  # Sums in another order, which cancel.
        )
        chex.assert_trees_all_close(
            compiled(permuted.update)(losses[order], permute(state)),
            permute(compiled(scalarizer.update)(losses, state)),
            rtol=1e-13,
            atol=1e-15,
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@all_rows
def test_types(row, dtype):
    with jax.enable_x64(dtype == "float64"):
        scalarizer = row.make()
        state = scalarizer.init(M)
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
        assert not any(weak for *_, weak in jax.tree.leaves(types_of(state), is_leaf=is_type))
        losses = jax.ShapeDtypeStruct((M,), dtype)
        after = jax.eval_shape(lambda L, s: scalarizer.update(L, s, unknown=1), losses, state)
        assert types_of(after) == types_of(state)
        value = jax.eval_shape(scalarizer.apply, losses, state)
        assert value.shape == ()
        assert value.dtype == ("float64" if dtype == "float64" else "float32")


def is_type(x: Any) -> bool:
    return type(x) is tuple and len(x) == 3


@all_rows
def test_a_state_may_be_donated(row):
    scalarizer = row.make()
    traces = []

    def step(losses, state):
        traces.append(None)
        return scalarizer.apply(losses, state), scalarizer.update(losses, state)

    jitted = jax.jit(step, donate_argnums=1)
    state = scalarizer.init(M)
    for losses in STEPS:
        value, state = jitted(jnp.asarray(losses, jnp.bfloat16), state)
        assert np.isfinite(value)
    assert len(traces) == 1
    chex.assert_tree_all_finite(raw(state))
    # Donated state must not take the factory's own buffers with it.
    chex.assert_tree_all_finite(raw(scalarizer.init(M)))


def run_of(scalarizer, losses, state):
    """The values and gradients of several steps, and the state after them."""

    def step(state, losses):
        result = jax.value_and_grad(scalarizer.apply)(losses, state)
        return scalarizer.update(losses, state), result

    return lax.scan(step, state, losses)


# Without a state a scan is a vmap: one of them, and what has a state.
@pytest.mark.parametrize(
    "row",
    slow_but({"cosmos", "dwa", "famo", "imtl_l", "random", "stch(warm-up)"}, ROWS),
    ids=lambda row: row.name,
)
@pytest.mark.slow
def test_scan_and_vmap_equal_a_python_loop(row):
    """Over losses and all hyper-parameters at once."""
    state = row.make().init(M)
    losses = jnp.asarray([STEPS, 0.5 * STEPS, 1.5 * STEPS], jnp.float32)
    factors = np.array([0.6, 1.0, 1.7], np.float32)
    arguments = {
        name: jnp.asarray(np.multiply.outer(factors, value), jnp.float32)
        for name, value in {**row.scalars, **row.per_task}.items()
    }
    batched = jax.jit(jax.vmap(lambda kwargs, steps: run_of(row.make(**kwargs), steps, state)))
    found_state, found = batched(arguments, losses)

    @jax.jit
    def step(kwargs, losses, state):
        scalarizer = row.make(**kwargs)
        result = jax.value_and_grad(scalarizer.apply)(losses, state)
        return result, scalarizer.update(losses, state)

    looped = []
    for i in range(3):
        kwargs = {name: np.asarray(value)[i] for name, value in arguments.items()}
        after, results = state, []
        for losses_of_step in np.asarray(losses)[i]:
            result, after = step(kwargs, losses_of_step, after)
            results.append(result)
        looped.append((raw(after), jax.tree.map(lambda *leaves: np.stack(leaves), *results)))
    expected = jax.tree.map(lambda *leaves: np.stack(leaves), *looped)
    chex.assert_trees_all_close((raw(found_state), found), expected, rtol=2e-6, atol=1e-6)
    # The middle one has the numbers of the row, given as Python numbers outside of jit.
    np.testing.assert_allclose(row.make().apply(losses[1, 0], state), found[0][1, 0], rtol=2e-6)


@all_rows
def test_a_saved_state_continues_bit_for_bit(row):
    scalarizer = row.scalarizer
    losses = np.asarray(STEPS, np.float32)

    def step(losses, state):
        results = []
        for losses_of_step in losses:
            results.append(compiled(scalarizer.apply)(losses_of_step, state))
            state = compiled(scalarizer.update)(losses_of_step, state)
        return state, np.stack(results)

    state, _ = step(losses, scalarizer.init(M))
    saved = pickle.dumps(jax.tree.map(np.asarray, raw(state)))
    restored = jax.tree.map(
        lambda like, value: (
            jax.random.wrap_key_data(jnp.asarray(value))
            if jnp.issubdtype(like.dtype, jax.dtypes.prng_key)
            else jnp.asarray(value)
        ),
        row.make().init(M),
        pickle.loads(saved),
    )
    for found, expected in zip(step(losses, restored), step(losses, state), strict=True):
        chex.assert_trees_all_equal(raw(found), raw(expected))


@all_rows
def test_what_is_not_finite_propagates(row):
    state = row.state()
    losses = np.asarray(LOSSES, np.float32)
    apply = compiled(row.scalarizer.apply)
    assert np.isfinite(apply(losses, state))
    for bad in (np.nan, np.inf):
        broken = np.where(np.arange(M) == 2, bad, losses).astype(np.float32)
        assert not np.isfinite(apply(broken, state))


@all_rows
def test_explicit_mesh(row):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        scalarizer = row.make()
        losses = {"a": jnp.ones((2, 2)), "b": jnp.ones(2)}
        losses = jax.tree.map(lambda leaf: jax.device_put(leaf, jax.P()), losses)
        train = lambda losses: run_of(
            scalarizer, jax.tree.map(lambda x: jnp.stack([x, x]), losses), scalarizer.init(M)
        )
        jax.eval_shape(train, losses)  # A scan refuses a state whose type changes.


# --- Known numbers -----------------------------------------------------------------------------


def scalarize(scalarizer, losses, state=()):
    """The value of float32 losses, and its gradient."""
    value, gradient = derivative(scalarizer.apply)(jnp.asarray(losses, jnp.float32), state)
    return float(value), np.asarray(gradient)


KNOWN = [
    (S.mean(), [1.0, 2.0, 6.0], 3),
    (S.sum(), [[1.0, 2.0], [3.0, 4.0]], 10),
    (S.constant([0.1, 0.2, 0.3, 0.4]), [1.0, 2.0, 3.0, 4.0], 3),
    (S.constant(2.0), 3.0, 6),
    (S.constant([[1, 2], [3, 4]]), [[1.0, 0.0], [0.0, 1.0]], 5),
    (S.stch(1.0), [0.0, 0.0], np.log(2)),
    (S.stch(1.0, weights=[1.0, 1.0]), [1.0, 1.0], 1 + np.log(2)),
    (S.stch(1.0, reference=[1.0, 1.0]), [1.0, 1.0], np.log(2)),
    (S.stch(1e-10), [1e30, 2e30, 3e30], 1e30),
    (S.pbi(1.0, [1.0, 1.0]), [2.0, 0.0], 2 * 2**0.5),
    (S.pbi(0.0, [1.0, 1.0]), [2.0, 0.0], 2**0.5),
    (S.pbi(7.0, [1.0, 1.0], reference=[1.0, 2.0]), [3.0, 4.0], 8**0.5),
    (S.cosmos(1.0, [3.0, 4.0]), [3.0, 4.0], 24),
    (S.cosmos(1.0, [0.6, 0.8]), [0.6, 0.8], 0),
    (S.cosmos(0.0, [1 / 3, 1 / 3, 1 / 3]), [1.0, 2.0, 4.0], 7 / 3),
    (S.cosmos(0.0, [2.0, 1.0]), [3.0, 4.0], 10),
    (S.cosmos(1.0, [1.0, 1.0]), [0.0, 0.0], 0),
    (S.cosmos(1.0, [0.0, 0.0]), [1.0, 2.0], 0),
    (S.geometric_mean(), [1.0, 2.0, 4.0], 2),
]


def test_known_values():
    @jax.jit
    def run(losses):
        scalarizers = [scalarizer for scalarizer, *_ in KNOWN]
        return [
            jax.value_and_grad(scalarizer.apply)(L, ())
            for scalarizer, L in zip(scalarizers, losses, strict=True)
        ]

    results = run([jnp.asarray(losses, jnp.float32) for _, losses, _ in KNOWN])
    for (_, losses, expected), (value, gradient) in zip(KNOWN, results, strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-7, err_msg=str(losses))
        assert np.all(np.isfinite(gradient))


def test_known_values_of_the_learned_ones():
    assert scalarize(S.imtl_l(), [1, 2, 4], S.imtl_l().init(3))[0] == 7
    assert scalarize(S.uw(), [1, 2, 4], S.uw().init(3))[0] == 3.5
    state = jnp.asarray(LEARNED, jnp.float32)
    imtl_l, uw = S.imtl_l().apply(LOSSES, state), S.uw().apply(LOSSES, -state)
    np.testing.assert_allclose(imtl_l, 2 * uw, rtol=1e-6)


@pytest.mark.parametrize("reference", [None, REFERENCE])
@pytest.mark.parametrize("mu", [1e-3, 0.3, 10.0])
def test_stch_is_a_combination_of_gradients(mu, reference):
    """The gradient through the scalarizer is J^T w with w = lambda softmax(lambda (L - z) / mu)."""
    with jax.enable_x64(True):
        matrix = jnp.asarray(rng.normal(size=(M, 4)))
        losses_fn = lambda params: jnp.square(matrix @ params)
        params = jnp.asarray(rng.normal(size=4))
        scalarizer = S.stch(mu, WEIGHTS, reference)
        found = jax.grad(lambda params: scalarizer.apply(losses_fn(params), ()))(params)
        losses, jacobian = jaxjd.value_and_jacobian(losses_fn)(params)
        gaps = np.asarray(losses) - (0 if reference is None else reference)
        weights = jnp.asarray(WEIGHTS * softmax(WEIGHTS * gaps / mu))
        chex.assert_trees_all_close(found, jaxjd.combine(weights, jacobian), rtol=1e-12)


# --- Scales and edges --------------------------------------------------------------------------

SCALE_FREE = {
    "mean": lambda c: S.mean(),
    "geometric_mean": lambda c: S.geometric_mean(),
    "pbi": lambda c: S.pbi(1.5, WEIGHTS, c * REFERENCE),
    "stch": lambda c: S.stch(c * 0.3, WEIGHTS, c * REFERENCE),
}


@pytest.mark.parametrize("name", SCALE_FREE)
def test_value_scales_with_the_losses(name):
    losses = LOSSES.astype(np.float32)
    value, gradient = scalarize(SCALE_FREE[name](1), losses)
    for power in (-100, -40, 40, 100):
        c = np.float32(2.0**power)
        scaled, scaled_gradient = scalarize(SCALE_FREE[name](c), c * losses)
        # Powers of two change no digit, except through logarithms as large as log c.
        tolerance = 1e-5 if name == "geometric_mean" else 1e-6
        np.testing.assert_allclose(scaled / c, value, rtol=tolerance)
        np.testing.assert_allclose(scaled_gradient, gradient, rtol=tolerance)


def test_cosine_of_tiny_and_huge_losses():
    for c in (np.float32(2.0**-100), np.float32(2.0**100)):
        value, gradient = scalarize(S.cosmos(1.0, [1.0, 0.0]), [c * 3, c * 4])
        np.testing.assert_allclose(value, 3 * float(c) - 0.6, rtol=1e-6)
        # The gradient of the cosine is (1 - 0.36, -0.48) / 5.
        np.testing.assert_allclose((c * gradient)[1], 0.48 / 5, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_pbi_on_the_ray(scale):
    weights = np.array([1.0, 2.0, 3.0, 0.7])
    losses = np.float32(scale) * weights.astype(np.float32)
    _, gradient = scalarize(S.pbi(100.0, weights), losses)
    np.testing.assert_allclose(gradient, weights / np.linalg.norm(weights), rtol=1e-6)
    # A little off the ray, the penalty is there with its full slope.
    value, gradient = scalarize(S.pbi(100.0, weights), losses * [1, 1, 1, 1.001])
    assert np.linalg.norm(gradient) > 99
    assert value > 1.001 * scale * np.linalg.norm(weights)
    # At the start of the ray there is no direction.
    value, gradient = scalarize(S.pbi(100.0, weights), np.zeros(4))
    assert value == 0
    np.testing.assert_allclose(gradient, weights / np.linalg.norm(weights), rtol=1e-6)


def test_geometric_mean_of_zero_and_negative_losses():
    value, gradient = scalarize(S.geometric_mean(), [1.0, 0.0, 4.0])
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)
    for losses in ([1.0, -1.0, 1.0], [0.0, -1.0, 1.0], [0.0, np.inf, 1.0]):
        value, gradient = scalarize(S.geometric_mean(), losses)
        assert np.isnan(value)
        assert np.all(np.isnan(gradient))


def run_updates(scalarizer, steps, num_tasks=2):
    state = scalarizer.init(num_tasks)
    for losses in steps:
        state = compiled(scalarizer.update)(jnp.asarray(losses, jnp.float32), state)
    return state


def weights_of(scalarizer, state, losses=(1.0, 1.0)):
    return scalarize(scalarizer, losses, state)[1]


def test_stch_with_warmup_on_zero_and_negative_losses():
    scalarizer = S.stch(0.5, warmup_steps=2)
    cold = scalarizer.init(2)
    warm = run_updates(scalarizer, [[0.0, 2.0], [0.0, 4.0], [100.0, 100.0]])
    np.testing.assert_array_equal(warm.nadir, [0, 3])
    for state in (cold, warm):
        value, gradient = scalarize(scalarizer, [0.0, 0.0], state)
        assert np.isfinite(value)
        np.testing.assert_array_equal(gradient, 0)
        value, gradient = scalarize(scalarizer, [-1.0, 1.0], state)
        assert np.isnan(value)
        assert np.all(np.isnan(gradient))
    np.testing.assert_array_equal(weights_of(scalarizer, cold, [0.0, 0.25]), [0, 4])
    # Two tasks, so m / L times the softmax: all of it for the one loss that is not zero.
    np.testing.assert_allclose(weights_of(scalarizer, warm, [0.0, 0.25]), [0, 8])
    # Without a nadir the ratio is 1; here the other one is 1 as well.
    np.testing.assert_allclose(weights_of(scalarizer, warm, [5.0, 3.0]), [1 / 5, 1 / 3], rtol=1e-6)
    # Nothing left to divide by zero, also for the derivative by mu.
    by_mu = jax.grad(lambda mu: S.stch(mu, warmup_steps=2).apply(jnp.array([0.0, 2.0]), warm))
    assert np.isfinite(by_mu(1e-3))


def test_dwa_weights():
    scalarizer = S.dwa()
    for steps in ([], [[1.0, 1.0]]):
        np.testing.assert_array_equal(
            weights_of(scalarizer, run_updates(scalarizer, steps)), [1, 1]
        )
    state = run_updates(scalarizer, [[1.0, 1.0], [1.0, 4.0]])
    expected = 2 * softmax(np.array([1, 4]) / 2)
    np.testing.assert_allclose(weights_of(scalarizer, state), expected, rtol=1e-6)
    # Averages of epochs; the steps of an epoch that is not complete do not count.
    averaged = S.dwa(steps_per_epoch=2)
    state = run_updates(averaged, [[0.5, 1.5], [1.5, 0.5], [0.0, 5.0], [2.0, 3.0], [9.0, 9.0]])
    np.testing.assert_allclose(weights_of(averaged, state), expected, rtol=1e-6)
    assert (int(state.step), int(state.epoch)) == (1, 2)
    np.testing.assert_array_equal(state.current, [9, 9])
    # Ratios of negative losses are ratios too.
    state = run_updates(scalarizer, [[-1.0, -1.0], [-1.0, -4.0]])
    np.testing.assert_allclose(weights_of(scalarizer, state), expected, rtol=1e-6)


def test_dwa_without_a_rate():
    scalarizer = S.dwa()
    # The first loss was zero: its ratio counts as 1, like that of the second.
    for first in (0.0, 3.0):
        state = run_updates(scalarizer, [[0.0, 2.0], [first, 2.0]])
        np.testing.assert_allclose(weights_of(scalarizer, state), [1, 1])
    # A ratio beyond the largest number takes everything.
    state = run_updates(scalarizer, [[1e-30, 1.0], [1e30, 1.0]])
    np.testing.assert_array_equal(weights_of(scalarizer, state), [2, 0])


def test_famo_gradient_and_solved_tasks():
    scalarizer = S.famo(min_losses=[1.0, 0.0, 0.5])
    state = scalarizer.init(3)._replace(logits=jnp.array([0.3, -0.2, 0.1]))
    z = softmax(np.array([0.3, -0.2, 0.1]))
    gaps = np.array([1.0, 3.0, 0.5])
    expected = z / gaps / np.sum(z / gaps)
    found = weights_of(scalarizer, state, [2.0, 3.0, 1.0])
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(found.sum(), 1, rtol=1e-6)
    # A task at its bound does not count, and the weights of the others sum to one.
    found = weights_of(scalarizer, state, [1.0, 3.0, 1.0])
    rest = z[1:] / gaps[1:]
    np.testing.assert_allclose(found, [0, *(rest / rest.sum())], rtol=1e-6)
    value, gradient = scalarize(scalarizer, [1.0, 0.0, 0.5], state)
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)
    # Below its bound, there is no logarithm.
    value, gradient = scalarize(scalarizer, [0.5, 3.0, 1.0], state)
    assert np.isnan(value)
    assert np.all(np.isnan(gradient))


@pytest.mark.parametrize("power", [-100, 100])
def test_famo_does_not_depend_on_the_unit_of_a_loss(power):
    scalarizer = S.famo()
    state = scalarizer.init(2)
    before, after = jnp.array([1.0, 3.0]), jnp.array([0.9, 2.9])
    expected = scalarizer.update(after, state, previous_losses=before).logits
    assert not np.allclose(expected, 0)
    unit = jnp.array([2.0**power, 1.0])
    found = scalarizer.update(unit * after, state, previous_losses=unit * before).logits
    np.testing.assert_array_equal(found, expected)
    weights = weights_of(scalarizer, state, unit * before)
    assert np.all(np.isfinite(weights))
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-6)


def test_famo_update_without_a_fall():
    scalarizer = S.famo(lr=0.5)
    state = scalarizer.init(3)
    for before, after in (
        ([1, 2, 3], [1, 2, 3]),
        ([1, 2, 3], [0.5, 1, 1.5]),
        ([1, 0, 3], [1, 2, 0]),
    ):
        before, after = jnp.asarray(before, jnp.float32), jnp.asarray(after, jnp.float32)
        found = scalarizer.update(after, state, previous_losses=before)
        np.testing.assert_array_equal(found.logits, 0)
    # The first call without the losses before only stores them, Adam included.
    first = scalarizer.update(jnp.array([1.0, 2.0, 3.0]), state)
    chex.assert_trees_all_equal((first.logits, first.adam), (state.logits, state.adam))
    np.testing.assert_array_equal(first.previous_losses, [1, 2, 3])
    assert int(first.count) == 1
    # From the second one on, it is the update with the losses of the call before.
    losses = jnp.array([1.0, 1.0, 3.0])
    second = scalarizer.update(losses, first)
    chex.assert_trees_all_equal(
        second, scalarizer.update(losses, first, previous_losses=jnp.array([1.0, 2.0, 3.0]))
    )
    assert second.logits[1] < 0 < second.logits[0]
    # A fall that a logarithm's last digit would hide is seen.
    tiny = scalarizer.update(
        jnp.array([1e30, 1e30, 1e30 * (1 - 2e-7)]), first, previous_losses=jnp.full(3, 1e30)
    )
    assert tiny.logits[2] < -0.4


# --- Training loops ----------------------------------------------------------------------------

TARGETS = np.array([[1.0, 0.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 3.0, 2.0], [0.0, 0.0, 9.0]])


def quadratics(params, batch):
    """Four losses that no parameters bring to zero together."""
    return {
        "near": jnp.stack([jnp.sum((params - batch - t) ** 2) + 0.1 for t in TARGETS[:3]]),
        "far": jnp.sum((params - batch - TARGETS[3]) ** 2) + 0.1,
    }


@pytest.mark.parametrize(
    ("scalarizer", "again"),
    [
        pytest.param(S.dwa(steps_per_epoch=3), False, id="dwa"),
        pytest.param(
            S.famo(lr=0.2), False, id="famo of successive batches", marks=pytest.mark.slow
        ),
        pytest.param(S.famo(lr=0.2), True, id="famo of the paper"),
    ],
)
def test_training_inside_a_scan(scalarizer, again):
    tx = optax.adam(0.05)
    batches = 0.1 * jax.random.normal(jax.random.key(0), (30, 3))

    def step(carry, batch):
        params, opt_state, state = carry

        def loss_fn(params):
            losses = quadratics(params, batch)
            return scalarizer.apply(losses, state), losses

        gradient, losses = jax.grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(gradient, opt_state, params)
        params = optax.apply_updates(params, updates)
        if again:
            after = quadratics(params, batch)
            state = scalarizer.update(after, state, previous_losses=losses)
        else:
            state = scalarizer.update(losses, state)
        return (params, opt_state, state), losses

    params = jnp.zeros(3)
    start = (params, tx.init(params), scalarizer.init(4))
    scanned, _ = jax.jit(lambda carry: lax.scan(step, carry, batches))(start)
    carry = start
    jitted = jax.jit(step)
    for batch in batches:
        carry, _ = jitted(carry, batch)
    chex.assert_trees_all_close(scanned, carry, rtol=1e-4, atol=1e-5)
    # It is no plain training: the state has been at work.
    plain = S.mean()
    params = jnp.zeros(3)
    opt_state = tx.init(params)
    gradient_of = jax.jit(jax.grad(lambda p, b: plain.apply(quadratics(p, b), ())))
    for batch in batches:
        gradient = gradient_of(params, batch)
        updates, opt_state = tx.update(gradient, opt_state, params)
        params = optax.apply_updates(params, updates)
    assert np.abs(scanned[0] - params).max() > 1e-3


@pytest.mark.parametrize(
    ("scalarizer", "optimum"), [(S.uw(), np.log), (S.imtl_l(), lambda L: -np.log(L))]
)
def test_learned_parameters_reach_their_optimum(scalarizer, optimum):
    losses = jnp.array([0.2, 1.0, 30.0])
    tx = optax.adam(0.1)
    state = scalarizer.init(3)

    def step(carry, _):
        state, opt_state = carry
        updates, opt_state = tx.update(jax.grad(scalarizer.apply, 1)(losses, state), opt_state)
        return (optax.apply_updates(state, updates), opt_state), None

    (state, _), _ = jax.jit(lambda c: lax.scan(step, c, length=300))((state, tx.init(state)))
    np.testing.assert_allclose(state, optimum(np.asarray(losses)), rtol=1e-3, atol=1e-3)


def test_random_weights_are_drawn_anew_after_every_update():
    def weights(key, steps=4):
        scalarizer = S.random(key)
        state = scalarizer.init()
        found = []
        for _ in range(steps):
            found.append(weights_of(scalarizer, state))
            np.testing.assert_array_equal(weights_of(scalarizer, state), found[-1])
            state = scalarizer.update(jnp.ones(2), state)
        return np.stack(found)

    first = weights(7)
    np.testing.assert_allclose(first.sum(axis=1), 1, rtol=1e-6)
    assert len(np.unique(first)) == first.size
    np.testing.assert_array_equal(weights(jax.random.key(7)), first)
    assert not np.allclose(weights(8), first)
    # The logits' difference of two tasks has the variance 2.
    scalarizer = S.random()
    states = jax.vmap(lambda key: S.random(key).init())(jax.random.split(jax.random.key(0), 4000))
    both = jax.jit(jax.vmap(jax.grad(scalarizer.apply), (None, 0)))(jnp.ones(2), states)
    logits = np.log(both[:, 0] / both[:, 1])
    assert abs(logits.mean()) < 4 * (2 / 4000) ** 0.5
    assert abs(logits.var() / 2 - 1) < 4 * (2 / 4000) ** 0.5


# --- Bad input ---------------------------------------------------------------------------------


def traced(scalarizer, losses, state=None, method="apply", **extra_args):
    """Traces under jit: nothing can run."""
    state = scalarizer.init(3) if state is None else state
    method = getattr(scalarizer, method)
    return jax.eval_shape(jax.jit(lambda L, s, e: method(L, s, **e)), losses, state, extra_args)


THREE = jnp.ones(3)
TWO = {"a": jnp.ones(()), "b": {"c": jnp.ones(1)}}
BAD = {
    "integer losses": (lambda: traced(S.mean(), {"a": {"b": jnp.arange(3)}}), "'a/b'", "int32.3"),
    "complex losses": (lambda: traced(S.sum(), 1j * THREE), "'<root>'", "real floating point"),
    "a Python int": (lambda: S.mean().apply([1.0, 2], ()), "Loss '1'", "found int"),
    "no number": (lambda: S.mean().apply({"a": "x"}, ()), "Loss 'a'", "found str"),
    "no losses": (lambda: traced(S.mean(), {}), "no losses"),
    "losses without entries": (lambda: traced(S.mean(), jnp.ones((0, 3))), "no losses"),
    "integer losses in update": (
        lambda: traced(S.dwa(), jnp.arange(3), method="update"),
        "'<root>'",
        "int32.3",
    ),
    **{
        f"{name} without num_tasks": (lambda s=s: s.init(), f"`{name}`", "num_tasks=")
        for name, s in (
            ("dwa", S.dwa()),
            ("famo", S.famo()),
            ("imtl_l", S.imtl_l()),
            ("stch", S.stch(1.0, warmup_steps=2)),
            ("uw", S.uw()),
        )
    },
    "zero tasks": (lambda: S.uw().init(0), "num_tasks", "got 0"),
    **{
        f"state of {name} for others, {method}": (
            lambda s=s, method=method: traced(s, TWO, s.init(3), method),
            "3 entries" if field else r"shape \(2,\)",
            "2 tasks" if field else r"got float32\[3\]",
        )
        for name, s, field in (
            ("dwa", S.dwa(), True),
            ("famo", S.famo(), True),
            ("stch", S.stch(1.0, warmup_steps=2), True),
            ("imtl_l", S.imtl_l(), False),
            ("uw", S.uw(), False),
        )
        for method in (("apply", "update") if field else ("apply",))
    },
    "forgotten state": (lambda: S.uw().apply(TWO, ()), "`state`", "got tuple"),
    "previous losses of others": (
        lambda: traced(S.famo(), THREE, method="update", previous_losses=jnp.ones(4)),
        "`previous_losses` has 4",
        "3 tasks",
    ),
    "previous losses that are integers": (
        lambda: traced(S.famo(), THREE, method="update", previous_losses=jnp.arange(3)),
        "floating point",
    ),
    "weights of others": (
        lambda: traced(S.constant([1.0, 2.0]), THREE),
        r"`weights` must have one entry per task, shape \(3,\)",
        r"float32\[3\]; found float32\[2\]",
    ),
    "weights in another shape": (
        lambda: traced(S.constant(jnp.ones((3, 2))), jnp.ones((2, 3))),
        r"shape \(6,\)",
        r"float32\[2,3\]; found float32\[3,2\]",
    ),
    "weights with other names": (
        lambda: traced(S.cosmos(1.0, {"a": 1.0, "d": 2.0}), TWO),
        "'c'",
        "'d'",
    ),
    "reference of others": (
        lambda: traced(S.pbi(1.0, [1.0, 2.0, 3.0], [1.0, 2.0]), THREE),
        "`reference`",
    ),
    "reference of others for stch": (
        lambda: traced(S.stch(1.0, None, [1.0, 2.0]), THREE),
        "`reference`",
    ),
    "bounds of others": (lambda: traced(S.famo([1.0, 2.0]), THREE), "`min_losses`"),
    "no weights": (lambda: S.constant(None), "`weights`", "got None"),
    "empty weights": (lambda: S.constant([]), "`weights`", r"got \[\]"),
    "weights that are words": (lambda: S.constant(["a", "b"]), "`weights`", "found str"),
    "complex weights": (lambda: S.cosmos(1.0, [1j, 1.0]), "`weights`", "found complex"),
    "Boolean weights": (lambda: S.pbi(1.0, [True, False]), "`weights`", "found bool"),
    "negative lambda_": (lambda: S.cosmos(-0.1, [1.0]), "`lambda_` must be >= 0", "got -0.1"),
    "zero temperature": (lambda: S.dwa(0.0), "`temperature` must be > 0", "got 0.0"),
    "no steps per epoch": (lambda: S.dwa(steps_per_epoch=0), "`steps_per_epoch`", ">= 1"),
    "half a step": (lambda: S.dwa(steps_per_epoch=0.5), "`steps_per_epoch`", "static int"),
    "negative lr": (lambda: S.famo(lr=-1.0), "`lr` must be >= 0", "got -1.0"),
    "negative decay": (lambda: S.famo(weight_decay=-1.0), "`weight_decay` must be >= 0"),
    "negative theta": (lambda: S.pbi(-1.0, [1.0]), "`theta` must be >= 0"),
    "zero mu": (lambda: S.stch(0.0), "`mu` must be > 0", "got 0.0"),
    "mu that is no number": (lambda: S.stch("1"), "`mu` must be a number"),
    "no warm-up steps": (lambda: S.stch(1.0, warmup_steps=0), "`warmup_steps`", ">= 1"),
    "weights and a warm-up": (
        lambda: S.stch(1.0, [1.0, 2.0], warmup_steps=1),
        "`weights` has no place",
        "`warmup_steps`",
    ),
    "reference and a warm-up": (
        lambda: S.stch(1.0, reference=[1.0, 2.0], warmup_steps=1),
        "`reference` has no place",
    ),
    "key that is no key": (lambda: S.random(jnp.ones(3)), "`key`", r"float32\[3\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    run, first, *others = BAD[name]
    with pytest.raises(ValueError, match=first) as caught:
        run()
    for other in others:
        assert re.search(other, str(caught.value)), str(caught.value)


# --- Parity with TorchJD -----------------------------------------------------------------------

GOLDENS = json.loads(
    pathlib.Path(__file__).with_name("goldens").joinpath("scalarizers.json").read_text()
)
TOLERANCES = {"float64": 1e-9, "float32": 2e-5}
both_dtypes = pytest.mark.parametrize("dtype", slow_but({"float64"}, TOLERANCES))


def assert_parity(found, case_value, case_gradient, losses, tolerance):
    """Relative to the largest entry; the value also to what rounding of the losses does to it."""
    value, gradient = (np.asarray(x, np.float64) for x in found)
    case_gradient = np.asarray(case_gradient)
    np.testing.assert_allclose(
        gradient, case_gradient, rtol=0, atol=tolerance * np.abs(case_gradient).max()
    )
    scale = np.abs(case_value) + np.sum(np.abs(case_gradient * losses))
    np.testing.assert_allclose(value, case_value, rtol=0, atol=tolerance * scale)


@both_dtypes
@pytest.mark.parametrize("name", sorted({case["scalarizer"] for case in GOLDENS["stateless"]}))
def test_stateless_parity(name, dtype):
    groups = collections.defaultdict(list)
    for case in GOLDENS["stateless"]:
        if case["scalarizer"] == name:
            groups[np.shape(case["losses"]), *sorted(case["arguments"])].append(case)

    def apply(losses, arguments):
        return getattr(S, name)(**arguments).apply(losses, ())

    @jax.jit
    def run(groups):
        return [jax.vmap(jax.value_and_grad(apply))(*group) for group in groups]

    stack = lambda *leaves: np.stack([np.asarray(leaf, dtype) for leaf in leaves])
    as_arrays = lambda case: (
        np.asarray(case["losses"]),
        {key: np.asarray(value) for key, value in case["arguments"].items()},
    )
    with jax.enable_x64(dtype == "float64"):
        stacked = [jax.tree.map(stack, *map(as_arrays, group)) for group in groups.values()]
        results = run(stacked)
    count = 0
    for group, (values, gradients) in zip(groups.values(), results, strict=True):
        for case, value, gradient in zip(group, values, gradients, strict=True):
            assert value.dtype == gradient.dtype == dtype
            assert_parity(
                (value, gradient),
                case["value"],
                case["gradient"],
                case["losses"],
                TOLERANCES[dtype],
            )
            count += 1
    assert count >= 8


@both_dtypes
@pytest.mark.parametrize("name", ["uw", "imtl_l"])
def test_learned_parity(name, dtype):
    cases = [case for case in GOLDENS["learned"] if case["scalarizer"] == name]
    assert len(cases) >= 16

    @jax.jit
    def run(cases):
        apply = getattr(S, name)().apply
        return [jax.value_and_grad(apply, (0, 1))(*case) for case in cases]

    with jax.enable_x64(dtype == "float64"):
        results = run(
            [[np.asarray(case[key], dtype) for key in ("losses", "state")] for case in cases]
        )
    for case, (value, (gradient, by_state)) in zip(cases, results, strict=True):
        tolerance = TOLERANCES[dtype]
        assert_parity((value, gradient), case["value"], case["gradient"], case["losses"], tolerance)
        expected = np.asarray(case["state_gradient"])
        # e^s L - 1 cancels where the scale is right.
        scale = max(1, np.abs(expected).max())
        np.testing.assert_allclose(by_state, expected, rtol=0, atol=tolerance * scale)


def check_sequence(case, losses, found, dtype):
    assert len(losses) >= 6
    results = zip(*found, case["values"], case["gradients"], losses, strict=True)
    for value, gradient, case_value, case_gradient, row in results:
        assert value.dtype == gradient.dtype == dtype
        assert_parity((value, gradient), case_value, case_gradient, row, TOLERANCES[dtype])


@both_dtypes
@pytest.mark.parametrize("index", range(len(GOLDENS["dwa"])))
def test_dwa_parity(index, dtype):
    case = GOLDENS["dwa"][index]
    with jax.enable_x64(dtype == "float64"):
        losses = jnp.asarray(case["losses"], dtype)
        scalarizer = S.dwa(**case["arguments"])
        run = jax.jit(functools.partial(run_of, scalarizer))
        _, found = run(losses, scalarizer.init(losses[0].size))
    check_sequence(case, case["losses"], found, dtype)


@jax.jit
def run_famo(bounds, arguments, before, after):
    scalarizer = S.famo(bounds, **arguments)

    def step(state, losses):
        result = jax.value_and_grad(scalarizer.apply)(losses[0], state)
        state = scalarizer.update(losses[1], state, previous_losses=losses[0])
        return state, (result, state.logits)

    return lax.scan(step, scalarizer.init(before[0].size), (before, after))[1]


@both_dtypes
@pytest.mark.parametrize("index", range(len(GOLDENS["famo"])))
def test_famo_parity(index, dtype):
    case = GOLDENS["famo"][index]
    with jax.enable_x64(dtype == "float64"):
        before, after = (jnp.asarray(case[key], dtype) for key in ("before", "after"))
        # TorchJD adds 1e-8 to the losses.
        bounds = 0 if case["min_losses"] is None else np.asarray(case["min_losses"])
        bounds = np.broadcast_to(bounds - 1e-8, before[0].shape)
        found, logits = run_famo(bounds, case["arguments"], before, after)
    check_sequence(case, case["before"], found, dtype)
    expected = np.asarray(case["logits"])
    np.testing.assert_allclose(
        logits, expected, rtol=0, atol=TOLERANCES[dtype] * np.abs(expected).max()
    )
