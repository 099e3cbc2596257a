"""Which form every leaf of a Jacobian takes, and what it costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxjd.autodiff import plan_jacobian
from jaxjd.base import PyTree
from jaxjd.checks import path_name
from jaxjd.linalg.costs import Sizes, dense_cost


class LeafReport(NamedTuple):
    """How one leaf of the Jacobian is computed.

    Attributes:
      path: The leaf's key path.
      shape: The parameter's shape.
      form: ``"factored"`` or ``"dense"``.
      layer: What uses the parameter: ``"matrix"``, ``"convolution"`` or ``"embedding"``, or
        ``"other"`` where the pass found no layer.
      reason: Why it has this form.
      dense_flops: Floating point operations of the dense leaf's rows (where they are one product
        after the backward pass), its part of the Gramian, and a combination of the rows.
      dense_bytes: The memory of the dense leaf.
      factored_flops: The same for the factored leaf, or None.
      factored_bytes: The memory of its two factors, or None.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> losses = lambda w, x: ((x @ w) ** 2).mean(axis=0).cumsum()
      >>> (leaf,) = jaxjd.diagnostics.explain_jacobian(
      ...     losses, jnp.ones((512, 256)), jnp.ones((8, 512)), quiet=True
      ... )
      >>> leaf.form, leaf.layer, leaf.factored_bytes < leaf.dense_bytes
      ('factored', 'matrix', True)
    """

    path: str
    shape: tuple[int, ...]
    form: str
    layer: str
    reason: str
    dense_flops: int
    dense_bytes: int
    factored_flops: int | None
    factored_bytes: int | None


def explain_jacobian(
    fn: Callable[..., Any],
    params: PyTree,
    *args: Any,
    has_aux: bool = False,
    form: str = "auto",
    per_example: bool = False,
    quiet: bool = False,
) -> list[LeafReport]:
    """Tells, leaf by leaf, which form the Jacobian takes, why, and what it costs.

    A leaf is factored where its Gramian and a combination of its rows are cheaper from the layer's
    inputs and cotangents than from the dense leaf. The costs are counted from static shapes:
    operations, and ten times the bytes that are written and read. Nothing is computed.

    Args:
      fn: The function that `jaxjd.value_and_jacobian` gets; with `per_example`, the one that
        `jaxjd.per_example_value_and_jacobian` gets.
      params: Its first argument; it and the others may hold `jax.ShapeDtypeStruct` leaves.
      *args: Its other arguments.
      has_aux: Whether it returns auxiliary output.
      form: The form asked for.
      per_example: Whether `fn` is the loss of one example, and `args` are batches.
      quiet: Whether to print nothing.

    Returns:
      A `LeafReport` per leaf, in tree order, which is also printed as a table.

    Raises:
      ValueError: As the engines do.

    Example:
      >>> import jax.numpy as jnp, jaxjd
      >>> def losses(params, x):
      ...     y = ((x @ params["kernel"] + params["bias"][None]) ** 2).mean(axis=0)
      ...     return y.cumsum()[:4]
      >>> params = {"kernel": jnp.ones((512, 256)), "bias": jnp.ones(256)}
      >>> leaves = jaxjd.diagnostics.explain_jacobian(losses, params, jnp.ones((8, 512)))
      leaf    shape    form      layer   why          dense: flops  bytes  factored: flops  bytes
      bias    256      dense     other   used by add  10.2K         4.1K   -                -
      kernel  512x256  factored  matrix  cheaper      13.6M         2.1M   2.38M            49.2K
      total                                           13.6M         2.1M
      chosen                                          2.39M         53.2K
    """
    choices, sites, m = plan_jacobian(fn, params, args, has_aux, form, per_example)
    reports = []
    for number, (path, leaf) in enumerate(jax.tree.leaves_with_path(params)):
        choice = choices[number]
        entries = m * leaf.size
        width = max(4, leaf.dtype.itemsize)
        sizes = sites[number].sizes(m, per_example) if number in sites else None
        # Without a layer the rows come from the backward pass.
        dense = choice.dense or dense_cost(Sizes(m, 1, 0, 1, leaf.size, width))
        reports.append(
            LeafReport(
                path=path_name(path),
                shape=tuple(leaf.shape),
                form=choice.form,
                layer="other" if sizes is None else sites[number].kind,
                reason=choice.reason,
                dense_flops=dense.flops,
                dense_bytes=entries * leaf.dtype.itemsize,
                factored_flops=None if choice.factored is None else choice.factored.flops,
                factored_bytes=None if sizes is None else sizes.factor_entries * width,
            )
        )
    if not quiet:
        print(_table(reports))  # noqa: T201
    return reports


def _table(reports: list[LeafReport]) -> str:
    header = ("leaf", "shape", "form", "layer", "why")
    rows = [[*header, "dense: flops", "bytes", "factored: flops", "bytes"]]
    for report in reports:
        shape = "x".join(map(str, report.shape)) or "scalar"
        costs = (report.dense_flops, report.dense_bytes)
        factored = (report.factored_flops, report.factored_bytes)
        rows.append(
            [
                *(report.path, shape, report.form, report.layer, report.reason),
                *(_short(number) for number in (*costs, *factored)),
            ]
        )
    chosen = [
        (r.factored_flops or 0, r.factored_bytes or 0)
        if r.form == "factored"
        else (r.dense_flops, r.dense_bytes)
        for r in reports
    ]
    dense = (sum(r.dense_flops for r in reports), sum(r.dense_bytes for r in reports))
    kept = (sum(flops for flops, _ in chosen), sum(size for _, size in chosen))
    for name, (flops, size) in (("total", dense), ("chosen", kept)):
        rows.append([name, "", "", "", "", _short(flops), _short(size), "", ""])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _short(number: int | None) -> str:
    if number is None:
        return "-"
    size = float(number)
    for suffix in ("", "K", "M", "G", "T"):
        if size < 1000 or suffix == "T":
            return f"{size:.3g}{suffix}"
        size /= 1000
    raise AssertionError
