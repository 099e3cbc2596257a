"""Embeddings whose indices have any integer dtype, sign and mode, against jax.jacrev."""

from __future__ import annotations

import functools
import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxjd
from tests.matrices import gaussian

# The emitters that conftest.py chooses to compile faster add up only one of equal 8-bit indices.
EMITTERS = "xla_cpu_use_fusion_emitters"
OPTIONS = {EMITTERS: True} if EMITTERS in os.environ["XLA_FLAGS"] else {}
jit = functools.partial(jax.jit, compiler_options=OPTIONS)

SIZE, M = 300, 3
TABLE = jnp.asarray(gaussian(0, SIZE, 4))
SCALE = jnp.asarray(gaussian(1, M, 4))
# The largest narrow ones, the ends of the table, one index twice, negative and outside ones.
INDICES = np.array([[0, 5, 5, 127], [-1, 255, 299, -3], [300, 260, 128, -301]])
DTYPES = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
GATHERS = {
    "embed": lambda table, ids: nn.Embed(SIZE, 4).apply({"params": {"embedding": table}}, ids),
    "take": lambda table, ids: jnp.take(table, ids, axis=0, mode="fill", fill_value=0.5),
    "take clipped": lambda table, ids: jnp.take(table, ids, axis=0, mode="clip"),
    "indexed": lambda table, ids: table[ids],
    "clipped": lambda table, ids: table.at[ids].get(mode="clip"),
    "filled": lambda table, ids: table.at[ids].get(mode="fill", fill_value=0.5),
    "dropped": lambda table, ids: table.at[ids].get(mode="drop", fill_value=0.5),
    "promised": lambda table, ids: table.at[ids].get(mode="promise_in_bounds"),
    "not wrapped": lambda table, ids: table.at[ids].get(
        mode="fill", fill_value=0.5, wrap_negative_indices=False
    ),
}

WRAPPING = ("indexed", "clipped", "filled", "dropped", "promised")


def indices_of(dtype, gather, size=SIZE):
    """What `dtype` can hold of the indices; without those outside, which Embed makes NaN."""
    ids = INDICES.astype(np.int64)
    if gather == "embed":
        ids = np.clip(ids, 0, size - 1)
    info = np.iinfo(dtype)
    return np.where((ids >= info.min) & (ids <= info.max), ids, 7).astype(dtype)


def example(gather):
    """The loss of one task or example, with its indices and a vector of its own."""
    look_up = GATHERS[gather]
    return lambda table, ids, scale: jnp.tanh(look_up(table, ids)).sum(axis=0) @ scale


def together(gather):
    """The losses of all tasks, with one lookup."""
    look_up = GATHERS[gather]

    def fn(table, ids):
        return jnp.einsum("mkd,md->m", jnp.tanh(look_up(table, ids)), SCALE)

    return fn


def close(found, expected, name=""):
    # Sums of at most 12 products of numbers near 1.
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5, err_msg=str(name))


def kinds():
    """Every gather with indices of every dtype: by default one, narrow and unsigned."""
    for gather in GATHERS:
        for dtype in DTYPES:
            marks = () if dtype == "uint8" else pytest.mark.slow
            yield pytest.param(gather, dtype, marks=marks)


@pytest.mark.parametrize(("gather", "dtype"), list(kinds()))
def test_every_dtype_and_mode(gather, dtype):
    fn, one = together(gather), example(gather)

    def rows(table, ids):
        _, jacobian = jaxjd.value_and_jacobian(fn, form="factored")(table, ids)
        _, examples = jaxjd.per_example_value_and_jacobian(one, form="factored")(table, ids, SCALE)
        found = jaxjd.materialize((jacobian, examples))
        return jax.jacrev(fn)(table, ids), jaxjd.gramian(jacobian), *found

    with jax.enable_x64(True):
        # In 8 bits JAX refuses to wrap negative indices into a table that is longer.
        size = 100 if dtype.endswith("int8") and gather in WRAPPING else SIZE
        ids = jnp.asarray(indices_of(dtype, gather, size))
        assert ids.dtype == dtype
        expected, gramian, *found = map(np.asarray, jit(rows)(np.asarray(TABLE)[:size], ids))
    assert np.abs(expected).max(axis=(1, 2)).min() > 0.1
    close(gramian, np.tensordot(expected, expected, ((1, 2), (1, 2))))
    for rows_ in found:
        close(rows_, expected)


def twice(table, ids):
    """The table once more, from the other end."""
    return together("embed")(table, ids) + together("embed")(table, SIZE - 1 - ids.astype(int))


@pytest.mark.parametrize("dtype", ["int8", pytest.param("uint8", marks=pytest.mark.slow)])
def test_every_engine(dtype):
    ids, weights = jnp.asarray(indices_of(dtype, "embed")), jnp.arange(1.0, M + 1)
    fn, one = together("embed"), example("embed")

    @jit
    def results(table):
        found = {}
        for form in ("dense", "auto", "factored", "products"):
            for uses, losses in (("once", fn), ("twice", twice)):
                _, gramian, pullback = jaxjd.value_and_gramian(losses, form=form)(table, ids)
                found[uses, form, "Gramian"] = gramian, pullback(weights)
            if form == "products":
                continue
            for uses, losses in (("once", fn), ("twice", twice)):
                _, rows = jaxjd.value_and_jacobian(losses, form=form)(table, ids)
                found[uses, form, "rows"] = jaxjd.gramian(rows), jaxjd.combine(weights, rows)
            _, rows = jaxjd.per_example_value_and_jacobian(one, form=form)(table, ids, SCALE)
            found["once", form, "examples"] = jaxjd.gramian(rows), jaxjd.combine(weights, rows)
            for chunk_size in (1, 2, None):
                engine = jaxjd.per_example_value_and_gramian(one, form=form, chunk_size=chunk_size)
                _, gramian, pullback = engine(table, ids, SCALE)
                found["once", form, str(chunk_size)] = gramian, pullback(weights)
        # The indices are features beside the embeddings, too.
        trunk = lambda table, ids: (GATHERS["embed"](table, ids), ids)
        heads = [
            lambda _, features, ids, task=task: jnp.sum(
                jnp.tanh(features[0][task]) @ SCALE[task] * (features[1][task] >= 0)
            )
            for task in range(M)
        ]
        empty = [jnp.zeros(0)] * M
        _, (rows, _) = jaxjd.mtl_value_and_jacobian(trunk, heads)(table, empty, ids)
        found["once", "dense", "mtl"] = jaxjd.gramian(rows), jaxjd.combine(weights, rows)
        return found, jax.jacrev(fn)(table, ids), jax.jacrev(twice)(table, ids)

    found, once, again = results(TABLE)
    expected = {"once": once, "twice": again}
    for name, (gramian, gradient) in found.items():
        close(gramian, jaxjd.gramian(expected[name[0]]), name)
        close(gradient, jaxjd.combine(weights, expected[name[0]]), name)
