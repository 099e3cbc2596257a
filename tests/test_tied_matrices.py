"""Ghost clipping of matrices that several layers use: no gradient of a single example is formed."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxjd
from tests.benchmarks.clipping import by_hand, plain
from tests.jaxprs import equations_of, multiplications
from tests.matrices import gaussian
from tests.registry import slow_but
from tests.test_zoo import assert_close

EXAMPLES, LENGTH, WORDS, WIDTH = 5, 3, 40, 16
IDS = jnp.asarray(np.random.default_rng(0).integers(0, WORDS, (EXAMPLES, LENGTH)))
X = jnp.asarray(gaussian(0, EXAMPLES, LENGTH, WORDS))
TABLE = {
    "tied": jnp.asarray(gaussian(1, WORDS, WIDTH)) / 4,
    "bias": jnp.asarray(gaussian(2, WIDTH)),
}
clipped = jaxjd.per_example_value_and_clipped_grad


def language_model(params, ids, x):
    hidden = jnp.tanh(params["tied"][ids] + params["bias"][None])
    logits = hidden @ params["tied"].T
    return -jnp.mean(jax.nn.log_softmax(logits)[:, ids])


def auto_encoder(params, ids, x):
    hidden = jnp.tanh(x @ params["tied"] + params["bias"][None])
    return jnp.mean((hidden @ params["tied"].T - x) ** 2)


def same_way_twice(params, ids, x):
    first, second = (jnp.tanh(part @ params["tied"]) for part in (x, jnp.cos(x)))
    return jnp.mean(first * second)


def two_lookups_and_products(params, ids, x):
    table = jnp.transpose(params["tied"]).astype(jnp.float32)
    hidden = params["tied"][ids] + jnp.sin(params["tied"][ids[::-1]])
    return jnp.mean(jnp.einsum("tw,wv->tv", hidden, table) * (x + hidden @ params["tied"].T))


def lookups(params, ids, x):
    return jnp.mean(jnp.sin(params["tied"][ids]) * params["tied"][ids[:1]])


LOSSES = [language_model, auto_encoder, same_way_twice, two_lookups_and_products, lookups]


def decayed(params, ids, x):
    return auto_encoder(params, ids, x) + 1e-2 * jnp.sum(params["tied"] ** 2)


def in_a_scan(params, ids, x):
    def step(hidden, row):
        return jnp.tanh(hidden + row @ params["tied"]), None

    hidden, _ = lax.scan(step, params["bias"], x)
    return jnp.mean((hidden @ params["tied"].T) ** 2)


def with_a_batch_axis(params, ids, x):
    heads = params["tied"].reshape(4, WORDS // 4, WIDTH)
    parts = jnp.einsum("thw,hwd->thd", x.reshape(LENGTH, 4, WORDS // 4), heads)
    return jnp.mean(parts**2) + auto_encoder(params, ids, x)


OTHERS = [decayed, in_a_scan, with_a_batch_axis]
QUICK = {"language_model", "two_lookups_and_products", "in_a_scan"}


@pytest.mark.parametrize("name", slow_but(QUICK, [loss.__name__ for loss in LOSSES + OTHERS]))
def test_sums_are_those_of_clipped_gradients(name):
    loss = globals()[name]

    @jax.jit
    def everything(clip_norm):
        found = [clipped(loss, clip_norm, chunk_size=size) for size in (None, 2)]
        return [fn(TABLE, IDS, X) for fn in (by_hand(loss, clip_norm), *found)]

    norms = everything(jnp.inf)[0][2]
    assert jnp.max(norms) > 1.01 * jnp.min(norms)
    for clip_norm in (jnp.inf, jnp.mean(norms)):
        wanted, *found = everything(clip_norm)
        for results in found:
            for part, own, other in zip(("losses", "sum", "norms"), results, wanted, strict=True):
                assert_close(own, other, 1e-5, part)


def largest(fn, *args):
    """Entries of the largest array in a program."""
    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    return max(var.aval.size for e in equations_of(jaxpr) for var in e.outvars)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_no_gradient_of_a_single_example_is_formed(loss):
    """It is as large as the table; the factors are smaller here."""
    args = TABLE, jnp.tile(IDS, (8, 1)), jnp.tile(X, (8, 1, 1))
    copies = 8 * EXAMPLES * WORDS * WIDTH
    assert largest(by_hand(loss, 1.0), *args) == copies
    assert largest(clipped(loss, 1.0), *args) < copies / 2


@pytest.mark.parametrize("loss", OTHERS, ids=lambda loss: loss.__name__)
def test_what_no_layer_uses_has_one_gradient_per_example(loss):
    copies = EXAMPLES * WORDS * WIDTH
    dense = [
        var
        for e in equations_of(jax.make_jaxpr(clipped(loss, 1.0))(TABLE, IDS, X).jaxpr)
        for var in e.outvars
        if var.aval.size == copies
    ]
    assert dense


def test_more_rows_than_the_table_is_wide_are_written_out():
    """Where the factors are larger, the gradients of examples are what is kept."""
    args = TABLE, jnp.tile(IDS, (1, 40)), jnp.tile(X, (1, 40, 1))
    jaxpr = jax.make_jaxpr(clipped(auto_encoder, 1.0))(*args)
    kernels = [e for e in equations_of(jaxpr.jaxpr) if e.outvars[0].aval.shape[-2:] == (240, 240)]
    assert not kernels
    wanted, found = (
        jax.jit(fn)(*args) for fn in (by_hand(auto_encoder, 1.0), clipped(auto_encoder, 1.0))
    )
    for part, own, other in zip(("losses", "sum", "norms"), found, wanted, strict=True):
        assert_close(own, other, 1e-5, part)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float64", marks=pytest.mark.slow)])
def test_dtypes(dtype):
    with jax.enable_x64(True):
        params, x = jax.tree.map(lambda array: array.astype(dtype), (TABLE, X))
        exact = jax.tree.map(lambda array: array.astype(jnp.float64), (params, x))
        wanted = jax.jit(by_hand(language_model, 0.5))(exact[0], IDS, exact[1])
        engine = functools.partial(clipped(language_model, 0.5, chunk_size=1), params)
        found = jax.jit(engine)(IDS, x)
        assert found[1]["tied"].dtype == dtype
        tolerance = 1e-12 if dtype == "float64" else 16 * 2.0**-8
        for part, own, other in zip(("losses", "sum", "norms"), found, wanted, strict=True):
            assert_close(own, other, tolerance, part)


def test_devices_add_up_their_sums():
    ids, x = jnp.tile(IDS, (4, 1)), jnp.tile(X, (4, 1, 1))
    engine = clipped(language_model, 0.05)

    def local(params, *batch):
        losses, gradient, norms = engine(jaxjd.sharding.vary(params, "data"), *batch)
        return losses, lax.psum(gradient, "data"), norms

    mesh = jax.make_mesh((4,), ("data",), (AxisType.Auto,), devices=jax.devices()[:4])
    parts = P("data")
    run = jax.shard_map(
        local, mesh=mesh, in_specs=(P(), parts, parts), out_specs=(parts, P(), parts)
    )
    wanted = jax.jit(engine)(TABLE, ids, x)
    chex.assert_trees_all_close(jax.jit(run)(TABLE, ids, x), wanted, rtol=1e-5, atol=1e-6)


SHAPES = {
    "language model": (language_model, (4096, 512), 16, 16),
    "autoencoder": (auto_encoder, (1024, 512), 64, 1),
}


@pytest.mark.parametrize("name", slow_but({"autoencoder"}, SHAPES))
def test_it_takes_one_plain_step_and_its_memory(name):
    loss, shape, examples, length = SHAPES[name]
    array = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)
    params = {"tied": array(*shape), "bias": array(shape[1])}
    args = params, array(examples, length, dtype=jnp.int32), array(examples, length, shape[0])
    steps = [jax.jit(fn).trace(*args) for fn in (plain(loss), clipped(loss, 1.0))]
    unit, own = (multiplications(traced.jaxpr.jaxpr) for traced in steps)
    assert own <= 1.1 * unit
    programs = [traced.lower().compile() for traced in steps]
    unit, own = (program.memory_analysis().temp_size_in_bytes for program in programs)
    assert own <= 1.2 * unit
