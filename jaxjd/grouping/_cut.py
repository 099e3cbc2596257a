"""Cutting what is laid out as the parameters to one group of them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import jax

from jaxjd.base import PyTree
from jaxjd.checks import leaf_names
from jaxjd.linalg.algebra import without

# Extra arguments that are pairs of Jacobians. Others are never cut, whatever their structure is:
# losses, say, may well be named as the parameters are.
PAIRS = ("cross_jacobians",)


def cut(tree: PyTree, found: list[str], label: str) -> PyTree:
    """Replaces the leaves of other groups by nodes without leaves."""
    return without(tree, [name != label for name in found])


def cut_extra_args(
    extra_args: dict[str, Any],
    like: PyTree,
    found: list[str],
    label: str,
    names: Collection[str] = (),
) -> dict[str, Any]:
    """Cuts the extra arguments that are laid out as the parameters, which their names tell.

    Args:
      extra_args: All extra arguments of `update`.
      like: The Jacobian.
      found: The label of every leaf.
      label: The group.
      names: Names of further arguments, of one tree each, besides the pairs of Jacobians.

    Raises:
      ValueError: If one of them has not the leaves of `like`.
    """

    def checked(name: str, tree: PyTree) -> PyTree:
        if leaf_names(tree) != leaf_names(like):
            raise ValueError(
                f"`{name}` must have the structure of the Jacobian, {jax.tree.structure(like)}, "
                f"found {jax.tree.structure(tree)}."
            )
        return cut(tree, found, label)

    result = dict(extra_args)
    for name in names:
        if extra_args.get(name) is not None:
            result[name] = checked(name, extra_args[name])
    for name in PAIRS:
        # What is no pair is for the method that reads it to refuse.
        if isinstance(extra_args.get(name), (tuple, list)):
            result[name] = tuple(checked(name, tree) for tree in extra_args[name])
    return result
