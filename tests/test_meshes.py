"""Methods whose constants or loops once lost the types of an Explicit mesh."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxjd
from tests import registry

AGGREGATORS = {
    "constant": jaxjd.constant([0.2, 0.3, 0.5], num_tasks=3),
    "multi_steps": jaxjd.multi_steps(jaxjd.mean(num_tasks=3), 1, 3),
    "multi_steps(waits)": jaxjd.multi_steps(jaxjd.mean(num_tasks=3), 2, 3),
    "trimmed_mean": jaxjd.trimmed_mean(trim_number=1, num_tasks=3),
}


@pytest.mark.parametrize("name", AGGREGATORS)
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize("compiled", [False, True])
def test_an_update_keeps_its_types_on_a_mesh(name, kind, compiled):
    rows = np.arange(24.0, dtype=np.float32).reshape(3, 8)
    aggregator = AGGREGATORS[name]
    expected, _ = aggregator.update(jnp.asarray(rows), aggregator.init(jnp.zeros(8)))
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        params = jax.device_put(np.zeros(8, np.float32), NamedSharding(mesh, PartitionSpec("x")))
        jacobian = jax.device_put(rows, NamedSharding(mesh, PartitionSpec(None, "x")))
        state = aggregator.init(params)
        update = jax.jit(aggregator.update) if compiled else aggregator.update
        found, after = update(jacobian, state)
        assert jax.typeof(found) == jax.typeof(params)
        assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("method", registry.AGGREGATORS + registry.LINKS, ids=registry.by_name)
def test_every_eager_update_keeps_its_types_on_a_mesh(method):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        params = jax.tree.map(lambda leaf: jax.device_put(leaf, jax.P()), registry.example_params())
        params["first"]["kernel"] = jax.device_put(jnp.zeros((2, 3)), jax.P("x", None))
        jacobian = jax.tree.map(
            lambda leaf: jnp.broadcast_to(leaf, (registry.M, *leaf.shape)) + 1.0, params
        )
        aggregator = method.aggregator(registry.M)
        state = aggregator.init(params)
        extra = method.extra_args(jacobian)
        found, after = aggregator.update(jacobian, state, params, **extra)
        assert jax.tree.map(jax.typeof, found) == jax.tree.map(jax.typeof, params)
        assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)
