"""Jacobian descent for JAX: one set of parameters, many losses, conflicts resolved on purpose."""

from importlib.metadata import PackageNotFoundError as _PackageNotFoundError
from importlib.metadata import version as _version

from jaxjd import diagnostics as diagnostics
from jaxjd import labels as labels
from jaxjd import linalg as linalg
from jaxjd import scalarizers as scalarizers
from jaxjd import sharding as sharding
from jaxjd import weightings as weightings
from jaxjd.aggregated import AggregatedGrad as AggregatedGrad
from jaxjd.aggregated import AggregatedGradState as AggregatedGradState
from jaxjd.aggregated import aggregated_value_and_grad as aggregated_value_and_grad
from jaxjd.aggregators import GradDropState as GradDropState
from jaxjd.aggregators import MomentumConflictFreeState as MomentumConflictFreeState
from jaxjd.aggregators import aligned_mtl as aligned_mtl
from jaxjd.aggregators import cagrad as cagrad
from jaxjd.aggregators import conflict_free as conflict_free
from jaxjd.aggregators import constant as constant
from jaxjd.aggregators import db_mtl as db_mtl
from jaxjd.aggregators import dualproj as dualproj
from jaxjd.aggregators import excess_mtl as excess_mtl
from jaxjd.aggregators import fairgrad as fairgrad
from jaxjd.aggregators import graddrop as graddrop
from jaxjd.aggregators import gradnorm as gradnorm
from jaxjd.aggregators import gradvac as gradvac
from jaxjd.aggregators import imtl_g as imtl_g
from jaxjd.aggregators import krum as krum
from jaxjd.aggregators import mean as mean
from jaxjd.aggregators import mgda as mgda
from jaxjd.aggregators import moco as moco
from jaxjd.aggregators import modo as modo
from jaxjd.aggregators import momentum_conflict_free as momentum_conflict_free
from jaxjd.aggregators import nash_mtl as nash_mtl
from jaxjd.aggregators import pcd as pcd
from jaxjd.aggregators import pcgrad as pcgrad
from jaxjd.aggregators import random as random
from jaxjd.aggregators import sdmgrad as sdmgrad
from jaxjd.aggregators import stch as stch
from jaxjd.aggregators import sum as sum  # noqa: A004
from jaxjd.aggregators import trimmed_mean as trimmed_mean
from jaxjd.aggregators import upgrad as upgrad
from jaxjd.aggregators import weighted as weighted
from jaxjd.autodiff import mtl_value_and_gramian as mtl_value_and_gramian
from jaxjd.autodiff import mtl_value_and_jacobian as mtl_value_and_jacobian
from jaxjd.autodiff import (
    per_example_value_and_clipped_grad as per_example_value_and_clipped_grad,
)
from jaxjd.autodiff import per_example_value_and_gramian as per_example_value_and_gramian
from jaxjd.autodiff import per_example_value_and_jacobian as per_example_value_and_jacobian
from jaxjd.autodiff import per_task_value_and_gramian as per_task_value_and_gramian
from jaxjd.autodiff import per_task_value_and_jacobian as per_task_value_and_jacobian
from jaxjd.autodiff import stack_tasks as stack_tasks
from jaxjd.autodiff import value_and_gramian as value_and_gramian
from jaxjd.autodiff import value_and_jacobian as value_and_jacobian
from jaxjd.base import Aggregator as Aggregator
from jaxjd.base import AggregatorState as AggregatorState
from jaxjd.base import Certified as Certified
from jaxjd.base import CrossGramianWeighting as CrossGramianWeighting
from jaxjd.base import JacobianWeighting as JacobianWeighting
from jaxjd.base import Scalarizer as Scalarizer
from jaxjd.base import Weighting as Weighting
from jaxjd.grouping import GroupedState as GroupedState
from jaxjd.grouping import PartitionState as PartitionState
from jaxjd.grouping import grouped as grouped
from jaxjd.grouping import partition as partition
from jaxjd.linalg import combine as combine
from jaxjd.linalg import cross_gramian as cross_gramian
from jaxjd.linalg import gramian as gramian
from jaxjd.linalg import materialize as materialize
from jaxjd.transforms import EnsureAggregatedState as EnsureAggregatedState
from jaxjd.transforms import MultiStepsState as MultiStepsState
from jaxjd.transforms import PerTaskState as PerTaskState
from jaxjd.transforms import SkipIfNotFiniteState as SkipIfNotFiniteState
from jaxjd.transforms import drop_extra_args as drop_extra_args
from jaxjd.transforms import ensure_aggregated as ensure_aggregated
from jaxjd.transforms import freeze as freeze
from jaxjd.transforms import multi_steps as multi_steps
from jaxjd.transforms import per_task as per_task
from jaxjd.transforms import skip_if_not_finite as skip_if_not_finite
from jaxjd.transforms import subset as subset

try:
    __version__ = _version("jaxjd")
except _PackageNotFoundError:  # Run from a checkout that is not installed.
    __version__ = "0.0.0"

__all__ = [
    "AggregatedGrad",
    "AggregatedGradState",
    "Aggregator",
    "AggregatorState",
    "Certified",
    "CrossGramianWeighting",
    "EnsureAggregatedState",
    "GradDropState",
    "GroupedState",
    "JacobianWeighting",
    "MomentumConflictFreeState",
    "MultiStepsState",
    "PartitionState",
    "PerTaskState",
    "Scalarizer",
    "SkipIfNotFiniteState",
    "Weighting",
    "aggregated_value_and_grad",
    "aligned_mtl",
    "cagrad",
    "combine",
    "conflict_free",
    "constant",
    "cross_gramian",
    "db_mtl",
    "diagnostics",
    "dualproj",
    "drop_extra_args",
    "ensure_aggregated",
    "excess_mtl",
    "freeze",
    "graddrop",
    "gradnorm",
    "gradvac",
    "gramian",
    "grouped",
    "imtl_g",
    "krum",
    "labels",
    "linalg",
    "materialize",
    "mean",
    "mgda",
    "moco",
    "modo",
    "momentum_conflict_free",
    "mtl_value_and_gramian",
    "mtl_value_and_jacobian",
    "multi_steps",
    "partition",
    "fairgrad",
    "nash_mtl",
    "pcd",
    "pcgrad",
    "per_example_value_and_clipped_grad",
    "per_example_value_and_gramian",
    "per_example_value_and_jacobian",
    "per_task",
    "per_task_value_and_gramian",
    "per_task_value_and_jacobian",
    "random",
    "scalarizers",
    "sdmgrad",
    "sharding",
    "skip_if_not_finite",
    "stack_tasks",
    "stch",
    "subset",
    "sum",
    "trimmed_mean",
    "upgrad",
    "value_and_gramian",
    "value_and_jacobian",
    "weighted",
    "weightings",
]
