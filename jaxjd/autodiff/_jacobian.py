"""Losses and their Jacobian in one forward pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxjd.autodiff._forms import check_form
from jaxjd.autodiff._tapped import differentiate
from jaxjd.autodiff._tasks import check_chunk_size, check_differentiable
from jaxjd.base import Differentiated, Jacobian, PyTree
from jaxjd.checks import argument_number, check_function, path_name, type_name


def value_and_jacobian(
    fn: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    chunk_size: int | None = None,
    form: str = "dense",
) -> Callable[..., tuple[Any, Jacobian]]:
    """Returns a function that computes the losses and their Jacobian.

    The forward pass runs once; then every task is pulled back through it.

    Args:
      fn: A function that returns the losses: a vector, an array of any shape, or a pytree of such
        (a list, tuple or dict of scalars, say). With `has_aux` it returns ``(losses, aux)``.
      argnums: Which positional arguments to differentiate; a sequence gives a tuple of Jacobians.
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
      A function of the arguments of `fn` that returns ``(losses, jacobian)``, or
      ``((losses, aux), jacobian)`` with `has_aux`. The losses have the structure that `fn` gave
      them. Each leaf of the Jacobian has shape ``(m, *param.shape)`` and the dtype of its
      parameter; the `m` losses are counted in the order of their pytree, row-major within a leaf.

    Raises:
      ValueError: If an option is out of range; when called, if a differentiated leaf or a loss is
        not floating point (its path is named), or if there are no losses.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> def losses(params, x):
      ...     return {"fit": (params["w"] @ x - 1.0) ** 2, "size": params["w"] @ params["w"]}
      >>> params, x = {"w": jnp.array([1.0, 2.0])}, jnp.array([1.0, 1.0])
      >>> values, jacobian = jaxjd.value_and_jacobian(losses)(params, x)
      >>> print(values["fit"], values["size"])
      4.0 5.0
      >>> print(jacobian["w"])
      [[4. 4.]
       [2. 4.]]
    """
    check_function("fn", fn)
    check_form(form)
    chunk_size = check_chunk_size(chunk_size)
    numbers, single = check_argnums(argnums)

    def value_and_jacobian_fn(*args: Any, **kwargs: Any) -> tuple[Any, Jacobian]:
        losses_of, chosen = arguments(fn, numbers, args, kwargs)
        losses, aux, jacobians, _ = differentiate(losses_of, chosen, has_aux, chunk_size, form)
        return ((losses, aux) if has_aux else losses), joined(jacobians, single)

    return Differentiated(numbers, single, has_aux).tell(value_and_jacobian_fn)


def stack_tasks(jacobian: PyTree, losses: PyTree) -> Jacobian:
    """Gives what ``jax.jacrev`` returns for a pytree of losses one leading task axis.

    For a vector of losses ``jax.jacrev`` returns a Jacobian as jaxjd reads it. For a list or
    dict of losses it returns a list or dict of pytrees like the parameters; for losses of shape
    ``(a, b)`` its leaves have two task axes. This puts the tasks in the order of
    `value_and_jacobian`.

    Args:
      jacobian: What ``jax.jacrev(fn)(params)`` or ``jax.jacfwd(fn)(params)`` returned.
      losses: What ``fn(params)`` returned, or the same structure with `jax.ShapeDtypeStruct`.

    Returns:
      A pytree like the parameters whose leaves have shape ``(m, *param.shape)``.

    Raises:
      ValueError: If the structure of `jacobian` does not start with that of `losses`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxjd
      >>> fn = lambda w: [w @ w, w.sum()]
      >>> w = jnp.array([1.0, 2.0])
      >>> print(jaxjd.stack_tasks(jax.jacrev(fn)(w), fn(w)))
      [[2. 4.]
       [1. 1.]]
    """
    shapes, treedef = jax.tree.flatten(jax.tree.map(jnp.shape, losses), is_leaf=_is_shape)
    try:
        parts = treedef.flatten_up_to(jacobian)
    except (ValueError, TypeError) as error:
        raise ValueError(
            "The Jacobian must start with the structure of the losses: expected "
            f"{treedef}, found {jax.tree.structure(jacobian)}."
        ) from error

    def stack(path: Any, *leaves: jax.Array) -> jax.Array:
        rows = []
        for shape, leaf in zip(shapes, leaves, strict=True):
            if not hasattr(leaf, "shape") or leaf.shape[: len(shape)] != shape:
                raise ValueError(
                    f"Jacobian leaf '{path_name(path)}': expected a shape that starts with the "
                    f"losses' {shape}, found {getattr(leaf, 'shape', type_name(leaf))}."
                )
            rows.append(leaf.reshape(math.prod(shape), *leaf.shape[len(shape) :]))
        return jnp.concatenate(rows)

    return jax.tree.map_with_path(stack, *parts)


def check_argnums(argnums: int | Sequence[int]) -> tuple[tuple[int, ...], bool]:
    """Returns the numbers of the arguments, and whether it is a single one.

    Raises:
      ValueError: If there is none.
    """
    if not isinstance(argnums, Sequence):
        return (argnums,), True
    if not argnums:
        raise ValueError("`argnums` must name at least one argument, got none.")
    return tuple(argnums), False


def arguments(
    fn: Callable[..., Any], numbers: Sequence[int], args: tuple, kwargs: Mapping[str, Any]
) -> tuple[Callable[..., Any], list[Any]]:
    """Returns `fn` as a function of the chosen arguments only, and these, checked."""
    positions = [argument_number(number, len(args)) for number in numbers]

    def losses_of(*chosen: Any) -> Any:
        full = list(args)
        for position, arg in zip(positions, chosen, strict=True):
            full[position] = arg
        return fn(*full, **kwargs)

    chosen = [args[position] for position in positions]
    for arg in chosen:
        check_differentiable(arg)
    return losses_of, chosen


def joined(trees: Sequence[PyTree], single: bool) -> PyTree:
    """One tree, or a tuple of them if `argnums` is a sequence."""
    return trees[0] if single else tuple(trees)


def _is_shape(x: Any) -> bool:
    return isinstance(x, tuple) and all(isinstance(size, int) for size in x)
