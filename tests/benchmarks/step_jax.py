"""jaxjd's side of `tests.benchmarks.steps`, and plain JAX: whole steps as functions.

Every step is a function of ``(params, batch)`` that returns the losses and the gradient. Both are
arguments: XLA would spend its time on folding an input that it knows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

import jaxjd
from tests.benchmarks.step_cases import Case

Step = Callable[[Any, Any], tuple]
METHODS = ("auto", "factored", "dense")


class Variant(NamedTuple):
    """One way of taking a step.

    Attributes:
      name: The name in the table.
      group: Variants of one group give the same gradient; TorchJD's groups have the same names.
      step: ``(params, batch) -> (losses, gradient, ...)``.
    """

    name: str
    group: str
    step: Step


class Model(NamedTuple):
    """A model as functions.

    Attributes:
      losses: ``(params, batch) -> (m,)``.
      example: ``(params, input, target) -> loss``, for one example.
      trunk: ``(trunk's params, batch) -> features``.
      head: ``(number) -> (head's params, features, batch) -> loss``.
    """

    losses: Callable[..., Any]
    example: Callable[..., Any] | None = None
    trunk: Callable[..., Any] | None = None
    head: Callable[..., Any] | None = None


def _dense(numbers: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return x @ numbers["kernel"] + jnp.expand_dims(numbers["bias"], range(x.ndim - 1))


def _norm(numbers: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    scale, bias = (jnp.expand_dims(numbers[name], range(x.ndim - 1)) for name in ("scale", "bias"))
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) * lax.rsqrt(variance + 1e-5) * scale + bias


def _mlp_trunk(kernels: list[jax.Array], batch: dict[str, jax.Array]) -> jax.Array:
    x = batch["inputs"]
    for kernel in kernels:
        x = jax.nn.relu(x @ kernel)
    return x


def _tensors_trunk(layers: list[dict[str, jax.Array]], batch: dict[str, jax.Array]) -> jax.Array:
    x = batch["inputs"]
    for layer in layers:
        x = x + 0.1 * jnp.tanh(_dense(layer, x))
    return x


def _block(numbers: dict[str, Any], x: jax.Array, heads: int) -> jax.Array:
    batch, length, width = x.shape
    split = _dense(numbers["qkv"], _norm(numbers["norm_1"], x))
    split = split.reshape(batch, length, 3, heads, width // heads)
    query, key, value = split.transpose(2, 0, 3, 1, 4)
    scores = query @ key.swapaxes(-1, -2) / (width // heads) ** 0.5
    attended = (jax.nn.softmax(scores) @ value).swapaxes(1, 2).reshape(x.shape)
    x = x + _dense(numbers["out"], attended)
    hidden = jax.nn.gelu(_dense(numbers["up"], _norm(numbers["norm_2"], x)))
    return x + _dense(numbers["down"], hidden)


def _max_pool(x: jax.Array, size: int) -> jax.Array:
    window = (1, size, size, 1)
    return lax.reduce_window(x, -jnp.inf, lax.max, window, window, "VALID")


def _cnn(params: dict[str, Any], images: jax.Array) -> jax.Array:
    x = images
    for numbers, pool in zip(params["convolutions"], (None, 2, 3), strict=True):
        x = lax.conv_general_dilated(
            x, numbers["kernel"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = x + jnp.expand_dims(numbers["bias"], range(3))
        x = jax.nn.elu(x if pool is None else _max_pool(x, pool))
    hidden, out = params["dense"]
    return _dense(out, jax.nn.elu(_dense(hidden, x.reshape(len(x), -1))))


def _examples_mlp(params: dict[str, Any], x: jax.Array) -> jax.Array:
    *hidden, out = params["dense"]
    for numbers in hidden:
        x = jax.nn.elu(_dense(numbers, x))
    return _dense(out, x)


def _cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def _own_losses(params: Any, batch: Any) -> list[jax.Array]:
    """A batch for each loss, one after the other."""
    pairs = zip(batch["inputs"], batch["heads"].T, strict=True)
    return [
        ((_mlp_trunk(params["trunk"], {"inputs": inputs}) @ head) ** 2).mean()
        for inputs, head in pairs
    ]


def _stacked_losses(params: Any, batch: Any) -> jax.Array:
    """The same by `jax.vmap`."""

    def loss(inputs: jax.Array, head: jax.Array) -> jax.Array:
        return ((_mlp_trunk(params["trunk"], {"inputs": inputs}) @ head) ** 2).mean()

    return jax.vmap(loss)(batch["inputs"], batch["heads"].T)


def _adapted_losses(params: Any, batch: Any) -> jax.Array:
    x = batch["inputs"]
    for base, pair in zip(batch["base"], params["trunk"], strict=True):
        x = jax.nn.relu(x @ base + (x @ pair["down"]) @ pair["up"])
    return ((x @ batch["heads"]) ** 2).mean(0)


def _image_losses(params: Any, batch: Any) -> list[jax.Array]:
    logits = _cnn(params, batch["inputs"])
    return [_cross_entropy(logits, targets).mean() for targets in batch["targets"]]


def _pinn_losses(params: Any, batch: Any) -> dict[str, jax.Array]:
    """Burgers' equation, with its values at the start and zeros at the edge."""

    def values(points: jax.Array) -> jax.Array:
        *hidden, out = params["trunk"]
        for numbers in hidden:
            points = jnp.tanh(_dense(numbers, points))
        return _dense(out, points)[:, 0]

    def along(axis: int) -> jax.Array:
        return jnp.zeros_like(batch["inside"]).at[:, axis].set(1)

    def slope(points: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.jvp(values, (points,), (along(1),))

    inside = batch["inside"]
    (u, u_x), (_, u_xx) = jax.jvp(slope, (inside,), (along(1),))
    u_t = jax.jvp(values, (inside,), (along(0),))[1]
    start = values(batch["start"]) + jnp.sin(jnp.pi * batch["start"][:, 1])
    return {
        "inside": ((u_t + u * u_x - 0.01 / jnp.pi * u_xx) ** 2).mean(),
        "start": (start**2).mean(),
        "edge": (values(batch["edge"]) ** 2).mean(),
    }


SHAPE_LOSSES = {
    "own": _own_losses,
    "stacked": _stacked_losses,
    "adapters": _adapted_losses,
    "images": _image_losses,
    "pinn": _pinn_losses,
}


def make_model(case: Case) -> Model:
    if case.per_example:
        logits = _cnn if case.kind == "cnn" else _examples_mlp

        def losses(params: Any, batch: Any) -> jax.Array:
            return _cross_entropy(logits(params, batch["inputs"]), batch["targets"])

        def example(params: Any, image: jax.Array, target: jax.Array) -> jax.Array:
            return _cross_entropy(logits(params, image[None]), target[None])[0]

        return Model(losses, example=example)

    if case.kind in SHAPE_LOSSES:
        return Model(SHAPE_LOSSES[case.kind])

    if case.kind == "transformer":

        def trunk(params: Any, batch: Any) -> jax.Array:
            x = batch["inputs"]
            for numbers in params["layers"]:
                x = _block(numbers, x, case.heads)
            return _norm(params["norm"], x).mean(1)

        def head(number: int) -> Callable[..., jax.Array]:
            def loss(params: Any, features: jax.Array, batch: Any) -> jax.Array:
                return ((_dense(params, features)[:, 0] - batch["targets"][number]) ** 2).mean()

            return loss

    elif case.kind in ("features", "heads"):
        trunk = _mlp_trunk

        def head(number: int) -> Callable[..., jax.Array]:
            return lambda vector, features, batch: ((features @ vector) ** 2).mean()

    else:
        mlp = _mlp_trunk if case.kind == "mlp" else _tensors_trunk
        return Model(
            lambda params, batch: ((mlp(params["trunk"], batch) @ batch["heads"]) ** 2).mean(0)
        )

    def losses(params: Any, batch: Any) -> jax.Array:
        features = trunk(params["trunk"], batch)
        pairs = enumerate(params["heads"])
        return jnp.stack([head(number)(numbers, features, batch) for number, numbers in pairs])

    return Model(losses, trunk=trunk, head=head)


def shared(tree: Any) -> Any:
    """The part of the parameters, or of a gradient, that all losses share."""
    return tree["trunk"] if isinstance(tree, dict) and "trunk" in tree else tree


def _weights(gramian: jax.Array) -> jax.Array:
    return jaxjd.weightings.upgrad().update(gramian, ())[0]


def _combined(jacobian: Any) -> Any:
    """UPGrad on the shared part; heads get the gradient of the sum of the losses."""
    weights = _weights(jaxjd.gramian(shared(jacobian)))
    if isinstance(jacobian, dict) and "heads" in jacobian:
        heads = jaxjd.combine(jnp.ones_like(weights), jacobian["heads"])
        return {"trunk": jaxjd.combine(weights, jacobian["trunk"]), "heads": heads}
    return jaxjd.combine(weights, jacobian)


def _plain(model: Model) -> Step:
    def step(params: Any, batch: Any) -> tuple:
        def mean(params: Any) -> tuple:
            losses = model.losses(params, batch)
            return losses.mean(), losses

        gradient, losses = jax.grad(mean, has_aux=True)(params)
        return losses, gradient

    return step


def _jacrev(model: Model) -> Step:
    def step(params: Any, batch: Any) -> tuple:
        def twice(params: Any) -> tuple:
            losses = model.losses(params, batch)
            return losses, losses

        jacobian, losses = jax.jacrev(twice, has_aux=True)(params)
        return losses, _combined(jacobian)

    return step


def _gramian(model: Model, method: str, solve: bool = True) -> Step:
    """`jaxjd.value_and_gramian`; without `solve` the weights are equal, as in the plain step."""

    def step(params: Any, batch: Any) -> tuple:
        if not isinstance(params, dict) or "heads" not in params:
            engine = jaxjd.value_and_gramian(model.losses, form=method)
            losses, gramian, pullback = engine(params, batch)
            weights = _weights(gramian) if solve else jnp.full_like(losses, 1 / losses.size)
            return losses, pullback(weights), gramian
        labels = {"trunk": "trunk", "heads": "heads"}
        engine = jaxjd.value_and_gramian(model.losses, form=method, labels=labels)
        losses, gramians, pullback = engine(params, batch)
        ones = jnp.ones_like(losses)
        weights = {"trunk": _weights(gramians["trunk"]), "heads": ones}
        if not solve:
            weights = dict.fromkeys(weights, ones / losses.size)
        return losses, pullback(weights), gramians["trunk"]

    return step


def _mtl_jacobian(model: Model) -> Step:
    def step(params: Any, batch: Any) -> tuple:
        heads = [model.head(number) for number in range(len(params["heads"]))]
        engine = jaxjd.mtl_value_and_jacobian(model.trunk, heads)
        losses, (jacobian, gradients) = engine(params["trunk"], params["heads"], batch)
        weights = _weights(jaxjd.gramian(jacobian))
        gradient = {"trunk": jaxjd.combine(weights, jacobian), "heads": gradients}
        return jnp.stack(losses), gradient

    return step


def _features(model: Model, whole: bool) -> Step:
    """`jaxjd.mtl_value_and_gramian` with a function per head, or one for all."""

    def step(params: Any, batch: Any) -> tuple:
        if whole:

            def heads(vectors: list[jax.Array], features: jax.Array, batch: Any) -> jax.Array:
                return ((features @ jnp.stack(vectors, axis=1)) ** 2).mean(0)

        else:
            heads = [model.head(number) for number in range(len(params["heads"]))]
        engine = jaxjd.mtl_value_and_gramian(model.trunk, heads)
        losses, gramian, pullback = engine(params["trunk"], params["heads"], batch)
        trunk, heads_gradient = pullback(_weights(gramian))
        return jnp.stack(losses), {"trunk": trunk, "heads": heads_gradient}

    return step


def _features_by_hand(model: Model) -> Step:
    def step(params: Any, batch: Any) -> tuple:
        def losses_of(heads: Any, features: jax.Array) -> tuple:
            pairs = enumerate(heads)
            found = [model.head(number)(numbers, features, batch) for number, numbers in pairs]
            return jnp.stack(found), jnp.stack(found)

        features, pull_back = jax.vjp(lambda trunk: model.trunk(trunk, batch), params["trunk"])
        jacobians, losses = jax.jacrev(losses_of, (0, 1), has_aux=True)(params["heads"], features)
        weights = _weights(jaxjd.gramian(jacobians[1]))
        (trunk,) = pull_back(jaxjd.combine(weights, jacobians[1]))
        heads = jax.tree.map(lambda leaf: leaf.sum(0), jacobians[0])
        return losses, {"trunk": trunk, "heads": heads}

    return step


def _examples(model: Model, form: str, solve: bool = True) -> Step:
    def step(params: Any, batch: Any) -> tuple:
        engine = jaxjd.per_example_value_and_gramian(model.example, form=form)
        losses, gramian, pullback = engine(params, batch["inputs"], batch["targets"])
        weights = _weights(gramian) if solve else jnp.full_like(losses, 1 / losses.size)
        return losses, pullback(weights), gramian

    return step


def _vmap_of_grad(model: Model) -> Step:
    def step(params: Any, batch: Any) -> tuple:
        one = jax.value_and_grad(model.example)
        inputs, targets = batch["inputs"], batch["targets"]
        losses, jacobian = jax.vmap(one, (None, 0, 0))(params, inputs, targets)
        return losses, _combined(jacobian)

    return step


def _by_tensor(model: Model, how: str, form: str) -> Step:
    weighting = jaxjd.weightings.upgrad()

    def step(params: Any, batch: Any) -> tuple:
        losses, jacobian = jaxjd.value_and_jacobian(model.losses, form=form)(params, batch)
        if how == "grouped":
            aggregator = jaxjd.grouped(weighting, jaxjd.labels.by_tensor)
        else:
            labels = jaxjd.labels.by_tensor(params)
            names = jax.tree.leaves(labels)
            aggregator = jaxjd.partition(dict.fromkeys(names, jaxjd.upgrad()), labels)
        gradient, _ = aggregator.update(jacobian, aggregator.init(params), params)
        return losses, gradient

    return step


def _by_tensor_gramians(model: Model) -> Step:
    def step(params: Any, batch: Any) -> tuple:
        engine = jaxjd.value_and_gramian(model.losses, labels=jaxjd.labels.by_tensor)
        losses, gramians, pullback = engine(params, batch)
        weights = jax.vmap(_weights)(jnp.stack(list(gramians.values())))
        return losses, pullback(dict(zip(gramians, weights, strict=True)))

    return step


def variants_of(case: Case) -> list[Variant]:
    """All ways of taking a step; the first of each group is the one that others must agree with."""
    model = make_model(case)
    variants = [Variant("jax plain", "plain", _plain(model))]
    if case.kind == "features":
        return [
            *variants,
            Variant("jax jacrev at the features", "features", _features_by_hand(model)),
            Variant("jaxjd features", "features", _features(model, whole=False)),
            Variant("jaxjd features, one function", "features", _features(model, whole=True)),
        ]
    if case.per_example:
        variants.append(Variant("jax vmap of grad", "together", _vmap_of_grad(model)))
        if case.batch <= 32:
            variants.append(Variant("jax jacrev", "together", _jacrev(model)))
        variants += [
            Variant(f"jaxjd {form}", "together", _examples(model, form)) for form in METHODS
        ]
        engine = _examples(model, "auto", solve=False)
        return [*variants, Variant("jaxjd auto without UPGrad", "plain", engine)]
    methods = METHODS if case.kind == "tensors" else (*METHODS, "products")
    variants.append(Variant("jax jacrev", "together", _jacrev(model)))
    variants += [
        Variant(f"jaxjd {method}", "together", _gramian(model, method)) for method in methods
    ]
    if model.head is not None:
        variants.append(Variant("jaxjd mtl_value_and_jacobian", "together", _mtl_jacobian(model)))
    engine = _gramian(model, "auto", solve=False)
    variants.append(Variant("jaxjd auto without UPGrad", "plain", engine))
    if case.kind == "tensors":
        variants += [
            Variant("jaxjd partition, dense", "by tensor", _by_tensor(model, "partition", "dense")),
            Variant("jaxjd grouped, dense", "by tensor", _by_tensor(model, "grouped", "dense")),
            Variant("jaxjd grouped, auto", "by tensor", _by_tensor(model, "grouped", "auto")),
            Variant("jaxjd labels", "by tensor", _by_tensor_gramians(model)),
        ]
    return variants


EVERY = 10


def shape_variants_of(case: Case) -> list[Variant]:
    """The documented route beside the plain gradient and ``jax.jacrev``, for any shape."""
    model = make_model(case)

    def losses_of(params: Any, batch: Any) -> jax.Array:
        return jnp.stack(jax.tree.leaves(model.losses(params, batch))).reshape(-1)

    flat = Model(losses_of)

    def documented(params: Any, batch: Any) -> tuple:
        init, apply = jaxjd.aggregated_value_and_grad(model.losses, jaxjd.weightings.upgrad())
        (losses, gradient), _ = apply(init(params), params, batch)
        return jnp.stack(jax.tree.leaves(losses)).reshape(-1), gradient

    def whole_jacobian(params: Any, batch: Any) -> tuple:
        twice = lambda params: (losses_of(params, batch),) * 2
        jacobian, losses = jax.jacrev(twice, has_aux=True)(params)
        return losses, jaxjd.combine(_weights(jaxjd.gramian(jacobian)), jacobian)

    # The first of ten calls and one between are one program, whose branch is not known to it.
    def periodic(params: Any, batch: Any, count: int) -> tuple:
        front = jaxjd.aggregated_value_and_grad(
            model.losses, jaxjd.weightings.upgrad(), num_tasks=case.m, every=EVERY
        )
        state = front.init(params)
        aggregator = state.aggregator._replace(weights=jnp.full((case.m,), 1 / case.m))
        state = state._replace(count=jnp.asarray(count, jnp.int32), aggregator=aggregator)
        state = lax.optimization_barrier(state)
        (losses, gradient), _ = front.apply(state, params, batch)
        return jnp.stack(jax.tree.leaves(losses)).reshape(-1), gradient

    return [
        Variant("jax plain", "plain", _plain(flat)),
        Variant("jax jacrev", "together", whole_jacobian),
        Variant("jaxjd documented", "together", documented),
        Variant("jaxjd every=10, first", "together", functools.partial(periodic, count=0)),
        Variant("jaxjd every=10, between", "plain", functools.partial(periodic, count=1)),
    ]


def grid_variants_of(case: Case) -> list[Variant]:
    """The forms between which ``"auto"`` chooses, and its choice."""
    model = make_model(case)
    names = ("dense", "factored", "auto")
    return [Variant(name, "together", _gramian(model, name)) for name in names]
