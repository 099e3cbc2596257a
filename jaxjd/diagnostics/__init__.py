"""Diagnostics: what the engines do, and why."""

from jaxjd.diagnostics._explain import LeafReport as LeafReport
from jaxjd.diagnostics._explain import explain_jacobian as explain_jacobian

__all__ = ["LeafReport", "explain_jacobian"]
