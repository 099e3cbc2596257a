"""Convolutions inside of the loops and conditionals of the engines, as XLA is fast at on CPUs."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxjd
from jaxjd.autodiff._loops import looped

FAST = {1: "b0f_0io->b0f", 2: "b01f_01io->b01f", 3: "b012f_012io->b012f"}
LAYOUTS = {1: ("NHC", "HIO", "NHC"), 2: ("NCHW", "OIHW", "NCHW"), 3: ("NHWDC", "HWDIO", "NHWDC")}
KERNEL = np.random.default_rng(0).normal(size=(3, 3, 2, 4)).astype(np.float32)
IMAGES = np.random.default_rng(1).normal(size=(4, 6, 6, 2)).astype(np.float32)


def features(params, images):
    """Two convolutions, so that the backward pass has one of each kind, one of them in a scan."""
    numbers = ("NHWC", "HWIO", "NHWC")
    x = lax.conv_general_dilated(images, params["in"], (1, 1), "SAME", dimension_numbers=numbers)

    @jax.checkpoint
    def layer(x, kernel):
        found = lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)
        return jnp.tanh(found), None

    return lax.scan(layer, jnp.tanh(x), params["deep"])[0]


def losses_of(params, images):
    return jnp.mean(features(params, images) ** 2, axis=(0, 1, 2))[:2]


def loss_of(params, image):
    return jnp.mean(features(params, image[None]) ** 2)


def layouts(fn, *args):
    """The layouts of the convolutions of a compiled program."""
    return set(re.findall(r"dim_labels=(\S+?)[,} ]", jax.jit(fn).lower(*args).compile().as_text()))


PARAMS = {"in": KERNEL, "deep": np.stack([np.resize(KERNEL, (3, 3, 4, 4))])}


def front_door(**options):
    init, apply = jaxjd.aggregated_value_and_grad(
        losses_of, jaxjd.weightings.imtl_g(), num_tasks=2, **options
    )
    return lambda params, images: apply(init(params), params, images)[0][1]


def by_example(engine, **options):
    def run(params, images):
        found = engine(loss_of, **options)(params, images)
        return found[-1](jnp.ones(len(images))) if engine is GRAMIAN else found[1]

    return run


GRAMIAN = jaxjd.per_example_value_and_gramian
ENGINES = {
    "every": front_door(every=2),
    "every, microbatches": front_door(every=2, microbatches=2),
    "microbatches": front_door(microbatches=2),
    "chunks": lambda *args: jaxjd.value_and_jacobian(losses_of, chunk_size=1)(*args)[1],
    "examples": by_example(GRAMIAN, chunk_size=2),
    "clipped": by_example(
        lambda fn, **options: jaxjd.per_example_value_and_clipped_grad(fn, 1.0, **options),
        chunk_size=2,
    ),
}


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of XLA's CPU compiler")
@pytest.mark.parametrize("name", ENGINES)
def test_engines_run_convolutions_in_the_fast_layout(name):
    assert layouts(ENGINES[name], PARAMS, IMAGES) == {FAST[2]}


def test_the_compiler_still_leaves_them_as_they_are():
    """Once this fails, XLA does it itself, and `looped` can go."""
    fn = lambda images: lax.map(lambda x: jax.grad(loss_of)(PARAMS, x)["in"], images)
    assert layouts(fn, IMAGES) > {FAST[2]}


@pytest.mark.parametrize("spatial", LAYOUTS)
def test_convolutions_are_the_same(spatial):
    """Strides, dilations, groups and layouts, through both backward passes."""
    numbers = LAYOUTS[spatial]
    sizes = dict(zip("HWD", (7, 8, 6), strict=True)) | {"N": 2, "C": 4, "I": 2, "O": 6}
    window = {"H": 3, "W": 2, "D": 2}
    draw = np.random.default_rng(2).normal
    images = draw(size=[sizes[axis] for axis in numbers[0]]).astype(np.float32)
    kernel = draw(size=[{**sizes, **window}[axis] for axis in numbers[1]]).astype(np.float32)

    def fn(images, kernel):
        return lax.conv_general_dilated(
            images,
            kernel,
            (2,) * spatial,
            [(1, 2)] * spatial,
            rhs_dilation=(2,) * spatial,
            dimension_numbers=numbers,
            feature_group_count=2,
        )

    def both(images, kernel):
        found, pull_back = jax.vjp(fn, images, kernel)
        return found, *pull_back(jnp.cos(found))

    wanted = both(images, kernel)
    inside = jax.jit(lambda *args: lax.cond(True, looped(both), both, *args))(images, kernel)
    for one, other in zip(inside, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.max(np.abs(other)))


def test_other_functions_are_passed_through():
    """Calls, literals, effects and closed-over arrays."""
    seen = []

    def fn(x, y):
        jax.debug.callback(seen.append, y["b"])
        inner = jax.jit(lambda x: jax.nn.relu(x) * KERNEL.sum())
        return {"sum": inner(x) + y["b"], "one": 1.0}

    found = looped(fn)(jnp.ones(3), {"b": jnp.float32(2)})
    wanted = fn(jnp.ones(3), {"b": jnp.float32(2)})
    jax.tree.map(np.testing.assert_allclose, found, wanted)
    jax.effects_barrier()
    assert len(seen) == 2
