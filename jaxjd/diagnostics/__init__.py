"""Diagnostics: what the engines do, how the tasks conflict, and what a step does to them."""

from jaxjd.diagnostics._change import predicted_change as predicted_change
from jaxjd.diagnostics._change import predicted_change_by as predicted_change_by
from jaxjd.diagnostics._conflict import conflict_count as conflict_count
from jaxjd.diagnostics._conflict import conflict_rate as conflict_rate
from jaxjd.diagnostics._conflict import cosine_matrix as cosine_matrix
from jaxjd.diagnostics._explain import LeafReport as LeafReport
from jaxjd.diagnostics._explain import ProgramCost as ProgramCost
from jaxjd.diagnostics._explain import Share as Share
from jaxjd.diagnostics._explain import StepReport as StepReport
from jaxjd.diagnostics._explain import explain_jacobian as explain_jacobian
from jaxjd.diagnostics._explain import explain_step as explain_step
from jaxjd.diagnostics._hypervolume import hypervolume as hypervolume
from jaxjd.diagnostics._monitored import MonitoredState as MonitoredState
from jaxjd.diagnostics._monitored import monitored as monitored
from jaxjd.diagnostics._plots import plot_conflict as plot_conflict
from jaxjd.diagnostics._plots import plot_diagnostics as plot_diagnostics
from jaxjd.diagnostics._plots import plot_front as plot_front
from jaxjd.diagnostics._plots import plot_weights as plot_weights
from jaxjd.diagnostics._rank import effective_rank as effective_rank
from jaxjd.diagnostics._residual import solver_residual as solver_residual
from jaxjd.diagnostics._state import skipped_steps as skipped_steps
from jaxjd.diagnostics._state import summary as summary
from jaxjd.diagnostics._state import weights as weights
from jaxjd.diagnostics._stationarity import stationarity_gap as stationarity_gap

__all__ = [
    "LeafReport",
    "MonitoredState",
    "ProgramCost",
    "Share",
    "StepReport",
    "conflict_count",
    "conflict_rate",
    "cosine_matrix",
    "effective_rank",
    "explain_jacobian",
    "explain_step",
    "hypervolume",
    "monitored",
    "plot_conflict",
    "plot_diagnostics",
    "plot_front",
    "plot_weights",
    "predicted_change",
    "predicted_change_by",
    "skipped_steps",
    "solver_residual",
    "stationarity_gap",
    "summary",
    "weights",
]
