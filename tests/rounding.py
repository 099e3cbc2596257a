"""How far apart two float32 results may be, given how the tests are compiled."""

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
