"""The inner products of long rows, which are taken in stretches on CPUs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxjd.linalg import products
from jaxjd.linalg.products import in_stretches, row_products

DRAW = np.random.default_rng(0).normal
ROWS = {
    "same": (DRAW(size=(3, 10, 7)),),
    "two": (DRAW(size=(3, 10, 7)), DRAW(size=(2, 10, 7))),
}


@pytest.mark.parametrize("stretch", [7, 64, 70])
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_stretches_add_up(name, stretch, dtype):
    arrays = [jnp.asarray(array, dtype) for array in ROWS[name]]
    wide = [np.asarray(array, np.float64).reshape(len(array), -1) for array in arrays]
    found = in_stretches(stretch, *arrays, dtype=jnp.float32)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, wide[0] @ wide[-1].T, rtol=1e-5, atol=1e-5)


def test_long_rows_are_not_copied_whole_on_one_cpu(monkeypatch):
    """Their stretches are what the product reads; on other platforms it is one product."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    rows = jax.ShapeDtypeStruct((8, 2**19), jnp.float32)
    gramian = jax.jit(lambda rows: row_products(rows, rows, jnp.float32))

    def lowered(platform):
        return gramian.trace(rows).lower(lowering_platforms=(platform,)).as_text()

    assert f"tensor<8x{products._CACHED // 8}xf32>" in lowered("cpu")
    for platform in ("cuda", "tpu"):
        assert "while" not in lowered(platform)


@pytest.mark.parametrize("shape", [(2, 2**18), (2**12, 300)])
def test_short_rows_are_one_product(shape, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    rows = jax.ShapeDtypeStruct(shape, jnp.float32)
    jaxpr = jax.make_jaxpr(lambda rows: row_products(rows, rows, jnp.float32))(rows)
    assert [equation.primitive.name for equation in jaxpr.eqns] == ["dot_general"]


def test_rows_that_devices_share_are_one_product(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    rows = jax.ShapeDtypeStruct((8, 2**20), jnp.float32)
    jaxpr = jax.make_jaxpr(lambda rows: row_products(rows, rows, jnp.float32))(rows)
    assert [equation.primitive.name for equation in jaxpr.eqns] == ["dot_general"]
