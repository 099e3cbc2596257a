"""Linear algebra on the task axis, and exact solvers of the small problems behind the methods."""

from jaxjd.linalg.algebra import combine as combine
from jaxjd.linalg.algebra import cross_gramian as cross_gramian
from jaxjd.linalg.algebra import gramian as gramian
from jaxjd.linalg.algebra import materialize as materialize
from jaxjd.solvers.dual_cone import DualConeProjector as DualConeProjector
from jaxjd.solvers.dual_cone import exact_projector as exact_projector
from jaxjd.solvers.dual_cone import project_onto_dual_cone as project_onto_dual_cone
from jaxjd.solvers.dual_cone import regularized_projector as regularized_projector
from jaxjd.solvers.min_norm import min_norm_weights as min_norm_weights
from jaxjd.solvers.residuals import dual_cone_residual as dual_cone_residual
from jaxjd.solvers.residuals import min_norm_residual as min_norm_residual
from jaxjd.solvers.residuals import simplex_residual as simplex_residual
from jaxjd.solvers.simplex import project_onto_simplex as project_onto_simplex
from jaxjd.solvers.solution import Solution as Solution
from jaxjd.solvers.solution import solve_dual_cone as solve_dual_cone
from jaxjd.solvers.solution import solve_min_norm as solve_min_norm
from jaxjd.solvers.solution import solve_simplex as solve_simplex

__all__ = [
    "DualConeProjector",
    "Solution",
    "combine",
    "cross_gramian",
    "dual_cone_residual",
    "exact_projector",
    "gramian",
    "materialize",
    "min_norm_residual",
    "min_norm_weights",
    "project_onto_dual_cone",
    "project_onto_simplex",
    "regularized_projector",
    "simplex_residual",
    "solve_dual_cone",
    "solve_min_norm",
    "solve_simplex",
]
