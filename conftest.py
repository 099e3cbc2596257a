"""Settings for all tests and doctests: 8 virtual CPU devices and no implicit rank promotion."""

import os

_flags = os.environ.get("XLA_FLAGS", "")
# Before JAX starts: one device per process otherwise, and threads that fight over two cores.
_flags += " --xla_force_host_platform_device_count=8"
if "xla_backend_optimization_level" not in _flags:
    # Compiling is most of the suite's time, and this halves it. For the code that users run, set
    # XLA_FLAGS=--xla_backend_optimization_level=3.
    _flags += " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] = _flags

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
