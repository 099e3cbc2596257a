"""No sum of 16-bit numbers runs in 16 bits: read from the jaxprs of engines, links and methods.

The function of the user is its own: it runs in the name scope "user", whose equations, those of
its backward pass too, are left out.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from jax import lax

import jaxjd
from jaxjd import scalarizers, sharding
from jaxjd.linalg.layers import ConvolutionLayer

from . import registry

NARROW = (jnp.bfloat16, jnp.float16)
SUMS = {
    "add",
    "add_any",
    "conv_general_dilated",
    "cumsum",
    "dot_general",
    "psum",
    "psum2",
    "psum_invariant",
    "ragged_dot_general",
    "reduce_scatter",
    "reduce_sum",
    "reduce_window_sum",
    "scatter-add",
    "scatter_add",
    "sub",
}
M = registry.M


def is_narrow(var):
    return getattr(var.aval, "dtype", None) in NARROW


def inner_jaxprs(equation):
    for param in jax.tree.leaves(
        list(equation.params.values()), is_leaf=lambda p: hasattr(p, "jaxpr") or hasattr(p, "eqns")
    ):
        inner = getattr(param, "jaxpr", param)
        if hasattr(inner, "eqns"):
            yield inner


def narrow_sums(jaxpr, user=False):
    """Yields the equations that add up in 16 bits."""
    for equation in jaxpr.eqns:
        of_user = user or "user" in str(equation.source_info.name_stack)
        for inner in inner_jaxprs(equation):
            yield from narrow_sums(inner, of_user)
        name = equation.primitive.name
        if of_user or not any(map(is_narrow, equation.outvars)):
            continue
        if name in SUMS:
            yield f"{name} at {jax.extend.source_info_util.summarize(equation.source_info)}"


def check(fn, *args):
    found = list(narrow_sums(jax.make_jaxpr(fn)(*args).jaxpr))
    assert not found, found


def narrow_state(state):
    return [
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree.leaves_with_path(state)
        if getattr(leaf, "dtype", None) in NARROW
    ]


# What is read are the equations, and those are alike.
@pytest.fixture(
    params=[NARROW[0], *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in NARROW[1:])],
    ids=lambda dtype: jnp.dtype(dtype).name,
)
def dtype(request):
    return request.param


def test_the_reader_finds_them():
    x = jnp.ones((4, 4), jnp.bfloat16)
    carry = lambda x: lax.scan(lambda total, row: (total + row, None), x[0], x)[0]
    for fn in (carry, lambda x: x @ x, lambda x: x.at[:, 0].add(x[0]), lambda x: jnp.cumsum(x, 0)):
        assert list(narrow_sums(jax.make_jaxpr(jax.jit(fn))(x).jaxpr))
        scoped = jax.named_scope("user")(fn)
        assert not list(narrow_sums(jax.make_jaxpr(scoped)(x).jaxpr))


@pytest.mark.parametrize("method", registry.AGGREGATORS + registry.LINKS, ids=registry.by_name)
def test_methods(method, dtype):
    params = registry.example_params(dtype)
    jacobian = jax.tree.map(lambda p: jnp.ones((M, *p.shape), dtype), params)
    aggregator = method.aggregator(M)
    state = aggregator.init(params)
    if method.name != "per_task(ema)":  # What a link of optax keeps is its own.
        assert not narrow_state(state)
        check(lambda j, s: aggregator.update(j, s, params, **method.extra_args(j)), jacobian, state)


SCALARIZERS = {
    "cosmos": scalarizers.cosmos(1.0, jnp.ones(M)),
    "dwa": scalarizers.dwa(),
    "famo": scalarizers.famo(),
    "geometric_mean": scalarizers.geometric_mean(),
    "mean": scalarizers.mean(),
    "pbi": scalarizers.pbi(1.0, jnp.ones(M)),
    "random": scalarizers.random(),
    "stch": scalarizers.stch(1.0, warmup_steps=1),
    "sum": scalarizers.sum(),
}


@pytest.mark.parametrize("name", SCALARIZERS)
def test_scalarizers(name, dtype):
    scalarizer = SCALARIZERS[name]
    state = scalarizer.init(M)
    losses = [jnp.ones((), dtype)] * M
    check(lambda losses, state: scalarizer.apply(losses, state), losses, state)


class Model(nn.Module):
    """A convolution, a matrix that is used in a scan, an embedding and plain leaves."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, ids):
        options = {"param_dtype": self.dtype, "dtype": self.dtype}
        x = nn.Conv(2, (2, 2), use_bias=False, **options)(x)
        x = x.reshape(*x.shape[:-3], -1)
        x = nn.scan(
            lambda layer, x, _: (layer(x), None),
            variable_broadcast="params",
            split_rngs={"params": False},
            length=2,
        )(nn.Dense(x.shape[-1], **options), x, None)[0]
        return x, nn.Embed(5, 3, param_dtype=self.dtype, dtype=self.dtype)(ids)


def losses_of(model):
    @jax.named_scope("user")
    def fn(params, x, ids):
        y, z = model.apply(params, x, ids)
        return jnp.stack([jnp.sum(y), jnp.sum(jnp.tanh(y)), jnp.sum(z)]).astype(model.dtype)

    return fn


FORMS = ("dense", "auto", "factored", "products")


@pytest.mark.parametrize("form", registry.slow_but({"dense", "auto"}, FORMS))
def test_engines(form, dtype, monkeypatch):
    monkeypatch.setattr(ConvolutionLayer, "_PATCH_BYTES", 1)
    model = Model(dtype)
    fn = losses_of(model)
    x, ids = jnp.ones((2, 3, 3, 1), dtype), jnp.array([1, 4])
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), x, ids))
    weights = jnp.ones(M)

    def sums(values, jacobian):
        dense = jaxjd.materialize(jacobian)
        return (
            values,
            dense,
            jaxjd.gramian(jacobian),
            jaxjd.cross_gramian(jacobian, dense),
            jaxjd.combine(jnp.ones(jaxjd.gramian(dense).shape[0]), jacobian),
        )

    @jax.named_scope("user")
    def one(params, x, ids):
        y, z = model.apply(params, x, ids)
        return (jnp.sum(y) + jnp.sum(z)).astype(dtype)

    def everything(params):
        for chunk_size in (None, 1, 2):
            options = {"chunk_size": chunk_size, "form": form}
            _, gramian, pullback = jaxjd.value_and_gramian(fn, **options)(params, x, ids)
            labels = jaxjd.labels.by_tensor
            engine = jaxjd.value_and_gramian(fn, labels=labels, **options)
            yield gramian, pullback(weights), engine(params, x, ids)[2](weights)
            if form == "products":
                continue
            yield sums(*jaxjd.value_and_jacobian(fn, **options)(params, x, ids))
            yield sums(*jaxjd.per_example_value_and_jacobian(one, **options)(params, x, ids))
            engine = jaxjd.per_example_value_and_gramian(one, **options)
            _, gramian, pullback = engine(params, x, ids)
            yield gramian, pullback(jnp.ones(2))

    check(lambda params: list(everything(params)), params)


def test_trunks_and_heads(dtype):
    trunk = jax.named_scope("user")(lambda w, x: jnp.tanh(x @ w))
    head = jax.named_scope("user")(lambda v, y, x: jnp.sum(y @ v).astype(dtype))
    heads = [head] * M
    whole = jax.named_scope("user")(
        lambda vs, y, x: jnp.stack([jnp.sum(y @ v) for v in vs]).astype(dtype)
    )
    w, v, x = jnp.ones((3, 4), dtype), [jnp.ones(4, dtype)] * M, jnp.ones((5, 3), dtype)
    for heads_fn in (heads, whole):

        def both(w, v, heads_fn=heads_fn):
            _, gramian, pullback = jaxjd.mtl_value_and_gramian(trunk, heads_fn)(w, v, x)
            found = jaxjd.mtl_value_and_jacobian(trunk, heads_fn, chunk_size=2)(w, v, x)
            return found, gramian, pullback(jnp.ones(M))

        check(both, w, v)


@pytest.mark.parametrize("form", ["dense", "factored"])
def test_devices(form, dtype):
    fn = jax.named_scope("user")(lambda w, x: jnp.sum(jnp.tanh(x @ w), axis=0).astype(dtype))
    w, x = jnp.ones((3, M), dtype), jnp.ones((8, 2, 3), dtype)
    engine = jaxjd.value_and_jacobian(fn, form=form)
    together = sharding.parallel(engine, "data")

    def per_device(x):
        _, jacobian = engine(sharding.vary(w, "data"), x)
        mean = sharding.pmean_jacobian(jacobian, "data")
        marked = sharding.sharded(jacobian, jax.P("data"))
        values, own = together(w, x)
        return values, [jaxjd.gramian(part) for part in (mean, marked, own)]

    check(lambda x: jax.vmap(per_device, axis_name="data")(x), x)
    mesh = jax.make_mesh((8,), ("data",))
    specs = {"in_specs": jax.P("data"), "out_specs": jax.P()}
    mapped = jax.shard_map(lambda x: per_device(x[0]), mesh=mesh, **specs)
    check(mapped, jax.device_put(x, jax.NamedSharding(mesh, jax.P("data"))))


def test_links_and_diagnostics(dtype):
    params = registry.example_params(dtype)
    jacobian = jax.tree.map(lambda p: jnp.ones((M, *p.shape), dtype), params)
    links = (
        jaxjd.diagnostics.monitored(jaxjd.upgrad(num_tasks=M), M),
        jaxjd.ensure_aggregated(jaxjd.mgda(num_tasks=M)),
        jaxjd.multi_steps(optax.chain(jaxjd.moco(num_tasks=M), optax.sgd(0.1)), 3, M),
    )
    for link in links:
        state = link.init(params)
        assert not narrow_state(state)
        losses = {"losses": jnp.ones(M, dtype)}
        check(functools.partial(link.update, params=params, **losses), jacobian, state)
    update = jax.tree.map(lambda leaf: leaf[0], jacobian)
    d = jaxjd.diagnostics
    for of_gramian in (d.cosine_matrix, d.conflict_rate, d.effective_rank, d.stationarity_gap):
        check(lambda j, f=of_gramian: f(jaxjd.gramian(j)), jacobian)
    check(d.predicted_change_by, update, jacobian)
