"""One function from losses to a gradient: the Jacobian, the weights and what they combine to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxjd.aggregators import weighted
from jaxjd.aggregators._weighted import weigh
from jaxjd.autodiff import in_microbatches, value_and_gramian, value_and_jacobian
from jaxjd.autodiff._gramian import Groups, pull_weights
from jaxjd.autodiff._jacobian import arguments, check_argnums, joined
from jaxjd.autodiff._loops import looped
from jaxjd.autodiff._together import Losses, together
from jaxjd.base import (
    CrossGramianWeighting,
    Differentiated,
    JacobianWeighting,
    PyTree,
    Weighting,
)
from jaxjd.checks import check_state, check_static_int, type_name
from jaxjd.grouping import grouped
from jaxjd.grouping._grouped import weigh_groups


class AggregatedGrad(NamedTuple):
    """A pair of pure functions that turn losses into one gradient.

    Attributes:
      init: ``init(params) -> state``. `params` are the differentiated arguments: a tuple of them if
        `argnums` is a sequence. They may hold `jax.ShapeDtypeStruct` leaves.
      apply: ``apply(state, *args, **kwargs) -> ((losses, gradient), state)``, with the arguments of
        the function, parameters first; ``((losses, aux), gradient), state`` with `has_aux`.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> losses = lambda w: {
      ...     "first": w @ jnp.array([-4.0, 1.0]),
      ...     "second": w @ jnp.array([6.0, 1.0]),
      ... }
      >>> init, apply = jaxjd.aggregated_value_and_grad(losses, jaxjd.weightings.sum())
      >>> w = jnp.zeros(2)
      >>> (values, gradient), state = apply(init(w), w)
      >>> print(gradient)
      [2. 2.]
    """

    init: Callable[[PyTree], AggregatedGradState]
    apply: Callable[..., tuple[tuple[Any, PyTree], AggregatedGradState]]


class AggregatedGradState(NamedTuple):
    """The state of `aggregated_value_and_grad`.

    Attributes:
      count: How often it was applied, modulo `every`, an int32 scalar; ``()`` if `every` is 1.
      aggregator: The state of the aggregator: `jaxjd.AggregatorState`, or `jaxjd.GroupedState` with
        labels. With `num_tasks` it holds the last weights.
      kept: With `every` and `jaxjd.subset`: the last weights of each of the `m` tasks and whether
        it has any yet, both of shape ``(m,)``; else ``()``.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> init, _ = jaxjd.aggregated_value_and_grad(
      ...     lambda w: w, jaxjd.weightings.upgrad(), num_tasks=2, every=10
      ... )
      >>> print(init(jnp.ones(2)).count, init(jnp.ones(2)).aggregator.weights)
      0 [0. 0.]
    """

    count: jax.Array | tuple[()]
    aggregator: PyTree
    kept: PyTree = ()


def aggregated_value_and_grad(
    fn: Losses,
    weighting: Weighting | optax.GradientTransformation,
    *,
    num_tasks: int | None = None,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    labels: Any = None,
    form: str = "auto",
    chunk_size: int | None = None,
    every: int = 1,
    microbatches: int = 1,
) -> AggregatedGrad:
    r"""As ``jax.value_and_grad``, for many losses: one gradient that resolves their conflicts.

    .. math:: d = \sum_i w_i \nabla f_i, \qquad w = w(J), \quad J = (\nabla f_1, \dots, \nabla f_m)

    The result is an ordinary gradient: it can be clipped, accumulated by ``optax.MultiSteps`` and
    passed to any optimizer or `TrainState`. The losses are given to the weightings that read them.

    Args:
      fn: Returns the losses as for `jaxjd.value_and_jacobian`: a vector, a list, a dict, ... It may
        also be a dict, list or tuple of functions of the same arguments, one per loss; with
        `has_aux` each of them returns ``(loss, aux)``, and what comes out is laid out alike.
      weighting: From `jaxjd.weightings`, or an aggregator, such as what `jaxjd.partition` and
        `jaxjd.subset` return; of `moco` and `db_mtl` the aggregator, which combines their moving
        averages of the rows.
      num_tasks: The number of losses. Needed if the weighting's state depends on it, and by
        `every`; with it the state holds the last weights.
      argnums: Which positional arguments to differentiate, as for `jaxjd.value_and_jacobian`.
      has_aux: Whether the given functions return pairs: their result, and auxiliary output of any
        kind.
      labels: Groups of parameters with weights of their own, as for `jaxjd.grouped`.
      form: How the Jacobian is held. ``"auto"``: leaf by leaf in what is cheaper for its shape.
        ``"dense"``: in arrays of shape ``(m, *param.shape)``, as from ``jax.jacrev``.
        ``"factored"``: in factors wherever there are any. ``"products"``, for Gramians only: not at
        all; losses are pulled back one by one and nothing is batched, for when nothing else fits.
        "Engines" in the guide has more.
      chunk_size: How many losses are pulled back at once, at least 1; all by default, and one with
        ``form="products"``. Less memory for more time. With 1 nothing is batched, so that whatever
        ``jax.grad`` of one loss can do works.
      every: The weights are computed in the first call and in every `every`-th one after it. Those
        between use the last weights, and cost one backward pass (one per group with `labels`), as
        in Xu, Ju, Liu and Yang, "PSMGD: Periodic Stochastic Multi-Gradient Descent for Fast
        Multi-Objective Optimization" (2024, https://arxiv.org/abs/2412.10961), and
        `update_weights_every` of the authors' Nash-MTL. It is cheaper and has a price: the weights
        are of an older point. `aux` may then hold arrays only. With `jaxjd.subset` of a weighting
        each task keeps the weight of the last call with new weights that it was in; a call with
        a task that has none yet computes new ones.
      microbatches: Into how many parts the batch is cut, for the activations of one part in memory
        at a time. The losses and rows are the means over the parts, in float32: those of the whole
        batch for losses that are means over it. The other positional arguments are the batch, cut
        along the first axis of their leaves; scalars and keyword arguments go to every part. It
        takes one dense Jacobian of memory, and the arrays of `aux` get an axis for the parts.

    Returns:
      An `AggregatedGrad`. Weightings of two batches (`modo`, `sdmgrad`) take the extra argument
      ``cross_args=(args1, args2)`` of `apply`: the positional arguments after the differentiated
      ones of two independent batches, as tuples, from which the weights are computed; `argnums`
      must then be 0. With an aggregator, ``tasks=`` is for it and not for `fn`: the indices of the
      tasks of the call, for `jaxjd.subset`.

    Raises:
      ValueError: If an option is out of range, `every` is more than 1 without `num_tasks`, or for
        an aggregator that is not `jaxjd.subset` of a weighting, `labels` are given with an
        aggregator, or ``form="products"`` with what reads more than the Gramian; when applied, as
        for `jaxjd.value_and_jacobian` and the weighting.

    Example:
      >>> import jax, jax.numpy as jnp, optax, jaxjd
      >>> def losses(params, x):
      ...     y = jnp.tanh(x @ params["w"])
      ...     return {"fit": jnp.mean((y - 1.0) ** 2), "size": jnp.mean(y**2)}
      >>> params, x = {"w": jnp.ones((3, 4))}, jnp.ones((5, 3))
      >>> init, apply = jaxjd.aggregated_value_and_grad(losses, jaxjd.weightings.upgrad())
      >>> optimizer = optax.adam(1e-2)
      >>> @jax.jit
      ... def step(params, opt_state, state, x):
      ...     (values, gradient), state = apply(state, params, x)
      ...     updates, opt_state = optimizer.update(gradient, opt_state)
      ...     return optax.apply_updates(params, updates), opt_state, state, values
      >>> params, opt_state, state, values = step(params, optimizer.init(params), init(params), x)
      >>> sorted(values), params["w"].shape
      (['fit', 'size'], (3, 4))
    """
    losses_fn = together(fn, has_aux)
    every = check_static_int("every", every, at_least=1)
    microbatches = check_static_int("microbatches", microbatches, at_least=1)
    aggregator = _aggregator(weighting, labels, num_tasks, every)
    numbers, single = check_argnums(argnums)
    told = Differentiated(numbers, single, has_aux)
    present = getattr(aggregator.update, "present", None) if every > 1 else None
    reads_pair = isinstance(weighting, CrossGramianWeighting)
    if by_products := form == "products":
        _check_gramian_weighting(weighting)
        if microbatches > 1:
            raise ValueError("form='products' takes a batch whole: `microbatches` must be 1.")
        gramian_fn = value_and_gramian(losses_fn, argnums, has_aux, chunk_size, form, labels)
    else:
        jacobian_fn = value_and_jacobian(losses_fn, argnums, has_aux, chunk_size, form)

    def pull(weights: jax.Array) -> Callable[..., tuple[Any, PyTree]]:
        """An engine that returns the losses and their gradient with given weights."""

        def pull_fn(*args: Any, **kwargs: Any) -> tuple[Any, PyTree]:
            losses_of, chosen = arguments(losses_fn, numbers, args, kwargs)
            groups = Groups.of(labels, joined(chosen, single))
            losses, aux, _, pullback = pull_weights(losses_of, chosen, single, has_aux, groups)
            split = weights if labels is None else dict(zip(groups.names, weights, strict=True))
            return ((losses, aux) if has_aux else losses), pullback(split)

        return told.tell(pull_fn)

    def init(params: PyTree) -> AggregatedGradState:
        inner = aggregator.init(params)
        if every == 1:
            return AggregatedGradState((), inner)
        kept = () if present is None else (inner.weights, jnp.zeros(inner.weights.shape, bool))
        return AggregatedGradState(jnp.zeros((), jnp.int32), inner, kept)

    def through(wrap: Callable[[Any], Any], moving: bool = False) -> AggregatedGrad:
        """The same with something around every engine in it.

        With `moving` the keyword argument of this name is a state that goes from one call of the
        function to the next, and `aux` is a pair of the next one and anything else.
        """

        def around(engine: Callable[..., Any]) -> Callable[..., Any]:
            if microbatches > 1:
                engine = in_microbatches(engine, microbatches, moving)
            return wrap(engine)

        def apply(
            state: AggregatedGradState, *args: Any, cross_args: Any = None, **kwargs: Any
        ) -> tuple[tuple[Any, PyTree], AggregatedGradState]:
            check_state("`aggregated_value_and_grad`", state, AggregatedGradState)
            own = {}
            if "tasks" in kwargs and not isinstance(weighting, Weighting):
                own["tasks"] = kwargs.pop("tasks")
            tasks, valid = (None, True) if present is None else present(own.get("tasks"))
            params = joined(arguments(losses_fn, numbers, args, kwargs)[1], single)

            def whole(inner: PyTree) -> tuple[Any, PyTree, PyTree]:
                engine, pair, now = around(jacobian_fn), [], kwargs
                for batch in cross_args or ():
                    values, rows = engine(args[0], *batch, **now)
                    pair.append(rows)
                    if moving:
                        now = {**now, "moving": values[1][0]}
                values, jacobian = engine(*args, **now)
                losses = values[0] if has_aux else values
                extra: dict[str, Any] = {"losses": losses, **own}
                if cross_args is not None:
                    extra["cross_jacobians"] = tuple(pair)
                gradient, inner = aggregator.update(jacobian, inner, params, **extra)
                return values, gradient, inner

            def whole_by_products(inner: PyTree) -> tuple[Any, PyTree, PyTree]:
                values, gramian, pullback = wrap(gramian_fn)(*args, **kwargs)
                losses = values[0] if has_aux else values
                m = jax.tree.leaves(gramian)[0].shape[0]
                rest = (m, inner, {"losses": losses})
                if labels is None:
                    weights, inner, _ = weigh(weighting, num_tasks, lambda: gramian, *rest)
                else:
                    names = sorted(gramian)
                    weights, inner, _ = weigh_groups(
                        weighting, num_tasks, gramian.__getitem__, names, *rest
                    )
                    weights = dict(zip(names, weights, strict=True))
                return values, pullback(weights), inner

            def backward(inner: PyTree) -> tuple[Any, PyTree, PyTree]:
                if present is None:
                    values, gradient = around(pull(inner.weights))(*args, **kwargs)
                    return values, gradient, inner
                weights = state.kept[0][tasks]
                values, gradient = around(pull(weights))(*args, **kwargs)
                gradient = jax.tree.map(lambda leaf: jnp.where(valid, leaf, jnp.nan), gradient)
                logged = jnp.zeros_like(inner.weights).at[tasks].set(weights)
                return values, gradient, inner._replace(weights=logged)

            if reads_pair and (cross_args is None or argnums != 0):
                raise ValueError(
                    "A weighting of two batches needs `cross_args=(args1, args2)` and argnums=0, "
                    f"got cross_args={type_name(cross_args)} and argnums={argnums}."
                )
            step = whole_by_products if by_products else whole
            if every == 1:
                values, gradient, inner = step(state.aggregator)
                return (values, gradient), AggregatedGradState((), inner)
            # A conditional takes one branch: the Jacobian is not computed in between.
            count, kept = jnp.asarray(state.count), state.kept
            is_due = count == 0
            if present is not None:
                is_due |= ~jnp.all(kept[1][tasks])
            values, gradient, inner = lax.cond(
                is_due, looped(step), looped(backward), state.aggregator
            )
            if present is not None:
                new = inner.weights[tasks]
                kept = kept[0].at[tasks].set(new), kept[1].at[tasks].set(True)
            return (values, gradient), AggregatedGradState((count + 1) % every, inner, kept)

        apply.through = through  # type: ignore[attr-defined]
        return AggregatedGrad(init, apply)

    return through(lambda engine: engine)


def _check_gramian_weighting(weighting: Any) -> None:
    reads_rows = isinstance(weighting, (JacobianWeighting, CrossGramianWeighting))
    if reads_rows or not isinstance(weighting, Weighting):
        raise ValueError(
            "form='products' holds no Jacobian: `weighting` must be one of the Gramian, got "
            f"{type_name(weighting)}."
        )


def _aggregator(weighting: Any, labels: Any, num_tasks: int | None, every: int) -> Any:
    if isinstance(weighting, Weighting):
        if every > 1 and num_tasks is None:
            raise ValueError("`every` keeps the weights in the state: pass `num_tasks=`.")
        if labels is None:
            return weighted(weighting, num_tasks=num_tasks)
        return grouped(weighting, labels, num_tasks=num_tasks)
    if not isinstance(weighting, optax.GradientTransformation):
        raise ValueError(
            "`weighting` must be a jaxjd.Weighting or an aggregator, got "
            f"{type_name(weighting)} (a factory has to be called first)."
        )
    aggregator = optax.with_extra_args_support(weighting)
    if labels is not None or (every > 1 and not hasattr(aggregator.update, "present")):
        raise ValueError(
            "`labels` and `every` are for a weighting, and `every` for `jaxjd.subset` of one; "
            "found an aggregator: take the weighting of the same name from jaxjd.weightings, or "
            "give labels to `jaxjd.partition`."
        )
    return aggregator
