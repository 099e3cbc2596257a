"""One loss per example (instance-wise risk minimization): all gradients in one backward pass."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxjd.autodiff._forms import check_form
from jaxjd.autodiff._gramian import Groups, Pullback
from jaxjd.autodiff._jacobian import check_argnums, joined
from jaxjd.autodiff._loops import looped
from jaxjd.autodiff._tapped import Split, split, trace
from jaxjd.autodiff._tasks import (
    batch_size,
    check_chunk_size,
    check_differentiable,
    equal_chunks,
    example_of,
    join_chunks,
    map_in_chunks,
    vary_like,
    with_losses,
)
from jaxjd.base import Jacobian, PyTree
from jaxjd.checks import argument_number, check_function, type_name
from jaxjd.linalg.algebra import cross_gramian, gramian, wide_combination


def per_example_value_and_jacobian(
    fn: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    chunk_size: int | None = None,
    form: str = "dense",
) -> Callable[..., tuple[Any, Jacobian]]:
    """Returns a function that computes one loss per example and the Jacobian of all of them.

    Each example's loss touches its own activations only, so one backward pass gives the cotangents
    of all examples, and each layer's part of the Jacobian is one batched product of them with the
    layer's inputs: no pass per example, and nothing of size batch times batch.

    Args:
      fn: ``fn(params, *example) -> loss``, a scalar, for one example without a batch axis. (A layer
        that normalizes over the batch has no such function.)
      argnums: Which positional arguments to differentiate, as for `jaxjd.value_and_jacobian`.
        Everything else, keyword arguments included, is the batch: bind what is the same for all
        examples with ``functools.partial``.
      has_aux: Whether the given functions return pairs: their result, and auxiliary output of any
        kind.
      chunk_size: How many losses are pulled back at once, at least 1; all by default, and one with
        ``form="products"``. Less memory for more time. With 1 nothing is batched, so that whatever
        ``jax.grad`` of one loss can do works.
      form: How the Jacobian is held. ``"auto"``: leaf by leaf in what is cheaper for its shape.
        ``"dense"``: in arrays of shape ``(m, *param.shape)``, as from ``jax.jacrev``.
        ``"factored"``: in factors wherever there are any. ``"products"``, for Gramians only: not at
        all; losses are pulled back one by one and nothing is batched, for when nothing else fits.
        "Engines" in the guide has more.

    Returns:
      A function of the arguments of `fn`, ``(params, *batch)`` as a rule, where every leaf of what
      is not differentiated has a leading axis of size `B`. It returns ``(losses, jacobian)`` with
      losses of shape ``(B,)`` and one row per example, ``m = B``, or ``((losses, aux), jacobian)``,
      where the arrays of `aux` have a leading axis of size `B`; what is no array, a string, say, is
      the same for all examples and is returned as it is.

    Raises:
      ValueError: If an option is out of range; when called, if a parameter is not floating point,
        the leaves of the batch disagree about `B`, or the loss is not a floating point scalar.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> loss = lambda w, x, y: (x @ w - y) ** 2
      >>> x, y = jnp.array([[1.0, 0.0], [1.0, 2.0]]), jnp.array([1.0, 1.0])
      >>> losses, jacobian = jaxjd.per_example_value_and_jacobian(loss)(jnp.ones(2), x, y)
      >>> print(losses)
      [0. 4.]
      >>> print(jacobian)
      [[0. 0.]
       [4. 8.]]
    """
    check_function("fn", fn)
    check_form(form)
    numbers, single = check_argnums(argnums)
    chunk_size = check_chunk_size(chunk_size)

    def per_example_fn(*args: Any, **kwargs: Any) -> tuple[Any, Jacobian]:
        loss_of, params, batch = _by_example(fn, numbers, single, args, kwargs)
        engine = _Engine(loss_of, params, batch, has_aux, form)
        losses, aux, jacobian = engine.run(batch, chunk_size)
        losses, aux = engine.traced.join([losses, *aux])
        return ((losses, aux) if has_aux else losses), jacobian

    return per_example_fn


def per_example_value_and_gramian(
    fn: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    chunk_size: int | None = None,
    form: str = "auto",
    labels: Any = None,
) -> Callable[..., tuple[Any, Any, Pullback]]:
    """Returns a function that computes one loss per example, their Gramian, and a pullback.

    It is `jaxjd.value_and_gramian` for losses of which each touches the activations of its own
    example only, at about the cost of a gradient step: one backward pass for all examples. With `k`
    chunks there are ``k (k + 1) / 2`` backward passes over a chunk, since every pair of examples
    has an inner product, and another gradient step in the pullback.

    Args:
      fn: As for `jaxjd.per_example_value_and_jacobian`.
      argnums: As for `jaxjd.per_example_value_and_jacobian`.
      has_aux: Whether the given functions return pairs: their result, and auxiliary output of any
        kind.
      chunk_size: How many losses are pulled back at once, at least 1; all by default, and one with
        ``form="products"``. Less memory for more time. With 1 nothing is batched, so that whatever
        ``jax.grad`` of one loss can do works.
      form: How the Jacobian is held. ``"auto"``: leaf by leaf in what is cheaper for its shape.
        ``"dense"``: in arrays of shape ``(m, *param.shape)``, as from ``jax.jacrev``.
        ``"factored"``: in factors wherever there are any. ``"products"``, for Gramians only: not at
        all; losses are pulled back one by one and nothing is batched, for when nothing else fits.
        "Engines" in the guide has more.
      labels: Groups of parameters, as for `jaxjd.value_and_gramian`.

    Returns:
      A function of the arguments of `fn`, as for `jaxjd.per_example_value_and_jacobian`, that
      returns ``(losses, gramian, pullback)``, or ``((losses, aux), gramian, pullback)``: losses of
      shape ``(B,)``, a Gramian of shape ``(B, B)``, ``m = B``, or a dict of them, and
      ``pullback(weights)``, a pytree like what is differentiated.

    Raises:
      ValueError: As for `jaxjd.per_example_value_and_jacobian` and `jaxjd.value_and_gramian`.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> loss = lambda w, x, y: (x @ w - y) ** 2
      >>> x, y = jnp.array([[1.0, 0.0], [1.0, 2.0]]), jnp.array([2.0, 1.0])
      >>> step_fn = jaxjd.per_example_value_and_gramian(loss)
      >>> losses, gramian, pullback = step_fn(jnp.ones(2), x, y)
      >>> print(gramian)
      [[ 4. -8.]
       [-8. 80.]]
      >>> print(pullback(jnp.array([1.0, 1.0])))
      [2. 8.]
    """
    check_function("fn", fn)
    check_form(form, products=True)
    numbers, single = check_argnums(argnums)
    chunk_size = check_chunk_size(chunk_size)
    if form == "products":  # The products of one pair of examples at a time.
        form, chunk_size = "auto", chunk_size or 1

    def per_example_fn(*args: Any, **kwargs: Any) -> tuple[Any, Any, Pullback]:
        loss_of, params, batch = _by_example(fn, numbers, single, args, kwargs)
        engine = _Engine(loss_of, params, batch, has_aux, form)
        groups = Groups.of(labels, params)
        if chunk_size is None or chunk_size >= engine.size:
            losses, aux, jacobian = engine.run(batch, chunk_size)
            gramians, pullback = groups.apply(gramian, jacobian), groups.pullback(jacobian)
        else:
            losses, aux, gramians, pullback = engine.run_in_chunks(batch, chunk_size, groups)
        losses, aux = engine.traced.join([losses, *aux])
        return ((losses, aux) if has_aux else losses), gramians, pullback

    return per_example_fn


def _by_example(
    fn: Callable[..., Any],
    numbers: Sequence[int],
    single: bool,
    args: tuple,
    kwargs: Mapping[str, Any],
) -> tuple[Callable[..., Any], PyTree, tuple]:
    """Returns `fn` as a function of the chosen arguments and an example, these, and the batch."""
    positions = [argument_number(number, len(args)) for number in numbers]
    others = [position for position in range(len(args)) if position not in positions]

    def loss_of(chosen: PyTree, *example: Any) -> Any:
        *rest, keywords = example
        full = dict(zip(others, rest, strict=True))
        full |= zip(positions, (chosen,) if single else chosen, strict=True)
        return fn(*(full[position] for position in range(len(args))), **keywords)

    chosen = joined([args[position] for position in positions], single)
    return loss_of, chosen, (*(args[position] for position in others), dict(kwargs))


class _Engine:
    """A traced per-example loss, and how its parameters are differentiated."""

    def __init__(
        self, fn: Callable[..., Any], params: PyTree, batch: tuple, has_aux: bool, form: str
    ) -> None:
        check_differentiable(params)
        self.size = batch_size(batch)
        example = example_of(batch)

        losses_fn = with_losses(lambda params, example: fn(params, *example), has_aux)

        def loss_of(params: PyTree, example: tuple) -> Any:
            found = losses_fn(params, example)
            loss = found[0] if has_aux else found
            if getattr(loss, "shape", None) != ():
                raise ValueError(
                    f"The loss of an example must be a scalar, found {type_name(loss)}."
                    + ("" if has_aux else " With auxiliary output, pass has_aux=True.")
                )
            return found

        leaves, self.treedef = jax.tree.flatten(params)
        self.leaves = [jnp.asarray(leaf) for leaf in leaves]
        way_out = "since one trace of it stands for all examples"
        self.traced = trace(loss_of, (params, example), has_aux, _is_array, way_out)
        self.parts = self._split(form)

    def _split(self, form: str) -> Split:
        return split(self.traced, len(self.leaves), self.size, form, per_task=True)

    def factored(self) -> _Engine:
        """The same with all factors that there are, for a combination of rows used once."""
        other = copy.copy(self)
        other.parts = self._split("factored")
        return other

    def run(self, batch: tuple, chunk_size: int | None) -> tuple[Any, Any, Jacobian]:
        """The losses, the flat auxiliary output and the Jacobian."""

        def one(example: list[jax.Array]) -> tuple:
            (loss,), pull_back, aux, inputs = self.parts.vjp(self.leaves, example)
            return loss, aux, inputs, *pull_back([vary_like(jnp.ones_like(loss), loss)])

        found = map_in_chunks(one, jax.tree.leaves(batch), chunk_size)
        losses, aux, inputs, dense, cotangents = found
        jacobian = self.parts.jacobian(dense, inputs, cotangents, per_task=True)
        return losses, aux, jax.tree.unflatten(self.treedef, jacobian)

    def run_in_chunks(self, batch: tuple, chunk_size: int, groups: Groups) -> tuple:
        """The losses, the flat auxiliary output, the Gramian and the pullback."""
        at_once = 1 if chunk_size == 1 else None
        size, count = self.size, -(-self.size // chunk_size)
        short = count * chunk_size - size

        chunks = equal_chunks(batch, count, chunk_size)
        numbers = jnp.arange(count)

        def block_row(pair: tuple[jax.Array, tuple]) -> tuple:
            row, chunk = pair
            losses, aux, jacobian = self.run(chunk, at_once)
            own = groups.apply(gramian, jacobian)

            def block(pair: tuple[jax.Array, tuple]) -> Any:
                column, chunk = pair
                return lax.cond(
                    column > row,
                    lambda: groups.apply(cross_gramian, jacobian, self.run(chunk, at_once)[2]),
                    # Half of each block of the diagonal: the other is added below.
                    lambda: jax.tree.map(
                        lambda matrix: jnp.where(column == row, matrix / 2, 0), own
                    ),
                )

            return losses, aux, lax.map(block, (numbers, chunks))

        losses, aux, blocks = lax.map(looped(block_row), (numbers, chunks))

        def assemble(blocks: jax.Array) -> jax.Array:
            total = count * chunk_size
            upper = blocks.transpose(0, 2, 1, 3).reshape(total, total)[:size, :size]
            return upper + upper.T

        def pull_back(weights: jax.Array) -> PyTree:
            def add(total: PyTree, part: tuple) -> tuple[PyTree, None]:
                weights, chunk = part
                rows = self.factored().run(chunk, at_once)[2]
                return jax.tree.map(jnp.add, total, wide_combination(weights, rows)), None

            padded = jnp.concatenate([weights, jnp.zeros((short,), weights.dtype)])
            parts = (padded.reshape(count, chunk_size), chunks)
            dtype = jnp.result_type(jnp.float32, weights.dtype)
            zeros = [
                jnp.zeros_like(leaf, dtype=jnp.promote_types(leaf.dtype, dtype))
                for leaf in self.leaves
            ]
            total, _ = lax.scan(looped(add), jax.tree.unflatten(self.treedef, zeros), parts)
            return jax.tree.map(
                lambda total, leaf: total.astype(leaf.dtype),
                total,
                jax.tree.unflatten(self.treedef, self.leaves),
            )

        def pullback(weights: Any) -> PyTree:
            return groups.spread(weights, size, pull_back)

        losses, aux = join_chunks((losses, aux), size)
        return losses, aux, jax.tree.map(assemble, blocks), pullback


def _is_array(leaf: Any) -> bool:
    try:
        jax.typeof(leaf)
    except TypeError:
        return False
    return True
