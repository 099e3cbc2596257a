"""Settings for all tests and doctests: virtual devices, no implicit rank promotion, a cache."""

import gc
import hashlib
import importlib.metadata
import importlib.util
import itertools
import mmap
import os
import pathlib
import platform

import pytest


def _known(flag):
    """Whether this XLA has a flag. It ends the process at any other."""
    folder = pathlib.Path(importlib.util.find_spec("jaxlib").origin).parent
    for path in folder.glob("*jax_common.*"):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as code:
            if code.find(flag.encode() + b"\0") >= 0:
                return True
    return False


_flags = os.environ.get("XLA_FLAGS", "")
# Before JAX starts: one device per process otherwise, and threads that fight over two cores.
_flags += " --xla_force_host_platform_device_count=8"
if "xla_backend_optimization_level" not in _flags:
    # Compiling is most of the suite's time, and this takes most of it. For the code that users
    # run, set XLA_FLAGS=--xla_backend_optimization_level=3.
    _flags += " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    # Code in one part, and by the emitters that are quicker; a newer XLA does not have them.
    _flags += " --xla_cpu_parallel_codegen_split_count=1"
    if _known("xla_cpu_use_fusion_emitters"):
        _flags += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = _flags

CACHE = pathlib.Path(__file__).parent / ".jax_cache"
"""Compiled programs, for both workers and for later runs. JAX_ENABLE_COMPILATION_CACHE=0: none."""
CACHE_BYTES = 2**30


def _cpu():
    """What machine code depends on: a program from a newer CPU crashes on an older one."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = {line for line in lines if line.startswith(("flags", "Features", "model name"))}
    return [platform.machine(), platform.processor(), *sorted(features)]


def _cache_of_this_machine():
    versions = [importlib.metadata.version(name) for name in ("jax", "jaxlib")]
    key = "\n".join([*versions, _flags, *_cpu()])
    return CACHE / f"{versions[1]}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


# In the environment, where tests that start processes pass them on. What the user set goes first.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_cache_of_this_machine()))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax  # noqa: E402
import numpy as np  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

# The doctest collector would import it, and PyTorch is no dependency of the tests.
collect_ignore = ["tests/benchmarks/step_torchjd.py"]


def pytest_configure(config):
    """Bounds the cache: what was written first goes first.

    JAX's own bound needs one more package, and takes a lock at every look-up.
    """
    if hasattr(config, "workerinput"):
        return
    files = [(path.stat(), path) for path in CACHE.glob("*/*") if path.is_file()]
    files.sort(key=lambda file: file[0].st_mtime, reverse=True)
    total = itertools.accumulate(stat.st_size for stat, _ in files)
    for (_, path), size in zip(files, total, strict=True):
        if size > CACHE_BYTES:
            path.unlink(missing_ok=True)


@pytest.fixture(autouse=True)
def print_options():
    """Examples set them, and the next ones in the same process start from the usual ones."""
    with np.printoptions():
        yield


@pytest.fixture
def own_metadata():
    """For tests that read scopes or source lines in compiled programs.

    The cache takes programs that differ in nothing else for the same.
    """
    name = "jax_compilation_cache_include_metadata_in_key"
    before = jax.config.read(name)
    jax.config.update(name, True)
    yield
    jax.config.update(name, before)


# Pages and modules whose examples take longest to compile.
SLOW_PAGES = {
    "chains.md",
    "diagnostics.md",
    "distributed.md",
    "engines.md",
    "frameworks.md",
    "pareto-fronts.md",
    "sharding.py",
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """A page has no place for a mark; it gets it before `-m` chooses."""
    for item in items:
        if item.path.parent.name in ("docs", "jaxjd") and item.path.name in SLOW_PAGES:
            item.add_marker("slow")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Leaves out what no program of JAX can do on this processor."""
    from tests.rounding import float16_works

    try:
        return (yield)
    except jax.errors.JaxRuntimeError:
        if "float16" in item.name.replace("bfloat16", "") and not float16_works():
            pytest.skip("jaxlib has no float16 for this processor")
        raise


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
