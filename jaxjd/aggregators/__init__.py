"""Aggregators: gradient transformations that turn a Jacobian into an update."""

from jaxjd.aggregators._aliases import *  # noqa: F403
from jaxjd.aggregators._aliases import __all__ as _aliases
from jaxjd.aggregators._graddrop import GradDropState as GradDropState
from jaxjd.aggregators._graddrop import graddrop as graddrop
from jaxjd.aggregators._momentum_conflict_free import (
    MomentumConflictFreeState as MomentumConflictFreeState,
)
from jaxjd.aggregators._momentum_conflict_free import (
    momentum_conflict_free as momentum_conflict_free,
)
from jaxjd.aggregators._tracked import db_mtl as db_mtl
from jaxjd.aggregators._tracked import moco as moco
from jaxjd.aggregators._trimmed_mean import trimmed_mean as trimmed_mean
from jaxjd.aggregators._weighted import weighted as weighted

__all__ = [
    *_aliases,
    "GradDropState",
    "MomentumConflictFreeState",
    "db_mtl",
    "graddrop",
    "moco",
    "momentum_conflict_free",
    "trimmed_mean",
    "weighted",
]
