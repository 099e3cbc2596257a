"""Settings for all tests and doctests: 8 virtual CPU devices and no implicit rank promotion."""

import gc
import itertools
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

# The doctest collector would import it, and PyTorch is no dependency of the tests.
collect_ignore = ["tests/benchmarks/step_torchjd.py"]


_finished = itertools.count(1)


def pytest_runtest_teardown():
    """Forgets compiled programs now and then.

    Each holds memory maps, of which Linux gives a process 65,530: the compiler then crashes.
    """
    if next(_finished) % 20:
        return
    try:
        with open("/proc/self/maps", "rb") as maps:
            many = sum(1 for _ in maps) > 25_000
    except OSError:
        many = True
    if many:
        jax.clear_caches()
        gc.collect()
