"""How far apart two float32 results may be, given how the tests are compiled."""

import functools

import jax
import jax.numpy as jnp


def fuses() -> bool:
    """Whether compiled code rounds a product and a sum once: a fused multiply-add."""
    x = jnp.full((64,), 1 + 2.0**-12)
    return bool((jax.jit(lambda x, y: x * x - y)(x, x * x) != 0).any())


UNFUSED = 1.0 if fuses() else 2.0
"""A factor on tolerances of a few ulps. Without optimizations, or on a processor without the
instruction, every product is rounded before it is added: sums of many terms lose up to a bit
more."""


@functools.cache
def float16_works() -> bool:
    """Whether XLA compiles float16: for processors without F16C jaxlib lacks the conversions."""
    try:
        jax.block_until_ready(jax.random.normal(jax.random.key(0), (1,), jnp.float16))
    except jax.errors.JaxRuntimeError:
        return False
    return True
