"""Random functions with several losses, for comparing engines with ``jax.jacrev``.

A function draws its own equations, from a seed that is its own: it is the same in every trace.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

WIDTH = 3
ROWS = (2, 4)
DATA = 3


def _array(rng, *shape):
    return rng.normal(size=shape) / max(shape[-2:-1] or (1,)) ** 0.5


def arguments(seed, dtype):
    """Parameters, data and labels of parameters."""
    rng = np.random.default_rng(seed)
    params = {
        "kernels": [_array(rng, WIDTH, WIDTH) for _ in range(3)],
        "heads": _array(rng, DATA, WIDTH, WIDTH),
        "rows": [_array(rng, WIDTH) for _ in range(2)],
        "scale": rng.normal() + 2,
        "scales": rng.normal(size=DATA) + 2,
        "table": _array(rng, 5, WIDTH),
        "unused": _array(rng, 2),
        "frozen": None,
    }
    data = {
        "points": [_array(rng, rng.choice(ROWS), WIDTH) for _ in range(DATA)],
        "stacked": _array(rng, DATA, 2, WIDTH),
        "tokens": rng.integers(0, 5, size=(DATA, 2)).astype(rng.choice(["int32", "uint8"])),
        "mask": rng.integers(0, 2, size=WIDTH).astype(bool),
    }

    def cast(array):
        array = np.asarray(array)
        return jnp.asarray(array, dtype if array.dtype.kind == "f" else None)

    labels = {name: "one" if name in ("kernels", "scales") else "other" for name in params}
    labels = {
        name: jax.tree.map(lambda _, label=label: label, params[name])
        for name, label in labels.items()
    }
    return jax.tree.map(cast, params), jax.tree.map(cast, data), labels


def _row(x, row):
    return jnp.broadcast_to(row[None], x.shape)


@jax.jit
def _jitted(x, kernel):
    return jnp.tanh(x @ kernel) + x


def _softplus(x, *_):
    return jax.nn.softplus(x)


# Each takes ``(rng, params, data, x)``, with `x` of shape ``(rows, WIDTH)``, and keeps its shape.


def _one_of(rng, kernels):
    return kernels[rng.integers(len(kernels))]


def dense(rng, params, data, x):
    return x @ _one_of(rng, params["kernels"])


def tied(rng, params, data, x):
    return x @ _one_of(rng, params["kernels"]).T


def head(rng, params, data, x):
    return jnp.tanh(x @ params["heads"][rng.integers(DATA)])


def einsum(rng, params, data, x):
    return jnp.einsum("rw,twv->rv", x, params["heads"]) / DATA


def add_row(rng, params, data, x):
    return x + _row(x, _one_of(rng, params["rows"]))


def normalize(rng, params, data, x):
    mean = jnp.broadcast_to(jnp.mean(x, axis=1, keepdims=True), x.shape)
    return (
        (x - mean)
        * lax.rsqrt(jnp.var(x, axis=1, keepdims=True) + 1.0)
        * _row(x, _one_of(rng, params["rows"]))
    )


def scaled(rng, params, data, x):
    return x * params["scale"] if rng.integers(2) else x * params["scales"][rng.integers(DATA)]


def tanh(rng, params, data, x):
    return jnp.tanh(x)


def several(rng, params, data, x):
    return _one_of(rng, [jnp.sin, jax.nn.softplus, jnp.square, jax.nn.relu, jax.nn.log_softmax])(x)


def masked(rng, params, data, x):
    return jnp.where(_row(x, data["mask"]), x, _one_of(rng, params["rows"])[0])


def stopped(rng, params, data, x):
    return lax.stop_gradient(x) * 0.5 + jnp.tanh(x)


def gathered(rng, params, data, x):
    return x[jnp.asarray(rng.integers(0, x.shape[0], size=x.shape[0]))]


def permuted(rng, params, data, x):
    return x[::-1] + jnp.cumsum(x, axis=rng.integers(2))


def cut(rng, params, data, x):
    place = rng.integers(1, WIDTH)
    return jnp.concatenate([x[:, place:], x[:, :place] * 2.0], axis=1)


def embedded(rng, params, data, x):
    tokens = data["tokens"].reshape(-1)[: x.shape[0]]
    return x + params["table"][tokens]


def logits(rng, params, data, x):
    return (x @ params["table"].T)[:, :WIDTH]


def jitted(rng, params, data, x):
    return _jitted(x, _one_of(rng, params["kernels"]))


def scanned(rng, params, data, x):
    stack = jnp.stack(params["kernels"]) if rng.integers(2) else params["heads"]
    return lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, stack)[0]


def recurrent(rng, params, data, x):
    kernel = _one_of(rng, params["kernels"])

    def step(carry, row):
        carry = jnp.tanh(carry @ kernel + row)
        return carry, carry

    return lax.scan(step, x[0], x)[1]


def checkpointed(rng, params, data, x):
    return jax.checkpoint(lambda x, kernel: jnp.tanh(x @ kernel))(
        x, _one_of(rng, params["kernels"])
    )


def mapped(rng, params, data, x):
    kernel = _one_of(rng, params["kernels"])
    return jax.vmap(lambda row: jnp.tanh(kernel @ row) + row)(x)


def branched(rng, params, data, x):
    kernel = _one_of(rng, params["kernels"])
    return lax.cond(data["mask"][0], lambda x: x @ kernel, lambda x: x * 2.0, x)


def derivative(rng, params, data, x):
    kernel = _one_of(rng, params["kernels"])
    return jax.vmap(jax.grad(lambda row: jnp.sum(jnp.tanh(row @ kernel))))(x)


def attention(rng, params, data, x):
    scores = jax.nn.softmax(x @ _one_of(rng, params["kernels"]) @ x.T, axis=1)
    return scores @ x


def segments(rng, params, data, x):
    ids = jnp.arange(x.shape[0]) % 2
    return jax.ops.segment_sum(x, ids, num_segments=x.shape[0]) + x


STEPS = (
    *(dense, dense, tied, head, einsum, add_row, normalize, scaled, tanh, tanh, several, masked),
    *(stopped, gathered, permuted, cut, embedded, logits, jitted, scanned, recurrent),
    *(checkpointed, mapped, branched, derivative, attention, segments),
)


def _steps(rng, params, data, x, most=3):
    for _ in range(rng.integers(1, most + 1)):
        x = STEPS[rng.integers(len(STEPS))](rng, params, data, x)
    return x


def _scalar(rng, x):
    return _one_of(rng, [jnp.mean, jnp.var, lambda x: jnp.sum(jnp.tanh(x)), jax.nn.logsumexp])(x)


def _losses_on_an_axis(rng, params, data):
    """Of a `vmap` over tasks, with what they own mapped, sliced or shared."""
    seed = int(rng.integers(2**31))
    own_heads = rng.integers(2)

    def one(x, scale, head, tokens):
        rng = np.random.default_rng(seed)
        if rng.integers(2):
            x = x + params["table"][tokens]
        x = _steps(rng, params, data, x, most=2)
        if own_heads:
            x = x @ head
        return scale * _scalar(rng, jnp.tanh(x))

    xs = data["stacked"]
    if rng.integers(2):
        xs = jnp.tanh(xs @ params["kernels"][0])
    return jax.vmap(one)(xs, params["scales"], params["heads"], data["tokens"])


def _losses_of_columns(rng, params, data):
    """Each of some columns of a product, whose matrix may be tied to other places."""
    x = _steps(rng, params, data, data["points"][rng.integers(DATA)], most=2)
    matrix = _one_of(rng, params["kernels"])
    kind = rng.integers(6)
    if kind == 0:
        y = x @ matrix.T + _row(x, _one_of(rng, params["rows"]))
    elif kind == 1:
        y = x @ params["table"].T
    elif kind == 2:
        y = jnp.einsum("rw,twv->rtv", x, params["heads"]).reshape(x.shape[0], -1)
    elif kind == 3:
        y = jnp.tanh(x @ matrix) * _row(x, _one_of(rng, params["rows"])) + x[:, ::-1]
    elif kind == 4:
        y = matrix[:, ::-1] * params["scale"] + _row(matrix, params["scales"])
    else:
        y = jnp.stack([x @ head for head in params["kernels"]], axis=1).reshape(x.shape[0], -1)
    if rng.integers(2):
        losses = jnp.mean(jnp.square(jnp.sin(y)), axis=0)
        return [losses] if rng.integers(2) else [losses[:2], losses[2:]]
    place = rng.integers(1, WIDTH)
    return [jnp.var(y[:, :place]), jnp.var(y[:, place:]), jnp.mean(y[:1, : place + 1])]


def _losses_one_by_one(rng, params, data):
    """Losses that start from points of their own, what is shared, or what others made."""
    pool = [_steps(rng, params, data, data["points"][0])]
    losses = []
    for place in range(rng.integers(2, 5)):
        kind = rng.integers(5)
        if kind == 0 and place:
            x = data["points"][place % DATA]
        elif kind == 1:
            x = data["points"][rng.integers(DATA)]
        else:
            x = pool[rng.integers(len(pool))]
        x = _steps(rng, params, data, x)
        if rng.integers(4) == 0:
            other = pool[rng.integers(len(pool))]
            x = x * jnp.mean(other)
        pool.append(x)
        losses.append(_scalar(rng, x))
    kind = rng.integers(6)
    if kind == 0:
        losses.append(jnp.zeros_like(losses[0]))
    elif kind == 1:
        losses.append(losses[0] * losses[-1])
    elif kind == 2:
        leaves = jax.tree.leaves(params)
        losses.append(sum(jnp.sum(leaf**2) for leaf in leaves) * 0.1)
    elif kind == 3:
        losses.append(losses[0])
    return losses


def _together(rng, losses):
    """The losses in one of the structures that a user returns."""
    kind = rng.integers(9)
    if kind == 0:
        return jnp.stack(losses)
    if kind == 1:
        return jnp.concatenate([loss[None] for loss in losses]) * 2.0
    if kind == 2:
        found = jnp.zeros(len(losses) + 1, losses[0].dtype)
        for place in rng.permutation(len(losses)):
            found = found.at[int(place)].set(losses[place])
        return found
    if kind == 3:
        return {"b": losses[0], "a": losses[1:]}
    if kind == 4:
        return jnp.stack(losses)[jnp.asarray(rng.permutation(len(losses)))]
    if kind == 5:
        return [jnp.stack(losses[:2]), *losses[2:]]
    if kind == 6:
        return jnp.cumsum(jnp.stack(losses))
    if kind == 7:
        return jnp.stack(losses).reshape(-1, 1) * jnp.ones((1, 2), losses[0].dtype)
    return tuple(losses)


def losses_of(seed):
    """Returns ``losses(params, data) -> (losses, aux)``."""

    def losses_fn(params, data):
        rng = np.random.default_rng(seed)
        kind = rng.integers(5)
        if kind == 4:
            losses = _losses_of_columns(rng, params, data)
            if rng.integers(2):
                losses = {"columns": losses, "rest": _losses_one_by_one(rng, params, data)}
        elif kind == 0:
            losses = _losses_on_an_axis(rng, params, data)
            if rng.integers(2):
                losses = [losses, _scalar(rng, _steps(rng, params, data, data["points"][0]))]
        elif kind == 1:
            vector = _losses_on_an_axis(rng, params, data)
            losses = _together(rng, [vector[n] for n in rng.permutation(DATA)])
        else:
            losses = _together(rng, _losses_one_by_one(rng, params, data))
        aux = {"size": data["mask"].sum(), "first": jnp.tanh(params["kernels"][0]), "name": "x"}
        return losses, aux

    return losses_fn
