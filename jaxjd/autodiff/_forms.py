"""Which leaves of a Jacobian are kept factored, decided from static shapes."""

from __future__ import annotations

from typing import NamedTuple

from jaxjd.autodiff._taps import Site, Taps
from jaxjd.linalg.costs import Cost, dense_cost, factored_cost, prefers_factors

FORMS = ("auto", "dense", "factored", "products")


class Choice(NamedTuple):
    """How one leaf of a Jacobian is computed.

    Attributes:
      form: ``"factored"`` or ``"dense"``.
      tapped: Whether the leaf is made from a layer's inputs and cotangents.
      reason: Why, in a few words.
      dense: The cost of the dense leaf, or None where it is not known.
      factored: The cost of the factored leaf, or None where there is none.
    """

    form: str
    tapped: bool
    reason: str
    dense: Cost | None = None
    factored: Cost | None = None


def choose(taps: Taps, num_params: int, m: int, form: str, per_task: bool = False) -> list[Choice]:
    """Chooses the form of every leaf."""
    return [
        _choose(taps.sites[number], m, form, per_task)
        if number in taps.sites
        else Choice("dense", False, taps.reasons[number])
        for number in range(num_params)
    ]


def _choose(site: Site, m: int, form: str, per_task: bool) -> Choice:
    if site.is_explicitly_sharded:
        # Its products would need shardings of their own.
        return Choice("dense", False, "sharded on an explicit mesh")
    sizes = site.sizes(m, per_task)
    dense, factored = dense_cost(sizes), factored_cost(sizes)
    if form == "dense":
        return Choice("dense", False, "asked for", dense, factored)
    keep = form == "factored" or prefers_factors(sizes)
    reason = "asked for" if form == "factored" else "cheaper"
    # XLA differentiates a convolution per task as a grouped one, which is slow on CPUs; and what
    # has inputs of its own per task is one batched product.
    tapped = keep or site.kind == "convolution" or per_task
    return Choice("factored" if keep else "dense", tapped, reason, dense, factored)


def check_form(form: str, *, products: bool = False) -> str:
    """Checks the name of a form.

    Args:
      form: The name.
      products: Whether the function can do without a Jacobian.

    Raises:
      ValueError: If there is no such form, or it is ``"products"`` where a Jacobian is needed.
    """
    if form not in FORMS:
        raise ValueError(f"`form` must be one of {FORMS}, got {form!r}.")
    if form == "products" and not products:
        raise ValueError(
            f"`form` must be one of {FORMS[:-1]} here, got 'products', which holds no Jacobian: "
            "it is for the engines that return a Gramian, such as `jaxjd.value_and_gramian`."
        )
    return form
