"""Nothing is lost: orbax checkpoints, new processes and killed ones, bit for bit."""

import os
import random
import signal
import subprocess
import sys

import numpy as np
import pytest


def command(*arguments):
    return [sys.executable, "-m", "tests.checkpoint_run", *map(str, arguments)]


def environment():
    flags = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    return {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


def run(*arguments):
    found = subprocess.run(
        command(*arguments), env=environment(), capture_output=True, text=True, timeout=500
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def assert_equal_bit_for_bit(first, second):
    with np.load(first) as expected, np.load(second) as found:
        assert set(expected) == set(found)
        assert len(expected) > 10
        for name in expected:
            assert expected[name].dtype == found[name].dtype, name
            assert expected[name].tobytes() == found[name].tobytes(), name


@pytest.mark.slow
def test_every_method_goes_on_in_a_new_process(tmp_path):
    run("save", tmp_path, tmp_path / "cache")
    run("resume", tmp_path, tmp_path / "cache")
    assert_equal_bit_for_bit(tmp_path / "unbroken.npz", tmp_path / "resumed.npz")


@pytest.mark.slow
def test_a_killed_run_ends_as_an_unbroken_one(tmp_path):
    """The process is killed after a random step, at any point of writing a checkpoint."""
    for name in ("unbroken", "killed"):
        (tmp_path / name).mkdir()
    cache = tmp_path / "cache"
    assert run("train", tmp_path / "unbroken", cache).startswith("start 0\n")

    starts = []
    for last in (random.randrange(4, 12), random.randrange(16, 28)):
        process = subprocess.Popen(
            command("train", tmp_path / "killed", cache),
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        starts.append(process.stdout.readline())
        for line in process.stdout:
            if line == f"step {last}\n":
                process.send_signal(signal.SIGKILL)
                break
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
    starts.append(run("train", tmp_path / "killed", cache).splitlines()[0])
    assert starts[0] == "start 0\n"
    assert int(starts[2].split()[1]) > 4
    assert_equal_bit_for_bit(tmp_path / "unbroken" / "end.npz", tmp_path / "killed" / "end.npz")
