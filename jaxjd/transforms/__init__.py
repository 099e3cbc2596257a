"""Chain links: what stands around an aggregator in a chain of optax transformations."""

from jaxjd.transforms._drop_extra_args import drop_extra_args as drop_extra_args
from jaxjd.transforms._ensure_aggregated import EnsureAggregatedState as EnsureAggregatedState
from jaxjd.transforms._ensure_aggregated import ensure_aggregated as ensure_aggregated
from jaxjd.transforms._freeze import freeze as freeze
from jaxjd.transforms._multi_steps import MultiStepsState as MultiStepsState
from jaxjd.transforms._multi_steps import multi_steps as multi_steps
from jaxjd.transforms._per_task import PerTaskState as PerTaskState
from jaxjd.transforms._per_task import per_task as per_task
from jaxjd.transforms._skip_if_not_finite import SkipIfNotFiniteState as SkipIfNotFiniteState
from jaxjd.transforms._skip_if_not_finite import skip_if_not_finite as skip_if_not_finite
from jaxjd.transforms._subset import subset as subset

__all__ = [
    "EnsureAggregatedState",
    "MultiStepsState",
    "PerTaskState",
    "SkipIfNotFiniteState",
    "drop_extra_args",
    "ensure_aggregated",
    "freeze",
    "multi_steps",
    "per_task",
    "skip_if_not_finite",
    "subset",
]
