"""Complex parameters: everything is as for their real and imaginary parts, as in `jax.grad`."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxjd
from jaxjd.diagnostics import explain_jacobian
from tests.matrices import gaussian
from tests.registry import AGGREGATORS, slow_but

M = 3
WEIGHTS = jnp.array([1.0, -2.0, 0.5])
close = functools.partial(chex.assert_trees_all_close, rtol=1e-10, atol=1e-10)


def draw(seed, *shape):
    return jnp.asarray(gaussian(seed, *shape), "float64")


def drawn(seed, *shape):
    return jax.lax.complex(draw(seed, *shape), draw(seed + 100, *shape))


def problem():
    params = {
        "filter": drawn(0, 4),
        "mix": drawn(1, 4, 5),
        "out": draw(2, 5, M),
        "heads": [drawn(3 + n, 4) for n in range(2)],
        "stack": drawn(6, M, 4),
    }
    return params, draw(7, 6, 4)


def one(params, x):
    """The losses of one example."""
    spectrum = jnp.fft.fft(x) * params["filter"]
    mixed = spectrum @ params["mix"]
    return jnp.tanh(mixed.real + jnp.abs(mixed) * mixed.imag) @ params["out"]


def shared(params, x):
    return jnp.mean(jax.vmap(functools.partial(one, params))(x) ** 2, axis=0)


def owned(params, x):
    """Losses that own complex parameters: whole ones, and entries along an axis."""
    spectrum = jnp.fft.fft(x) * params["filter"][None]
    each = [jnp.mean(jnp.abs(spectrum @ head) ** 2) for head in params["heads"]]
    stacked = jnp.einsum("bi,ti->tb", spectrum, params["stack"])
    per_task = jnp.mean(jnp.abs(stacked) ** 2, axis=1)
    return per_task + jnp.stack([*each, jnp.sum(params["out"]) ** 2])


def inner_products(rows):
    """The real part of the rows' products with their conjugates."""
    flat = [np.asarray(leaf).reshape(M, -1) for leaf in jax.tree.leaves(rows)]
    return sum(np.real(leaf @ leaf.conj().T) for leaf in flat)


@pytest.mark.parametrize(
    ("fn", "form", "chunk_size", "labels"),
    [
        (owned, "auto", None, True),
        (shared, "products", 2, False),
        *(
            pytest.param(fn, form, chunk_size, labels, marks=pytest.mark.slow)
            for fn in (shared, owned)
            for form in ("dense", "auto", "factored", "products")
            for chunk_size, labels in ((None, True), (1, False), (2, True))
            if (fn, form, chunk_size, labels) != (owned, "auto", None, True)
        ),
    ],
)
def test_engines_equal_jacrev(fn, form, chunk_size, labels):
    with jax.enable_x64(True):
        params, x = problem()

        @jax.jit
        def expected(params):
            rows = jax.jacrev(fn)(params, x)
            gradient = jax.grad(lambda params: WEIGHTS @ fn(params, x))(params)
            return rows, gradient, jaxjd.gramian(rows), jaxjd.combine(WEIGHTS, rows)

        rows, gradient, gramian, combined = expected(params)
        close(combined, gradient)
        close(gramian, inner_products(rows))
        assert gramian.dtype == jnp.float64
        options = {"form": form, "chunk_size": chunk_size}
        groups = {"filter": "a", "mix": "a", "out": "b", "heads": "b", "stack": "b"}

        @jax.jit
        def run(params):
            engine = jaxjd.value_and_gramian(fn, labels=groups if labels else None, **options)
            _, gramian, pullback = engine(params, x)
            if form == "products":
                return gramian, pullback(WEIGHTS)
            _, found = jaxjd.value_and_jacobian(fn, **options)(params, x)
            pair = jaxjd.materialize(found), jaxjd.combine(WEIGHTS, found)
            return gramian, pullback(WEIGHTS), *pair

        gramian, *found = run(params)
        if labels:
            part = {name: rows[name] for name in ("filter", "mix")}
            close(gramian["a"], inner_products(part))
            gramian = gramian["a"] + gramian["b"]
        close(gramian, inner_products(rows))
        wanted = [gradient] if form == "products" else [gradient, rows, gradient]
        close(found, wanted)


def test_kinds_of_leaves_and_their_report():
    with jax.enable_x64(True):
        params, x = problem()
        _, jacobian = jaxjd.value_and_jacobian(owned, form="auto")(params, x)
        kinds = {type(leaf).__name__ for leaf in jax.tree.leaves(jacobian)}
        assert {"RowsLeaf", "BlocksLeaf"} <= kinds
        reports = explain_jacobian(shared, params, x, quiet=True)
        assert {report.form for report in reports if "out" not in report.path} == {"dense"}


@pytest.mark.parametrize("form", ["auto", pytest.param("dense", marks=pytest.mark.slow)])
def test_trunk_and_heads(form):
    with jax.enable_x64(True):
        params, x = problem()

        def trunk(params, x):
            return jnp.fft.fft(x) * params["filter"][None]

        def heads(kernels, z, x):
            return jnp.stack([jnp.mean(jnp.abs(z @ kernel) ** 2) for kernel in kernels])

        kernels = [drawn(20 + n, 4) for n in range(M)]
        losses = lambda params, kernels: heads(kernels, trunk(params, x), x)
        rows, by_loss = jax.jacrev(losses, (0, 1))(params, kernels)
        sums = jax.tree.map(lambda leaf: leaf.sum(0), by_loss)
        _, (found, gradients) = jaxjd.mtl_value_and_jacobian(trunk, heads, form=form)(
            params, kernels, x
        )
        close((jaxjd.materialize(found), gradients), (rows, sums))
        features = jax.jacrev(lambda z: heads(kernels, z, x))(trunk(params, x))
        for how in (form, "products"):
            engine = jaxjd.mtl_value_and_gramian(trunk, heads, form=how)
            _, gramian, pullback = engine(params, kernels, x)
            close(gramian, inner_products(features))
            close(pullback(WEIGHTS), (jaxjd.combine(WEIGHTS, rows), sums))


EXAMPLES = [("dense", 2), ("factored", 1), ("products", None), ("products", 2)]


@pytest.mark.parametrize(
    ("form", "chunk_size"),
    [("auto", None), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in EXAMPLES)],
)
def test_one_loss_per_example(form, chunk_size):
    with jax.enable_x64(True):
        params, x = problem()
        x = x[:M]
        loss = lambda params, x: jnp.sum(one(params, x) ** 2)
        all_of = lambda params: jax.vmap(functools.partial(loss, params))(x)
        rows = jax.jit(jax.jacrev(all_of))(params)
        options = {"form": form, "chunk_size": chunk_size}
        if form != "products":
            engine = jaxjd.per_example_value_and_jacobian(loss, **options)
            close(jax.jit(lambda params: jaxjd.materialize(engine(params, x)[1]))(params), rows)

        @jax.jit
        def run(params):
            engine = jaxjd.per_example_value_and_gramian(loss, **options)
            _, gramian, pullback = engine(params, x)
            return gramian, pullback(WEIGHTS)

        close(run(params), (inner_products(rows), jaxjd.combine(WEIGHTS, rows)))


def parts(tree):
    """The real and imaginary parts side by side."""
    return jax.tree.map(lambda leaf: jnp.stack([leaf.real, leaf.imag], axis=-1), tree)


LINKS = {
    "multi_steps": lambda: jaxjd.multi_steps(jaxjd.mean(num_tasks=M), 1, M),
    "per_task": lambda: optax.chain(jaxjd.per_task(optax.trace(0.5), M), jaxjd.mean()),
    "skip_if_not_finite": lambda: jaxjd.skip_if_not_finite(jaxjd.sum(num_tasks=M)),
}
ENTRIES = ("graddrop", "trimmed_mean", "excess_mtl", "momentum_conflict_free")
METHODS = [method for method in AGGREGATORS if not any(name in method.name for name in ENTRIES)]
QUICK = {"upgrad", "moco"}


@pytest.mark.parametrize(
    "method",
    [*LINKS, *slow_but(QUICK, METHODS)],
    ids=lambda method: getattr(method, "name", method),
)
def test_updates_are_those_of_the_parts(method):
    with jax.enable_x64(True):
        params = {"first": drawn(0, 4), "second": drawn(1, 2, 3)}
        jacobian = {"first": drawn(2, M, 4), "second": drawn(3, M, 2, 3)}
        tx = LINKS[method]() if isinstance(method, str) else method.aggregator(M)

        def run(params, jacobian):
            state = tx.init(params)
            extra = {"losses": jnp.arange(1.0, M + 1)}
            if getattr(method, "stat", "") == "cross":
                extra["cross_jacobians"] = (jacobian, jacobian)
            for _ in range(2):
                updates, state = tx.update(jacobian, state, params, **extra)
            return updates

        found = run(params, jacobian)
        assert all(leaf.dtype == jnp.complex128 for leaf in jax.tree.leaves(found))
        close(parts(found), run(parts(params), parts(jacobian)), rtol=1e-7, atol=1e-7)


def test_a_step_of_descent_takes_the_conjugate():
    with jax.enable_x64(True):
        params, x = problem()
        init, apply = jaxjd.aggregated_value_and_grad(shared, jaxjd.weightings.mean())
        (before, gradient), _ = jax.jit(apply)(init(params), params, x)
        step = jax.tree.map(lambda g: -1e-6 * jnp.conj(g), gradient)
        change = shared(jax.tree.map(jnp.add, params, step), x) - before
        assert change.sum() < 0
        rows = jax.jit(jax.jacrev(shared))(params, x)
        row = jax.tree.map(lambda g: g[None], gradient)
        expected = -1e-6 * jaxjd.cross_gramian(rows, row)[:, 0]
        # The second derivatives are of the order of the first.
        close(change, expected, rtol=1e-3, atol=0)
        close(jaxjd.diagnostics.predicted_change_by(step, rows), expected, atol=0)
        around = jaxjd.diagnostics.monitored(jaxjd.mean(num_tasks=M), M, learning_rate=1e-6)
        _, state = jax.jit(around.update)(rows, around.init(params), params)
        close(state.predicted_change, expected, atol=0)
