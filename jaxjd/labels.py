r"""Label trees: which parameters are aggregated together.

A label tree is a pytree of strings with the structure of the parameters, or a prefix of it. The
functions of this module take parameters and return one; pass the functions themselves to
`jaxjd.partition` and `jaxjd.grouped`. `together`, `by_network`, `by_layer` and `by_tensor` are the
four strategies of Gradient Vaccine (Wang et al., ICLR 2021): ``whole_model``, ``enc_dec``,
``all_layer`` and ``all_matrix``.

Labels come from the leaves' key paths: dictionary keys, attribute names and indices, joined by
``/``. A name that holds a ``/`` itself is quoted, so that different paths never share a label. The
``value`` that wraps a parameter in flax's nnx is left out, and so is a ``params`` collection that
holds everything. Inside of `jaxjd.partition`, `by_network`, `by_layer` and `by_tensor` label the
subtree of their group as if it stood alone; `by_rules` reads whole paths everywhere.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from jaxjd.base import PyTree
from jaxjd.checks import leaf_names, type_name

__all__ = ["by_layer", "by_network", "by_rules", "by_tensor", "together"]

_ROOT = "root"


def together(params: PyTree) -> PyTree:
    """Labels all parameters alike, ``"all"``.

    Args:
      params: Any pytree.

    Returns:
      A pytree of strings with the structure of `params`.

    Example:
      >>> import jaxjd
      >>> jaxjd.labels.together({"encoder": {"w": 0.0}, "decoder": {"w": 0.0}})
      {'decoder': {'w': 'all'}, 'encoder': {'w': 'all'}}
    """
    return jax.tree.map(lambda _: "all", params)


def by_network(params: PyTree) -> PyTree:
    """Labels every parameter by the top-level network that it is in, the first name of its path.

    Of haiku's module names, which hold a whole path, it is the part before the first ``/``. A
    warning says so where that is one network with several parts.

    Args:
      params: Any pytree.

    Returns:
      A pytree of strings with the structure of `params`.

    Example:
      >>> import jaxjd
      >>> jaxjd.labels.by_network({"encoder": {"w": 0.0}, "decoder": {"w": 0.0}})
      {'decoder': {'w': 'decoder'}, 'encoder': {'w': 'encoder'}}
    """
    labels = _label_own(params, lambda names: names[0].split("/")[0] if names else _ROOT)
    _warn_of_one_group(params, labels)
    return labels


def by_layer(params: PyTree) -> PyTree:
    """Labels every parameter by the layer that holds it, its path without the last name.

    Args:
      params: Any pytree.

    Returns:
      A pytree of strings with the structure of `params`.

    Example:
      >>> import jaxjd
      >>> jaxjd.labels.by_layer({"encoder": [{"w": 0.0, "b": 0.0}, {"w": 0.0}]})
      {'encoder': [{'b': 'encoder/0', 'w': 'encoder/0'}, {'w': 'encoder/1'}]}
    """
    return _label_own(params, lambda names: _join(names[:-1]))


def by_tensor(params: PyTree) -> PyTree:
    """Labels every parameter by its whole path: each tensor is a group of its own.

    Args:
      params: Any pytree.

    Returns:
      A pytree of strings with the structure of `params`.

    Example:
      >>> import jaxjd
      >>> jaxjd.labels.by_tensor({"encoder": {"w": 0.0, "b": 0.0}})
      {'encoder': {'b': 'encoder/b', 'w': 'encoder/w'}}
    """
    return _label_own(params, _join)


def by_rules(
    rules: Sequence[tuple[str, str]], default: str | None = None
) -> Callable[[PyTree], PyTree]:
    """Makes a function that labels every parameter by the first rule that its path matches.

    Args:
      rules: Pairs of a regular expression, searched for in the path (``"encoder/0/w"``), and a
        label.
      default: The label of what no rule matches.

    Returns:
      A function of the parameters that returns a label tree. It raises a `ValueError` that names
      the path if no rule matches one and there is no default, or names a rule that no path
      matches.

    Raises:
      ValueError: If the rules are not pairs of strings.

    Example:
      >>> import jaxjd
      >>> rules = jaxjd.labels.by_rules([("^head", "heads"), ("", "trunk")])
      >>> rules({"body": {"w": 0.0}, "head_1": {"w": 0.0}})
      {'body': {'w': 'trunk'}, 'head_1': {'w': 'heads'}}
    """
    if not isinstance(rules, Sequence):
        raise ValueError(
            f"`rules` must be a sequence of pairs (regular expression, label), got {rules!r}."
        )
    if default is not None and not isinstance(default, str):
        raise ValueError(f"`default` must be a label, a string, got {default!r}.")
    compiled = []
    for rule in rules:
        if not (
            isinstance(rule, tuple) and len(rule) == 2 and all(isinstance(s, str) for s in rule)
        ):
            raise ValueError(f"`rules` must hold pairs (regular expression, label), got {rule!r}.")
        try:
            compiled.append((re.compile(rule[0]), rule[1]))
        except re.error as error:
            raise ValueError(f"`rules` has the invalid expression {rule[0]!r}: {error}.") from error

    def label_by_rules(params: PyTree) -> PyTree:
        used: set[int] = set()

        def label(names: tuple[str, ...]) -> str:
            path = "/".join(names)
            for number, (expression, name) in enumerate(compiled):
                if expression.search(path):
                    used.add(number)
                    return name
            if default is None:
                raise ValueError(
                    f"Parameter leaf '{path}': no rule matches it and there is no default; the "
                    f"rules are {[rule[0] for rule in rules]}."
                )
            return default

        labels = _label(params, label)
        matched_first = {number for number, _ in enumerate(compiled)} - used
        if jax.tree.leaves(params):
            for number in sorted(matched_first):
                raise ValueError(
                    f"The rule {rules[number][0]!r} labels no leaf: nothing matches it, or "
                    "earlier rules take all that does."
                )
        return labels

    return label_by_rules


def resolve(labels: Any, params: PyTree) -> list[str]:
    """Returns the label of every leaf of `params`, in tree order.

    Args:
      labels: A label tree, a prefix of one, or a function of `params` that returns either. A tree
        is matched by its key paths, so that a plain dict labels a FrozenDict or an nnx.State too.
      params: A pytree like the parameters; only its structure and shapes are used.

    Raises:
      ValueError: If a leaf has no label, or a label is not a string or belongs to no leaf.
    """
    # A module with a `__call__` is a label tree; only a callable leaf is a function.
    if callable(labels) and jax.tree_util.all_leaves([labels]):
        labels = labels(params)
    wanted: dict[tuple[str, ...], str] = {}
    for names, label in zip(leaf_names(labels), jax.tree.leaves(labels), strict=True):
        if not isinstance(label, str):
            name = "/".join(names) or _ROOT
            raise ValueError(f"Label '{name}': expected a string, found {type_name(label)}.")
        wanted[names] = label
    leaves = leaf_names(params)
    result, used = [], set()
    for names in leaves:
        for length in range(len(names), -1, -1):
            if names[:length] in wanted:
                used.add(names[:length])
                result.append(wanted[names[:length]])
                break
        else:
            raise ValueError(
                f"Parameter leaf '{'/'.join(names)}' has no label; the label tree has "
                f"{sorted('/'.join(names) for names in wanted)}."
            )
    if leaves:
        for names in wanted.keys() - used:
            raise ValueError(f"The label of '{'/'.join(names)}' belongs to no parameter leaf.")
    return result


def _join(names: tuple[str, ...]) -> str:
    return "/".join(f"'{name}'" if "/" in name else name for name in names) or _ROOT


def _is_collection(paths: list[tuple[str, ...]]) -> bool:
    return bool(paths) and all(len(p) > 1 and p[0] == "params" for p in paths)


def _label(params: PyTree, label: Callable[[tuple[str, ...]], str]) -> PyTree:
    paths = leaf_names(params)
    collection = _is_collection(paths)
    labels = [label(names[1:] if collection else names) for names in paths]
    return jax.tree.unflatten(jax.tree.structure(params), labels)


def _label_own(params: PyTree, label: Callable[[tuple[str, ...]], str]) -> PyTree:
    """Labels what `jaxjd.partition` has left of the parameters as if it stood alone."""
    depth = _depth(params)
    return _label(params, lambda names: label(names[depth:] or names[-1:]))


def _depth(params: PyTree) -> int:
    """How many names lead to the subtree that is left where other groups' leaves are holes."""

    def is_hole(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    paths = leaf_names(params)
    filled = jax.tree.map(lambda node: 0 if is_hole(node) else node, params, is_leaf=is_hole)
    holes = set(leaf_names(filled)) - set(paths)
    if not paths or not holes:
        return 0
    common = [len(set(names)) == 1 for names in zip(*paths, strict=False)]
    prefix = paths[0][: ([*common, False]).index(False)]
    # Where a hole branches off above the end of the prefix, the next name is the subtree's.
    branches = [
        next((n for n, name in enumerate(prefix) if hole[n : n + 1] != (name,)), None)
        for hole in holes
    ]
    depth = max((branch + 1 for branch in branches if branch is not None), default=0)
    # A collection that holds everything is taken off for all labels.
    return depth - 1 if depth and _is_collection(paths) else depth


def _warn_of_one_group(params: PyTree, labels: PyTree) -> None:
    """Says that networks were asked for and one was found, with several parts in it."""
    paths = leaf_names(params)
    depth = _depth(params) + _is_collection(paths)
    paths = [names[depth:] for names in paths]
    parts = {names[:2] for names in paths if len(names) > 2}
    found = set(jax.tree.leaves(labels))
    if len(found) == 1 and len(parts) > 1:
        warnings.warn(
            f"by_network puts all parameters into one group, {found.pop()!r}: they are in one "
            f"network, with the parts {sorted('/'.join(part) for part in parts)}. Use "
            "jaxjd.labels.by_layer or by_rules for these, or jaxjd.labels.together if one group "
            "is meant.",
            stacklevel=3,
        )
