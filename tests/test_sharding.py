"""Training on many devices equals training on one, and only what must crosses them."""

from __future__ import annotations

import functools
import os
import pathlib
import socket
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxjd
from jaxjd import labels, sharding, weightings
from jaxjd.linalg import reduction
from tests.collectives import collectives

M, STEPS = 4, 3
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def _params():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "first": {"kernel": jax.random.normal(keys[0], (8, 16)) / 3, "bias": jnp.zeros((1, 16))},
        "second": {"kernel": jax.random.normal(keys[1], (16, 8)) / 4, "bias": jnp.ones((1, 8))},
        "heads": jax.random.normal(keys[2], (8, M)),
    }


PARAMS = _params()
X = jax.random.normal(jax.random.key(1), (STEPS, 16, 8))
Y = jax.random.normal(jax.random.key(2), (STEPS, 16, M)) * jnp.arange(1.0, M + 1)[None, None]


def forward(params, x, *, whole=lambda params: params, add=lambda x: x, dot=jnp.dot):
    """A perceptron; the functions are what a parallel program does in between."""
    params = whole(params)
    first, second = params["first"], params["second"]
    h = jnp.tanh(dot(x, first["kernel"]) + first["bias"])
    h = jnp.tanh(add(dot(h, second["kernel"])) + second["bias"])
    return dot(h, params["heads"])


def losses_fn(params, x, y, **parallel):
    return jnp.mean((forward(params, x, **parallel) - y) ** 2, axis=0)


def sgd(aggregator):
    # Scale matters: an optimizer that is invariant to it would hide a wrong factor.
    return optax.chain(aggregator, optax.sgd(0.05))


def train(engine, tx, params, x, y):
    """Some steps; what every method needs is passed to all of them."""

    def step(carry, batch):
        params, state = carry
        losses, jacobian = engine(params, *batch)
        extra = {"losses": losses, "cross_jacobians": (jacobian, jacobian)}
        updates, state = tx.update(jacobian, state, params, **extra)
        return (optax.apply_updates(params, updates), state), losses

    (params, _), losses = lax.scan(step, (params, tx.init(params)), (x, y))
    return params, losses


METHODS = {
    "upgrad": lambda: jaxjd.upgrad(num_tasks=M),
    "modo": lambda: jaxjd.modo(gamma=0.1, num_tasks=M),
    "excess_mtl": lambda: jaxjd.excess_mtl(num_tasks=M),
    "moco": lambda: jaxjd.moco(num_tasks=M),
    "db_mtl": lambda: jaxjd.db_mtl(num_tasks=M),
    "gradnorm": lambda: jaxjd.gradnorm(num_tasks=M),
    "momentum_conflict_free": lambda: jaxjd.momentum_conflict_free(num_tasks=M),
    "trimmed_mean": lambda: jaxjd.trimmed_mean(1),
    "grouped": lambda: jaxjd.grouped(weightings.mgda(), labels.by_layer, num_tasks=M),
    "partition": lambda: jaxjd.partition(
        {"first": jaxjd.upgrad(), "second": jaxjd.imtl_g(), "heads": jaxjd.sum()},
        labels.by_network,
    ),
}


def train_all(engine, names, params, x, y):
    """Several methods in one program: compiling is what takes the time."""
    return {name: train(engine, sgd(METHODS[name]()), params, x, y) for name in names}


@functools.cache
def expected():
    engine = jaxjd.value_and_jacobian(losses_fn)
    return jax.jit(functools.partial(train_all, engine, list(METHODS)))(PARAMS, X, Y)


def check(found, names):
    for name in names:
        chex.assert_trees_all_close(found[name], expected()[name], **CLOSE, custom_message=name)


# How the parameters are split over the mesh ("data", "model").
LAYOUTS = {
    "data": jax.tree.map(lambda _: P(), PARAMS),
    "fsdp_rows": {
        "first": {"kernel": P("data", None), "bias": P(None, "data")},
        "second": {"kernel": P("data", None), "bias": P()},
        "heads": P("data", None),
    },
    "fsdp_columns": {
        "first": {"kernel": P(None, "data"), "bias": P()},
        "second": {"kernel": P(None, "data"), "bias": P(None, "data")},
        "heads": P(None, "data"),
    },
    "tensor": {
        "first": {"kernel": P(None, "model"), "bias": P(None, "model")},
        "second": {"kernel": P("model", None), "bias": P()},
        "heads": P(),
    },
    "both": {
        "first": {"kernel": P("data", "model"), "bias": P(None, "model")},
        "second": {"kernel": P("model", "data"), "bias": P(None, "data")},
        "heads": P(("data",), None),
    },
}


def mesh_of(kind=AxisType.Auto):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))


def put(mesh, tree, specs):
    return jax.tree.map(
        lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), tree, specs
    )


def whole(params, specs):
    """All-gathers what is split over the data axis, as in FSDP; what is split over the other is not."""

    def gather(leaf, spec):
        for axis, entry in enumerate(spec):
            if "data" in ((entry,) if isinstance(entry, str) else entry or ()):
                leaf = lax.all_gather(leaf, "data", axis=axis, tiled=True)
        return leaf

    return jax.tree.map(gather, params, specs)


# Under jit


@pytest.mark.parametrize("layout", LAYOUTS)
def test_jit_on_an_auto_mesh(layout):
    mesh = mesh_of()
    names = ["upgrad", "excess_mtl"] if layout == "both" else ["upgrad"]
    form = "dense" if layout in ("fsdp_rows", "both") else "auto"
    engine = jaxjd.value_and_jacobian(losses_fn, form=form)
    params = put(mesh, PARAMS, LAYOUTS[layout])
    batch = (jax.device_put(array, NamedSharding(mesh, P(None, "data"))) for array in (X, Y))
    found = jax.jit(functools.partial(train_all, engine, names))(params, *batch)
    check(found, names)
    kernel = found["upgrad"][0]["first"]["kernel"]
    wanted = NamedSharding(mesh, LAYOUTS[layout]["first"]["kernel"])
    assert kernel.sharding.is_equivalent_to(wanted, 2)


def test_jit_with_the_task_axis_split():
    mesh = mesh_of()

    def engine(params, x, y):
        losses, jacobian = jaxjd.value_and_jacobian(losses_fn)(params, x, y)
        split = NamedSharding(mesh, P("data"))
        return losses, jax.tree.map(lambda leaf: lax.with_sharding_constraint(leaf, split), jacobian)

    params = put(mesh, PARAMS, LAYOUTS["data"])
    check(jax.jit(functools.partial(train_all, engine, ["upgrad"]))(params, X, Y), ["upgrad"])


@pytest.mark.parametrize("layout", ["data", "fsdp_rows", "tensor"])
def test_jit_on_an_explicit_mesh(layout):
    mesh, specs = mesh_of(AxisType.Explicit), LAYOUTS[layout]

    def unsplit(params):
        if layout == "tensor":
            return params
        return jax.tree.map(lambda leaf: jax.sharding.reshard(leaf, P()), params)

    def dot(x, kernel):
        columns = jax.typeof(kernel).sharding.spec[1]
        return jnp.einsum("bi,ij->bj", x, kernel, out_sharding=P("data", columns))

    fn = functools.partial(losses_fn, whole=unsplit, dot=dot)
    engine = jaxjd.value_and_jacobian(fn, form="auto")
    with jax.set_mesh(mesh):
        params = put(mesh, PARAMS, specs)
        batch = (jax.device_put(array, NamedSharding(mesh, P(None, "data"))) for array in (X, Y))
        found = jax.jit(functools.partial(train_all, engine, ["upgrad"]))(params, *batch)
        check(found, ["upgrad"])
    kernel = found["upgrad"][0]["first"]["kernel"]
    assert kernel.sharding.is_equivalent_to(NamedSharding(mesh, specs["first"]["kernel"]), 2)


# Inside shard_map and pmap


def run_in_shard_map(layout, names, checked, form="auto"):
    mesh, specs = mesh_of(), LAYOUTS[layout]
    fn = functools.partial(
        losses_fn,
        whole=lambda params: whole(params, specs),
        add=(lambda x: lax.psum(x, "model")) if layout in ("tensor", "both") else lambda x: x,
    )
    engine = sharding.parallel(jaxjd.value_and_jacobian(fn, form=form), "data", specs)
    run = jax.shard_map(
        functools.partial(train_all, engine, names),
        mesh=mesh,
        in_specs=(specs, P(None, "data"), P(None, "data")),
        out_specs=dict.fromkeys(names, (specs, P())),
        check_vma=checked,
    )
    return jax.jit(run)(put(mesh, PARAMS, specs), X, Y)


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("layout", ["data", "fsdp_rows", "fsdp_columns", "tensor"])
def test_shard_map(layout, checked):
    form = "factored" if layout in ("data", "tensor") else "auto"
    check(run_in_shard_map(layout, ["upgrad"], checked, form), ["upgrad"])


@pytest.mark.parametrize("checked", [True, False])
def test_all_methods_on_a_mesh_of_data_and_model(checked):
    check(run_in_shard_map("both", list(METHODS), checked), list(METHODS))
