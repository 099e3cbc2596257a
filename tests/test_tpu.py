"""Programs compiled for a TPU, on machines without one: the compiler is the extra `tpu-compile`.

What they cost is read from the compiled program, so that it is the same on every machine.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

import jaxjd
from tests.registry import WEIGHTINGS, M
from tests.test_cost_of_shapes import FROZEN, GRAMIAN, ROWS, TEN_SHAPES, cost_of

pytestmark = [
    pytest.mark.tpu,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="without libtpu"),
]

LAYERS, WIDTH, BATCH = 4, 512, 64


@functools.cache
def mesh() -> Mesh:
    """Four chips of a v5e that need not exist."""
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    }
    from jax.experimental import topologies  # There is no public name elsewhere.

    found = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    return Mesh(np.array(found.devices), ("data",))


def spec(shape: tuple[int, ...], *axes: str) -> jax.ShapeDtypeStruct:
    sharding = NamedSharding(mesh(), PartitionSpec(*axes))
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)


def losses(params, x, out):
    for layer in params:
        x = jax.nn.relu(x @ layer["w"] + layer["b"][None])
    return jnp.mean((x @ out) ** 2, axis=0)


def arguments():
    params = [{"w": spec((WIDTH, WIDTH)), "b": spec((WIDTH,))} for _ in range(LAYERS)]
    return params, spec((BATCH, WIDTH), "data"), spec((WIDTH, M))


def costs(fn) -> tuple[float, float]:
    analysis = jax.jit(fn).lower(*arguments()).compile().cost_analysis()
    return analysis["flops"], analysis["bytes accessed"]


def test_a_step_costs_what_it_should():
    tx = jaxjd.upgrad()

    def step(jacobian_of, params, x, out):
        return tx.update(jacobian_of(params, x, out), tx.init(params), params)[0]

    def auto(params, x, out):
        return jaxjd.value_and_jacobian(losses, form="auto")(params, x, out)[1]

    plain, _ = costs(jax.grad(lambda *args: jnp.mean(losses(*args))))
    flops, moved = costs(functools.partial(step, auto))
    dense_flops, dense_moved = costs(functools.partial(step, jax.jacrev(losses)))
    # A forward pass, a backward pass without kernels' gradients per task, and one with them.
    assert plain < flops < 1.25 * (M + 2) / 3 * plain
    assert flops < 0.8 * dense_flops
    assert moved < dense_moved / 2


# The small ones of the ten shapes, which compile five times faster; the CNN is the slowest by far.
SMALL = {param.values[0].name: param.values[0] for param in TEN_SHAPES if "small" in param.id}
SMALL["cnn-4"] = SMALL["cnn-4"]._replace(batch=8, m=3)

# Multiplications, operations and bytes of a step with UPGrad on one chip, in plain steps, and why
# the first are above (m + 2) / 3 where they are. None of the plain steps has temporaries.
COSTS = {
    "heads-6": (3.306, 3.344, 3.10, GRAMIAN),
    "pinn": (1.001, 1.001, 1.05, ""),
    "own": (1.799, 1.788, 1.10, ""),
    "stacked": (1.799, 1.793, 2.58, ""),
    "cnn-4": (2.379, 2.315, 4.03, ROWS),
    "transformer": (4.146, 4.131, 4.20, ROWS),
    # The solver's arrays of six numbers are padded to tiles: 2.7 MB of this small step's bytes.
    "adapters": (3.143, 3.134, 2.08, FROZEN),
    "mlp-32": (3.287, 3.284, 2.45, ""),
    "mlp-2": (1.540, 1.538, 1.69, GRAMIAN),
    "mlp-32-losses": (13.504, 13.520, 12.23, GRAMIAN),
}


def test_every_shape_is_here():
    assert set(COSTS) == set(SMALL)


@pytest.mark.parametrize("name", COSTS)
def test_ten_shapes_cost_what_they_should(name):
    multiplications, flops, moved, above = COSTS[name]
    ratio = cost_of(SMALL[name], SingleDeviceSharding(mesh().devices.flat[0]))
    assert ratio.multiplications <= 1.01 * multiplications
    assert ratio.flops <= 1.1 * flops
    assert ratio.bytes <= 1.1 * moved
    assert above or ratio.multiplications <= (SMALL[name].m + 2) / 3


@pytest.mark.parametrize("method", WEIGHTINGS, ids=lambda method: method.name)
def test_weightings_compile(method):
    if method.stat != "gramian":
        pytest.skip("reads Jacobians, which the steps above and below do")
    weighting = method.weighting()
    state = weighting.init(M, jnp.zeros(3))
    extra = {"losses": spec((M,))} if method.losses else {}
    shapes = jax.tree.map(
        lambda leaf: spec(leaf.shape) if leaf.dtype == jnp.float32 else leaf, state
    )

    def update(gramian, state, extra):
        return weighting.update(gramian, state, **extra)

    jax.jit(update).lower(spec((M, M)), shapes, extra).compile()
