"""What `tests/test_checkpoints.py` runs in processes of their own.

Usage:

    python -m tests.checkpoint_run save DIRECTORY CACHE    # two steps, checkpoint, two more
    python -m tests.checkpoint_run resume DIRECTORY CACHE  # the last two, from the checkpoint
    python -m tests.checkpoint_run train DIRECTORY CACHE   # goes on from the last checkpoint
"""

from __future__ import annotations

import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import jaxjd
from tests.registry import AGGREGATORS, LINKS, M, example_losses, example_params

STEPS = 30


def raw(tree):
    return jax.tree.map(
        lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x,
        tree,
    )


def write(path, tree):
    leaves = jax.tree.leaves_with_path(raw(tree))
    np.savez(path, **{jax.tree_util.keystr(key): np.asarray(leaf) for key, leaf in leaves})


def methods():
    """The initial parameters and states of all methods, and one step of all of them."""
    chains = {
        method.name: (method, optax.chain(method.aggregator(M), optax.adam(0.05)))
        for method in AGGREGATORS + LINKS
    }

    def init():
        params = example_params()
        return {name: (params, tx.init(params)) for name, (_, tx) in chains.items()}

    def step(carry):
        result = {}
        for name, (method, tx) in chains.items():
            params, state = carry[name]
            if not (method.stateful or method.random):
                # Nothing of a step depends on the last one: any numbers show that they come back.
                result[name] = jax.tree.map(lambda leaf: leaf + leaf.size, (params, state))
                continue
            jacobian = jax.jacrev(example_losses)(params)
            extra = method.extra_args(jacobian)
            updates, state = tx.update(jacobian, state, params, **extra)
            result[name] = (optax.apply_updates(params, updates), state)
        return result

    return init, step


def save(directory):
    init, step = methods()
    step = jax.jit(step)
    carry = step(step(init()))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory / "checkpoint", carry)
        carry = step(step(carry))
    write(directory / "unbroken.npz", carry)


def resume(directory):
    init, step = methods()
    step = jax.jit(step)
    with ocp.StandardCheckpointer() as checkpointer:
        carry = checkpointer.restore(directory / "checkpoint", jax.eval_shape(init))
    write(directory / "resumed.npz", step(step(carry)))


def train(directory):
    """Noise, momentum, random orders and a Jacobian in the state; a checkpoint every few steps."""
    params = example_params()
    tx = jaxjd.skip_if_not_finite(
        optax.chain(
            jaxjd.per_task(optax.chain(optax.ema(0.9), optax.add_noise(0.01, 0.5, key=3)), M),
            jaxjd.partition(
                {
                    "first": jaxjd.gradvac(num_tasks=M),
                    "second": jaxjd.excess_mtl(num_tasks=M),
                },
                {"first": "first", "second": "second"},
            ),
            optax.adam(0.05),
        )
    )

    @jax.jit
    def step(params, state, count):
        jacobian = jax.jacrev(example_losses)(params)
        # Every seventh step is bad and skipped.
        jacobian = jax.tree.map(lambda x: jnp.where(count % 7 == 3, jnp.nan, x), jacobian)
        updates, state = tx.update(jacobian, state, params)
        return optax.apply_updates(params, updates), state

    options = ocp.CheckpointManagerOptions(save_interval_steps=2, max_to_keep=2)
    with ocp.CheckpointManager(directory / "run", options=options) as manager:
        carry, start = (params, tx.init(params)), 0
        if manager.latest_step() is not None:
            like = ocp.args.StandardRestore(jax.eval_shape(lambda: carry))
            start = manager.latest_step()
            carry = manager.restore(start, args=like)
        print("start", start, flush=True)
        for count in range(start, STEPS):
            carry = step(*carry, count)
            manager.save(count + 1, args=ocp.args.StandardSave(carry))
            print("step", count + 1, flush=True)
            time.sleep(0.02)  # Time to be killed in.
        manager.wait_until_finished()
    write(directory / "end.npz", carry)


if __name__ == "__main__":
    # The second process finds the programs of the first one.
    jax.config.update("jax_compilation_cache_dir", sys.argv[3])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    {"save": save, "resume": resume, "train": train}[sys.argv[1]](pathlib.Path(sys.argv[2]))
