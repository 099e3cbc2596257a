"""Engines: functions that return losses together with their Jacobian."""

from jaxjd.autodiff._jacobian import stack_tasks as stack_tasks
from jaxjd.autodiff._jacobian import value_and_jacobian as value_and_jacobian
from jaxjd.autodiff._mtl import mtl_value_and_jacobian as mtl_value_and_jacobian

__all__ = ["mtl_value_and_jacobian", "stack_tasks", "value_and_jacobian"]
