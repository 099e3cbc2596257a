"""One function of what may be a collection of functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jaxjd.checks import check_function

Losses = Callable[..., Any] | Mapping[str, Callable[..., Any]] | Sequence[Callable[..., Any]]


def together(fn: Losses, has_aux: bool) -> Callable[..., Any]:
    """One function that returns what a dict, list or tuple of functions do, laid out alike.

    Args:
      fn: The functions, of the same arguments; or one, which is returned as it is.
      has_aux: Whether they return pairs.

    Raises:
      ValueError: If something in it is no function.
    """
    if callable(fn):
        return fn
    if not isinstance(fn, (Mapping, list, tuple)) or not fn:
        check_function("fn", fn)
    fns, treedef = jax.tree.flatten(fn, is_leaf=callable)
    for number, one in enumerate(fns):
        check_function(f"fn[{number}]", one)

    def run(*args: Any, **kwargs: Any) -> Any:
        found = [one(*args, **kwargs) for one in fns]
        if not has_aux:
            return treedef.unflatten(found)
        losses, aux = zip(*found, strict=True)
        return treedef.unflatten(losses), treedef.unflatten(aux)

    return run
