"""What the links check alike."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxjd.base import PyTree
from jaxjd.checks import leaf_names, path_name, type_name


def check_transform(name: str, tx: Any) -> optax.GradientTransformation:
    """Checks that an argument is a transformation of optax, not a factory of one.

    Raises:
      ValueError: If it is anything else.
    """
    if not isinstance(tx, optax.GradientTransformation):
        raise ValueError(
            f"`{name}` must be an optax transformation (a factory has to be called first), found "
            f"{type_name(tx)}."
        )
    return tx


def check_updates(updates: PyTree, params: PyTree, cure: str) -> None:
    """Checks that updates have the structure and the shapes of the parameters.

    Raises:
      ValueError: If they have not; the message names the leaf's path and ends with `cure`.
    """
    leaves, wanted = jax.tree.leaves_with_path(updates), jax.tree.leaves(params)
    names, param_names = leaf_names(updates), leaf_names(params)
    for (path, leaf), name, param_name, param in zip(
        leaves, names, param_names, wanted, strict=False
    ):
        if name != param_name:
            raise ValueError(
                f"Update leaf '{'/'.join(name)}': expected the structure of the parameters, which "
                f"have the leaf '{'/'.join(param_name)}' in its place."
            )
        shape, expected = getattr(leaf, "shape", None), jnp.shape(param)
        if shape is None:
            raise ValueError(
                f"Update leaf '{path_name(path)}': expected an array, found {type_name(leaf)}."
            )
        if shape != expected:
            axis = " with a task axis in front" if shape[1:] == expected else ""
            raise ValueError(
                f"Update leaf '{path_name(path)}': expected the shape {expected} of its parameter, "
                f"found {shape}{axis}. {cure}"
            )
    if len(leaves) != len(wanted):
        raise ValueError(
            f"The updates have {len(leaves)} leaves, but the parameters have {len(wanted)}."
        )
