"""Linear algebra on the task axis, and exact solvers of the small problems behind the methods."""

from jaxjd.linalg.algebra import combine as combine
from jaxjd.linalg.algebra import cross_gramian as cross_gramian
from jaxjd.linalg.algebra import gramian as gramian
from jaxjd.linalg.algebra import materialize as materialize
from jaxjd.linalg.dual_cone import DualConeProjector as DualConeProjector
from jaxjd.linalg.dual_cone import exact_projector as exact_projector
from jaxjd.linalg.dual_cone import project_onto_dual_cone as project_onto_dual_cone
from jaxjd.linalg.dual_cone import regularized_projector as regularized_projector
from jaxjd.linalg.min_norm import min_norm_weights as min_norm_weights
from jaxjd.linalg.simplex import project_onto_simplex as project_onto_simplex

__all__ = [
    "DualConeProjector",
    "combine",
    "cross_gramian",
    "exact_projector",
    "gramian",
    "materialize",
    "min_norm_weights",
    "project_onto_dual_cone",
    "project_onto_simplex",
    "regularized_projector",
]
