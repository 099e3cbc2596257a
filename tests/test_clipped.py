"""Ghost clipping gives what clipping the gradients of single examples does, for less."""

from __future__ import annotations

import functools
import json
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxjd
from jaxjd.integrations import nnx as engines
from jaxjd.linalg.algebra import squared_norms
from jaxjd.linalg.layers import ConvolutionLayer
from tests import zoo
from tests.benchmarks import clipping
from tests.benchmarks.clipping import CASES, by_hand, plain, problem
from tests.benchmarks.step_cases import Case
from tests.jaxprs import equations, multiplications
from tests.pages import DOCS, table_in
from tests.registry import slow_but
from tests.test_zoo import assert_close, loss_of_an_example

clipped = jaxjd.per_example_value_and_clipped_grad


# The numbers


@pytest.mark.parametrize(
    "name",
    slow_but(
        {
            "linen cnn",
            "linen language model with tied embedding",
            "rnn",
            "custom rule with a parameter",
        },
        [
            "linen mlp",
            "linen cnn",
            "linen transformer",
            "linen language model with tied embedding",
            "linen group norm",
            "linen scanned layers",
            "linen convolutions of all kinds",
            "linen computation in bfloat16",
            "equinox cnn with channels first",
            "rnn",
            "scan within a scan",
            "scan over rematerialized layers",
            "embeddings with indices of all kinds",
            "mixture of experts",
            "views of parameters",
            "custom rule with a parameter",
            "weight standardization",
        ],
    ),
)
def test_sums_are_those_of_clipped_gradients(name, monkeypatch):
    monkeypatch.setattr(ConvolutionLayer, "_PATCH_BYTES", 2**11)  # Of some examples at a time.
    model = zoo.by_name(name)
    losses_fn, params, x = model.build()
    loss = loss_of_an_example(losses_fn)

    @jax.jit
    def everything(params, clip_norm):
        return (
            by_hand(loss, clip_norm)(params, x),
            clipped(loss, clip_norm)(params, x),
            clipped(loss, clip_norm, chunk_size=2)(params, x),
        )

    _, _, norms = everything(params, jnp.inf)[0]
    assert jnp.max(norms) > 1.0001 * jnp.min(norms)
    for clip_norm in (jnp.inf, jnp.mean(norms), 0.01):
        wanted, *found = everything(params, clip_norm)
        for what, results in zip(("whole", "chunks"), found, strict=True):
            for part, own, other in zip(("losses", "sum", "norms"), results, wanted, strict=True):
                assert_close(own, other, model.tolerance, f"{what}, {part}")


def sequence_loss(params, x, y):
    """A step that is applied to all of a sequence, and a head."""
    hidden = jnp.tanh(x @ params["kernel"] + params["bias"][None])
    return jnp.sum((hidden.mean(0) @ params["head"] - y) ** 2)


def sequence_problem(dtype=jnp.float32, batch=6, length=5, width=8):
    params = {
        "kernel": zoo.draw(0, width, width, scale=width**-0.5),
        "bias": zoo.draw(1, width),
        "head": zoo.draw(2, width, 3, scale=width**-0.5),
    }
    data = (zoo.draw(3, batch, length, width), zoo.draw(4, batch, 3))
    return jax.tree.map(lambda array: array.astype(dtype), (params, data))


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_dtypes(dtype):
    with jax.enable_x64(True):
        params, data = sequence_problem(dtype)
        exact = jax.tree.map(lambda array: array.astype(jnp.float64), (params, data))
        wanted = jax.jit(by_hand(sequence_loss, 0.5))(exact[0], *exact[1])
        engine = clipped(sequence_loss, 0.5, chunk_size=4)
        losses, gradient, norms = found = jax.jit(engine)(params, *data)
        assert losses.dtype == dtype
        assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype(dtype)}
        assert norms.dtype == {"float64": "float64", "bfloat16": "float32"}[dtype]
        # A few roundings of activations and cotangents.
        tolerance = 1e-12 if dtype == "float64" else 8 * 2.0**-8
        for part, own, other in zip(("losses", "sum", "norms"), found, wanted, strict=True):
            assert_close(own, other, tolerance, part)


@pytest.mark.parametrize("chunk_size", [None, 7])
@pytest.mark.parametrize("shape", [(), (1, 1)])
def test_sums_are_in_float32(chunk_size, shape):
    # Added up one by one in bfloat16, ones stop at 256.
    loss = lambda w, x: jnp.sum(x @ w) if shape else w * x
    x = jnp.ones((1000, *shape), jnp.bfloat16)
    engine = clipped(loss, math.inf, chunk_size=chunk_size)
    _, gradient, norms = engine(jnp.ones(shape, jnp.bfloat16), x)
    assert gradient.dtype == jnp.bfloat16
    assert gradient.reshape(()) == 1000
    np.testing.assert_array_equal(norms, np.ones(1000, np.float32))


def test_a_gradient_of_zero_adds_nothing():
    params, (x, y) = sequence_problem()
    kept = jnp.array([0, 2, 3, 5])
    loss = lambda params, x, y, switch: switch * sequence_loss(params, x, y)

    @jax.jit
    def both(clip_norm):
        switches = jnp.zeros(6).at[kept].set(1.0)
        _, wanted, _ = clipped(sequence_loss, clip_norm)(params, x[kept], y[kept])
        return clipped(loss, clip_norm)(params, x, y, switches), wanted

    for clip_norm in (1e-3, 1.0, math.inf):
        (_, gradient, norms), wanted = both(clip_norm)
        assert norms[1] == norms[4] == 0
        assert (norms[kept] > 0).all()
        chex.assert_trees_all_close(gradient, wanted, rtol=1e-5, atol=1e-6)


def test_rows_that_cancel_have_a_length():
    # The same inputs with opposite cotangents: rounding alone decides what is left of the square,
    # and its sign.
    x = zoo.draw(0, 64, 10, 100)
    x = jnp.concatenate([x, x[:, ::-1]], axis=1)
    signs = zoo.draw(1, 20)
    signs = signs - signs[::-1]
    loss = lambda w, x: jnp.sum(signs @ jnp.sin(x @ w))
    w = zoo.draw(2, 100, 100, scale=0.1)
    _, gradient, norms = jax.jit(clipped(loss, 1.0))(w, x)
    assert jnp.isfinite(gradient).all()
    largest = jnp.sum(jnp.abs(signs)) ** 2 * 100 * jnp.max(jnp.sum(x**2, axis=-1))
    assert (norms**2 <= 100 * jnp.finfo(jnp.float32).eps * largest).all()


@pytest.mark.parametrize("shape", slow_but({(2, 3), (0,)}, [(), (3,), (2, 3), (0,)]))
@pytest.mark.parametrize("width", slow_but({(4,)}, [(), (4,)]))
def test_embeddings_of_any_shape(shape, width):
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 3, (5, *shape)))
    table = zoo.draw(0, 50, *width)

    def loss(table, ids):
        return jnp.sum(jnp.sin(table[ids]) * jnp.cos(ids.reshape(*shape, *[1] * len(width))))

    _, gradient, norms = jax.jit(clipped(loss, 1.0))(table, ids)
    _, wanted, lengths = jax.jit(by_hand(loss, 1.0))(table, ids)
    np.testing.assert_allclose(norms, lengths, rtol=1e-5)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=1e-6)


def test_lengths_of_complex_rows():
    rows = {"w": jnp.array([[3 + 4j, 0.0], [1j, 2.0]]), "b": jnp.array([1.0, 2.0])}
    np.testing.assert_array_equal(squared_norms(rows, (2,), jnp.float32), [26, 9])


# Options


def test_arguments_by_number_and_by_name():
    params, (x, y) = sequence_problem()
    head = {"head": params.pop("head")}
    loss = lambda x, trunk, head, *, y: sequence_loss(trunk | head, x, y)

    @jax.jit
    def both():
        engine = clipped(loss, 0.7, argnums=(1, -1), chunk_size=4)
        return engine(x, params, head, y=y), clipped(sequence_loss, 0.7)(params | head, x, y)

    (losses, (trunk, own), norms), wanted = both()
    chex.assert_trees_all_close((losses, trunk | own, norms), wanted, rtol=1e-5, atol=1e-6)


def test_complex_parameters():
    loss = lambda w, x: jnp.sum(jnp.abs(x @ w) ** 2)
    w, x = jax.lax.complex(zoo.draw(0, 4, 3), zoo.draw(1, 4, 3)), zoo.draw(2, 6, 2, 4)

    @jax.jit
    def both(clip_norm):
        chunks = clipped(loss, clip_norm, chunk_size=4)
        return by_hand(loss, clip_norm)(w, x), clipped(loss, clip_norm)(w, x), chunks(w, x)

    norms = both(jnp.inf)[0][2]
    wanted, *found = both(jnp.mean(norms))
    for results in found:
        chex.assert_trees_all_close(results, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk_size", slow_but({1, 4}, [1, 2, 4, 6, 9]))
def test_chunks_and_auxiliary_output(chunk_size):
    params, (x, y) = sequence_problem()
    keys = jax.random.split(jax.random.key(0), 6)

    def loss(params, batch, key):
        kept = jax.random.bernoulli(key, 0.5, batch["x"].shape)
        value = sequence_loss(params, batch["x"] * kept, batch["y"])
        return value, {"kept": kept, "name": "dropout"}

    def run(chunk_size):
        engine = clipped(loss, 0.7, has_aux=True, chunk_size=chunk_size)
        (losses, aux), gradient, norms = engine(params, {"x": x, "y": y}, keys)
        assert aux["name"] == "dropout"
        return (losses, aux["kept"]), gradient, norms

    found, wanted = (jax.jit(functools.partial(run, size))() for size in (chunk_size, None))
    chex.assert_trees_all_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert found[0][1].shape == x.shape


def test_one_example_at_a_time_is_not_batched():
    @jax.custom_vjp
    def opaque(x):
        return x

    def call(x):
        return jax.ffi.ffi_call("no_such_target", jax.ShapeDtypeStruct(x.shape, x.dtype))(x)

    opaque.defvjp(lambda x: (call(x), None), lambda _, g: (g,))
    loss = lambda w, x: jnp.sum(opaque(x @ w))
    args = (jnp.ones((3, 2)), jnp.ones((5, 3)))
    jax.eval_shape(clipped(loss, 1.0, chunk_size=1), *args)
    with pytest.raises(ValueError, match="chunk_size=1"):
        jax.eval_shape(clipped(loss, 1.0, chunk_size=2), *args)


@pytest.mark.parametrize("chunk_size", slow_but({2}, [None, 2]))
def test_devices_add_up_their_sums(chunk_size):
    params, data = sequence_problem(batch=12)
    engine = clipped(sequence_loss, 0.7, chunk_size=chunk_size)

    def local(params, *batch):
        losses, gradient, norms = engine(jaxjd.sharding.vary(params, "data"), *batch)
        return losses, jax.lax.psum(gradient, "data"), norms

    mesh = jax.make_mesh((4,), ("data",), (AxisType.Auto,), devices=jax.devices()[:4])
    parts = P("data")
    run = jax.shard_map(
        local, mesh=mesh, in_specs=(P(), parts, parts), out_specs=(parts, P(), parts)
    )
    wanted = jax.jit(clipped(sequence_loss, 0.7))(params, *data)
    chex.assert_trees_all_close(jax.jit(run)(params, *data), wanted, rtol=1e-5, atol=1e-6)


def test_models_of_nnx():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    x = zoo.draw(0, 5, 3)
    loss = lambda model, x: jnp.sum(model(x) ** 2)
    graphdef, params = nnx.split(model)
    wanted = clipped(lambda params, x: loss(nnx.merge(graphdef, params), x), 2.0)(params, x)
    for chunk_size in (None, 2):
        engine = engines.per_example_value_and_clipped_grad(loss, 2.0, chunk_size=chunk_size)
        found = engine(model, x)
        chex.assert_trees_all_close(jax.tree.leaves(found), jax.tree.leaves(wanted), rtol=1e-5)
    assert set(found[1]) == {"kernel", "bias"}


# The cost


def figures(step, params, batch):
    compiled = jax.jit(step).lower(params, *batch).compile()
    analysis, memory = compiled.cost_analysis(), compiled.memory_analysis()
    return analysis["flops"], analysis["bytes accessed"], memory.temp_size_in_bytes


@pytest.mark.parametrize("batch", [128, 256])
def test_an_mlp_takes_one_plain_step(batch):
    loss, params, data = problem(CASES[f"MLP of 8 x 512, batch {batch}"])
    own, base = (figures(step, params, data) for step in (clipped(loss, 1.0), plain(loss)))
    for most, figure, unit in zip((1.05, 1.5, 1.5), own, base, strict=True):
        assert figure <= most * unit


@pytest.mark.parametrize("batch", [pytest.param(128, marks=pytest.mark.slow), 16])
def test_a_cnn_takes_one_plain_step(batch):
    loss, params, data = problem(Case("cnn", "cnn", batch, batch))
    steps = (clipped(loss, 1.0), plain(loss))
    own, base = (multiplications(jax.make_jaxpr(step)(params, *data)) for step in steps)
    assert own <= 1.05 * base
    # XLA's convolution writes no patches that its analysis sees. A loop's bytes count once there.
    (_, *own), (_, *base) = (figures(step, params, data) for step in steps)
    for most, figure, unit in zip((2.0, 1.5), own, base, strict=True):
        assert figure <= most * unit


@pytest.mark.parametrize(
    ("kind", "largest"), [("examples", 512), ("cnn", 9 * 32 * 24 * 24)], ids=["mlp", "cnn"]
)
def test_no_gramian_and_no_copy_of_the_kernels(kind, largest):
    batch = 37
    loss, params, data = problem(Case("", kind, batch, batch, depth=3, width=512, inputs=512))
    found = equations(clipped(loss, 1.0), params, *data)
    shapes = [var.aval.shape for equation in found for var in equation.outvars]
    assert not any(shape.count(batch) > 1 for shape in shapes)
    # As many entries as the activations, or the patches, of the largest layer.
    assert max(map(math.prod, shapes)) <= max(batch * largest, 512 * 512)


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path):
    path = tmp_path / "clipping.json"
    clipping.main(["--cases", "tiny", "--rounds", "1", "--seconds", "0.001", "--json", str(path)])
    rows = json.loads(path.read_text())["rows"]
    assert [row["step"] for row in rows] == list(clipping.steps_of(sequence_loss))
    assert all(row["cpu_s"] > 0 for row in rows)


def test_the_page_has_the_results():
    path = DOCS.parent / "tests" / "benchmarks" / "results" / "clipping.json"
    rows = json.loads(path.read_text())["rows"]
    assert table_in(clipping.PAGE.read_text(), "clipping").strip() == clipping.table(rows)
    whole = [row for row in rows if row["step"] == "jaxjd"]
    base = {row["case"]: row["cpu_s"] for row in rows if row["step"] == "plain"}
    assert len(whole) == len(base) == 4
    assert all(row["cpu_s"] <= 1.5 * base[row["case"]] for row in whole)


def test_long_sequences_and_large_tables_keep_their_factors():
    loss = lambda params, ids: jnp.sum(jnp.sin(params["table"][ids] @ params["kernel"]))
    params = {"table": jnp.ones((1000, 64)), "kernel": jnp.ones((64, 256))}
    found = list(equations(clipped(loss, 1.0), params, jnp.zeros((13, 11), jnp.int32)))
    sizes = [math.prod(var.aval.shape) for equation in found for var in equation.outvars]
    assert max(sizes) == 1000 * 64  # The sum; 13 gradients would be 832,000 and 212,992.
