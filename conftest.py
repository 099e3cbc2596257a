"""Settings for all tests and doctests: 8 virtual CPU devices and no implicit rank promotion."""

import os

# Before JAX starts: one device per process otherwise, and threads that fight over two cores.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    " --xla_force_host_platform_device_count=8"
)

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
