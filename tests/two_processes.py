"""One of several processes that train together; started by test_sharding.py.

Run as ``python -m tests.two_processes PORT PROCESS COUNT OUTPUT``.
"""

from __future__ import annotations

import functools
import sys

import jax


def main() -> None:
    port, process, count, output = sys.argv[1:]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", int(count), int(process))

    import numpy as np
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    import jaxjd
    from jaxjd import sharding
    from tests import test_sharding as case

    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))

    def put(array, spec):
        made = NamedSharding(mesh, spec)
        host = np.asarray(array)
        return jax.make_array_from_callback(host.shape, made, lambda index: host[index])

    specs = case.LAYOUTS["fsdp_rows"]
    split = jax.tree.map(put, case.PARAMS, specs)
    same = jax.tree.map(lambda leaf: put(leaf, P()), case.PARAMS)
    batch = [put(array, P(None, "data")) for array in (case.X, case.Y)]
    names = ["aligned_mtl"]

    # jit with a split batch and split parameters.
    engine = jaxjd.value_and_jacobian(case.losses_fn)
    run = functools.partial(case.train_all, engine, names)
    everywhere = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, P()))
    by_jit = everywhere(jax.jit(run)(split, *batch))

    # shard_map with a split batch.
    engine = sharding.parallel(jaxjd.value_and_jacobian(case.losses_fn, form="factored"), "data")
    run = jax.shard_map(
        functools.partial(case.train_all, engine, names),
        mesh=mesh,
        in_specs=(P(), P(None, "data"), P(None, "data")),
        out_specs=P(),
    )
    by_shard_map = jax.jit(run)(same, *batch)
    arrays = {
        f"{kind}{number}": np.asarray(leaf.addressable_data(0))
        for kind, tree in (("jit", by_jit), ("shard_map", by_shard_map))
        for number, leaf in enumerate(jax.tree.leaves(tree))
    }
    np.savez(output, **arrays)


if __name__ == "__main__":
    main()
