"""Aggregators: gradient transformations that turn a Jacobian into an update."""

from jaxjd.aggregators._aliases import *  # noqa: F403
from jaxjd.aggregators._aliases import __all__ as _aliases
from jaxjd.aggregators._weighted import weighted as weighted

__all__ = [*_aliases, "weighted"]
