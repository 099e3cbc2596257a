"""A batch in parts: the activations of one part are in memory at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxjd.autodiff._loops import looped
from jaxjd.autodiff._tasks import vary_like
from jaxjd.base import Differentiated, PyTree
from jaxjd.checks import argument_number, path_name, type_name
from jaxjd.linalg.sharded import local_rows


def in_microbatches(
    engine: Callable[..., Any], count: int, moving: bool = False
) -> Callable[..., Any]:
    r"""Makes an engine for `count` parts of a batch, whose losses and rows it averages.

    .. math:: \ell = \frac1k \sum_b \ell^b, \qquad J = \frac1k \sum_b J^b

    The sums are those of float32 or better, and there is one Jacobian, dense, whatever `count` is.

    Args:
      engine: A function that tells what it differentiates (`Differentiated`) and returns the losses
        or a pair with auxiliary output, and rows or a gradient.
      count: The number of parts.
      moving: Whether the keyword argument ``moving`` is a state that goes from part to part. The
        auxiliary output is then a pair of the next such state and anything else.

    Returns:
      The same kind of function. Leaves of the other positional arguments are cut along their first
      axis, every `count`-th entry into one part, so that devices that share a batch share each part
      as well; scalars and keyword arguments go to every part whole. The arrays of the auxiliary
      output have a leading axis of size `count`.

    Raises:
      ValueError: When called, if a leaf's first axis has no multiple of `count` entries.
    """
    told: Differentiated = engine.differentiated  # type: ignore[attr-defined]

    @functools.wraps(engine)
    def run(*args: Any, **kwargs: Any) -> tuple[Any, PyTree]:
        numbers = [argument_number(number, len(args)) for number in told.argnums]
        leaves, treedef = jax.tree.flatten_with_path(
            {n: arg for n, arg in enumerate(args) if n not in numbers}
        )
        parts = {
            place: _cut(path, leaf, count)
            for place, (path, leaf) in enumerate(leaves)
            if getattr(leaf, "shape", ())
        }
        if not parts:
            raise ValueError("`microbatches` needs arguments with a batch axis, found none.")

        def one(part: dict[int, jax.Array], state: dict[str, Any]) -> tuple:
            given = [part.get(place, leaf) for place, (_, leaf) in enumerate(leaves)]
            full = dict(enumerate(args)) | treedef.unflatten(given)
            values, rows = engine(*(full[n] for n in range(len(args))), **{**kwargs, **state})
            aux: Any = ()
            losses, aux = values if told.has_aux else (values, aux)
            if moving:
                state, aux = {"moving": aux[0]}, aux[1]
            return (losses, jax.tree.map(local_rows, rows)), state, aux

        state = {"moving": kwargs["moving"]} if moving else {}
        of_first = lambda parts: one(jax.tree.map(lambda part: part[0], parts), state)[0]
        found = jax.eval_shape(of_first, parts)
        zeros = jax.tree.map(
            lambda like: vary_like(lax.full_like(like, 0, _wide(like.dtype)), like), found
        )

        def add(carry: tuple, part: dict[int, jax.Array]) -> tuple[tuple, Any]:
            new, state, aux = one(part, carry[1])
            total = jax.tree.map(lambda old, x: old + x.astype(old.dtype), carry[0], new)
            return (total, state), aux

        (total, state), aux = lax.scan(looped(add), (zeros, state), parts)
        if moving:
            aux = state["moving"], aux
        losses, rows = jax.tree.map(
            lambda old, like: (old / count).astype(like.dtype), total, found
        )
        return ((losses, aux) if told.has_aux else losses), rows

    return run


def _wide(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)


def _cut(path: Any, leaf: Any, count: int) -> jax.Array:
    size = leaf.shape[0]
    if size == 0 or size % count:
        raise ValueError(
            f"Batch leaf '{path_name(path)}': expected a first axis that `microbatches`={count} "
            f"divides, found {type_name(leaf)}."
        )
    return jnp.swapaxes(leaf.reshape(size // count, count, *leaf.shape[1:]), 0, 1)
