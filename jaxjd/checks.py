"""Trace-time checks shared by every layer: each failure is a ``ValueError``.

The messages follow one pattern: what was looked at (a leaf's path or a parameter's name), what was
expected, and what was found.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


def path_name(path: Sequence[Any]) -> str:
    """Returns the readable name of a key path, for example ``'encoder/kernel'``."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/") or "<root>"


def leaf_names(tree: Any) -> list[tuple[str, ...]]:
    """Returns the names along every leaf's key path, without those of flax's wrappers.

    An optimizer of nnx is initialized with variables and updated with their values: both must have
    the same names.
    """
    wrappers = {
        path
        for path, node in jax.tree.leaves_with_path(tree, is_leaf=_is_wrapper)
        if _is_wrapper(node)
    }
    names = []
    for path, _ in jax.tree.leaves_with_path(tree):
        kept = [key for place, key in enumerate(path) if path[:place] not in wrappers]
        names.append(tuple(_key_name(key) for key in kept))
    return names


def is_mutable_state(node: Any) -> bool:
    """Whether a node is a variable of flax nnx that is no parameter: a statistic, say, or a key."""
    bases = _flax_bases(node)
    return "Variable" in bases and "Param" not in bases


def _is_wrapper(node: Any) -> bool:
    return not _flax_bases(node).isdisjoint(("Variable", "AxisMetadata"))


def _flax_bases(node: Any) -> set[str]:
    # By name: flax is not imported here.
    return {base.__name__ for base in type(node).__mro__ if base.__module__.startswith("flax.")}


def _key_name(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def type_name(value: Any) -> str:
    """Returns ``float32[2,3]`` for arrays and the type's name for anything else."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    return type(value).__name__


def check_range(
    name: str,
    value: Any,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> None:
    """Checks a scalar hyper-parameter that is known now; traced values pass unchecked.

    Args:
      name: The parameter's name, for the message.
      value: A Python or NumPy number, an array, or a tracer.
      at_least: Inclusive lower bound.
      above: Exclusive lower bound.
      at_most: Inclusive upper bound.
      below: Exclusive upper bound.

    Raises:
      ValueError: If `value` is not a scalar, or is a known number outside the bounds.
    """
    if not isinstance(value, numbers.Real):
        if isinstance(value, (str, bytes)) or value is None or not hasattr(value, "shape"):
            raise ValueError(f"`{name}` must be a number, got {value!r}.")
        if value.shape != ():
            raise ValueError(f"`{name}` must be a scalar, got {type_name(value)}.")
        return  # An array may be traced (vmap, inject_hyperparams): its value cannot be read.
    bounds = (
        (at_least, ">=", lambda bound: value >= bound),
        (above, ">", lambda bound: value > bound),
        (at_most, "<=", lambda bound: value <= bound),
        (below, "<", lambda bound: value < bound),
    )
    wanted = " and ".join(f"{sign} {bound:g}" for bound, sign, _ in bounds if bound is not None)
    if not all(holds(bound) for bound, _, holds in bounds if bound is not None):
        raise ValueError(f"`{name}` must be {wanted}, got {value!r}.")


def check_function(name: str, value: Any) -> None:
    """Checks that an argument is a function.

    Raises:
      ValueError: If it cannot be called.
    """
    if not callable(value):
        raise ValueError(f"`{name}` must be a function, got {type_name(value)}.")


def check_state(name: str, state: Any, kind: Any) -> None:
    """Checks that a state has the fields of the NamedTuple that the method's `init` returns.

    Raises:
      ValueError: If it has not, as the state of another method has not.
    """
    if not all(hasattr(state, field) for field in kind._fields):
        raise ValueError(
            f"The state of {name} must be what its `init` returns, {kind.__name__}, got "
            f"{type_name(state)}."
        )


def is_real(dtype: Any) -> bool:
    """Whether numbers of this dtype are real; Booleans are no numbers."""
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)


def check_static_int(name: str, value: Any, *, at_least: int) -> int:
    """Checks an integer that shapes or trip counts depend on.

    Raises:
      ValueError: If `value` is traced, not an integer, or too small.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        hint = ""
        if hasattr(value, "aval"):
            hint = f" (under optax.inject_hyperparams, name {name!r} in static_args)"
        raise ValueError(f"`{name}` must be a static int, got {type_name(value)}{hint}.")
    if value < at_least:
        raise ValueError(f"`{name}` must be >= {at_least}, got {value}.")
    return int(value)


def as_vector(name: str, value: Any) -> jax.Array:
    """Returns a hyper-parameter with one real number per task as a one-dimensional array.

    Args:
      name: The parameter's name, for the message.
      value: A vector, or a pytree of numbers and arrays laid out as the losses, which is read in
        the order of the tree.

    Raises:
      ValueError: If it is anything else.
    """
    leaves = jax.tree.leaves(value, is_leaf=lambda node: node is None)
    try:
        arrays = [jnp.asarray(leaf) for leaf in leaves]
        if not jax.tree_util.all_leaves([value]) and arrays:
            arrays = [jnp.concatenate([jnp.ravel(array) for array in arrays])]
        array = arrays[0] if arrays else jnp.zeros(0)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{name}` must be a vector of numbers, got {value!r}.") from error
    if array.ndim == 1 and array.size and not is_real(array.dtype):
        raise ValueError(f"`{name}` must hold real numbers, got {type_name(array)}.")
    if array.ndim != 1:
        raise ValueError(
            f"`{name}` must be a vector with one entry per task, got shape {array.shape}."
        )
    return array


def check_entries(name: str, value: Any, *, at_least: float, at_most: float) -> None:
    """Checks the range of the numbers in a sequence or another structure, where they are known.

    Raises:
      ValueError: If one is outside the bounds.
    """
    if jax.tree_util.all_leaves([value]):
        return
    for place, entry in enumerate(jax.tree.leaves(value)):
        if not getattr(entry, "shape", ()):
            check_range(f"{name}[{place}]", entry, at_least=at_least, at_most=at_most)


def argument_number(number: Any, num_args: int) -> int:
    """Returns the number of a positional argument, counted from the first.

    Raises:
      ValueError: If there is none.
    """
    if isinstance(number, bool) or not isinstance(number, int):
        raise ValueError(f"`argnums` must hold ints, got {number!r}.")
    if not -num_args <= number < num_args:
        raise ValueError(f"`argnums` has {number}, but there are {num_args} positional arguments.")
    return number % num_args


def check_square(name: str, value: Any) -> int:
    """Checks that an argument is a non-empty floating point square matrix; returns its size.

    Raises:
      ValueError: If it is anything else.
    """
    shape = getattr(value, "shape", None)
    if shape is None or len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0:
        raise ValueError(f"`{name}` must be a matrix of shape (m, m), got {type_name(value)}.")
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(f"`{name}` must be floating point, got {type_name(value)}.")
    return shape[0]


def check_weights(name: str, weights: Any, num_tasks: int | None) -> jax.Array:
    """Checks that weights are a vector with one entry per task, where that number is known.

    Raises:
      ValueError: If they are not.
    """
    if getattr(weights, "ndim", None) != 1:
        raise ValueError(f"`{name}` must have shape (m,), got {type_name(weights)}.")
    if not is_real(weights.dtype):
        raise ValueError(f"`{name}` must be real numbers, got {type_name(weights)}.")
    if num_tasks is not None:
        check_length(name, weights.shape[0], num_tasks)
    return weights


def check_length(name: str, found: int, num_tasks: int) -> None:
    """Checks that a per-task hyper-parameter or state has one entry per task.

    Raises:
      ValueError: If it has not.
    """
    if found != num_tasks:
        raise ValueError(f"`{name}` has {found} entries, but there are {num_tasks} tasks.")
