"""The engines for whole models of flax nnx, as `nnx.value_and_grad` is for ``jax.value_and_grad``.

Each engine here is the engine of the same name in `jaxjd` for functions of modules. It
differentiates the variables that `wrt` selects (all `nnx.Param` by default). All other state, such
as running statistics, the counts of random streams and caches, changes once per call, in place, as
in one call of the function. A Jacobian is an `nnx.State` with a leading task axis on every leaf,
dense or factored, for ``optimizer.update(model, jacobian)`` of an `nnx.Optimizer` whose chain
starts with an aggregator. All of this works inside `nnx.jit` and outside.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax
from flax import nnx

from jaxjd import aggregated, autodiff
from jaxjd.aggregated import AggregatedGrad, AggregatedGradState
from jaxjd.autodiff._tasks import check_pair
from jaxjd.base import Gramian, Jacobian, PyTree, Weighting
from jaxjd.checks import argument_number, check_function, path_name, type_name

__all__ = [
    "aggregated_value_and_grad",
    "value_and_jacobian",
    "value_and_gramian",
    "mtl_value_and_jacobian",
    "mtl_value_and_gramian",
    "per_example_value_and_jacobian",
    "per_example_value_and_gramian",
    "per_example_value_and_clipped_grad",
]

Heads = Callable[..., Any] | Sequence[Callable[..., Any]] | Mapping[str, Callable[..., Any]]
Pullback = Callable[[Any], PyTree]
Argnums = int | nnx.DiffState | Sequence[int | nnx.DiffState]


def aggregated_value_and_grad(
    fn: Callable[..., Any],
    weighting: Weighting | optax.GradientTransformation,
    *,
    num_tasks: int | None = None,
    argnums: Argnums = 0,
    has_aux: bool = False,
    wrt: Any = nnx.Param,
    **options: Any,
) -> AggregatedGrad:
    """As `nnx.value_and_grad`, for many losses: one gradient that resolves their conflicts.

    It is `jaxjd.aggregated_value_and_grad` for a function of modules.

    Args:
      fn: As for `value_and_jacobian`.
      weighting: As for `jaxjd.aggregated_value_and_grad`, as all that follows but `wrt`.
      num_tasks: The number of losses.
      argnums: As for `value_and_jacobian`.
      has_aux: Whether the given functions return pairs: their result, and auxiliary output of any
        kind.
      wrt: As for `value_and_jacobian`.
      **options: `labels` of the differentiated variables, `form`, `chunk_size`, `every` and
        `microbatches`.

    Returns:
      A pair ``(init, apply)``: ``state = init(*args)`` with the positional arguments of `fn` as far
      as they are differentiated, and ``(losses, gradient), state = apply(state, *args, **kwargs)``,
      with ``(losses, aux)`` in the place of the losses if `has_aux`. `gradient` is what
      `nnx.value_and_grad` returns, for ``optimizer.update(model, gradient)``.

      With `microbatches` and with ``cross_args=`` (of `apply`, for weightings of two batches) `fn`
      is called several times, one after the other, as in a loop: each call begins with the
      statistics, random streams and caches that the last one left. So BatchNorm normalizes by the
      statistics of a part, the gradient is the mean over the parts and not that of the whole batch,
      and running statistics move on once per part; dropout draws a new mask for each. Arrays in the
      positional arguments that are not differentiated are the batch; modules there, as those that
      are differentiated, go from call to call. The batches of `cross_args` come before the batch
      itself, which they have the structure of, and a module in them must be that of the call.

    Raises:
      ValueError: As for `jaxjd.aggregated_value_and_grad` and `value_and_jacobian`; with several
        calls of `fn` in a step, if one changes what is differentiated, or leaves other variables
        or other types than it found.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxjd
      >>> from flax import nnx
      >>> from jaxjd.integrations.nnx import aggregated_value_and_grad
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(
      ...     nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)
      ... )
      >>> optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
      >>> def losses_fn(model, x):
      ...     return jnp.mean((model(x) - 1.0) ** 2, axis=0)
      >>> init, apply = aggregated_value_and_grad(losses_fn, jaxjd.weightings.upgrad())
      >>> @nnx.jit
      ... def step(model, optimizer, state, x):
      ...     (losses, gradient), state = apply(state, model, x)
      ...     optimizer.update(model, gradient)
      ...     return losses, state
      >>> losses, state = step(model, optimizer, init(model), jnp.eye(3))
      >>> losses.shape, bool(jnp.all(model.layers[1].mean[...] != 0))
      ((2,), True)
    """
    make = functools.partial(
        aggregated.aggregated_value_and_grad, weighting=weighting, num_tasks=num_tasks
    )
    states, single = _states(lambda fn, **given: make(fn, **given), fn, argnums, wrt, options)
    numbers = 0 if single else range(len(states))
    parts = options.get("microbatches", 1)

    def init(*args: Any) -> AggregatedGradState:
        with contextlib.ExitStack() as contexts:
            chosen = _Call(fn, has_aux, args, {}, states, contexts).chosen
        return make(fn, **options).init(chosen[0] if single else chosen)

    def apply(
        state: AggregatedGradState, *args: Any, cross_args: Any = None, **kwargs: Any
    ) -> tuple[tuple[Any, PyTree], AggregatedGradState]:
        own = {}
        if "tasks" in kwargs and not isinstance(weighting, Weighting):
            own["tasks"] = kwargs.pop("tasks")
        with contextlib.ExitStack() as contexts:
            call = _Call(fn, has_aux, args, kwargs, states, contexts)

            def losses_of(*given: Any, moving: Any = None) -> Any:
                chosen, batch = given[: len(states)], given[len(states) :]
                if moving is None:
                    return call(chosen)
                losses, (afters, aux) = call(chosen, batch=batch[0], moving=moving)
                return losses, (call.next_of(afters), aux)

            pair = make(losses_of, argnums=numbers, has_aux=True, **options)
            if parts == 1 and cross_args is None:
                ((losses, found), gradient), after = pair.apply(state, *call.chosen, **own)
            else:
                if cross_args is not None:
                    own["cross_args"] = [(call.batch_of(other),) for other in cross_args]
                own["moving"] = call.moving(parts)
                # The same, in which variables go from call to call.
                through = pair.apply.through  # type: ignore[attr-defined]
                pair = through(lambda engine: engine, moving=True)
                ((losses, found), gradient), after = pair.apply(
                    state, *call.chosen, call.batch, **own
                )
                found = call.afters_of(found[0]), found[1]
            aux = call.finish(found)
        gradient = call.wrap((gradient,) if single else gradient)
        values = (losses, aux) if has_aux else losses
        return (values, gradient[0] if single else gradient), after

    return AggregatedGrad(init, apply)


def value_and_jacobian(
    fn: Callable[..., Any],
    argnums: Argnums = 0,
    has_aux: bool = False,
    wrt: Any = nnx.Param,
    **options: Any,
) -> Callable[..., tuple[Any, Jacobian]]:
    """Returns a function of modules that computes the losses and their Jacobian.

    Args:
      fn: A function of modules and anything else that returns the losses as for
        `jaxjd.value_and_jacobian`; with `has_aux` it returns ``(losses, aux)``. It may change the
        modules, as BatchNorm and dropout do.
      argnums: Which positional arguments to differentiate: modules, pytrees of modules and arrays,
        or arrays. An `nnx.DiffState` in place of a number brings its own filter.
      has_aux: Whether the given functions return pairs: their result, and auxiliary output of any
        kind.
      wrt: Which variables of the modules to differentiate, any filter of nnx: a type such as
        `nnx.LoRAParam`, ``nnx.PathContains("head")``, ... Use the same for `nnx.Optimizer`.
      **options: `chunk_size` and `form`, as for `jaxjd.value_and_jacobian`.

    Returns:
      A function of the arguments of `fn` that returns ``(losses, jacobian)``, or
      ``((losses, aux), jacobian)``. `jacobian` has the structure that `nnx.value_and_grad` gives
      its gradients: an `nnx.State` in the place of every module of the differentiated argument,
      with leaves of shape ``(m, *param.shape)``; a tuple of such if `argnums` is a sequence. A
      variable that two modules share has its leaf in the first.

    Raises:
      ValueError: As for `jaxjd.value_and_jacobian`; if `fn` is a method of a module, `wrt` selects
        nothing, or a variable is differentiated in one argument and constant in another.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxjd
      >>> from flax import nnx
      >>> from jaxjd.integrations.nnx import value_and_jacobian
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(
      ...     nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)
      ... )
      >>> tx = optax.chain(jaxjd.upgrad(), optax.adam(1e-2))
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> def losses_fn(model, x):
      ...     return jnp.mean((model(x) - 1.0) ** 2, axis=0)
      >>> @nnx.jit
      ... def step(model, optimizer, x):
      ...     losses, jacobian = value_and_jacobian(losses_fn, form="auto")(model, x)
      ...     optimizer.update(model, jacobian)
      ...     return losses
      >>> step(model, optimizer, jax.random.normal(jax.random.key(1), (8, 3))).shape
      (2,)
      >>> bool(jnp.all(model.layers[1].mean[...] != 0))  # The statistics have moved.
      True
    """
    run = _engine(autodiff.value_and_jacobian, fn, argnums, has_aux, wrt, options)

    def value_and_jacobian_fn(*args: Any, **kwargs: Any) -> tuple[Any, Jacobian]:
        values, wrap, jacobian = run(args, kwargs)
        return values, wrap(jacobian)

    return value_and_jacobian_fn


def value_and_gramian(
    fn: Callable[..., Any],
    argnums: Argnums = 0,
    has_aux: bool = False,
    wrt: Any = nnx.Param,
    **options: Any,
) -> Callable[..., tuple[Any, Any, Pullback]]:
    """Returns a function of modules that computes the losses, their Gramian, and a pullback.

    Args:
      fn: As for `value_and_jacobian`.
      argnums: As for `value_and_jacobian`.
      has_aux: Whether the given functions return pairs: their result, and auxiliary output of any
        kind.
      wrt: As for `value_and_jacobian`.
      **options: `chunk_size`, `form` and `labels`, as for `jaxjd.value_and_gramian`.

    Returns:
      A function of the arguments of `fn` that returns ``(losses, gramian, pullback)``, with
      ``(losses, aux)`` in the place of the losses if `has_aux`, as `jaxjd.value_and_gramian` does.
      ``pullback(weights)`` has the structure of the gradients of `nnx.value_and_grad`.

    Raises:
      ValueError: As for `value_and_jacobian` and `jaxjd.value_and_gramian`.

    Example:
      >>> import jax.numpy as jnp, optax, jaxjd
      >>> from flax import nnx
      >>> from jaxjd.integrations.nnx import value_and_gramian
      >>> model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
      >>> losses_fn = lambda model, x: jnp.mean(model(x) ** 2, axis=0)
      >>> losses, gramian, pullback = value_and_gramian(losses_fn)(model, jnp.ones((5, 3)))
      >>> weights, _ = jaxjd.weightings.upgrad().update(gramian, ())
      >>> gradient = pullback(weights)
      >>> gradient["kernel"][...].shape
      (3, 2)
      >>> _ = optimizer.update(model, gradient)
    """
    run = _engine(autodiff.value_and_gramian, fn, argnums, has_aux, wrt, options)

    def value_and_gramian_fn(*args: Any, **kwargs: Any) -> tuple[Any, Any, Pullback]:
        values, wrap, gramian, pullback = run(args, kwargs)
        return values, gramian, lambda weights: wrap(pullback(weights))

    return value_and_gramian_fn


def mtl_value_and_jacobian(
    trunk_fn: Callable[..., Any],
    heads_fn: Heads,
    has_aux: bool = False,
    wrt: Any = nnx.Param,
    **options: Any,
) -> Callable[..., tuple[Any, tuple[Jacobian, PyTree]]]:
    """Returns a function that differentiates a trunk module shared by tasks, and the tasks' heads.

    Args:
      trunk_fn: ``trunk_fn(trunk, *args) -> features``, as for `jaxjd.mtl_value_and_jacobian`.
      heads_fn: A list, tuple or dict with one function ``head_fn(head, features, *args) -> loss``
        per task, or one function of all heads.
      has_aux: Whether the given functions return pairs: their result, and auxiliary output of any
        kind.
      wrt: Which variables of trunk and heads to differentiate. Modules in `args` are constant.
      **options: `chunk_size` and `form`, as for `jaxjd.mtl_value_and_jacobian`.

    Returns:
      A function ``(trunk, heads, *args, **kwargs)`` that returns what
      `jaxjd.mtl_value_and_jacobian` does, with an `nnx.State` in the place of every
      module.

    Raises:
      ValueError: As for `jaxjd.mtl_value_and_jacobian` and `value_and_jacobian`; if a
        differentiated variable belongs to trunk and head or to two heads, or if two of the
        functions change the same variable: each sees the state from before the step, so the order
        of the changes is not defined. (Give every head a random stream of its own.)

    Example:
      >>> import jax.numpy as jnp, optax, jaxjd
      >>> from flax import nnx
      >>> from jaxjd.integrations.nnx import mtl_value_and_jacobian
      >>> class Model(nnx.Module):
      ...     def __init__(self, rngs):
      ...         self.trunk = nnx.Linear(3, 4, rngs=rngs)
      ...         self.left, self.right = (nnx.Linear(4, 1, rngs=rngs) for _ in range(2))
      >>> model = Model(nnx.Rngs(0))
      >>> trunk_fn = lambda trunk, x: nnx.tanh(trunk(x))
      >>> head_fn = lambda head, features, x: jnp.mean(head(features) ** 2)
      >>> engine = mtl_value_and_jacobian(trunk_fn, {"left": head_fn, "right": head_fn})
      >>> heads = {"left": model.left, "right": model.right}
      >>> losses, (jacobian, gradients) = engine(model.trunk, heads, jnp.ones((5, 3)))
      >>> jacobian["kernel"][...].shape, gradients["left"]["kernel"][...].shape
      ((2, 3, 4), (4, 1))

      One optimizer for the model: the heads need no aggregation.

      >>> aggregator = jaxjd.partition(
      ...     {"trunk": jaxjd.upgrad(), "heads": optax.identity()},
      ...     {"trunk": "trunk", "left": "heads", "right": "heads"},
      ... )
      >>> optimizer = nnx.Optimizer(model, optax.chain(aggregator, optax.adam(1e-3)), wrt=nnx.Param)
      >>> _ = optimizer.update(model, nnx.State({"trunk": jacobian, **gradients}))
    """
    run = _mtl_engine(autodiff.mtl_value_and_jacobian, trunk_fn, heads_fn, has_aux, wrt, options)

    def mtl_fn(
        trunk: Any, heads: Any, *args: Any, **kwargs: Any
    ) -> tuple[Any, tuple[Jacobian, PyTree]]:
        values, wrap, pair = run(trunk, heads, args, kwargs)
        return values, wrap(pair)

    return mtl_fn


def mtl_value_and_gramian(
    trunk_fn: Callable[..., Any],
    heads_fn: Heads,
    has_aux: bool = False,
    wrt: Any = nnx.Param,
    **options: Any,
) -> Callable[..., tuple[Any, Gramian, Callable[[jax.Array], tuple[PyTree, PyTree]]]]:
    """Returns a function that computes the Gramian of the tasks at the features, and a pullback.

    Args:
      trunk_fn: As for `mtl_value_and_jacobian`.
      heads_fn: As for `mtl_value_and_jacobian`.
      has_aux: Whether the given functions return pairs: their result, and auxiliary output of any
        kind.
      wrt: As for `mtl_value_and_jacobian`.
      **options: `chunk_size`, `form` and `labels`, as for `jaxjd.mtl_value_and_gramian`.

    Returns:
      A function ``(trunk, heads, *args, **kwargs)`` that returns what
      `jaxjd.mtl_value_and_gramian` does, with an `nnx.State` in the place of every
      module in the pairs of the pullback.

    Raises:
      ValueError: As for `mtl_value_and_jacobian`.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> from flax import nnx
      >>> from jaxjd.integrations.nnx import mtl_value_and_gramian
      >>> trunk, *heads = (nnx.Linear(3, 3, rngs=nnx.Rngs(seed)) for seed in range(3))
      >>> head_fn = lambda head, features, x: jnp.mean(head(features) ** 2)
      >>> engine = mtl_value_and_gramian(lambda trunk, x: trunk(x), [head_fn, head_fn])
      >>> losses, gramian, pullback = engine(trunk, heads, jnp.ones((5, 3)))
      >>> weights, _ = jaxjd.weightings.mgda().update(gramian, ())
      >>> trunk_gradient, heads_gradients = pullback(weights)
      >>> trunk_gradient["kernel"][...].shape, len(heads_gradients)
      ((3, 3), 2)
    """
    run = _mtl_engine(autodiff.mtl_value_and_gramian, trunk_fn, heads_fn, has_aux, wrt, options)

    def mtl_fn(trunk: Any, heads: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        values, wrap, gramian, pullback = run(trunk, heads, args, kwargs)
        return values, gramian, lambda weights: wrap(pullback(weights))

    return mtl_fn


def per_example_value_and_jacobian(
    fn: Callable[..., Any],
    argnums: Argnums = 0,
    has_aux: bool = False,
    wrt: Any = nnx.Param,
    **options: Any,
) -> Callable[..., tuple[Any, Jacobian]]:
    """Returns a function that computes one loss per example and the Jacobian of all of them.

    Args:
      fn: ``fn(model, *example) -> loss``, a scalar, for one example without a batch axis. It must
        not change the model, since all examples would change the same variable: BatchNorm with
        ``use_running_average=True``, and dropout with a key that is part of the example,
        ``model(x, rngs=nnx.Rngs(dropout=key))``.
      argnums: As for `value_and_jacobian`; everything else is the batch.
      has_aux: Whether the given functions return pairs: their result, and auxiliary output of any
        kind.
      wrt: As for `value_and_jacobian`.
      **options: `chunk_size` and `form`, as for `jaxjd.per_example_value_and_jacobian`.

    Returns:
      A function of the arguments of `fn` that returns what
      `jaxjd.per_example_value_and_jacobian` does, with an `nnx.State` in the place of every
      module.

    Raises:
      ValueError: As for `jaxjd.per_example_value_and_jacobian`, and if `fn` changes a variable: its
        path is named.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxjd.integrations.nnx import per_example_value_and_jacobian
      >>> model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
      >>> loss = lambda model, x: jnp.sum(model(x) ** 2)
      >>> losses, jacobian = per_example_value_and_jacobian(loss)(model, jnp.ones((8, 3)))
      >>> losses.shape, jacobian["kernel"][...].shape
      ((8,), (8, 3, 1))
    """
    engine = autodiff.per_example_value_and_jacobian
    run = _per_example(engine, fn, argnums, has_aux, wrt, options)

    def per_example_fn(*args: Any, **kwargs: Any) -> tuple[Any, Jacobian]:
        values, wrap, jacobian = run(args, kwargs)
        return values, wrap(jacobian)

    return per_example_fn


def per_example_value_and_gramian(
    fn: Callable[..., Any],
    argnums: Argnums = 0,
    has_aux: bool = False,
    wrt: Any = nnx.Param,
    **options: Any,
) -> Callable[..., tuple[Any, Any, Pullback]]:
    """Returns a function that computes one loss per example, their Gramian, and a pullback.

    Args:
      fn: As for `per_example_value_and_jacobian`.
      argnums: As for `value_and_jacobian`; everything else is the batch.
      has_aux: Whether the given functions return pairs: their result, and auxiliary output of any
        kind.
      wrt: As for `value_and_jacobian`.
      **options: `chunk_size`, `form` and `labels`, as for `jaxjd.per_example_value_and_gramian`.

    Returns:
      A function of the arguments of `fn` that returns what
      `jaxjd.per_example_value_and_gramian` does, with an `nnx.State` in the place of every
      module in what the pullback returns.

    Raises:
      ValueError: As for `per_example_value_and_jacobian`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxjd.integrations.nnx import per_example_value_and_gramian
      >>> model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
      >>> loss = lambda model, x: jnp.sum(model(x) ** 2)
      >>> engine = per_example_value_and_gramian(loss)
      >>> losses, gramian, pullback = engine(model, jnp.ones((8, 3)))
      >>> gramian.shape, pullback(jnp.ones(8))["kernel"][...].shape
      ((8, 8), (3, 1))
    """
    engine = autodiff.per_example_value_and_gramian
    run = _per_example(engine, fn, argnums, has_aux, wrt, options)

    def per_example_fn(*args: Any, **kwargs: Any) -> tuple[Any, Any, Pullback]:
        values, wrap, gramian, pullback = run(args, kwargs)
        return values, gramian, lambda weights: wrap(pullback(weights))

    return per_example_fn


def per_example_value_and_clipped_grad(
    fn: Callable[..., Any],
    clip_norm: Any,
    argnums: Argnums = 0,
    has_aux: bool = False,
    wrt: Any = nnx.Param,
    **options: Any,
) -> Callable[..., tuple[Any, PyTree, jax.Array]]:
    """Returns a function that computes one loss per example and the sum of the clipped gradients.

    Args:
      fn: As for `per_example_value_and_jacobian`.
      clip_norm: The bound on the length of an example's gradient.
      argnums: As for `value_and_jacobian`; everything else is the batch.
      has_aux: Whether the given functions return pairs: their result, and auxiliary output of any
        kind.
      wrt: As for `value_and_jacobian`.
      **options: `chunk_size`, as for `jaxjd.per_example_value_and_clipped_grad`.

    Returns:
      A function of the arguments of `fn` that returns what
      `jaxjd.per_example_value_and_clipped_grad` does; the gradient has the structure of those of
      `nnx.value_and_grad`.

    Raises:
      ValueError: As for `per_example_value_and_jacobian` and
        `jaxjd.per_example_value_and_clipped_grad`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxjd.integrations.nnx import per_example_value_and_clipped_grad
      >>> model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
      >>> loss = lambda model, x: jnp.sum(model(x) - 1.0)
      >>> engine = per_example_value_and_clipped_grad(loss, 0.5)
      >>> losses, gradient, norms = engine(model, jnp.ones((8, 3)))
      >>> print(gradient["kernel"][...].ravel(), norms[0])
      [2. 2. 2.] 2.0
    """
    engine = functools.partial(autodiff.per_example_value_and_clipped_grad, clip_norm=clip_norm)
    run = _per_example(engine, fn, argnums, has_aux, wrt, options)

    def per_example_fn(*args: Any, **kwargs: Any) -> tuple[Any, PyTree, jax.Array]:
        values, wrap, gradient, norms = run(args, kwargs)
        return values, wrap(gradient), norms

    return per_example_fn


def _engine(
    engine: Callable[..., Any],
    fn: Callable[..., Any],
    argnums: Argnums,
    has_aux: bool,
    wrt: Any,
    options: Mapping[str, Any],
) -> Callable[..., tuple]:
    """An engine for a function of modules."""
    states, single = _states(engine, fn, argnums, wrt, options)

    def run(args: tuple, kwargs: Mapping[str, Any]) -> tuple:
        with contextlib.ExitStack() as contexts:
            call = _Call(fn, has_aux, args, kwargs, states, contexts)
            numbers = 0 if single else range(len(states))
            pure = engine(lambda *chosen: call(chosen), argnums=numbers, has_aux=True, **options)
            (losses, after), *found = pure(*call.chosen)
            aux = call.finish(after)

        def wrap(tree: PyTree) -> PyTree:
            return call.wrap((tree,))[0] if single else call.wrap(tree)

        return ((losses, aux) if has_aux else losses), wrap, *found

    return run


def _mtl_engine(
    engine: Callable[..., Any],
    trunk_fn: Callable[..., Any],
    heads_fn: Heads,
    has_aux: bool,
    wrt: Any,
    options: Mapping[str, Any],
) -> Callable[..., tuple]:
    """A multi-task engine for functions of modules."""
    functions, treedef = jax.tree.flatten(heads_fn)
    for name, fn in [("trunk_fn", trunk_fn), *(("heads_fn", fn) for fn in functions)]:
        _check_function(name, fn)
    engine(trunk_fn, heads_fn, **options)  # Checks the options.

    def run(trunk: Any, heads: Any, args: tuple, kwargs: Mapping[str, Any]) -> tuple:
        try:
            parts = [trunk, *treedef.flatten_up_to(heads)]
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"The heads must have the outer structure of `heads_fn`: expected {treedef}, found "
                f"{type(heads).__name__}."
            ) from error
        with contextlib.ExitStack() as contexts:
            calls = [
                _Call(fn, has_aux, (part, *args), kwargs, [nnx.DiffState(0, wrt)], contexts)
                for fn, part in zip((trunk_fn, *functions), parts, strict=True)
            ]
            _check_disjoint(calls)
            trunk_call, *head_calls = [_of_one(call) for call in calls]
            pure = engine(trunk_call, treedef.unflatten(head_calls), has_aux=True, **options)
            chosen = [call.chosen[0] for call in calls]
            values, *found = pure(chosen[0], treedef.unflatten(chosen[1:]))
            losses, (trunk_after, heads_after) = values
            afters = [trunk_after, *treedef.flatten_up_to(heads_after)]
            _check_changes(calls, afters)
            auxs = [call.finish(after) for call, after in zip(calls, afters, strict=True)]

        def wrap(pair: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
            trees = [pair[0], *treedef.flatten_up_to(pair[1])]
            wrapped = [call.wrap((tree,))[0] for call, tree in zip(calls, trees, strict=True)]
            return wrapped[0], treedef.unflatten(wrapped[1:])

        aux = (auxs[0], treedef.unflatten(auxs[1:]))
        return ((losses, aux) if has_aux else losses), wrap, *found

    return run


def _per_example(
    engine: Callable[..., Any],
    fn: Callable[..., Any],
    argnums: Argnums,
    has_aux: bool,
    wrt: Any,
    options: Mapping[str, Any],
) -> Callable[..., tuple]:
    """A per-example engine for a function of modules."""
    states, single = _states(engine, fn, argnums, wrt, options)

    def run(args: tuple, kwargs: Mapping[str, Any]) -> tuple:
        numbers = [argument_number(state.argnum, len(args)) for state in states]
        _check_distinct(numbers)
        rest = [number for number in range(len(args)) if number not in numbers]
        order = [numbers[0], *rest, *numbers[1:]]

        def one(*given: Any, **keywords: Any) -> Any:
            found = dict(zip(order, given, strict=True))
            return fn(*(found[number] for number in range(len(args))), **keywords)

        models = tuple(args[number] for number in numbers)
        batch = [args[number] for number in rest]
        with contextlib.ExitStack() as contexts:
            filters = [nnx.DiffState(n, state.filter) for n, state in enumerate(states)]
            call = _Call(one, has_aux, models, {}, filters, contexts)

            def loss_of(chosen: Sequence[PyTree], *example: Any, **keywords: Any) -> Any:
                loss, (after, aux) = call(chosen, example, keywords)
                for path in call.changes(after).values():
                    raise ValueError(
                        f"Variable '{path}': the loss of an example changes it, and all examples "
                        "would change the same one. Use running averages in BatchNorm, and for "
                        "dropout a key per example, `model(x, rngs=nnx.Rngs(dropout=key))`."
                    )
                return (loss, aux) if has_aux else loss

            pure = engine(loss_of, has_aux=has_aux, **options)
            values, *found = pure(call.chosen, *batch, **kwargs)

        def wrap(tree: PyTree) -> PyTree:
            wrapped = call.wrap(tree)
            return wrapped[0] if single else wrapped

        return values, wrap, *found

    return run


def _states(
    engine: Callable[..., Any],
    fn: Callable[..., Any],
    argnums: Argnums,
    wrt: Any,
    options: Mapping[str, Any],
) -> tuple[list[nnx.DiffState], bool]:
    """What is differentiated, and whether it is a single argument; checks it and the options."""
    _check_function("fn", fn)
    single = not isinstance(argnums, Sequence)
    entries = [argnums] if single else argnums
    states = [n if isinstance(n, nnx.DiffState) else nnx.DiffState(n, wrt) for n in entries]
    engine(fn, argnums=[state.argnum for state in states], **options)
    return states, single


def _of_one(call: _Call) -> Callable[..., Any]:
    return lambda chosen, *extra: call((chosen,), extra)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["changed"], meta_fields=["kept", "graphdef"]
)
@dataclasses.dataclass(frozen=True)
class _After:
    """A module after the call.

    Attributes:
      changed: The variables that are new or have another value.
      kept: The paths of all others. They are no outputs of the function: as outputs they would be
        uses of the parameters, and no parameter with two uses is factored.
      graphdef: The structure.
    """

    changed: Any
    kept: tuple
    graphdef: Any


class _Part(NamedTuple):
    """A leaf of the arguments: a module or variable that was split, or anything else.

    Attributes:
      owner: The number of the positional argument, None for keyword arguments.
      graphdef: The structure of a module, None for anything else.
      chosen: What is differentiated, None in an argument that is constant.
      rest: The other state, None where there is none.
    """

    owner: int | None
    graphdef: Any
    chosen: Any
    rest: Any

    @property
    def states(self) -> list[Any]:
        if _is_variable(self.rest):
            return [self.rest]
        return [state for state in (self.chosen, self.rest) if state is not None]


class _Call:
    """One call of a function of modules, as a pure function of what is differentiated.

    The arguments are split into what is differentiated and the rest, merged inside the engine and
    split again, and merged outside into the objects that they were: the four steps of
    `nnx.update_context`.

    Attributes:
      chosen: What is differentiated of each argument: arrays without variables around them.
      places: Where arrays of the other positional arguments are among all leaves, and their paths.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        has_aux: bool,
        args: tuple,
        kwargs: Mapping[str, Any],
        states: Sequence[nnx.DiffState],
        contexts: contextlib.ExitStack,
    ) -> None:
        self.fn, self.has_aux, self.args = fn, has_aux, args
        self.numbers = [argument_number(state.argnum, len(args)) for state in states]
        _check_distinct(self.numbers)
        filters = dict(zip(self.numbers, [state.filter for state in states], strict=True))
        self.predicates = {n: nnx.filterlib.to_predicate(wrt) for n, wrt in filters.items()}
        leaves, self.treedef = jax.tree.flatten_with_path((args, dict(kwargs)), is_leaf=_is_node)
        self.seen: dict[int, tuple[str, bool]] = {}
        contexts.enter_context(nnx.update_context(self))
        with nnx.split_context(self) as context:
            self.parts = [self._split(context, path, leaf) for path, leaf in leaves]
        self.places = {
            place: path_name(path[1:])
            for place, (part, (path, leaf)) in enumerate(zip(self.parts, leaves, strict=True))
            if part.graphdef is None and part.owner not in self.numbers and path[0].idx == 0
            if hasattr(leaf, "shape")
        }
        self.treedefs = {n: jax.tree.structure(args[n], is_leaf=_is_node) for n in self.numbers}
        wrapped = tuple(
            self.treedefs[n].unflatten([part.chosen for part in self.parts if part.owner == n])
            for n in self.numbers
        )
        self.structure = jax.tree.structure(wrapped)
        if not self.structure.num_leaves:
            raise ValueError(f"`wrt` selects no variable of the arguments {self.numbers}.")
        self.chosen = jax.tree.map(_raw, wrapped, is_leaf=_is_variable)

    def _split(self, context: Any, path: Sequence[Any], leaf: Any) -> _Part:
        owner = path[1].idx if path[0].idx == 0 else None
        predicate = None if owner is None else self.predicates.get(owner)
        inner: tuple[Any, ...] = tuple(
            getattr(key, "key", getattr(key, "idx", None)) for key in path[2:]
        )
        if not _is_node(leaf):
            return _Part(owner, None, *((None, leaf) if predicate is None else (leaf, None)))
        for below, node in nnx.iter_graph(leaf):
            if _is_variable(node):
                at: Any = below or inner
                where = f"'{'/'.join(map(str, at))}' of argument {path_name(path[1:2])}"
                self._note(node, where, predicate is not None and predicate(at, node))
        if predicate is None:
            graphdef, rest = context.split(leaf)
            return _Part(owner, graphdef, None, rest)
        if not _is_variable(leaf):
            return _Part(owner, *context.split(leaf, predicate, ...))
        graphdef, state = context.split(leaf)
        pair = (state, None) if predicate(inner, leaf) else (nnx.State({}), state)
        return _Part(owner, graphdef, *pair)

    def _note(self, variable: nnx.Variable, where: str, differentiated: bool) -> None:
        other, known = self.seen.setdefault(id(variable), (where, differentiated))
        if known != differentiated:
            pair = (where, other) if differentiated else (other, where)
            raise ValueError(
                f"Variable {pair[0]} is differentiated, but it is also {pair[1]}, where it is "
                "constant. Differentiate both or none."
            )

    def __call__(
        self,
        chosen: Sequence[PyTree],
        extra: Sequence[Any] = (),
        more: Mapping[str, Any] | None = None,
        *,
        batch: Mapping[str, Any] | None = None,
        moving: Sequence[Any] = (),
    ) -> tuple[Any, tuple[Any, Any]]:
        """Returns what the function returns, and the state afterwards with auxiliary output.

        Args:
          chosen: As the attribute.
          extra: More arguments, after the first.
          more: More keyword arguments.
          batch: What is in the place of the attribute `batch`.
          moving: What is in the place of what `moving` returned.
        """
        trees = zip(self.numbers, self.wrap(tuple(chosen)), strict=True)
        found = {n: iter(self.treedefs[n].flatten_up_to(tree)) for n, tree in trees}
        parts = [
            part._replace(chosen=next(found[part.owner])) if part.owner in found else part
            for part in self.parts
        ]
        if batch is not None:
            for place, name in self.places.items():
                parts[place] = parts[place]._replace(rest=batch[name])
        for place, new in enumerate(moving):
            if new is not None:
                rest = _flat(parts[place].rest) | _flat(new)
                parts[place] = parts[place]._replace(rest=_nested(rest))
        with nnx.merge_context(self, inner=True) as context:
            nodes = [
                part.states[0]
                if part.graphdef is None
                else context.merge(part.graphdef, *part.states)
                for part in parts
            ]
        (first, *others), keywords = self.treedef.unflatten(nodes)
        result = self.fn(first, *extra, *others, **keywords, **(more or {}))
        value, aux = check_pair(result) if self.has_aux else (result, None)
        with nnx.split_context(self) as context:
            after = [
                None if part.graphdef is None else _after(context, node, part.states)
                for part, node in zip(parts, nodes, strict=True)
            ]
            aux = jax.tree.map(
                lambda leaf: _after(context, leaf, ()) if _is_node(leaf) else leaf,
                aux,
                is_leaf=_is_node,
            )
        return value, (after, aux)

    @property
    def batch(self) -> dict[str, Any]:
        """The arrays of the positional arguments that are not differentiated, by their paths."""
        return {name: self.parts[place].rest for place, name in self.places.items()}

    def batch_of(self, args: Sequence[Any]) -> dict[str, Any]:
        """What has the places of `batch` in other arguments after the first.

        Raises:
          ValueError: If they are not laid out as those of the call, or hold another module.
        """
        if self.numbers != [0]:
            raise ValueError(
                "`cross_args` has the arguments after the first, which is the one to differentiate:"
                f" `argnums` must be 0, got {self.numbers}."
            )
        leaves, treedef = jax.tree.flatten((None, *args), is_leaf=_is_node)
        own, expected = jax.tree.flatten((None, *self.args[1:]), is_leaf=_is_node)
        if treedef != expected:
            raise ValueError(
                "Both batches of `cross_args` must be laid out as the arguments after the first: "
                f"expected {expected}, found {treedef}."
            )
        for leaf, other in zip(leaves, own, strict=True):
            if (_is_node(leaf) or _is_node(other)) and leaf is not other:
                raise ValueError(
                    "A module in `cross_args` must be the one that the call has there, since it "
                    f"goes from call to call, got another {type(leaf).__name__}."
                )
        start = sum(part.owner == 0 for part in self.parts)
        return {name: leaves[place - start] for place, name in self.places.items()}

    def moving(self, parts: int) -> list[Any]:
        """The variables that a call changes, as they are before it: what goes from call to call.

        Args:
          parts: Into how many parts the batch is cut.

        Raises:
          ValueError: If a call changes what is differentiated, or does not leave what it found.
        """

        def cut(leaf: Any) -> jax.ShapeDtypeStruct:
            size = (leaf.shape[0] // parts,) if leaf.shape and parts > 1 else leaf.shape[:1]
            return jax.ShapeDtypeStruct((*size, *leaf.shape[1:]), leaf.dtype)

        run = lambda batch: self(self.chosen, batch=batch)[1][0]
        self.found = jax.eval_shape(run, jax.tree.map(cut, self.batch))
        found = []
        for part, after in zip(self.parts, self.found, strict=True):
            changed = {} if after is None else _flat(after.changed)
            known = _flat(*part.states) if after is not None else {}
            chosen = _flat(part.chosen) if part.chosen is not None and known else {}
            for path, new in changed.items():
                old, name = known.get(path), "/".join(map(str, path))
                if path in chosen:
                    raise ValueError(
                        f"Variable '{name}' is differentiated, but the function changes it, and it "
                        "is called several times in a step (`microbatches`, `cross_args`): leave "
                        "it out of `wrt`."
                    )
                if old is None or _type(old) != _type(new):
                    before = "nothing" if old is None else _type(old)
                    raise ValueError(
                        f"Variable '{name}': a call leaves {_type(new)} where it found {before}, "
                        "and the next one of the step (`microbatches`, `cross_args`) begins with "
                        "what it leaves. Make the variable before with "
                        "this type, or collect values in the auxiliary output."
                    )
            attributes = getattr(part.graphdef, "attributes", None)
            lost = known.keys() - changed.keys() - set(after.kept if after else ())
            if after is not None and (
                lost or getattr(after.graphdef, "attributes", None) != attributes
            ):
                raise ValueError(
                    "The function changes attributes of a module that are no variables, and it is "
                    "called several times in a step (`microbatches`, `cross_args`) but traced "
                    "once: keep them in an nnx.Variable."
                )
            found.append(
                None if after is None else _nested({path: known[path] for path in changed})
            )
        return found

    def next_of(self, afters: Sequence[_After | None]) -> list[Any]:
        """What `moving` is after a call."""
        return [after and after.changed for after in afters]

    def afters_of(self, moving: Sequence[Any]) -> list[_After | None]:
        """The modules after the last call."""
        return [
            after and dataclasses.replace(after, changed=changed)
            for after, changed in zip(self.found, moving, strict=True)
        ]

    def finish(self, found: tuple[Any, Any]) -> Any:
        """Updates the modules; returns the auxiliary output."""
        after, aux = found
        with nnx.merge_context(self, inner=False) as context:
            for part, node in zip(self.parts, after, strict=True):
                if node is not None:
                    _merge(context, node, part.states)
            return jax.tree.map(
                lambda leaf: _merge(context, leaf, ()) if isinstance(leaf, _After) else leaf,
                aux,
                is_leaf=lambda leaf: isinstance(leaf, _After),
            )

    def changes(self, after: Sequence[_After | None]) -> dict[int, str]:
        """The variables that the function changed or made, by id, with their paths."""
        found = {}
        for part, node in zip(self.parts, after, strict=True):
            if node is not None:
                known = _flat(*part.states)
                for path, variable in _flat(node.changed).items():
                    found[id(known.get(path, variable))] = "/".join(map(str, path))
        return found

    def wrap(self, tree: PyTree) -> PyTree:
        """Puts what is like `chosen` into variables, leaf by leaf."""
        return jax.tree.unflatten(self.structure, jax.tree.leaves(tree))


def _after(context: Any, node: Any, states: Sequence[Any]) -> _After:
    graphdef, state = context.split(node)
    known = {path: _raw(value) for path, value in _flat(*states).items()}
    found = _flat(state)
    changed = {
        path: value
        for path, value in found.items()
        if path not in known or _raw(value) is not known[path]
    }
    kept = tuple(path for path in found if path not in changed)
    return _After(_nested(changed), kept, graphdef)


def _merge(context: Any, node: _After, states: Sequence[Any]) -> Any:
    known = _flat(*states)
    found = _flat(node.changed) | {path: known[path] for path in node.kept}
    return context.merge(node.graphdef, _nested(found))


def _flat(*states: Any) -> dict[tuple, Any]:
    """All leaves of states, by path; a variable that stands alone has an empty one."""
    found: dict[tuple, Any] = {}
    for state in states:
        found |= {(): state} if _is_variable(state) else dict(nnx.to_flat_state(state))
    return found


def _nested(flat: dict[tuple, Any]) -> Any:
    return flat[()] if () in flat else nnx.from_flat_state(flat)


def _check_disjoint(calls: Sequence[_Call]) -> None:
    """Checks that what one function differentiates belongs to no other.

    Raises:
      ValueError: If it does.
    """
    seen: dict[int, tuple[str, bool]] = {}
    for call in calls:
        for key, (where, differentiated) in call.seen.items():
            if key in seen and (differentiated or seen[key][1]):
                raise ValueError(
                    f"Variable {where} of one function is also {seen[key][0]} of another, trunk or "
                    "head, and differentiated. With tied parameters use `value_and_jacobian`."
                )
        seen |= call.seen


def _check_changes(calls: Sequence[_Call], afters: Sequence[tuple[Any, Any]]) -> None:
    """Checks that no two functions change the same variable.

    Raises:
      ValueError: If they do.
    """
    seen: set[int] = set()
    for call, (after, _) in zip(calls, afters, strict=True):
        changes = call.changes(after)
        for key in seen & set(changes):
            raise ValueError(
                f"Variable '{changes[key]}' is changed by two of the functions, trunk and heads, "
                "and their order is not defined. Give each one of its own (for dropout, an "
                "`nnx.Rngs`), or use `value_and_jacobian`."
            )
        seen |= set(changes)


def _check_function(name: str, fn: Any) -> None:
    check_function(name, fn)
    if inspect.ismethod(fn) and isinstance(fn.__self__, nnx.Module):
        raise ValueError(
            f"`{name}` is the method {fn.__qualname__} of a module, whose variables are no "
            f"arguments. Pass {fn.__qualname__.split('.')[0]}.{fn.__name__} and the module as its "
            "first argument."
        )


def _check_distinct(numbers: Sequence[int]) -> None:
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"`argnums` names an argument twice: {list(numbers)}.")


def _type(variable: Any) -> str:
    raw = _raw(variable)
    return type_name(raw) if hasattr(raw, "shape") else type(raw).__name__


def _raw(leaf: Any) -> Any:
    return leaf.get_raw_value() if _is_variable(leaf) else leaf


def _is_variable(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Variable)


def _is_node(leaf: Any) -> bool:
    return isinstance(leaf, (nnx.Pytree, nnx.Variable))
