"""Engines: functions that return losses together with their Jacobian or Gramian."""

from jaxjd.autodiff._clipped import (
    per_example_value_and_clipped_grad as per_example_value_and_clipped_grad,
)
from jaxjd.autodiff._gramian import value_and_gramian as value_and_gramian
from jaxjd.autodiff._jacobian import stack_tasks as stack_tasks
from jaxjd.autodiff._jacobian import value_and_jacobian as value_and_jacobian
from jaxjd.autodiff._microbatches import in_microbatches as in_microbatches
from jaxjd.autodiff._mtl import mtl_value_and_gramian as mtl_value_and_gramian
from jaxjd.autodiff._mtl import mtl_value_and_jacobian as mtl_value_and_jacobian
from jaxjd.autodiff._owners import total_multiplications as total_multiplications
from jaxjd.autodiff._per_example import (
    per_example_value_and_gramian as per_example_value_and_gramian,
)
from jaxjd.autodiff._per_example import (
    per_example_value_and_jacobian as per_example_value_and_jacobian,
)
from jaxjd.autodiff._per_task import per_task_value_and_gramian as per_task_value_and_gramian
from jaxjd.autodiff._per_task import per_task_value_and_jacobian as per_task_value_and_jacobian
from jaxjd.autodiff._tapped import JacobianPlan as JacobianPlan
from jaxjd.autodiff._tapped import plan_jacobian as plan_jacobian

__all__ = [
    "in_microbatches",
    "JacobianPlan",
    "mtl_value_and_gramian",
    "mtl_value_and_jacobian",
    "per_example_value_and_clipped_grad",
    "per_example_value_and_gramian",
    "per_example_value_and_jacobian",
    "per_task_value_and_gramian",
    "per_task_value_and_jacobian",
    "plan_jacobian",
    "stack_tasks",
    "total_multiplications",
    "value_and_gramian",
    "value_and_jacobian",
]
