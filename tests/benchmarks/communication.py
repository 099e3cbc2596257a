"""What crosses devices in an aggregated step: formulas, checked against compiled programs.

``python -m tests.benchmarks.communication`` compiles a small residual perceptron for 8 virtual
devices with every strategy, counts the bytes of the collectives, and compares them with the
formulas; then it prints the formulas for a decoder of 7 billion parameters on 256 chips. No number
of it is a time.
"""

from __future__ import annotations

import os

if __name__ == "__main__":  # Before JAX starts.
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    )

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxjd
from jaxjd import sharding
from jaxjd.linalg import reduction
from tests.collectives import collectives

WIDTH = 4  # Bytes per number: everything in float32.


class Model(NamedTuple):
    """What the formulas need to know.

    Attributes:
      kernels: Inputs, outputs and the number of the matrices of each kind.
      others: The number of parameters that are no matrices.
      hidden: The size of the activations between blocks.
      blocks: The number of blocks whose output a tensor-parallel program sums over its devices.
      rows: The rows of the batch (sequences times tokens) on one device.
      gathers: How often FSDP gathers a parameter in a step: twice with rematerialization.
    """

    kernels: tuple[tuple[int, int, int], ...]
    others: int
    hidden: int
    blocks: int
    rows: int
    gathers: int = 1

    @property
    def size(self) -> int:
        return self.others + sum(p * q * count for p, q, count in self.kernels)


class Traffic(NamedTuple):
    """Bytes that one device sends in a step, and that it keeps for the Jacobian."""

    sent: float
    memory: float


def all_reduce(numbers: float, devices: int) -> float:
    return 2 * (devices - 1) / devices * numbers * WIDTH


def all_gather(numbers: float, devices: int) -> float:
    """`numbers` are those of the result."""
    return (devices - 1) / devices * numbers * WIDTH


reduce_scatter = all_gather  # `numbers` are those of the operand.


def data_dense(model: Model, m: int, devices: int) -> Traffic:
    """The dense Jacobian is averaged."""
    return Traffic(all_reduce(m * model.size, devices), m * model.size * WIDTH)


def data_rows(model: Model, m: int, devices: int) -> Traffic:
    """The rows of both factors of every kernel are gathered."""
    rows = sum(count * model.rows * (p + m * q) for p, q, count in model.kernels)
    sent = all_gather(devices * rows, devices) + all_reduce(m * model.others, devices)
    return Traffic(sent, (devices * rows + m * model.others) * WIDTH)


def fsdp(model: Model, m: int, devices: int) -> Traffic:
    """Parameters gathered, the Jacobian scattered, its Gramian summed."""
    sent = model.gathers * all_gather(model.size, devices)
    sent += reduce_scatter(m * model.size, devices) + all_reduce(m * m, devices)
    return Traffic(sent, m * model.size / devices * WIDTH)


def tensor(model: Model, m: int, devices: int, split: int) -> Traffic:
    """Kernels split over some devices, the batch over the rest."""
    # Activations forward; their cotangents backward, but for the first block's input.
    sums = model.blocks + m * (model.blocks - 1)
    sent = all_reduce(sums * model.rows * model.hidden + m * m, split)
    sent += all_reduce(m * model.size / split, devices // split)
    return Traffic(sent, m * model.size / split * WIDTH)


def no_jacobian(model: Model, m: int, devices: int) -> Traffic:
    """``value_and_gramian(form="products")``: a gradient per task, and the update's."""
    sent = (m + 1) * all_reduce(model.size, devices) + all_reduce(m * m, devices)
    return Traffic(sent, model.size * WIDTH)


# At small scale, compiled.

DEVICES, SPLIT, M = 8, 4, 4
P_SIZE, Q_SIZE, BLOCKS, ROWS = 32, 64, 2, 2
SMALL = Model(
    kernels=((P_SIZE, Q_SIZE, BLOCKS), (Q_SIZE, P_SIZE, BLOCKS)),
    others=0,
    hidden=P_SIZE,
    blocks=BLOCKS,
    rows=ROWS,
)


def losses_fn(
    params: Any, x: jax.Array, whole: Callable = lambda w: w, add: Callable = lambda y: y
) -> jax.Array:
    for first, second in params:
        x = x + add(jnp.tanh(x @ whole(first)) @ whole(second))
    return jnp.mean(jnp.square(x[:, :M]), axis=0)


def _shapes(mesh: Any, specs: Sequence[P], batch: P, devices: int) -> tuple[Any, jax.Array]:
    def one(shape: tuple[int, ...], spec: P) -> Any:
        return jax.ShapeDtypeStruct(shape, "float32", sharding=NamedSharding(mesh, spec))

    block = (one((P_SIZE, Q_SIZE), specs[0]), one((Q_SIZE, P_SIZE), specs[1]))
    return (block,) * BLOCKS, one((devices * ROWS, P_SIZE), batch)


def _aggregated(engine: Callable, params: Any, x: jax.Array) -> Any:
    """The losses are left out, so that what averages them is not compiled."""
    _, jacobian = engine(params, x)
    weights = 1 / jnp.sqrt(jnp.diagonal(jaxjd.gramian(jacobian)) + 1)
    return jaxjd.combine(weights, jacobian)


def _in_shard_map(fn: Callable, form: str, sizes: dict[str, int], spec: tuple[P, P]) -> Any:
    mesh = jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)
    )
    specs = ((spec[0], spec[1]),) * BLOCKS
    engine = sharding.parallel(jaxjd.value_and_jacobian(fn, form=form), "data", specs)
    run = jax.shard_map(
        functools.partial(_aggregated, engine),
        mesh=mesh,
        in_specs=(specs, P("data")),
        out_specs=specs,
    )
    return jax.jit(run).lower(*_shapes(mesh, spec, P("data"), sizes["data"])).compile()


def _gather(kernel: jax.Array) -> jax.Array:
    return lax.all_gather(kernel, "data", axis=0, tiled=True)


def compile_data_dense() -> Any:
    return _in_shard_map(losses_fn, "dense", {"data": DEVICES}, (P(), P()))


def compile_data_rows() -> Any:
    prefers = reduction.prefers_rows
    reduction.prefers_rows = lambda *_: True
    try:
        return _in_shard_map(losses_fn, "factored", {"data": DEVICES}, (P(), P()))
    finally:
        reduction.prefers_rows = prefers


def compile_fsdp() -> Any:
    fn = functools.partial(losses_fn, whole=_gather)
    return _in_shard_map(fn, "dense", {"data": DEVICES}, (P("data"), P("data")))


def compile_tensor() -> Any:
    fn = functools.partial(losses_fn, add=lambda y: lax.psum(y, "model"))
    sizes = {"data": DEVICES // SPLIT, "model": SPLIT}
    return _in_shard_map(fn, "dense", sizes, (P(None, "model"), P("model")))


def compile_no_jacobian() -> Any:
    # All tasks at once: in a loop the text of the program has the collectives of one.
    engine = jaxjd.value_and_gramian(losses_fn, form="products", chunk_size=M)

    def run(params: Any, x: jax.Array) -> Any:
        _, gramian, pullback = engine(params, x)
        return pullback(1 / jnp.sqrt(jnp.diagonal(gramian) + 1))

    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    return jax.jit(run).lower(*_shapes(mesh, (P(), P()), P("data"), DEVICES)).compile()


def measure() -> dict[str, tuple[float, float]]:
    """The bytes that one device sends, by the formula and in the compiled program."""
    strategies = {
        "data-parallel, dense": (data_dense(SMALL, M, DEVICES), compile_data_dense),
        "data-parallel, rows gathered": (data_rows(SMALL, M, DEVICES), compile_data_rows),
        "FSDP": (fsdp(SMALL, M, DEVICES), compile_fsdp),
        "tensor-parallel": (tensor(SMALL, M, DEVICES, SPLIT), compile_tensor),
        "no Jacobian": (no_jacobian(SMALL, M, DEVICES), compile_no_jacobian),
    }
    return {
        name: (counted.sent, sum(one.sent for one in collectives(compiled())))
        for name, (counted, compiled) in strategies.items()
    }


# A decoder of 7 billion parameters: 32 layers of width 4096, a vocabulary of 32,000.

LAYERS, HIDDEN, INNER, VOCABULARY = 32, 4096, 11008, 32000
CHIPS, CHIP_SPLIT = 256, 16


def decoder(rows: int) -> Model:
    return Model(
        kernels=(
            (HIDDEN, HIDDEN, 4 * LAYERS),  # queries, keys, values, output
            (HIDDEN, INNER, 2 * LAYERS),  # gate, up
            (INNER, HIDDEN, LAYERS),  # down
            (HIDDEN, VOCABULARY, 1),  # head
        ),
        others=VOCABULARY * HIDDEN + (2 * LAYERS + 1) * HIDDEN,  # embedding, scales
        hidden=HIDDEN,
        blocks=2 * LAYERS,
        rows=rows,
        gathers=2,
    )


def table(rows: int) -> list[tuple[str, ...]]:
    model = decoder(rows)
    found = []
    for m in (2, 4, 8, 16, 32, 64):
        strategies = (
            data_dense(model, m, CHIPS),
            data_rows(model, m, CHIPS),
            fsdp(model, m, CHIPS),
            tensor(model, m, CHIPS, CHIP_SPLIT),
            no_jacobian(model, m, CHIPS),
        )
        cells = [f"{one.sent / 1e9:.4g} / {one.memory / 1e9:.4g}" for one in strategies]
        found.append((str(m), *cells))
    return found


HEADER = ("m", "data, dense", "data, rows", "FSDP", "tensor x data", "no Jacobian")


def main() -> None:
    print(f"Sent by one of {DEVICES} devices, bytes: formula, compiled program")
    for name, (counted, found) in measure().items():
        print(f"  {name:30} {counted:10.0f} {found:10.0f}")
    for rows in (8, 2048):
        print(f"\n{decoder(rows).size / 1e9:.3f} billion parameters on {CHIPS} chips,")
        print(f"{rows} rows per chip: GB sent / GB of Jacobian, per chip and step\n")
        for cells in [HEADER, ("---",) * len(HEADER), *table(rows)]:
            print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
